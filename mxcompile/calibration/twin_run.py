"""The same batches through the model as it is being quantized and, in lockstep, through the exact one."""

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

_HELD = 4 << 30


class TwinRun:
    """segments: of the program, to be gone through in order. prepare: rounds the input of every matmul as at run time.

    with_exact: also run the program as it is now, unrounded, to see what is lost.
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
            own = [matmul for matmul in choose(copy).matmuls if matmul.node.name in names]
            self._nodes = {node.name: node for node in copy.graph.nodes}
            self._twins = dict(zip(self.segments, find_segments(copy, own), strict=True))
            self._exact = Sweep(copy, copy.batches)

    def advance(self, segment: Segment) -> None:
        """Move behind a segment, with its weights as they are now."""
        self._rounded.advance(segment)
        if self._exact is not None:
            self._exact.advance(self._twins[segment])
            self._forget(self._twins[segment])

    def moments(self, segment: Segment, readers: Sequence[Matmul], residual: bool) -> list[SecondMoments]:
        """Second moments of the value that some matmuls of a segment read; one for each expert of a 3-D weight.

        What the value lacks is seen if the exact model runs too, and not for experts, whose tokens may differ;
        residual: likewise for what is added to the matmuls' outputs. Moves to where the value is made, unless too much
        were to be held there: the weights of all matmuls in front of it must be as they will be.
        """
        first, shape = readers[0], readers[0].root.meta["val"].shape
        exactly = first.node if _seen_by_output(readers) else first.activation
        self._approach(segment, first.activation, exactly)
        if len(shape) == 3:
            return self._expert_moments(segment, first, int(shape[0]))
        added = {matmul.node.name: residual_operand(matmul) for matmul in readers} if residual else {}
        others = {name: node for name, node in added.items() if node is not None}
        found: SecondMoments | None = None
        for values, exact in self._pairs(segment, [first.activation, *others.values()], [exactly, *others.values()]):
            x = self._prepare(values[first.activation])
            rows = x.reshape(-1, x.shape[-1])
            found = found or SecondMoments(x.shape[-1], x.device)
            if exact is None:
                found.update(rows)
                continue
            lost = {name: exact[self._nodes[node.name]] - values[node] for name, node in others.items()}
            flat = {name: difference.reshape(len(rows), -1) for name, difference in lost.items()}
            seen = exact[self._nodes[exactly.name]].reshape(len(rows), -1)
            if exactly is first.node:
                found.update(rows, added=flat, made={first.node.name: seen})
            else:
                found.update(rows, seen, flat)
        assert found is not None
        return [found]

    def _expert_moments(self, segment: Segment, matmul: Matmul, experts: int) -> list[SecondMoments]:
        offsets = expert_offsets(matmul)
        found: list[SecondMoments] = []
        for values in self._rounded.values(segment, [matmul.activation, *([offsets] if offsets else [])]):
            x = self._prepare(values[matmul.activation])
            found = found or [SecondMoments(x.shape[-1], x.device) for _ in range(experts)]
            parts = expert_rows(x, None if offsets is None else values[offsets], experts)
            for known, rows in zip(found, parts, strict=True):
                known.update(rows)
        return found

    def _forget(self, segment: Segment) -> None:
        """Let go of the exact model's weights that only a passed segment reads: a fold's are held by nothing else."""
        for matmul in segment.matmuls:
            sources = self._copy.graph.find_nodes(op="get_attr", target=matmul.parameter)
            if all(user in segment.nodes for source in sources for user in source.users):
                self._copy.set_tensor(matmul.parameter, torch.empty(0))

    def _approach(self, segment: Segment, value: Node, exactly: Node) -> None:
        self._rounded.approach(segment, value, _HELD)
        if self._exact is not None:
            self._exact.approach(self._twins[segment], self._nodes[exactly.name], _HELD)

    def _pairs(
        self, segment: Segment, nodes: Sequence[Node], exactly: Sequence[Node]
    ) -> Iterator[tuple[NodeValues, NodeValues | None]]:
        rounded = self._rounded.values(segment, nodes)
        if self._exact is None:
            return zip(rounded, repeat(None), strict=False)
        own = [self._nodes[node.name] for node in exactly]
        return zip(rounded, self._exact.values(self._twins[segment], own), strict=True)


def _seen_by_output(readers: Sequence[Matmul]) -> bool:
    """True if what a value lacks is better seen in what its only reader makes of it: fewer numbers."""
    first, shape = readers[0], readers[0].root.meta["val"].shape
    outputs = int(shape[-1] if first.axis == -2 else shape[-2])
    return len(readers) == 1 and len(shape) == 2 and first.bias is None and outputs < first.in_features
