"""Other formats for some weights, by name pattern: `{"*.down_proj": MXFP8_E4M3, "model.layers.0.*": None}`.

Patterns are those of `Selection`: shell-style, on a parameter's full name or its module's path. None leaves a layer in
float, its input too. Of several patterns that match the last one counts. Text form, as an option of a pass:
`overrides=[*.down_proj=mxfp8_e4m3,model.layers.0.*=none]`.
"""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat

_RESERVED = ",={}|"


class Overrides(Mapping[str, MXFormat | None]):
    """An immutable mapping in a fixed order. Raises PipelineError for a pattern that has no text form."""

    def __init__(self, given: Mapping[str, MXFormat | None] | None = None) -> None:
        self._formats = dict(given or {})
        for pattern in self._formats:
            if not pattern or any(mark in pattern for mark in _RESERVED) or pattern.count("[") != pattern.count("]"):
                raise PipelineError(
                    f"the override pattern {pattern!r} is empty, or holds one of {_RESERVED} or a lone ["
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


def last_match(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The last pattern that matches one of the names."""
    names = tuple(names)
    return next((p for p in reversed(tuple(patterns)) if any(fnmatchcase(name, p) for name in names)), None)
