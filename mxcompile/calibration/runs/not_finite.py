"""Name the calibration batch, and the first value computed from it, in which NaN or Inf arises.

One bad batch makes every statistic NaN. Statistics are checked when they are complete; only then are batches run again
to find the one at fault. NaN among the inputs is no fault by itself: a model may read it as a missing number.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.calibration.runs.run import BoundBatch, Request, Runner
from mxcompile.errors import InputError
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.dataflow import compute_nodes
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program, where

_EXAMPLE = "the example inputs"
_ADVICE = "repair the batch or leave it out"


def check_inputs(program: Program, batches: Sequence[Inputs], label: str | None = None) -> None:
    """Raise InputError if NaN in a batch's inputs reaches a matmul that will be quantized, or an output.

    Only batches that hold NaN are run. label: what the inputs are, for the message; None: calibration batches.
    """
    for index, batch in enumerate(batches):
        if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in batch.tensors()):
            (end,) = program.graph.find_nodes(op="output")
            read = [*(matmul.activation for matmul in choose(program).matmuls), *end.all_input_nodes]
            _raise_at_first(program, batch, label or _batch_label(program, index), read)


def check_statistics(program: Program, batches: Sequence[Inputs], value: Node, statistics: Iterable[Tensor]) -> None:
    """Raise InputError if statistics of a value are not finite because it holds NaN or Inf for some batch."""
    if all(not s.is_floating_point() or bool(torch.isfinite(s).all()) for s in statistics):
        return
    for index, batch in enumerate(batches):
        _raise_at_first(program, batch, _batch_label(program, index), [value])


def check_requests(program: Program, requests: Sequence[Request]) -> None:
    """`check_statistics` of the requested statistics that have been gathered."""
    nodes = {node.name: node for node in program.graph.nodes}
    for request in requests:
        if request.seen(program):
            check_statistics(program, program.batches, nodes[request.value], [request.result(program)])


def _batch_label(program: Program, index: int) -> str:
    """`calibration[3]`, or `the example inputs` where there is no calibration data."""
    is_example = len(program.batches) == 1 and program.batches[0] is program.example
    return _EXAMPLE if is_example else f"calibration[{index}]"


def _raise_at_first(program: Program, batch: Inputs, label: str, values: Iterable[Node]) -> None:
    """Raise InputError if one of the values holds NaN (or Inf) for a batch: it names the value in which that arises."""
    bound = BoundBatch.of(program, bind_inputs(program, batch))
    nan, inf = set[Node](), set[Node]()

    def note(node: Node, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = bound.visibility.rows(node, value)
            nan.update([node] * bool(value.isnan().any()))
            inf.update([node] * bool(value.isinf().any()))

    for node, value in bound.values.items():
        note(node, value)
    Runner(program).run_nodes(compute_nodes(program.graph.nodes), bound, note)
    for kind, holders in (("NaN", nan), ("Inf", inf)):
        for value in values:
            if value in holders:
                first = _first(value, holders)
                place = f"its input {first.name!r}" if first.op == "placeholder" else f"first in {where(first)}"
                source = next((s.name for s in first.all_input_nodes if kind == "NaN" and s in inf), None)
                verb = "give" if label == _EXAMPLE else "gives"
                reason = "" if source is None else f", which reads Inf from %{source}"
                raise InputError(f"{label} {verb} {kind} at {where(value)}: {place}{reason}; {_ADVICE}")


def _first(node: Node, holders: set[Node]) -> Node:
    """The node, among those that it is computed from, in which the holders' kind of value arises."""
    while (source := next((s for s in node.all_input_nodes if s in holders), None)) is not None:
        node = source
    return node
