"""The command line: `mxcompile demo | eval | bisect`, and the commands of other files.

About checkpoints: `model_commands.py`; about dumps: `dump_commands.py`; what there is: `list_commands.py`.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mxcompile.cli import dump_commands, list_commands, model_commands
from mxcompile.cli.arguments import Calibration, CalibrationText, Device, Json, Length, Model, TextFile
from mxcompile.cli.compare import Question, compare, prepare, report
from mxcompile.cli.console import messages, print_json, results
from mxcompile.cli.demo import run_demo
from mxcompile.cli.progress import Progress
from mxcompile.diagnostics.bisect import bisect as find_culprits
from mxcompile.errors import MXCompileError
from mxcompile.passes.recipes import QUICK

app = typer.Typer(
    help="Quantize PyTorch models to Microscaling (MX) formats.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.command()
def demo(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="folder for the graph dumps")] = Path("out/demo"),
    length: Annotated[int, typer.Option(help="tokens a window of the evaluation text")] = 2048,
    windows: Annotated[int, typer.Option(help="number of windows")] = 4,
    new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 32,
    compile: Annotated[bool, typer.Option(help="compile the quantized models")] = True,
) -> None:
    """Quantize a real language model W8A8 and W4A8, compile it, and compare it with its float self."""
    run_demo(results(), model, folder=out, length=length, windows=windows, new_tokens=new_tokens, compile=compile)


@app.command("eval")
def evaluate(
    model: Model = None,
    against: Annotated[
        str | None, typer.Option(help="another model, to compare with: a path, a hub id, smollm2")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="quantize the model by a recipe or pipeline, and compare")] = None,
    text: TextFile = None,
    length: Length = 2048,
    windows: Annotated[int, typer.Option(min=0, help="number of windows; 0 for all of the text")] = 4,
    calibration_text: CalibrationText = None,
    calibration: Calibration = 32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Print a language model's perplexity; with --recipe, of its quantized self too, and how far that is from it.

    Every token of a window is predicted from those before it; there is no special token in front of them.

    --json: {"model": {"name", "bytes", "nll", "perplexity"}, "recipe", "reference", "kl", "top1", "text", "length",
    "windows", "tokens", "calibration"}; the reference, null or like the model, is what kl and top1 compare with.
    """
    question = Question(model, against, recipe, text, length, windows, calibration_text, calibration, device)
    answer = compare(messages(), question)
    if as_json:
        print_json(answer.record())
    else:
        report(results(), answer)


@app.command()
def bisect(
    model: Model = None,
    recipe: Annotated[str, typer.Option(help="a recipe or pipeline")] = QUICK,
    kl: Annotated[
        float | None, typer.Option(help="the largest KL divergence from the float model that will do")
    ] = None,
    perplexity: Annotated[float | None, typer.Option(help="the largest perplexity that will do")] = None,
    text: TextFile = None,
    length: Length = 256,
    windows: Annotated[int, typer.Option(min=1, help="number of windows")] = 1,
    calibration_text: CalibrationText = None,
    calibration: Calibration = 32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the pass, and in it the layers, that bring a model over a threshold, and what to leave out to mend it.

    Takes about two forwards of the windows for every layer.

    --json: {"metric", "threshold", "scores": [{"pass", "score"}], "culprit", "contributions": {layer: what it adds},
    "guilty", "restored", "fix": null or {"names", "format", "score", "mends"}, "forwards"}.
    """
    question = Question(model, None, recipe, text, length, windows, calibration_text, calibration, device)
    screen = messages()
    loaded, data = prepare(screen, question)
    probe = [{"input_ids": window.to(device)} for window in data.windows]
    kl = 0.1 if kl is None and perplexity is None else kl
    with Progress(screen, last="scoring") as progress:
        found = find_culprits(
            loaded,
            probe[0],
            recipe=recipe,
            kl=kl,
            perplexity=perplexity,
            probe=probe,
            calibration=data.batches,
            instruments=[progress],
            report=progress.report,
        )
    if as_json:
        print_json(found.record())
    else:
        found.print_to(results())


model_commands.add_to(app)
dump_commands.add_to(app)
list_commands.add_to(app)


def main() -> None:
    """Entry point: errors of ours are one message, not a traceback."""
    try:
        app()
    except MXCompileError as error:
        messages().print(Text(f"error: {error}", style="red"))
        raise SystemExit(1) from None
