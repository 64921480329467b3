"""Patterns of an MX weight in a graph: its `mx::dequantize`, as it is or transposed."""

from typing import Any, Final

from mxcompile.graph.dataflow import TRANSPOSES
from mxcompile.graph.rules import Call, Match, Wildcard
from mxcompile.ops import DEQUANTIZE

WEIGHT: Final = Call(
    DEQUANTIZE,
    Wildcard("elements"),
    Wildcard("scales"),
    Wildcard("format"),
    Wildcard("size"),
    Wildcard("dtype"),
    name="weight",
)
TRANSPOSED_WEIGHT: Final = Call(TRANSPOSES, WEIGHT, name="transpose")


def planes_argument(match: Match) -> tuple[Any, ...]:
    """The `planes` argument of a matched weight's `mx::dequantize`; none if it is row-major."""
    return match["weight"].args[len(WEIGHT.operands) :]
