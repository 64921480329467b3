"""Where commands print: results on stdout, in colours on a terminal and at full width elsewhere; messages on stderr."""

import json
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.text import Text
from rich.theme import Theme

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


def results() -> Console:
    """For what a command was asked for."""
    return _console(stderr=False)


def messages() -> Console:
    """For what happens on the way: it does not mix with results that are piped on."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    console = Console(theme=_THEME, highlight=False, soft_wrap=True, stderr=stderr)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


def print_json(content: dict[str, Any]) -> None:
    """One line on stdout; a number that is not finite is the word "inf", "-inf" or "nan"."""
    typer.echo(json.dumps(plain(content)))


def graph_text(text: str) -> Text:
    """A graph's text in colours."""
    return _GraphHighlighter()(Text(text))


def diff_text(lines: Iterable[str]) -> Text:
    """A unified diff in colours."""
    return Text("\n").join(Text(line, style=_DIFF.get(line[:1], "dim")) for line in lines)
