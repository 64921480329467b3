"""The commands that quantize a language model and compare it with the float model: `mxcompile demo | eval | bisect`."""

from pathlib import Path
from typing import Annotated

import typer

from mxcompile.cli.arguments import (
    Calibration,
    CalibrationLength,
    CalibrationLike,
    CalibrationSelf,
    CalibrationText,
    Device,
    Json,
    Length,
    Model,
    SpecialTokens,
    TextFile,
)
from mxcompile.cli.calibration import CalibrationOptions
from mxcompile.cli.commands.demo import run_demo
from mxcompile.cli.compare import EvalOptions, compare, load_with_data, print_comparison
from mxcompile.cli.console import messages, print_json, results
from mxcompile.cli.progress import Progress
from mxcompile.diagnostics.bisect import bisect as find_culprits
from mxcompile.passes.recipes import QUICK


def demo(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="folder for the dumps")] = Path("out/demo"),
    length: Length = 2048,
    windows: Annotated[int, typer.Option(min=1, help="number of windows")] = 4,
    new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 32,
    compile: Annotated[bool, typer.Option(help="compile the quantized models")] = True,
) -> None:
    """Quantize a real language model to W8A8 and W4A8, compile it, and compare it with the float model."""
    run_demo(results(), messages(), EvalOptions(model, length=length, windows=windows), out, new_tokens, compile)


def evaluate(
    model: Model = None,
    against: Annotated[
        str | None, typer.Option(help="another model to compare with: a path, a hub id, or smollm2")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="a recipe or pipeline: quantize the model and compare")] = None,
    text: TextFile = None,
    length: Length = 2048,
    windows: Annotated[int, typer.Option(min=0, help="number of windows; 0 for all of the text")] = 4,
    half: Annotated[str | None, typer.Option(metavar="first|second", help="one half of the text alone")] = None,
    calibration: Calibration = None,
    calibration_text: CalibrationText = None,
    calibration_length: CalibrationLength = None,
    calibration_like: CalibrationLike = None,
    calibration_self: CalibrationSelf = None,
    special_tokens: SpecialTokens = True,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Print the perplexity of a language model; with --recipe, also that of the quantized model and its KL.

    Every token of a window is predicted from those before it, the first of the text from BOS if the tokenizer puts one
    before a text.

    --json: {"model": {"name", "bytes", "nll", "perplexity"}, "recipe", "reference", "kl", "top1", "text", "length",
    "windows", "tokens", "calibration"}; kl and top1 compare with the reference, which is null or like the model.
    """
    data = CalibrationOptions.parse(
        calibration, calibration_text, calibration_length, calibration_like, calibration_self
    )
    options = EvalOptions(model, against, recipe, text, length, windows, data, device, special_tokens, half)
    comparison = compare(messages(), options)
    if as_json:
        print_json(comparison.record())
    else:
        print_comparison(results(), comparison)


def bisect(
    model: Model = None,
    recipe: Annotated[str, typer.Option(help="a recipe or pipeline")] = QUICK,
    kl: Annotated[
        float | None, typer.Option(help="threshold: largest accepted KL divergence from float; 0.1 by default")
    ] = None,
    perplexity: Annotated[float | None, typer.Option(help="threshold: largest accepted perplexity")] = None,
    text: TextFile = None,
    length: Length = 256,
    windows: Annotated[int, typer.Option(min=1, help="number of windows")] = 1,
    calibration: Calibration = None,
    calibration_text: CalibrationText = None,
    calibration_length: CalibrationLength = None,
    calibration_like: CalibrationLike = None,
    calibration_self: CalibrationSelf = None,
    special_tokens: SpecialTokens = True,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the pass and the layers that push a model over an error threshold, and suggest a fix.

    Takes about two forwards of the windows for every layer.

    --json: {"metric", "threshold", "scores": [{"pass", "score"}], "culprit", "contributions": {layer: added error},
    "guilty", "restored", "fix": null or {"names", "format", "score", "mends"}, "forwards"}.
    """
    data = CalibrationOptions.parse(
        calibration, calibration_text, calibration_length, calibration_like, calibration_self
    )
    options = EvalOptions(model, None, recipe, text, length, windows, data, device, special_tokens)
    screen = messages()
    loaded, _, texts = load_with_data(screen, options)
    probe = [{"input_ids": window.to(device)} for window in texts.windows]
    kl = 0.1 if kl is None and perplexity is None else kl
    with Progress(screen, last="scoring") as progress:
        bisection = find_culprits(
            loaded,
            probe[0],
            recipe=recipe,
            kl=kl,
            perplexity=perplexity,
            probe=probe,
            calibration=texts.batches,
            instruments=[progress],
            report=progress.report,
        )
    if as_json:
        print_json(bisection.record())
    else:
        bisection.print_to(results())


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(demo)
    app.command("eval")(evaluate)
    app.command()(bisect)
