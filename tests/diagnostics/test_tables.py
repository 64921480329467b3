"""Tables: nothing is truncated or read as markup, numbers stay whole, columns without entries are omitted."""

from io import StringIO

import pytest
from rich.console import Console
from rich.text import Text

from mxcompile.diagnostics.tables import graded, table

NAME = "model.layers.10.self_attn.q_proj.weight"


def printed(made, width: int) -> str:
    text = StringIO()
    Console(file=text, width=width, soft_wrap=True).print(made)
    return text.getvalue()


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip(" ─")]


def test_columns_are_aligned():
    text = printed(table(("pass", "by"), ("dB",), [("a", "b", "1.0"), ("longer", "c", "10.0")], "title"), 80)
    assert text.splitlines()[0].strip() == "title"
    lines = [line for line in text.splitlines() if line.rstrip().endswith(("1.0", "10.0", "dB"))]
    assert len({len(line.rstrip()) for line in lines}) == 1
    assert rows(text)[1:] == [["pass", "by", "dB"], ["a", "b", "1.0"], ["longer", "c", "10.0"]]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_what_is_too_wide_is_folded_and_not_cut(width):
    made = table(("layer", "in"), ("local", "after\nround-\nweights"), [(NAME, "mxint4", "17.25", "exact")])
    text = printed(made, width)
    assert "…" not in text
    below = text.rpartition("─")[2].strip()
    assert below.splitlines()[0].split()[1:] == ["mxint4", "17.25", "exact"]
    assert "".join(line.split()[0] for line in below.splitlines() if line.strip()) == NAME
    assert (len(below.splitlines()) == 1) == (width >= 80)


def test_text_stands_for_itself():
    text = printed(table(("a", "b"), (), [("[model.layers.0.*=none]", "[bold]x[/bold] :smile:")]), 80)
    assert rows(text)[1] == ["[model.layers.0.*=none]", "[bold]x[/bold]", ":smile:"]


def test_a_column_without_entries_is_left_out_but_not_of_an_empty_table():
    made = table(("name", "note"), ("one", "two"), [("a", "", "1", ""), ("b", "", "", "")])
    assert [column.header for column in made.columns] == ["name", "one"]
    assert rows(printed(table(("name",), ("one",), []), 80)) == [["name", "one"]]


@pytest.mark.parametrize(
    ("value", "good", "bad", "style"),
    [(30, 30, 15, "green"), (20, 30, 15, "yellow"), (15, 30, 15, "red"), (0.01, 0.1, 1, "green"), (2, 0.1, 1, "red")],
)
def test_grades(value, good, bad, style):
    assert graded("x", value, good, bad) == Text("x", style=style)
    assert graded("", None, good, bad).style == ""
