"""The command line app, with the commands `demo`, `eval` and `bisect`.

Commands on models and checkpoints: `quantize_command.py`, `model_commands.py`; servers: `serve_command.py`; studies:
`study_command.py`; on dumps: `dump_commands.py`; lists: `list_commands.py`.
"""

import inspect
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mxcompile.calibration.ranks.process_group import is_first, launched
from mxcompile.cli import dump_commands, list_commands, model_commands, quantize_command, serve_command, study_command
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
from mxcompile.cli.compare import EvalOptions, compare, load_with_data, print_comparison
from mxcompile.cli.console import messages, print_json, results, warnings_as_messages
from mxcompile.cli.demo import run_demo
from mxcompile.cli.progress import Progress
from mxcompile.diagnostics.bisect import bisect as find_culprits
from mxcompile.errors import InputError, MXCompileError
from mxcompile.passes.recipes import QUICK

_PRINTING = 2.0  # seconds

app = typer.Typer(
    help="Quantize PyTorch models to Microscaling (MX) formats.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.command()
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


@app.command("eval")
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


@app.command()
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


quantize_command.register(app)
model_commands.register(app)
serve_command.register(app)
study_command.register(app)
dump_commands.register(app)
list_commands.register(app)
for _command in app.registered_commands:
    # Typer keeps the line breaks of a docstring behind its first paragraph: only those after a sentence or before an
    # option are meant
    _command.help = re.sub(r"(?<![.:\n])\n(?!\n|--)", " ", inspect.getdoc(_command.callback) or "")


def main() -> None:
    """Entry point: an `MXCompileError` is printed as one message and its notes, without a traceback."""
    try:
        if launched() and sys.argv[1:2] not in (["quantize"], ["--help"]):
            raise InputError("torchrun is for mxcompile quantize: start other commands without it")
        if not is_first():
            warnings.simplefilter("ignore")  # the first process gives the same
        with warnings_as_messages():
            app()
    except MXCompileError as error:
        screen = messages()
        screen.print(Text(f"error: {error}", style="red"))
        for note in getattr(
            error, "__notes__", ()
        ):  # that of a failed run says what is left, which ends with a command
            screen.print(Text(f"{'note' if error.unfinished is None else 'in Python'}: {note}"))
        if not is_first():
            time.sleep(_PRINTING)  # torchrun ends all processes when the first of them has ended
        raise SystemExit(1) from None
