"""The commands that read a dump folder: `mxcompile show | diff`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mxcompile.cli.arguments import Json
from mxcompile.cli.console import diff_text, graph_text, print_json, results
from mxcompile.diagnostics.dump import write_page
from mxcompile.diagnostics.dump_reader import DumpReader

Folder = Annotated[Path, typer.Argument(help="a dump folder")]


def show(
    folder: Folder,
    name: Annotated[str | None, typer.Argument(metavar="PASS", help="name or number of a pass")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="the SQNR of every layer after each pass")] = False,
    html: Annotated[bool, typer.Option("--html", help="write the report page, index.html, again")] = False,
    as_json: Json = False,
) -> None:
    """Print the ledger of a dump, the graph after a pass, or the measurements of all layers.

    --json: the ledger (its keys are those of ledger.json) with "graphs", the names of the graphs, and "failure", null
    or {"pass", "error", "rest"}. With PASS: {"pass", "graph"}.
    """
    reader = DumpReader(folder)
    if html:
        typer.echo(write_page(folder))
    elif name is not None and as_json:
        print_json({"pass": reader.stage(name), "graph": reader.text(name)})
    elif name is not None:
        results().print(graph_text(reader.text(name)))
    elif as_json:
        print_json(_record(reader))
    elif layers:
        results().print(reader.ledger().to_layer_table())
    else:
        _overview(reader)


def diff(
    folder: Folder,
    first: Annotated[str, typer.Argument(help="name or number of a pass")],
    second: Annotated[str, typer.Argument(help="name or number of a pass")],
    as_json: Json = False,
) -> None:
    """Print what changed in the graph between two passes.

    --json: {"first", "second", "removed", "added", "diff"}: the graphs' names, numbers of lines, the unified diff.
    """
    reader = DumpReader(folder)
    lines = reader.diff(first, second).splitlines()
    names = reader.stage(first), reader.stage(second)
    removed, added = (sum(line.startswith(mark) for line in lines[2:]) for mark in "-+")
    if as_json:
        record = {"first": names[0], "second": names[1], "removed": removed, "added": added, "diff": "\n".join(lines)}
        print_json(record)
    elif not lines:
        results().print("no difference")
    else:
        results().print(diff_text(lines))
        results().print(Text(f"{names[0]} to {names[1]}: {removed} lines removed, {added} added", style="bold"))


def _overview(reader: DumpReader) -> None:
    console = results()
    reader.ledger().print_to(console)
    failure = reader.failure()
    if failure is not None:
        console.print(Text(f"pass {failure.index} failed: {failure.message}", style="red"))
        console.print(Text(f"still to run: {failure.rest}"))
    console.print(Text(f"graphs: {', '.join(reader.stages())}", style="dim"))


def _record(reader: DumpReader) -> dict[str, object]:
    failure = reader.failure()
    failed = failure and {"pass": failure.index, "error": failure.message, "rest": failure.rest}
    return {**reader.ledger().record(), "graphs": reader.stages(), "failure": failed}


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(show)
    app.command()(diff)
