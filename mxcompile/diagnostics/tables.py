"""The tables that all commands print: names on the left, numbers on the right, nothing truncated.

Where a terminal is too narrow, names wrap and numbers stay whole (on a console with `soft_wrap`, at any width). A
column without entries is omitted.
"""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

Cell = str | Text
_LEAST_WIDTH = 16  # of a column of names, in characters


def table(
    names: Iterable[str], numbers: Iterable[str], rows: Iterable[Sequence[Cell]], title: str | None = None
) -> Table:
    """Make a table. names, numbers: titles of the left and of the right columns. rows: their cells in that order.

    Strings are printed as they are, not as rich markup.
    """
    names = tuple(names)
    titles = (*names, *numbers)
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    shown = [index for index in range(len(titles)) if index == 0 or not cells or any(row[index].plain for row in cells)]
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
    for index in shown:
        words = [word for text in (titles[index], *(row[index].plain for row in cells)) for word in text.split()]
        longest = max(map(len, words), default=0)
        if index < len(names):
            least = min(longest, _LEAST_WIDTH)
            result.add_column(titles[index], overflow="fold", min_width=least, style=None if index else "cyan")
        else:
            result.add_column(titles[index], overflow="fold", min_width=longest, justify="right")
    for row in cells:
        result.add_row(*(row[index] for index in shown))
    return result


def graded(text: str, value: float | None, good: float, bad: float) -> Text:
    """Color a number: green at `good` or better, red at `bad` or worse, else yellow. `bad` may exceed `good`."""
    if value is None:
        return Text(text)
    sign = 1 if good > bad else -1
    if sign * value >= sign * good:
        return Text(text, style="green")
    return Text(text, style="red" if sign * value <= sign * bad else "yellow")
