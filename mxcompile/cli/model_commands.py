"""The commands about models in folders: `mxcompile quantize | convert | generate | inspect | lm-eval | explain`.

`cli.py` puts them beside the others.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mxcompile.api import load
from mxcompile.checkpoint import Checkpoint, check_free, save
from mxcompile.cli import compare, smollm2
from mxcompile.cli.arguments import Calibration, CalibrationText, Device, Format, Json, Length, Model, TextFile
from mxcompile.cli.checkpoint_contents import Description
from mxcompile.cli.compare import Question
from mxcompile.cli.console import messages, print_json, results
from mxcompile.cli.model_source import load_model, load_tokenizer
from mxcompile.cli.progress import waiting
from mxcompile.diagnostics.evaluation import Metric
from mxcompile.diagnostics.explain import explain as find_kernels
from mxcompile.errors import InputError, RecoveryError
from mxcompile.inductor import compile_module
from mxcompile.passes.recipes import QUICK


def quantize(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="folder for the checkpoint")] = Path("out/quantized"),
    format: Format = None,
    recipe: Annotated[str, typer.Option(help="a recipe or pipeline")] = QUICK,
    min_recovery: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="write nothing if less of the float model is left")
    ] = None,
    metric: Annotated[Metric, typer.Option(help="what that is measured by")] = Metric.TOP1,
    force: Annotated[bool, typer.Option("--force", help="write it all the same")] = False,
    text: TextFile = None,
    length: Length = 2048,
    windows: Annotated[int, typer.Option(min=0, help="number of windows to compare on; 0 for all of the text")] = 4,
    calibration_text: CalibrationText = None,
    calibration: Calibration = 32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Quantize a language model, compare it with its float self, and write it to a folder.

    Recovery is how much of the float model is left: the share of tokens predicted alike (top1), its perplexity over the
    quantized model's (perplexity), or exp(-KL) (kl).

    --json: as of eval, and "recovery", "metric", "out" (null if nothing is written).
    """
    check_free(out, format)
    question = Question(model, None, recipe, text, length, windows, calibration_text, calibration, device)
    quantized, tokenizer, answer = compare.quantize(messages(), question, recipe)
    recovery = answer.scores.recovery(metric)
    enough = min_recovery is None or recovery >= min_recovery
    if enough or force:
        with waiting(messages(), "writing"):
            save(quantized, out, tokenizer=tokenizer, format=format)
    found = {"recovery": recovery, "metric": str(metric), "out": str(out) if enough or force else None}
    if as_json:
        print_json(answer.record() | found)
    else:
        compare.report(results(), answer)
    verdict = f"recovery ({metric}) {recovery:.3f}" + ("" if enough else f", less than {min_recovery}")
    if not enough and not force:
        raise RecoveryError(f"{verdict}: nothing is written; try another recipe, mxcompile bisect, or --force")
    screen = messages() if as_json else results()
    screen.print(f"{verdict}; written to {out} (mxcompile generate {out} --prompt ...)", markup=False)


def convert(
    source: Annotated[Path, typer.Argument(help="a quantized model: a folder of any format, or a GGUF file")],
    out: Annotated[Path, typer.Argument(help="where to write it")],
    format: Format = None,
) -> None:
    """Write a quantized model in another format: the same elements and scales, nothing is rounded again."""
    check_free(out, format)
    with waiting(messages(), "writing"):
        save(load(source), out, tokenizer=load_tokenizer(source), format=format)
    results().print(f"{source} written to {out}", markup=False)


def generate(
    model: Model = None,
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "The capital of France is",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    compile: Annotated[bool, typer.Option("--compile", help="compile first; kept on disk for the next time")] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Go on with a text, greedily; the model is a checkpoint, or any language model.

    --json: {"text", "prompt", "tokens", "seconds"}; the text begins with the prompt, tokens are those generated.
    """
    with waiting(messages(), "loading"):
        loaded, tokenizer = load_model(model)
        loaded = loaded.to(device)
    if compile:
        compile_module(loaded)
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    began = time.perf_counter()
    if not (compile or as_json):
        loaded.generate(**inputs, **options, streamer=_streamer(tokenizer))
        return
    with waiting(messages(), "compiling, generating" if compile else "generating"):
        output = loaded.generate(**inputs, **options, cache_implementation="static" if compile else None)[0]
    text = tokenizer.decode(output, skip_special_tokens=True)
    if not as_json:
        typer.echo(text)
        return
    tokens, seconds = len(output) - inputs["input_ids"].shape[1], time.perf_counter() - began
    print_json({"text": text, "prompt": prompt, "tokens": tokens, "seconds": seconds})


def inspect(
    folder: Annotated[Path, typer.Argument(help="a checkpoint")],
    tensors: Annotated[bool, typer.Option("--tensors", help="a line for every tensor")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read all of it and compare checksums")] = False,
    as_json: Json = False,
) -> None:
    """Print what a checkpoint holds: formats, sizes, the recipe and versions that made it.

    --json: {"folder", "module", "recipe", "versions", "bytes", "files", "tensors": [{"name", "format", "input",
    "shape", "bytes"}]}.
    """
    with waiting(messages(), "reading"):
        description = Description(Checkpoint(folder, verify=verify))
    if as_json:
        print_json(description.record())
        return
    description.print_to(results(), every=tensors)
    if verify:
        results().print("every byte is as it was saved")


def lm_eval(context: typer.Context) -> None:
    """Run EleutherAI's lm_eval, all of whose options follow, where it can load checkpoints.

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
    recipe: Annotated[str, typer.Option(help="a recipe or pipeline; without effect on a checkpoint")] = QUICK,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Print which kernel runs each layer on a device and why, its bytes, and what stays float; nothing is quantized."""
    messages().print(f"loading {model or smollm2.NAME}", markup=False)
    loaded, tokenizer = load_model(model)
    example = {"input_ids": tokenizer("The capital of France is", return_tensors="pt").input_ids}
    found = find_kernels(loaded, example, recipe=recipe, device=device)
    if as_json:
        print_json(found.record())
    else:
        found.print_to(results())


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_special_tokens=True)


def add_to(app: typer.Typer) -> None:
    """Make them commands."""
    for command in (quantize, convert, generate, inspect, explain):
        app.command()(command)
    unread = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("lm-eval", context_settings=unread, add_help_option=False)(lm_eval)
