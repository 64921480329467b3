"""What each pass did: rewrites, misses with reasons, seconds, bytes, and what was measured of the model and its layers.

A pass returns a `PassResult`; the pipeline makes a `PassRecord` of it, with what instruments measured. A `Ledger` is
all records of a run: a table, and a file that others may read (`ledger.json`).
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mxcompile.diagnostics.tables import graded, table
from mxcompile.errors import DumpError
from mxcompile.graph.records import LayerNumbers, Measured, Miss, PassRecord

SCHEMA = 2
FILE = "ledger.json"
_GOOD_DB, _BAD_DB = 30.0, 15.0  # an SQNR that costs little; one that is felt: their colours in tables
_INFINITE = {math.inf: "inf", -math.inf: "-inf"}


@dataclass(frozen=True)
class Ledger:
    """The records of a run. pipeline: its text form. bytes: of the model before the first pass.

    The file is a JSON object, `{"schema": 2, "pipeline": str, "bytes": int, "passes": [...]}`; a pass has the fields of
    `PassRecord`, with those of `Miss`, `Measured` (but for its distributions) and `LayerNumbers` inside. A number that
    is not finite is the string "inf" (an SQNR without any error), "-inf" or "nan"; null is what was not measured. The
    schema's number changes with every change of names or meanings.
    """

    pipeline: str
    bytes: int
    passes: tuple[PassRecord, ...]

    @classmethod
    def load(cls, path: str | Path) -> "Ledger":
        """Read a `ledger.json`, or the one of a dump folder; raises DumpError if it is not one of this schema."""
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            schema = content["schema"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DumpError(f"{file} is not a ledger ({type(error).__name__}: {error})") from error
        if schema != SCHEMA:
            raise DumpError(f"{file} has schema {schema}, this version of mxcompile reads {SCHEMA}: dump it again")
        return cls(content["pipeline"], content["bytes"], tuple(map(_record, content["passes"])))

    def record(self) -> dict[str, Any]:
        """Plain values: what the file holds."""
        passes = [plain(_fields(record)) for record in self.passes]
        return {"schema": SCHEMA, "pipeline": self.pipeline, "bytes": self.bytes, "passes": passes}

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.record(), indent=1) + "\n"

    def layers(self) -> tuple[str, ...]:
        """Names of all layers that were measured, in graph order."""
        return tuple(dict.fromkeys(name for record in self.passes for name in _layers_of(record)))

    def misses(self) -> dict[Miss, list[str]]:
        """Each miss once, with the passes that met it."""
        found: dict[Miss, list[str]] = {}
        for record in self.passes:
            for miss in record.misses:
                found.setdefault(miss, []).append(record.name)
        return found

    def to_table(self) -> Table:
        """A row for every pass; what was not measured is left empty."""
        title = "passes: outputs and what they were kept to in dB, KL in nats"
        numbers = ("rewrites", "misses", "s", "MB", "outputs", "KL", "top-1", "kept to")
        return table(("pass",), numbers, [(record.name, *_cells(record)) for record in self.passes], title)

    def to_layer_table(self, worst: int | None = None) -> Table:
        """A row for every layer, or for those with the largest error of their own, the worst first.

        local: the last pass's. after a pass: along the path.
        """
        measured = [record for record in self.passes if record.measured is not None]
        rows: list[list[str | Text]] = []
        for name in self.layers() if worst is None else self.worst(worst):
            numbers = [_layers_of(record).get(name) for record in measured]
            last = next(found for found in reversed(numbers) if found is not None)
            row = [name, last.weight or "float", last.activation or "float", _db(last.weight_db), _db(last.local_db)]
            rows.append([*row, *(_db(found.accumulated_db if found else None) for found in numbers)])
        along = ("after\n" + record.name.replace("-", "-\n") for record in measured)
        title = f"layers{'' if worst is None else ', the worst first'}: SQNR in dB"
        return table(("layer", "weight", "input"), ("of\nweight", "local", *along), rows, title)

    def to_miss_table(self) -> Table:
        """What was left alone, why, and by which passes."""
        rows = [(miss.where, miss.reason, ", ".join(names)) for miss, names in self.misses().items()]
        return table(("left alone", "because", "by"), (), rows, "misses")

    def print_to(self, console: Console, worst: int = 12) -> None:
        """The pipeline, and the tables: of passes, of the worst layers, and of misses."""
        console.print(Text("\n| ".join(self.pipeline.split(" | "))))
        console.print(self.to_table())
        if self.layers():
            console.print(self.to_layer_table(worst))
        if self.misses():
            console.print(self.to_miss_table())

    def worst(self, count: int) -> list[str]:
        """The layers with the largest error of their own after the last measured pass, the worst first."""
        last = next((_layers_of(r) for r in reversed(self.passes) if r.measured is not None), {})
        errors = {name: found.local_db for name, found in last.items() if found.local_db is not None}
        return sorted(errors, key=lambda name: errors[name])[:count]


def _layers_of(record: PassRecord) -> dict[str, LayerNumbers]:
    return {} if record.measured is None else record.measured.layers


def _record(content: dict[str, Any]) -> PassRecord:
    measured = content["measured"]
    misses = tuple(Miss(**miss) for miss in content["misses"])
    read = _read(content, "name", "spec")
    return PassRecord(**read | {"misses": misses, "measured": measured and _measured(measured)})


def _measured(content: dict[str, Any]) -> Measured:
    layers = {name: LayerNumbers(**_read(layer, "weight", "activation")) for name, layer in content["layers"].items()}
    return Measured(**_read(content) | {"layers": layers})


def _fields(record: PassRecord) -> dict[str, Any]:
    if record.measured is None:
        return asdict(record)
    fields = asdict(replace(record, measured=replace(record.measured, distributions={})))
    del fields["measured"]["distributions"]
    return fields


def plain(value: Any) -> Any:
    """A value as JSON has it: what is not finite is a word."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _INFINITE.get(value, "nan")
    return value


def _read(value: Any, *texts: str) -> Any:
    """The inverse, but for the entries of an object that are texts: a pass may be called inf."""
    if isinstance(value, dict):
        return {key: item if key in texts else _read(item) for key, item in value.items()}
    return float(value) if value in ("inf", "-inf", "nan") else value


def _cells(record: PassRecord) -> tuple[str | Text, ...]:
    """A pass's numbers as a table has them."""
    misses = Text(str(len(record.misses)), style="yellow" if record.misses else "")
    counts = (str(record.rewrites), misses, f"{record.seconds:.2f}", f"{record.bytes / 1e6:.1f}")
    found = record.measured
    numbers = ("", "", "") if found is None else (_db(found.output_db), _number(found.kl), _share(found.top1))
    return *counts, *numbers, _db(record.preserved_db)


def _db(value: float | None) -> Text:
    text = "" if value is None else "exact" if value == math.inf else f"{value:.1f}"
    return graded(text, value, _GOOD_DB, _BAD_DB)


def _number(value: float | None) -> str:
    return "" if value is None else f"{round(value, 4) + 0.0:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
