"""The commands on models and checkpoints: `mxcompile convert | generate | inspect | lm-eval | explain | diagnose`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mxcompile.api import load
from mxcompile.checkpoint import Checkpoint, check_destination, is_foreign, is_gguf
from mxcompile.cli import smollm2
from mxcompile.cli.arguments import Device, Format, Json, Length, Model, SpecialTokens, TextFile
from mxcompile.cli.checkpoint_contents import CheckpointContents
from mxcompile.cli.commands.quantize import save_model
from mxcompile.cli.compare import EvalOptions, load_with_data
from mxcompile.cli.console import messages, print_json, results
from mxcompile.cli.generation import generate_text
from mxcompile.cli.model_source import load_model, load_tokenizer, load_weights
from mxcompile.cli.progress import Progress, waiting
from mxcompile.diagnostics.diagnosis import Diagnosis
from mxcompile.diagnostics.dump import Dump
from mxcompile.diagnostics.dump_reader import PAGE
from mxcompile.diagnostics.explain import explain as find_kernels
from mxcompile.errors import InputError
from mxcompile.graph.trace import trace
from mxcompile.inductor import compile_module
from mxcompile.passes.diagnose import Diagnose
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.recipes import QUICK, as_pipeline
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.devices import find_device


def convert(
    source: Annotated[Path, typer.Argument(help="a quantized model: a folder of any format, or a GGUF file")],
    out: Annotated[Path, typer.Argument(help="where to write it")],
    format: Format = None,
) -> None:
    """Write a quantized model in another format, with the same elements and scales; nothing is rounded again.

    A GGUF file also loses the formats of inputs, and keeps in float16 what is not quantized.
    """
    check_destination(out, format)
    with waiting(messages(), "reading"):
        loaded, tokenizer = load(source), load_tokenizer(source)
    save_model(loaded, out, tokenizer, format)
    results().print(f"{source} written to {out}", markup=False)


def generate(
    model: Model = None,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "The capital of France is",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    compile: Annotated[bool, typer.Option("--compile", help="compile first; cached on disk for the next time")] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a text greedily with a checkpoint or any language model.

    --json: {"text", "prompt", "tokens", "seconds"}; the text includes the prompt, tokens counts the generated ones.
    """
    target = find_device(device)
    with waiting(messages(), "loading"):
        loaded, tokenizer = load_model(model)
        loaded = loaded.to(target)
    if compile:
        compile_module(loaded)
    if not (compile or as_json):
        generate_text(loaded, tokenizer, prompt, max_new_tokens, streamer=_streamer(tokenizer))
        return
    with waiting(messages(), "compiling, generating" if compile else "generating"):
        generation = generate_text(loaded, tokenizer, prompt, max_new_tokens, static_cache=compile)
    if as_json:
        numbers = {"tokens": generation.tokens, "seconds": generation.seconds}
        print_json({"text": generation.text, "prompt": prompt} | numbers)
    else:
        typer.echo(generation.text)


def inspect(
    folder: Annotated[Path, typer.Argument(help="a checkpoint of any format, or a GGUF file")],
    tensors: Annotated[bool, typer.Option("--tensors", help="one line per tensor")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read all tensors and check their checksums")] = False,
    as_json: Json = False,
) -> None:
    """Print the contents of a checkpoint: formats, sizes, and the recipe and versions that made it.

    --json: {"folder", "module", "recipe", "versions", "bytes", "files", "tensors": [{"name", "format", "input",
    "shape", "bytes"}]}.
    """
    if verify and is_foreign(folder):
        raise InputError(f"{folder} has no checksums to verify: only checkpoints in mxcompile's own format have them")
    with waiting(messages(), "reading"):
        contents = _contents(folder, verify)
    if as_json:
        print_json(contents.record())
        return
    contents.print_to(results(), every=tensors)
    if verify:
        results().print("all checksums match")


def _contents(path: Path, verify: bool) -> CheckpointContents:
    if is_gguf(path):
        return CheckpointContents.of_gguf(path)
    if is_foreign(path):
        return CheckpointContents.of_module(path, load(path))
    return CheckpointContents.of_checkpoint(Checkpoint(path, verify=verify))


def lm_eval(context: typer.Context) -> None:
    """Run EleutherAI's lm_eval, with all its options, on any model or a checkpoint of mxcompile.

    mxcompile lm-eval --model hf --model_args pretrained=FOLDER --tasks ...
    """
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore
    except ImportError as error:
        raise InputError(f"lm_eval is not installed ({error}): pip install 'mxcompile[eval]'") from error
    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()


def explain(
    model: Model = None,
    recipe: Annotated[str, typer.Option(help="a recipe or pipeline; ignored for a checkpoint")] = QUICK,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Print which kernel runs each layer on a device and why, its bytes, and what stays float; nothing is quantized."""
    target, pipeline = find_device(device), as_pipeline(recipe)
    messages().print(f"loading {model or smollm2.NAME}", markup=False)
    with waiting(messages(), "loading"):
        loaded = load_weights(model)
    explanation = find_kernels(loaded, {"input_ids": torch.arange(8)[None]}, recipe=pipeline, device=target)
    if as_json:
        print_json(explanation.record())
    else:
        explanation.print_to(results())


def diagnose(
    model: Model = None,
    recipe: Annotated[str, typer.Option(help="a recipe or pipeline, for the planned formats")] = QUICK,
    text: TextFile = None,
    length: Length = 512,
    windows: Annotated[int, typer.Option(min=1, help="number of windows")] = 8,
    special_tokens: SpecialTokens = True,
    every: Annotated[bool, typer.Option("--layers", help="all values, not only the worst")] = False,
    dump: Annotated[Path | None, typer.Option(help="folder for the report page")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Print what makes each layer's input hard to quantize, and the step that saves most; nothing is quantized.

    --json: {"pass", "outliers": [layer], "values": [{"layers", "outliers", "advice": null or {"step", "reason",
    "saves_db", "text"}, "numbers", "outputs": {layer: numbers}}]}.
    """
    options = EvalOptions(model, None, None, text, length, windows, device=device, special_tokens=special_tokens)
    plan = planned_formats(recipe)
    screen = messages()
    loaded, _, data = load_with_data(screen, options)
    probe = [{"input_ids": window.to(device)} for window in data.windows]
    program = trace(loaded, {"input_ids": data.example()["input_ids"].to(device)})
    dumps = [] if dump is None else [Dump(dump)]
    with Progress(screen) as progress:
        ledger = Pipeline([plan]).run(program, probe, [progress, *dumps]).ledger
    diagnosis = Diagnosis.of(ledger)
    assert diagnosis is not None
    if as_json:
        print_json(diagnosis.record())
        return
    diagnosis.print_to(results(), every)
    if dump is not None:
        results().print(f"the report page is {dump / PAGE}", markup=False)


def planned_formats(recipe: str) -> Diagnose:
    """The pass that diagnoses for the formats of a recipe; raises InputError for one that does not lower."""
    lowering = next((each for each in as_pipeline(recipe).passes if isinstance(each, LowerMX)), None)
    if lowering is None:
        raise InputError(f"--recipe {recipe}: it has no lower-mx, which says the formats to diagnose for")
    return Diagnose(lowering.weight, lowering.activation)


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_special_tokens=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for command in (convert, generate, inspect, explain, diagnose):
        app.command()(command)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("lm-eval", context_settings=passed_on, add_help_option=False)(lm_eval)
