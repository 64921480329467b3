"""Dump folder -> `index.html`: the overview as HTML, the rest as JSON that scripts draw on demand.

Names and errors of the model are untrusted: the template escapes them, the JSON escapes `<`, `>` and `&`, and the
scripts set text, never HTML. The content security policy of the page forbids requests and all scripts but its own.
"""

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import isinf
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.filters import do_filesizeformat

from mxcompile.diagnostics.allocation_table import allocation_lines, item_name
from mxcompile.diagnostics.diagnosis import Diagnosis, three_digits
from mxcompile.diagnostics.dump_reader import DumpReader
from mxcompile.diagnostics.ledger import Ledger
from mxcompile.diagnostics.report.content import page_content
from mxcompile.graph.records import ModelMeasurements

_LIBRARIES = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "vendor/diff2html.min.js")
_SCRIPTS = ("page.js", "search.js", "heat.js", "layer.js", "diagnosis.js", "training.js", "passes.js", "graph.js")
_STYLES = ("vendor/diff2html.min.css", "page.css")
_FOLDER = files("mxcompile.diagnostics.report")


@dataclass(frozen=True)
class Tile:
    """A number of the overview with its label and a remark."""

    label: str
    value: str
    remark: str = ""


def print_page(dump: DumpReader) -> str:
    """The text of the page; the same dump always makes the same page."""
    ledger = dump.ledger()
    failure, diagnosis, allocation = dump.failure(), Diagnosis.of(ledger.passes), ledger.allocation()
    return render(
        "page.html",
        (_LIBRARIES, _SCRIPTS),
        _STYLES,
        ledger=ledger,
        pipeline=dump.pipeline(),
        tiles=_tiles(ledger),
        failure=failure,
        allocation=allocation,
        allocation_lines=() if allocation is None else allocation_lines(allocation),
        diagnosis=diagnosis,
        content=page_content(dump, ledger, diagnosis),
    )


def render(
    template: str, scripts: tuple[tuple[str, ...], tuple[str, ...]], styles: Sequence[str], **values: Any
) -> str:
    """The text of a page that needs no other file. scripts: the libraries, and those that draw the page."""
    texts = _joined(*scripts)
    return (
        _environment()
        .get_template(template)
        .render(
            scripts=texts,
            hashes=" ".join(f"'sha256-{_digest(script)}'" for script in texts),
            styles=list(map(_asset, styles)),
            licenses=_asset("vendor/LICENSES.txt"),
            **values,
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mxcompile.diagnostics.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"item_name": item_name, "db": _db, "nats": _nats, "share": _share, "short": three_digits}
    return environment


@cache
def _joined(libraries: tuple[str, ...], scripts: tuple[str, ...]) -> tuple[str, str]:
    return ";\n".join(map(_asset, libraries)), '"use strict";\n' + "\n".join(map(_asset, scripts))


def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _tiles(ledger: Ledger) -> list[Tile]:
    if not ledger.passes:
        return [Tile("Size", do_filesizeformat(ledger.bytes), "float, no pass has run")]
    last = ledger.passes[-1]
    size = f"{last.bytes / ledger.bytes:.0%} of {do_filesizeformat(ledger.bytes)}" if ledger.bytes else ""
    tiles = [Tile("Size", do_filesizeformat(last.bytes), size)]
    if last.measured is not None:
        tiles += _measured_tiles(last.measured)
    misses = ledger.misses()
    return [
        *tiles,
        Tile("Misses", str(len(misses)), "skipped, with reasons" if misses else "nothing was skipped"),
    ]


def _measured_tiles(measured: ModelMeasurements) -> list[Tile]:
    tiles = [Tile("Output SQNR", _db(measured.output_db), "against the float model")]
    if measured.kl is not None:
        tiles.append(Tile("KL divergence", _nats(measured.kl), "nats per position, from the float model"))
        tiles.append(Tile("Top-1 agreement", _share(measured.top1), "of positions, with the float model"))
    pairs = Counter((layer.weight or "float", layer.activation or "float") for layer in measured.layers.values())
    formats = ", ".join(f"{count} in {weight} on {activation}" for (weight, activation), count in pairs.most_common(2))
    return [*tiles, Tile("Layers", str(len(measured.layers)), formats)]


def _db(value: float | None) -> str:
    if value is None:
        return ""
    return "exact" if isinf(value) and value > 0 else f"{value:.1f} dB"


def _nats(value: float | None) -> str:
    return "" if value is None else f"{max(value, 0.0):.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
