"""The command line: `mxcompile demo | eval | bisect | show | diff | groups | recipes | passes | formats`.

Those about checkpoints are in `commands.py`.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from mxcompile.analysis.choice import choose
from mxcompile.analysis.groups import find_groups
from mxcompile.bisection import bisect as find_culprits
from mxcompile.commands import add_to
from mxcompile.comparison import Question, compare, prepare, report
from mxcompile.demo import load_model, run_demo
from mxcompile.dump import write_page
from mxcompile.errors import MXCompileError
from mxcompile.folder import DumpReader
from mxcompile.formats import FORMATS, activation_rule
from mxcompile.passes import PASSES
from mxcompile.passes.recipes import DEFAULT, QUICK, RECIPES
from mxcompile.program import where
from mxcompile.progress import Progress
from mxcompile.trace import trace

app = typer.Typer(
    help="Quantize PyTorch models to Microscaling (MX) formats.", no_args_is_help=True, pretty_exceptions_enable=False
)


class _GraphHighlighter(RegexHighlighter):
    """Colours of a printed graph: names, types, operators, module paths."""

    base_style = "graph."
    highlights = [  # noqa: RUF012 - rich reads a class attribute
        r"(?P<name>%\w+)",
        r"(?P<type>\b(?:f64|f32|f16|bf16|i64|i32|i16|i8|u8|b8)\[[^\]]*\])",
        r"(?P<mx>\bmx\.\w+)",
        r"(?P<op>\baten\.[\w.]+)",
        r"(?P<tensor>tensor \"[^\"]*\")",
        r"(?P<module>  # .*$)",
    ]


_THEME = Theme(
    {
        "graph.name": "cyan",
        "graph.type": "yellow",
        "graph.mx": "bold magenta",
        "graph.op": "blue",
        "graph.tensor": "green",
        "graph.module": "dim",
    }
)


def _console(stderr: bool = False) -> Console:
    return Console(theme=_THEME, highlight=False, soft_wrap=True, stderr=stderr)


@app.command()
def demo(
    model: Annotated[str | None, typer.Argument(help="a local path or hub id; SmolLM2-135M if left out")] = None,
    out: Annotated[Path, typer.Option(help="folder for the graph dumps")] = Path("out/demo"),
    length: Annotated[int, typer.Option(help="tokens a window of the evaluation text")] = 2048,
    windows: Annotated[int, typer.Option(help="number of windows")] = 4,
    new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 32,
    compile: Annotated[bool, typer.Option(help="compile the quantized models")] = True,
) -> None:
    """Quantize a real language model W8A8 and W4A8, compile it, and compare it with its float self."""
    console = _console()
    run_demo(console, model, folder=out, length=length, windows=windows, new_tokens=new_tokens, compile=compile)


@app.command("eval")
def evaluate(
    model: Annotated[str | None, typer.Argument(help="a local path or hub id; SmolLM2-135M if left out")] = None,
    against: Annotated[
        str | None, typer.Option(help="another model, to compare with: a path, a hub id, smollm2")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="quantize the model by a recipe or pipeline, and compare")] = None,
    text: Annotated[
        Path | None, typer.Option(help='.txt, or .jsonl of {"text": ...}; else Python\'s help topics')
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens a window of the text")] = 2048,
    windows: Annotated[int, typer.Option(min=0, help="number of windows; 0 for all of the text")] = 4,
    calibration_text: Annotated[
        Path | None, typer.Option(help="for recipes that calibrate; else the first half of the text")
    ] = None,
    calibration: Annotated[int, typer.Option(min=1, help="windows of 512 tokens to calibrate with")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON")] = False,
) -> None:
    """Print a language model's perplexity; with --recipe, of its quantized self too, and how far that is from it.

    Every token of a window is predicted from those before it; there is no special token in front of them.
    """
    question = Question(model, against, recipe, text, length, windows, calibration_text, calibration, device)
    answer = compare(_console(stderr=as_json), question)
    if as_json:
        print(json.dumps(answer.record()))
    else:
        report(_console(), answer)


@app.command()
def bisect(
    model: Annotated[str | None, typer.Argument(help="a local path or hub id; SmolLM2-135M if left out")] = None,
    recipe: Annotated[str, typer.Option(help="a recipe or pipeline")] = QUICK,
    kl: Annotated[
        float | None, typer.Option(help="the largest KL divergence from the float model that will do")
    ] = None,
    perplexity: Annotated[float | None, typer.Option(help="the largest perplexity that will do")] = None,
    text: Annotated[
        Path | None, typer.Option(help='.txt, or .jsonl of {"text": ...}; else Python\'s help topics')
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens a window of the text")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="number of windows")] = 1,
    calibration_text: Annotated[
        Path | None, typer.Option(help="for recipes that calibrate; else the first half of the text")
    ] = None,
    calibration: Annotated[int, typer.Option(min=1, help="windows of 512 tokens to calibrate with")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON")] = False,
) -> None:
    """Find the pass, and in it the layers, that bring a model over a threshold, and what to leave out to mend it.

    Takes about two forwards of the windows for every layer.
    """
    console = _console(stderr=as_json)
    question = Question(model, None, recipe, text, length, windows, calibration_text, calibration, device)
    loaded, data = prepare(console, question)
    probe = [{"input_ids": window.to(device)} for window in data.windows]
    kl = 0.1 if kl is None and perplexity is None else kl
    found = find_culprits(
        loaded,
        probe[0],
        recipe=recipe,
        kl=kl,
        perplexity=perplexity,
        probe=probe,
        calibration=data.batches,
        instruments=[Progress(console)],
    )
    if as_json:
        print(json.dumps(found.record()))
    else:
        found.print_to(console)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="a dump folder")],
    name: Annotated[str | None, typer.Argument(metavar="PASS", help="name or number of a pass")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="what each pass did to each layer")] = False,
    html: Annotated[bool, typer.Option("--html", help="write the dump's page, index.html, again")] = False,
) -> None:
    """Print a dump's summary, the graph after a pass, or the numbers of all layers."""
    reader = DumpReader(folder)
    console = _console()
    if html:
        console.print(write_page(folder), markup=False)
        return
    if layers:
        console.print(reader.ledger().to_layer_table())
        return
    if name is not None:
        console.print(_GraphHighlighter()(Text(reader.text(name))))
        return
    console.print(reader.summary())
    console.print("graphs: " + ", ".join(reader.stages()))


