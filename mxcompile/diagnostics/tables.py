"""Tables as every command prints them: names to the left, numbers to the right, nothing cut off.

Names fold where a terminal is too narrow, numbers stay whole (on a console with `soft_wrap`, whatever its width); a
column without any entry is left out.
"""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

Cell = str | Text
_NARROWEST = 16  # characters of a name in one line, at least


def table(
    names: Iterable[str], numbers: Iterable[str], rows: Iterable[Sequence[Cell]], title: str | None = None
) -> Table:
    """names, numbers: titles of the columns to the left and of those to the right. rows: their cells, in that order.

    Text stands for itself: nothing in it is read as markup.
    """
    names = tuple(names)
    titles = (*names, *numbers)
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    shown = [index for index in range(len(titles)) if index == 0 or not cells or any(row[index].plain for row in cells)]
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
    for index in shown:
        words = [word for text in (titles[index], *(row[index].plain for row in cells)) for word in text.split()]
        longest = max(map(len, words), default=0)
        if index < len(names):
            least = min(longest, _NARROWEST)
            made.add_column(titles[index], overflow="fold", min_width=least, style=None if index else "cyan")
        else:
            made.add_column(titles[index], overflow="fold", min_width=longest, justify="right")
    for row in cells:
        made.add_row(*(row[index] for index in shown))
    return made


def graded(text: str, value: float | None, good: float, bad: float) -> Text:
    """A measured number in green from `good` on, red up to `bad` (which may be the larger of the two), else yellow."""
    if value is None:
        return Text(text)
    sign = 1 if good > bad else -1
    if sign * value >= sign * good:
        return Text(text, style="green")
    return Text(text, style="red" if sign * value <= sign * bad else "yellow")
