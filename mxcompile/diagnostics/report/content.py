"""The data of the report page: measurements, histograms, graphs and diffs of a dump, as one JSON value.

passes   [{name, spec, diff, numbers: {layer: {weight, activation, weight_db, ...}}, distributions: {layer: ...},
           curves: {what: {training: [[step, loss], ...], held_out: ...}}}]
         A measured pass also has the keys and values that are cached rounded, by `quantize-cache` or before it.
stages   [{name, nodes: [[name, op, call, dtype, shape, format, module], ...]}], the trace first
layers   [{name, module, row, column}], in graph order, then cached keys and values
diagnosis   [{name, layers, outliers, advice, numbers}] of the values that layers read, or null
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import Any

from mxcompile.diagnostics.diagnosis import Diagnosis, ValueDiagnosis
from mxcompile.diagnostics.dump_reader import DumpReader
from mxcompile.diagnostics.ledger import Ledger, plain
from mxcompile.diagnostics.report.nodes import read_graph
from mxcompile.graph.records import PassRecord
from mxcompile.numerics.histogram import HistogramChange

_COUNT = re.compile(r" \(\d+\)$")
_WEIGHT = re.compile(r"\.weight( \(\d+\))?$")
_SPACES = re.compile(r"(?<=\S) {2,}")
_CACHED = {"key_sqnr_db": "cached_keys", "value_sqnr_db": "cached_values"}


def page_content(dump: DumpReader, ledger: Ledger, diagnosis: Diagnosis | None) -> dict[str, Any]:
    """Plain values, for JSON."""
    histograms = dump.distributions().passes
    stages = dump.stages()
    cached = cached_numbers(ledger.passes)
    passes = [
        _pass(record, collapse_columns((dump.folder / f"{stage}.diff").read_text(encoding="utf-8")), layers, caches)
        for record, stage, layers, caches in zip(ledger.passes, stages[1:], histograms, cached, strict=True)
    ]
    graphs = [{"name": stage, "nodes": list(map(astuple, read_graph(dump.text(stage))))} for stage in stages]
    values = None if diagnosis is None else list(map(_diagnosed, diagnosis.values))
    rounded = dict.fromkeys(name for caches in cached for name in caches)
    layers = list(map(_layer, (*ledger.layers(), *rounded)))
    return {"passes": passes, "stages": graphs, "layers": layers, "diagnosis": values}


def cached_numbers(records: Sequence[PassRecord]) -> list[dict[str, dict[str, Any]]]:
    """Numbers of keys and values that are cached rounded, after each pass: rounding them is their own error.

    A pass that was not measured has none, like its layers. `cache` is the pass that rounded them.
    """
    found: list[dict[str, dict[str, Any]]] = []
    cached: dict[str, dict[str, Any]] = {}
    for record in records:
        for layer, numbers in record.numbers.items():
            for number, name in _CACHED.items():
                if number in numbers:
                    errors = {"weight_db": None, "local_db": numbers[number], "accumulated_db": None}
                    cached = cached | {f"{layer}.{name}": {"cache": record.spec, **errors}}
        found.append(cached if record.measured is not None else {})
    return found


def owner(layer: str) -> str:
    """Path of the module that owns a layer's weight."""
    return _COUNT.sub("", layer).rpartition(".")[0]


def cell(layer: str) -> tuple[str, str]:
    """Row and column of a layer in the heat map: `model.layers.3`, `mlp.up_proj`. A repeated block is a row."""
    parts = _WEIGHT.sub(r"\1", layer).split(".")
    split = next((i for i, part in enumerate(parts[:-1], start=1) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:split]), ".".join(parts[split:])


def collapse_columns(text: str) -> str:
    """The text of a graph with two spaces between its columns."""
    return _SPACES.sub("  ", text)


def _pass(
    record: PassRecord, diff: str, distributions: dict[str, HistogramChange], cached: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    layers = {} if record.measured is None else record.measured.layers
    numbers = {name: plain(asdict(layer)) for name, layer in layers.items()} | plain(cached)
    histograms = {name: asdict(change) for name, change in distributions.items()}
    curves = {name: plain(asdict(curve)) for name, curve in record.curves.items()}
    texts = {"name": record.name, "spec": record.spec, "diff": diff}
    return texts | {"numbers": numbers, "distributions": histograms, "curves": curves}


def _diagnosed(value: ValueDiagnosis) -> dict[str, Any]:
    return {
        "name": value.name,
        "layers": value.layers,
        "outliers": value.has_outliers,
        "advice": None if value.advice is None else str(value.advice),
        "numbers": plain(dict(value.numbers)),
    }


def _layer(name: str) -> dict[str, str]:
    row, column = cell(name)
    return {"name": name, "module": owner(name), "row": row, "column": column}
