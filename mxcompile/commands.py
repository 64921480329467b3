"""The commands that make, run and show checkpoints: `mxcompile quantize | convert | generate | inspect | lm-eval`.

`cli.py` puts them beside the others.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from mxcompile import comparison
from mxcompile.api import load
from mxcompile.checkpoint import Checkpoint, check_free, save
from mxcompile.checkpoint.description import Description
from mxcompile.comparison import Question
from mxcompile.demo import load_model, load_tokenizer
from mxcompile.errors import InputError, RecoveryError
from mxcompile.evaluation import Metric
from mxcompile.inductor import compile_module
from mxcompile.passes.recipes import QUICK

Model = Annotated[str | None, typer.Argument(help="a local path or hub id; SmolLM2-135M if left out")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Format = Annotated[
    str | None,
    typer.Option("--format", help="mxcompile, compressed-tensors, or gguf (to a file); by the name if left out"),
]
Json = Annotated[bool, typer.Option("--json", help="print one line of JSON")]


def console(stderr: bool = False) -> Console:
    """Where a command prints; with --json, messages go to stderr."""
    return Console(highlight=False, soft_wrap=True, stderr=stderr)


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
    text: Annotated[
        Path | None, typer.Option(help='.txt, or .jsonl of {"text": ...}; else Python\'s help topics')
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens a window of the text")] = 2048,
    windows: Annotated[int, typer.Option(min=0, help="number of windows to compare on; 0 for all of the text")] = 4,
    calibration_text: Annotated[
        Path | None, typer.Option(help="for recipes that calibrate; else the first half of the text")
    ] = None,
    calibration: Annotated[int, typer.Option(min=1, help="windows of 512 tokens to calibrate with")] = 32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Quantize a language model, compare it with its float self, and write it to a folder.

    Recovery is how much of the float model is left: the share of tokens predicted alike (top1), its perplexity over the
    quantized model's (perplexity), or exp(-KL) (kl).
    """
    screen = console(stderr=as_json)
    check_free(out, format)
    question = Question(model, None, recipe, text, length, windows, calibration_text, calibration, device)
    quantized, tokenizer, answer = comparison.quantize(screen, question, recipe)
    recovery = answer.scores.recovery(metric)
    enough = min_recovery is None or recovery >= min_recovery
    if enough or force:
        save(quantized, out, tokenizer=tokenizer, format=format)
    found = {"recovery": recovery, "metric": str(metric), "out": str(out) if enough or force else None}
    if as_json:
        print(json.dumps(answer.record() | found))
    else:
        comparison.report(screen, answer)
    verdict = f"recovery ({metric}) {recovery:.3f}" + ("" if enough else f", less than {min_recovery}")
    if not enough and not force:
        raise RecoveryError(f"{verdict}: nothing is written; try another recipe, mxcompile bisect, or --force")
    screen.print(f"{verdict}; written to {out} (mxcompile generate {out} --prompt ...)")


def convert(
    source: Annotated[Path, typer.Argument(help="a quantized model: a folder of any format, or a GGUF file")],
    out: Annotated[Path, typer.Argument(help="where to write it")],
    format: Format = None,
) -> None:
    """Write a quantized model in another format: the same elements and scales, nothing is rounded again."""
    check_free(out, format)
    save(load(source), out, tokenizer=load_tokenizer(source), format=format)
    console().print(f"{source} written to {out}")


def generate(
    model: Model = None,
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "The capital of France is",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    compile: Annotated[bool, typer.Option("--compile", help="compile first; kept on disk for the next time")] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Go on with a text, greedily; the model is a checkpoint, or any language model."""
    loaded, tokenizer = load_model(model)
    loaded = loaded.to(device)
    if compile:
        compile_module(loaded)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    streamer = None if as_json else _streamer(tokenizer)
    began = time.perf_counter()
    with torch.no_grad():
        output = loaded.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            cache_implementation="static" if compile else None,
            streamer=streamer,
        )[0]
    if as_json:
        seconds = time.perf_counter() - began
        text = tokenizer.decode(output, skip_special_tokens=True)
        tokens = len(output) - inputs.input_ids.shape[1]
        print(json.dumps({"text": text, "prompt": prompt, "tokens": tokens, "seconds": seconds}))


def inspect(
    folder: Annotated[Path, typer.Argument(help="a checkpoint")],
    tensors: Annotated[bool, typer.Option("--tensors", help="a line for every tensor")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read all of it and compare checksums")] = False,
    as_json: Json = False,
) -> None:
    """Print what a checkpoint holds: formats, sizes, the recipe and versions that made it."""
    description = Description(Checkpoint(folder, verify=verify))
    if as_json:
        print(json.dumps(description.record()))
        return
    description.print_to(console(), every=tensors)
    if verify:
        console().print("every byte is as it was saved")


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


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_special_tokens=True)


def add_to(app: typer.Typer) -> None:
    """Make them commands."""
    for command in (quantize, convert, generate, inspect):
        app.command()(command)
    unread = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("lm-eval", context_settings=unread, add_help_option=False)(lm_eval)
