"""What the page's scripts show: a dump's numbers, distributions, graphs and diffs, as one JSON value.

passes   [{name, spec, diff, numbers: {layer: {weight, activation, weight_db, ...}}, distributions: {layer: ...}}]
stages   [{name, nodes: [[name, op, call, dtype, shape, format, module], ...]}], the trace first
layers   [{name, module, row, column}], in graph order
"""

import re
from dataclasses import asdict, astuple
from typing import Any

from mxcompile.diagnostics.dump_reader import DumpReader
from mxcompile.diagnostics.ledger import Ledger, plain
from mxcompile.diagnostics.report.nodes import read_graph
from mxcompile.graph.records import PassRecord
from mxcompile.numerics.histogram import Distribution

_COUNT = re.compile(r" \(\d+\)$")
_WEIGHT = re.compile(r"\.weight( \(\d+\))?$")
_SPACES = re.compile(r"(?<=\S) {2,}")


def page_content(dump: DumpReader, ledger: Ledger) -> dict[str, Any]:
    """Plain values, for JSON."""
    found = dump.distributions().passes
    stages = dump.stages()
    passes = [
        _pass(record, narrow((dump.folder / f"{stage}.diff").read_text(encoding="utf-8")), distributions)
        for record, stage, distributions in zip(ledger.passes, stages[1:], found, strict=True)
    ]
    graphs = [{"name": stage, "nodes": list(map(astuple, read_graph(dump.text(stage))))} for stage in stages]
    return {"passes": passes, "stages": graphs, "layers": list(map(_layer, ledger.layers()))}


def owner(layer: str) -> str:
    """Path of the module that a layer's weight belongs to."""
    return _COUNT.sub("", layer).rpartition(".")[0]


def place(layer: str) -> tuple[str, str]:
    """Row and column of a layer in the heat map, a row for each repeated block: `model.layers.3`, `mlp.up_proj`."""
    parts = _WEIGHT.sub(r"\1", layer).split(".")
    cut = next((i for i, part in enumerate(parts[:-1], start=1) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def narrow(text: str) -> str:
    """A graph's text without the columns: two spaces for many."""
    return _SPACES.sub("  ", text)


def _pass(record: PassRecord, diff: str, distributions: dict[str, Distribution]) -> dict[str, Any]:
    layers = {} if record.measured is None else record.measured.layers
    numbers = {name: plain(asdict(found)) for name, found in layers.items()}
    shown = {name: asdict(found) for name, found in distributions.items()}
    return {"name": record.name, "spec": record.spec, "diff": diff, "numbers": numbers, "distributions": shown}


def _layer(name: str) -> dict[str, str]:
    row, column = place(name)
    return {"name": name, "module": owner(name), "row": row, "column": column}
