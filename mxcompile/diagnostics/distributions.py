"""`distributions.json` of a dump: histograms of each layer's weight and input, before and after every pass."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mxcompile.errors import DumpError
from mxcompile.numerics.histogram import Histogram, HistogramChange, LayerHistograms

SCHEMA = 1
FILE = "distributions.json"


@dataclass(frozen=True)
class Distributions:
    """The layers' histograms before and after each pass of a run, in order; empty for a pass that was not measured.

    The file is a JSON object, `{"schema": 1, "passes": [{layer: {"before": VALUES, "after": VALUES}}]}`. VALUES is
    `{"weight": HISTOGRAM, "input": HISTOGRAM or null, "rounded": HISTOGRAM or null}`, and a HISTOGRAM has the fields of
    that class. Any change of a name or a meaning increments the schema number.
    """

    passes: tuple[dict[str, HistogramChange], ...] = ()

    @classmethod
    def load(cls, folder: Path) -> "Distributions":
        """Read the file of a dump folder; raises DumpError if it does not have this schema."""
        file = folder / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            schema = content["schema"]
            if schema == SCHEMA:
                return cls(tuple({name: _change(layer) for name, layer in each.items()} for each in content["passes"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DumpError(
                f"{file} holds no distributions ({type(error).__name__}: {error}): dump it again"
            ) from error
        raise DumpError(f"{file} has schema {schema}, this version of mxcompile reads {SCHEMA}: dump it again")

    def to_json(self) -> str:
        """The text of the file, one line for each pass."""
        passes = [{name: asdict(change) for name, change in each.items()} for each in self.passes]
        lines = ",\n".join(json.dumps(each, separators=(",", ":")) for each in passes)
        return f'{{"schema": {SCHEMA}, "passes": [\n{lines}\n]}}\n'


def _change(content: dict[str, Any]) -> HistogramChange:
    return HistogramChange(*(_layer(content[when]) for when in ("before", "after")))


def _layer(content: dict[str, Any]) -> LayerHistograms:
    x, rounded = (content[kind] and _histogram(content[kind]) for kind in ("input", "rounded"))
    return LayerHistograms(_histogram(content["weight"]), x, rounded)


def _histogram(content: dict[str, Any]) -> Histogram:
    return Histogram(content["zeros"], content["nonfinite"], content["first"], tuple(content["counts"]))
