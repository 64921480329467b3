"""Name patterns of the user: which matmuls are quantized (`Selection`), and in which formats (`Overrides`).

Patterns are shell-style (`*.down_proj`, `model.layers.0.*`) and match a parameter's full name or its module's path. In
a `Selection`, one that matches nothing is an error.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mxcompile.errors import PipelineError, UnknownNameError
from mxcompile.formats import MXFormat, parse_format

_RESERVED = ",={}|"


@dataclass(frozen=True)
class Selection:
    """Which matmuls are quantized: all but the output head (`lm_head`, a tied embedding), embeddings, and
    routers (matmuls that choose what others multiply).

    exclude: keeps more in float. include: wins over both. allow_partial: accept that less than half of the matmul
    weight bytes is quantized.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_partial: bool = False

    def included(self, *names: str) -> bool:
        """True if `include` matches one of the names of a parameter or module."""
        return _matches(self.include, names)

    def excluded(self, *names: str) -> bool:
        """True if `exclude` matches one of the names."""
        return _matches(self.exclude, names)

    def check(self, names: Iterable[str]) -> None:
        """Raise `UnknownNameError` for a pattern that matches none of the names."""
        names = tuple(names)
        for pattern in (*self.include, *self.exclude):
            if not _matches((pattern,), names):
                raise UnknownNameError("module or parameter pattern", pattern, names)


def _matches(patterns: tuple[str, ...], names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


class Overrides(Mapping[str, MXFormat | None]):
    """Formats that differ from a pass's default: `{"*.down_proj": MXFP8_E4M3, "model.layers.0.*": None}`, immutable.

    A format may be given by its name, `"mxint8"`. None keeps a layer in float, its input too. If several patterns
    match, the last one counts. Text form, as an option of a pass: `overrides=[*.down_proj=mxfp8_e4m3,lm_head=none]`.
    Raises PipelineError for a pattern that has no text form, and for what is no format.
    """

    def __init__(self, formats: Mapping[str, MXFormat | str | None] | None = None) -> None:
        self._formats = {pattern: _as_format(pattern, fmt) for pattern, fmt in dict(formats or {}).items()}
        for pattern in self._formats:
            if not pattern or any(mark in pattern for mark in _RESERVED) or pattern.count("[") != pattern.count("]"):
                raise PipelineError(
                    f"the override pattern {pattern!r} is empty, or contains one of {_RESERVED} or an unmatched ["
                )

    def __getitem__(self, pattern: str) -> MXFormat | None:
        return self._formats[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Overrides) and list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return f"Overrides({self._formats!r})"


def _as_format(pattern: str, fmt: Any) -> MXFormat | None:
    if isinstance(fmt, str):
        return parse_format(fmt)
    if fmt is None or isinstance(fmt, MXFormat):
        return fmt
    raise PipelineError(f"the override of {pattern!r} is {fmt!r}: give a format, its name, or None for float")


def last_match(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The last pattern that matches one of the names."""
    names = tuple(names)
    return next((p for p in reversed(tuple(patterns)) if any(fnmatchcase(name, p) for name in names)), None)