@app.command()
def diff(
    folder: Annotated[Path, typer.Argument(help="a dump folder")],
    first: Annotated[str, typer.Argument(help="name or number of a pass")],
    second: Annotated[str, typer.Argument(help="name or number of a pass")],
) -> None:
    """Print what changed in the graph between two passes."""
    text = DumpReader(folder).diff(first, second)
    _console().print(Syntax(text, "diff", background_color="default") if text else "no difference")


@app.command()
def groups(
    model: Annotated[str | None, typer.Argument(help="a local path or hub id; SmolLM2-135M if left out")] = None,
) -> None:
    """Print which matmul inputs of a language model can be scaled, by what, and why others cannot."""
    loaded, tokenizer = load_model(model)
    program = trace(loaded, {"input_ids": tokenizer("The capital of France is", return_tensors="pt").input_ids})
    found, unfoldable = find_groups(program, choose(program).matmuls)
    table = Table("value", "factors", "divided in", "multiplied in", title=f"{len(found)} scale groups")
    for group in found:
        divided, multiplied = (
            [a.parameter + (" (1 + w)" if a.offset else "") for a in group.absorbers if a.power == power]
            for power in (-1, 1)
        )
        table.add_row(f"%{group.value.name}", str(group.count), "\n".join(divided), "\n".join(multiplied))
    console = _console()
    console.print(table)
    for miss in unfoldable:
        console.print(f"not foldable: {where(miss.matmul.node)}: {miss.reason}")


@app.command()
def recipes() -> None:
    """Print the recipes and the pipelines they stand for."""
    table = Table("recipe", "pipeline")
    for name, text in RECIPES.items():
        table.add_row(f"{name} (default)" if name == DEFAULT else name, text)
    _console().print(table)


@app.command()
def passes() -> None:
    """Print the passes and their options."""
    table = Table("pass", "what it rewrites", "options and defaults")
    for name, kind in PASSES.items():
        summary = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]
        table.add_row(name, summary, ", ".join(f"{f.name}={f.default}" for f in fields(kind)))  # pyright: ignore
    _console().print(table)


@app.command()
def formats() -> None:
    """Print the formats."""
    table = Table("format", "bits a value", "largest element", "scale rule of activations")
    for name, fmt in FORMATS.items():
        table.add_row(name, f"{fmt.bits_per_value:g}", f"{fmt.max_value:g}", str(activation_rule(fmt)))
    _console().print(table)


add_to(app)


def main() -> None:
    """Entry point: errors of ours are one message, not a traceback."""
    try:
        app()
    except MXCompileError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"))
        raise SystemExit(1) from None
