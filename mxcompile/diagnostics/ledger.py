"""The ledger of a run: rewrites, misses, seconds, bytes and measurements of every pass.

A pass returns a `PassResult`, from which the pipeline makes a `PassRecord` with the measurements of the instruments. A
`Ledger` holds the records of a run, as tables and as a file for other programs (`ledger.json`).
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from mxcompile.arguments import checked
from mxcompile.diagnostics.allocation_table import print_allocation
from mxcompile.diagnostics.tables import graded, table
from mxcompile.errors import DumpError
from mxcompile.graph.records import (
    Allocation,
    ItemFormat,
    LayerMeasurements,
    LossCurve,
    Miss,
    ModelMeasurements,
    PassRecord,
)

SCHEMA = 3
FILE = "ledger.json"
_GOOD_DB, _BAD_DB = 30.0, 15.0  # SQNR with little loss (green), with visible loss (red)
_INFINITE = {math.inf: "inf", -math.inf: "-inf"}


@dataclass(frozen=True)
class Ledger:
    """The records of a run. pipeline: its text form. bytes: of the model before the first pass.

    The file is a JSON object, `{"schema": 3, "pipeline": str, "bytes": int, "passes": [...]}`; a pass has the fields of
    `PassRecord`, and inside those of `Miss`, `ModelMeasurements` (without its distributions) and `LayerMeasurements`. A
    number that is not finite is the string "inf" (an SQNR without any error), "-inf" or "nan"; null is what was not
    measured. Any change of a name or a meaning increments the schema number.
    """

    pipeline: str
    bytes: int
    passes: tuple[PassRecord, ...]

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "Ledger":
        """Read a `ledger.json`, or the one in a dump folder; raises DumpError if it does not have this schema."""
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            schema = content["schema"]
            if schema == SCHEMA:
                return cls(content["pipeline"], content["bytes"], tuple(map(_record, content["passes"])))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DumpError(f"{file} is not a ledger ({type(error).__name__}: {error}): dump it again") from error
        raise DumpError(f"{file} has schema {schema}, this version of mxcompile reads {SCHEMA}: dump it again")

    def record(self) -> dict[str, Any]:
        """The content of the file, as plain values."""
        passes = [plain(_fields(record)) for record in self.passes]
        return {"schema": SCHEMA, "pipeline": self.pipeline, "bytes": self.bytes, "passes": passes}

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.record(), indent=1) + "\n"

    def layers(self) -> tuple[str, ...]:
        """Names of all measured layers, in graph order."""
        return tuple(dict.fromkeys(name for record in self.passes for name in _layers_of(record)))

    def misses(self) -> dict[Miss, list[str]]:
        """Each miss once, with the names of the passes that reported it."""
        passes_of: dict[Miss, list[str]] = {}
        for record in self.passes:
            for miss in record.misses:
                passes_of.setdefault(miss, []).append(record.name)
        return passes_of

    def to_table(self) -> Table:
        """A row for every pass; cells without a measurement are empty."""
        title = "passes: SQNR of the outputs and agreement across the pass in dB, KL in nats"
        numbers = ("rewrites", "misses", "s", "MB", "output dB", "KL", "top-1", "preserved dB")
        return table(("pass",), numbers, [(record.name, *_cells(record)) for record in self.passes], title)

    def to_layer_table(self, worst: int | None = None) -> Table:
        """A row for every layer, or for the `worst` layers with the largest local error, the worst first.

        The local column is that of the last pass; an "after" column holds the accumulated SQNR after a pass.
        """
        measured = [record for record in self.passes if record.measured is not None]
        rows: list[list[str | Text]] = []
        for name in self.layers() if worst is None else self.worst(worst):
            numbers = [_layers_of(record).get(name) for record in measured]
            last = next(layer for layer in reversed(numbers) if layer is not None)
            row = [name, last.weight or "float", last.activation or "float", _db(last.weight_db), _db(last.local_db)]
            rows.append([*row, *(_db(layer.accumulated_db if layer else None) for layer in numbers)])
        after = ("after\n" + record.name.replace("-", "-\n") for record in measured)
        title = f"layers{'' if worst is None else ', the worst first'}: SQNR in dB"
        return table(("layer", "weight", "input"), ("of\nweight", "local", *after), rows, title)

    def expert_tokens(self) -> dict[str, tuple[int, ...]]:
        """Calibration tokens of each expert, by layer, as the last pass that counted them did.

        A layer is what holds the experts' weights. Where its weights have other counts, each is named.
        """
        counts = {name: each for record in self.passes for name, each in record.expert_tokens.items()}
        layers: dict[str, set[tuple[int, ...]]] = {}
        for name, each in counts.items():
            layers.setdefault(name.rpartition(".")[0] or name, set()).add(each)
        return {_layer(name, layers): each for name, each in counts.items()}

    def to_expert_table(self) -> Table:
        """How many calibration tokens reach the experts of each layer."""
        rows: list[list[str | Text]] = []
        for layer, counts in self.expert_tokens().items():
            none = counts.count(0)
            numbers = map(str, (min(counts), round(median(counts)), max(counts)))
            rows.append([layer, str(len(counts)), Text(str(none), style="yellow" if none else ""), *numbers])
        titles = ("experts", "without\ntokens", "least", "median", "most")
        return table(("layer",), titles, rows, "calibration tokens of an expert")

    def allocation(self) -> Allocation | None:
        """The formats that the last pass that chose any has chosen under a budget."""
        chosen = (record.allocation for record in reversed(self.passes))
        return next((allocation for allocation in chosen if allocation is not None), None)

    def to_miss_table(self) -> Table:
        """What was skipped, why, by which passes, and the size of the tensors that stay float because of it."""
        rows = [
            (miss.where, miss.reason, ", ".join(names), decimal(miss.bytes) if miss.bytes else "")
            for miss, names in self.misses().items()
        ]
        return table(("skipped", "reason", "passes"), ("size",), rows, "misses")

    def print_to(self, console: Console, worst: int = 12) -> None:
        """Print the pipeline and the tables of passes, of the worst layers, of experts and of misses."""
        console.print(Text("\n| ".join(self.pipeline.split(" | "))))
        console.print(self.to_table())
        if self.layers():
            console.print(self.to_layer_table(worst))
        if (allocation := self.allocation()) is not None:
            print_allocation(console, allocation)
        if self.expert_tokens():
            console.print(self.to_expert_table())
        if self.misses():
            console.print(self.to_miss_table())

    def worst(self, count: int) -> list[str]:
        """The layers with the largest local error after the last measured pass, the worst first."""
        last = next((_layers_of(r) for r in reversed(self.passes) if r.measured is not None), {})
        errors = {name: layer.local_db for name, layer in last.items() if layer.local_db is not None}
        return sorted(errors, key=lambda name: errors[name])[:count]


def _layer(weight: str, layers: Mapping[str, Collection[object]]) -> str:
    """The layer of an expert weight; the weight itself where those of the layer have other counts of tokens."""
    layer = weight.rpartition(".")[0] or weight
    return layer if len(layers[layer]) == 1 else weight


def _layers_of(record: PassRecord) -> dict[str, LayerMeasurements]:
    return {} if record.measured is None else record.measured.layers


def _record(content: dict[str, Any]) -> PassRecord:
    measured = content["measured"]
    misses = tuple(Miss(**miss) for miss in content["misses"])
    read = _read(content, "name", "spec")
    tokens = {name: tuple(map(int, counts)) for name, counts in content["expert_tokens"].items()}
    return PassRecord(
        **read
        | {"misses": misses, "measured": measured and _measured(measured), "expert_tokens": tokens}
        | {"allocation": _allocation(content.get("allocation"))}
        | {"curves": {name: LossCurve.of(curve) for name, curve in content.get("curves", {}).items()}}
    )


def _allocation(content: dict[str, Any] | None) -> Allocation | None:
    if content is None:
        return None
    items = (_read(item, "weights", "format", "activation") for item in content["items"])
    return Allocation(
        **_read(content, "score", "solver", "limit", "unit", "rounding")
        | {"items": tuple(ItemFormat(**item | {"weights": tuple(item["weights"])}) for item in items)}
    )


def _measured(content: dict[str, Any]) -> ModelMeasurements:
    layers = {
        name: LayerMeasurements(**_read(layer, "weight", "activation")) for name, layer in content["layers"].items()
    }
    return ModelMeasurements(**_read(content) | {"layers": layers})


def _fields(record: PassRecord) -> dict[str, Any]:
    if record.measured is None:
        return asdict(record)
    fields = asdict(replace(record, measured=replace(record.measured, distributions={})))
    del fields["measured"]["distributions"]
    return fields


def plain(value: Any) -> Any:
    """A value for JSON, in which floats that are not finite become the strings "inf", "-inf" and "nan"."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _INFINITE.get(value, "nan")
    return value


def _read(value: Any, *texts: str) -> Any:
    """The inverse of `plain`, except for the entries of an object named in `texts`: a pass may be called inf."""
    if isinstance(value, dict):
        return {key: item if key in texts else _read(item) for key, item in value.items()}
    return float(value) if value in ("inf", "-inf", "nan") else value


def _cells(record: PassRecord) -> tuple[str | Text, ...]:
    """The cells of a pass in a table."""
    misses = Text(str(len(record.misses)), style="yellow" if record.misses else "")
    counts = (str(record.rewrites), misses, f"{record.seconds:.2f}", f"{record.bytes / 1e6:.1f}")
    measured = record.measured
    numbers = ("", "", "") if measured is None else (_db(measured.output_db), _nats(measured.kl), _share(measured.top1))
    return *counts, *numbers, _db(record.preserved_db)


def _db(value: float | None) -> Text:
    text = "" if value is None else "exact" if value == math.inf else f"{value:.1f}"
    return graded(text, value, _GOOD_DB, _BAD_DB)


def _nats(value: float | None) -> str:
    return "" if value is None else f"{round(value, 4) + 0.0:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
