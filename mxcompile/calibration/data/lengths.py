"""How many windows of each length, and in which order they are cut from a text.

One length is the usual case. What a model computes depends on how long its inputs are, so that calibration may take
several (SLAC in Lee et al., arXiv 2311.05161): each length gets an equal share of the tokens, and the windows of all
lengths alternate, so that they are cut from all parts of the text. Windows as long as the lines of a task (`like`) are
equally many of each length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mxcompile.errors import InputError

QUANTILES = 8
_MOST = 1 << 20


@dataclass(frozen=True)
class WindowLengths:
    """The lengths of windows, each with its share of the tokens (or, if not `by_tokens`, of the windows)."""

    lengths: tuple[int, ...]
    by_tokens: bool = True

    @property
    def least(self) -> int:
        """The fewest windows that there can be."""
        return len(self.lengths) if self.by_tokens else 1

    @classmethod
    def of(cls, length: int | Sequence[int]) -> "WindowLengths":
        """One length, or several with equal shares of the tokens; raises InputError if there is none."""
        lengths = (length,) if isinstance(length, int) else tuple(sorted(set(length)))
        if not lengths:
            raise InputError("length is a number of tokens, or several: give at least one")
        return cls(lengths)

    @classmethod
    def like(cls, counts: Sequence[int]) -> "WindowLengths":
        """The lengths at 8 evenly spaced quantiles of the token counts of a task's lines."""
        ordered = sorted(counts)
        places = [(2 * index + 1) * len(ordered) // (2 * QUANTILES) for index in range(QUANTILES)]
        return cls(tuple(ordered[place] for place in places), by_tokens=False)

    def order(self, windows: int) -> list[int]:
        """The lengths of so many windows, in the order in which they are cut from a text; see `counts`."""
        pairs = self.counts(windows)
        places = ((place + 0.5) / count for _, count in pairs for place in range(count))
        every = [length for length, count in pairs for _ in range(count)]
        return [length for _, length in sorted(zip(places, every, strict=True), key=lambda pair: pair[0])]

    def counts(self, windows: int) -> list[tuple[int, int]]:
        """Each length and how many of so many windows have it.

        Each share is rounded so that there are exactly as many windows as asked for, and at least one of each length.
        Raises InputError for fewer windows than lengths, and for more than a million.
        """
        check_number("windows is how many to take", windows)
        lengths = self._chosen(windows)
        if windows < len(lengths):
            raise InputError(f"{windows} windows cannot have {len(lengths)} lengths: ask for more windows")
        shares = [1 / length if self.by_tokens else 1.0 for length in lengths]
        exact = [windows * share / sum(shares) for share in shares]
        counts = [max(1, int(count)) for count in exact]
        while missing := windows - sum(counts):
            step = 1 if missing > 0 else -1
            movable = [index for index, count in enumerate(counts) if count + step > 0]
            counts[max(movable, key=lambda index: step * (exact[index] - counts[index]))] += step
        return list(zip(lengths, counts, strict=True))

    def _chosen(self, windows: int) -> tuple[int, ...]:
        """All lengths, or evenly spaced ones where quantiles are more than windows."""
        count = len(self.lengths)
        if self.by_tokens or windows >= count:
            return self.lengths
        return tuple(self.lengths[(2 * index + 1) * count // (2 * windows)] for index in range(windows))


def check_number(what: str, number: int) -> None:
    """Raise InputError for a number of windows or tokens that is not from 1 to about a million."""
    if not 1 <= number <= _MOST:
        raise InputError(f"{what}, from 1 to {_MOST}, not {number}")
