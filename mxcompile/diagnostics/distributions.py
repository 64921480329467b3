"""The file of a dump that holds histograms of each layer's weight and input, before and after every pass."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mxcompile.errors import DumpError
from mxcompile.numerics.histogram import Distribution, Histogram, Values

SCHEMA = 1
FILE = "distributions.json"


@dataclass(frozen=True)
class Distributions:
    """The layers' distributions around each pass of a run, in order; a pass without measurement has none.

    The file is a JSON object, `{"schema": 1, "passes": [{layer: {"before": VALUES, "after": VALUES}}]}`, VALUES being
    `{"weight": HISTOGRAM, "input": HISTOGRAM or null, "rounded": HISTOGRAM or null}` and a HISTOGRAM having the fields
    of that class. The schema's number changes with every change of names or meanings.
    """

    passes: tuple[dict[str, Distribution], ...] = ()

    @classmethod
    def load(cls, folder: Path) -> "Distributions":
        """Read the file of a dump folder; raises DumpError if it is not one of this schema."""
        file = folder / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            schema = content["schema"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DumpError(f"{file} holds no distributions ({type(error).__name__}: {error})") from error
        if schema != SCHEMA:
            raise DumpError(f"{file} has schema {schema}, this version of mxcompile reads {SCHEMA}: dump it again")
        return cls(tuple({name: _distribution(found) for name, found in each.items()} for each in content["passes"]))

    def to_json(self) -> str:
        """The file's text, a line for each pass."""
        passes = [{name: asdict(found) for name, found in each.items()} for each in self.passes]
        lines = ",\n".join(json.dumps(each, separators=(",", ":")) for each in passes)
        return f'{{"schema": {SCHEMA}, "passes": [\n{lines}\n]}}\n'


def _distribution(content: dict[str, Any]) -> Distribution:
    return Distribution(*(_values(content[when]) for when in ("before", "after")))


def _values(content: dict[str, Any]) -> Values:
    given, rounded = (content[kind] and _histogram(content[kind]) for kind in ("input", "rounded"))
    return Values(_histogram(content["weight"]), given, rounded)


def _histogram(content: dict[str, Any]) -> Histogram:
    return Histogram(content["zeros"], content["nonfinite"], content["first"], tuple(content["counts"]))
