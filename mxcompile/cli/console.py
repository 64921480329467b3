"""Consoles of the commands: results on stdout, messages on stderr, colors on a terminal, full width elsewhere."""

import json
import shlex
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.text import Text
from rich.theme import Theme

from mxcompile.calibration.ranks.process_group import is_first
from mxcompile.diagnostics.ledger import plain

_UNBOUNDED = 10_000  # columns where no terminal sets a width
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
_DIFF = {"+": "green", "-": "red", "@": "cyan"}


class _GraphHighlighter(RegexHighlighter):
    """Colors of a printed graph: names, types, operators, module paths."""

    base_style = "graph."
    highlights = [  # noqa: RUF012 - rich reads a class attribute
        r"(?P<name>%\w+)",
        r"(?P<type>\b(?:f64|f32|f16|bf16|i64|i32|i16|i8|u8|b8)\[[^\]]*\])",
        r"(?P<mx>\bmx\.\w+)",
        r"(?P<op>\baten\.[\w.]+)",
        r"(?P<tensor>tensor \"[^\"]*\")",
        r"(?P<module>  # .*$)",
    ]


def results() -> Console:
    """The console for the results of a command."""
    return _console(stderr=False)


def messages() -> Console:
    """The console for progress and errors, apart from results that are piped."""
    return _console(stderr=True)


@contextmanager
def warnings_as_messages() -> Generator[None]:
    """Print each UserWarning as a message, without the line of code that gave it."""
    with warnings.catch_warnings():  # puts the function back
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category is UserWarning:
                messages().print(f"warning: {message}", markup=False)
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _console(stderr: bool) -> Console:
    console = Console(theme=_THEME, highlight=False, soft_wrap=True, stderr=stderr, quiet=not is_first())
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


def quoted(path: str | Path) -> str:
    """A path as a shell takes it, for a command that is printed to be copied."""
    return shlex.quote(str(path))


def print_json(content: dict[str, Any]) -> None:
    """Print one line on stdout; numbers that are not finite become the strings "inf", "-inf" and "nan"."""
    if is_first():
        typer.echo(json.dumps(plain(content)))


def graph_text(text: str) -> Text:
    """The text of a graph in colors."""
    return _GraphHighlighter()(Text(text))


def diff_text(lines: Iterable[str]) -> Text:
    """A unified diff in colors."""
    return Text("\n").join(Text(line, style=_DIFF.get(line[:1], "dim")) for line in lines)
