"""A format of weights with the format of their inputs, and a weight rounded to it as later passes will."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mxcompile.analysis.format_items import FormatItems
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.calibration.quantizers import input_format
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.graph.program import Program
from mxcompile.graph.records import ItemFormat
from mxcompile.numerics.importance import round_rows


@dataclass(frozen=True)
class FormatPair:
    """Formats of weights and of their inputs; None: float."""

    weight: MXFormat | None
    activation: MXFormat | None

    def label(self, *, with_input: bool) -> str:
        """Its name in tables: `mxint4`, or with the input's format `mxint4/mxint8`."""
        return f"{self.weight or 'float'}/{self.activation or 'float'}" if with_input else str(self.weight or "float")


def rounded_weights(
    program: Program, matmul: Matmul, formats: Iterable[MXFormat | None]
) -> dict[MXFormat | None, Tensor]:
    """A matmul's weight rounded to nearest in each format, None: in float, as the parameter is (not transposed)."""
    rows, importance = finite_rows(program, matmul), program.importance.get(matmul.parameter)
    return {
        fmt: matmul.rows(rows if fmt is None else round_rows(rows, fmt, ScaleRule.MSE, importance)[0])
        for fmt in formats
    }


def item_records(
    program: Program,
    items: FormatItems,
    chosen: Sequence[FormatPair],
    pairs: Sequence[FormatPair],
    costs: Tensor,
    activation: MXFormat | None,
) -> tuple[ItemFormat, ...]:
    """What the ledger keeps of all items, the fixed ones first.

    chosen: of each free item, one of `pairs`. costs: `[items, pairs]`. activation: of the inputs of fixed items.
    """
    inputs = {pair.activation for pair in pairs if pair.weight is not None}
    names = [pair.label(with_input=len(inputs) > 1) for pair in pairs]
    records: list[ItemFormat] = []
    for item, fmt in items.fixed:
        x = None if fmt is None else input_format(program, item.matmuls[0], activation)
        records.append(ItemFormat(item.weights, _text(fmt), _text(x), item.stored_bytes(fmt), fixed=True))
    for item, pair, row in zip(items.free, chosen, costs.tolist(), strict=True):
        texts, by_name = (_text(pair.weight), _text(pair.activation)), dict(zip(names, row, strict=True))
        cost = row[pairs.index(pair)]
        records.append(ItemFormat(item.weights, *texts, item.stored_bytes(pair.weight), cost, by_name))
    return tuple(records)


def _text(fmt: MXFormat | None) -> str | None:
    return None if fmt is None else str(fmt)
