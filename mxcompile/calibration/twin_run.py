"""Run the same batches, in lockstep, through the model being quantized and through the float ("exact") model."""

from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.altered_run import AlteredRun, Prepare
from mxcompile.calibration.run import NodeValues
from mxcompile.calibration.second_moments import SecondMoments, expert_offsets, expert_rows, residual_operand
from mxcompile.calibration.sweep import Sweep
from mxcompile.graph.program import Program

_LARGEST_STATE = 4 << 30  # bytes of activations that may be kept inside a segment


class TwinRun:
    """segments: the program's segments, to be advanced over in order. prepare: rounds a matmul's input as at run time.

    with_exact: also run a copy of the program as it is now, without rounding, to measure the quantization error.
    """

    def __init__(self, program: Program, matmuls: Sequence[Matmul], prepare: Prepare, with_exact: bool) -> None:
        self.segments = find_segments(program, matmuls)
        self._prepare = prepare
        runner = AlteredRun(program, dict.fromkeys(matmuls, self._prepare))
        self._rounded = Sweep(program, program.batches, runner)
        self._twins: dict[Segment, Segment] = {}
        self._nodes: dict[str, Node] = {}
        self._exact: Sweep | None = None
        if with_exact:
            self._copy = copy = program.copy()
            names = {matmul.node.name for matmul in matmuls}
            twins = [matmul for matmul in choose(copy).matmuls if matmul.node.name in names]
            self._nodes = {node.name: node for node in copy.graph.nodes}
            self._twins = dict(zip(self.segments, find_segments(copy, twins), strict=True))
            self._exact = Sweep(copy, copy.batches)

    def advance(self, segment: Segment) -> None:
        """Run all batches through a segment, with its weights as they are now."""
        self._rounded.advance(segment)
        if self._exact is not None:
            self._exact.advance(self._twins[segment])
            self._free_weights(self._twins[segment])

    def moments(self, segment: Segment, readers: Sequence[Matmul], residual: bool) -> list[SecondMoments]:
        """Second moments of the value that some matmuls of a segment read; for a 3-D weight, one for each expert.

        With the exact model they include the error of the value, but not for experts, whose tokens may differ between
        the two models. residual: also the error of what is added to the matmuls' outputs.
        Advances the batches to the node that computes the value if its state is small enough to keep, so the weights of
        all matmuls before it must be final.
        """
        first, shape = readers[0], readers[0].root.meta["val"].shape
        exact_node = first.node if _smaller_by_output(readers) else first.activation
        self._approach(segment, first.activation, exact_node)
        if len(shape) == 3:
            return self._expert_moments(segment, first, int(shape[0]))
        residuals = {matmul.node.name: residual_operand(matmul) for matmul in readers} if residual else {}
        added = {name: node for name, node in residuals.items() if node is not None}
        moments: SecondMoments | None = None
        for values, exact in self._pairs(segment, [first.activation, *added.values()], [exact_node, *added.values()]):
            x = self._prepare(values[first.activation])
            rows = x.reshape(-1, x.shape[-1])
            moments = moments or SecondMoments(x.shape[-1], x.device)
            if exact is None:
                moments.update(rows)
                continue
            errors = {name: exact[self._nodes[node.name]] - values[node] for name, node in added.items()}
            errors = {name: error.reshape(len(rows), -1) for name, error in errors.items()}
            exact_rows = exact[self._nodes[exact_node.name]].reshape(len(rows), -1)
            if exact_node is first.node:
                moments.update(rows, residual_errors=errors, exact_outputs={first.node.name: exact_rows})
            else:
                moments.update(rows, exact_rows, errors)
        assert moments is not None
        return [moments]

    def _expert_moments(self, segment: Segment, matmul: Matmul, experts: int) -> list[SecondMoments]:
        offsets = expert_offsets(matmul)
        moments: list[SecondMoments] = []
        for values in self._rounded.values(segment, [matmul.activation, *([offsets] if offsets else [])]):
            x = self._prepare(values[matmul.activation])
            moments = moments or [SecondMoments(x.shape[-1], x.device) for _ in range(experts)]
            rows_by_expert = expert_rows(x, None if offsets is None else values[offsets], experts)
            for of_expert, rows in zip(moments, rows_by_expert, strict=True):
                of_expert.update(rows)
        return moments

    def _free_weights(self, segment: Segment) -> None:
        """Free the exact model's weights that only this segment reads: folded ones have no other owner."""
        for matmul in segment.matmuls:
            sources = self._copy.graph.find_nodes(op="get_attr", target=matmul.parameter)
            if all(user in segment.nodes for source in sources for user in source.users):
                self._copy.set_tensor(matmul.parameter, torch.empty(0))

    def _approach(self, segment: Segment, value: Node, exact_node: Node) -> None:
        self._rounded.approach(segment, value, _LARGEST_STATE)
        if self._exact is not None:
            self._exact.approach(self._twins[segment], self._nodes[exact_node.name], _LARGEST_STATE)

    def _pairs(
        self, segment: Segment, nodes: Sequence[Node], exact_nodes: Sequence[Node]
    ) -> Iterator[tuple[NodeValues, NodeValues | None]]:
        rounded = self._rounded.values(segment, nodes)
        if self._exact is None:
            return zip(rounded, repeat(None), strict=False)
        twins = [self._nodes[node.name] for node in exact_nodes]
        return zip(rounded, self._exact.values(self._twins[segment], twins), strict=True)


def _smaller_by_output(readers: Sequence[Matmul]) -> bool:
    """Whether Y of the value's only reader is smaller than D of the value (`second_moments.py`)."""
    first, shape = readers[0], readers[0].root.meta["val"].shape
    outputs = int(shape[-1] if first.axis == -2 else shape[-2])
    return len(readers) == 1 and len(shape) == 2 and first.bias is None and outputs < first.in_features
