"""Which matmuls are to be quantized, by name pattern.

Everything is, but for the output head (`lm_head`, a tied embedding) and embeddings. `exclude` leaves more in float;
`include` wins over both. Patterns are shell-style (`*.down_proj`, `model.layers.0.*`) and match a parameter's full name
or its module's path; one that matches nothing is an error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mxcompile.errors import UnknownNameError


@dataclass(frozen=True)
class Selection:
    """Patterns, and whether covering less than half of the matmul weight bytes is acceptable."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_partial: bool = False

    def included(self, *names: str) -> bool:
        """True if one of the names of a parameter or module is asked for by `include`."""
        return _matches(self.include, names)

    def excluded(self, *names: str) -> bool:
        """True if one of the names is ruled out by `exclude`."""
        return _matches(self.exclude, names)

    def check(self, known: Iterable[str]) -> None:
        """Raise `UnknownNameError` for a pattern that matches none of the known names."""
        names = tuple(known)
        for pattern in (*self.include, *self.exclude):
            if not _matches((pattern,), names):
                raise UnknownNameError("module or parameter pattern", pattern, names)


def _matches(patterns: tuple[str, ...], names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
