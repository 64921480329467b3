"""The same batches through the model as it is being quantized and, in lockstep, through the exact one."""

from collections.abc import Iterator, Sequence
from itertools import repeat

from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.altered import Altered, Prepare
from mxcompile.calibration.moments import Moments, added_to, expert_offsets, expert_rows
from mxcompile.calibration.run import Values
from mxcompile.calibration.sweep import Sweep
from mxcompile.program import Program


class Streams:
    """segments: of the program, to be gone through in order. prepare: rounds the input of every matmul as at run time.

    with_exact: also run the program as it is now, unrounded, to see what is lost.
    """

    def __init__(self, program: Program, matmuls: Sequence[Matmul], prepare: Prepare, with_exact: bool) -> None:
        self.segments = find_segments(program, matmuls)
        self._prepare = prepare
        runner = Altered(program, dict.fromkeys(matmuls, self._prepare))
        self._rounded = Sweep(program, program.batches, runner)
        self._twins: dict[Segment, Segment] = {}
        self._nodes: dict[str, Node] = {}
        self._exact: Sweep | None = None
        if with_exact:
            copy = program.copy()
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

    def moments(self, segment: Segment, readers: Sequence[Matmul], residual: bool) -> list[Moments]:
        """Second moments of the value that some matmuls of a segment read; one for each expert of a 3-D weight.

        What the value lacks is seen if the exact model runs too, and not for experts, whose tokens may differ;
        residual: likewise for what is added to the matmuls' outputs.
        """
        first = readers[0]
        shape = first.root.meta["val"].shape
        if len(shape) == 3:
            return self._expert_moments(segment, first, int(shape[0]))
        added = {matmul.node.name: added_to(matmul) for matmul in readers} if residual else {}
        others = {name: node for name, node in added.items() if node is not None}
        found: Moments | None = None
        for values, exact in self._pairs(segment, [first.activation, *others.values()]):
            x = self._prepare(values[first.activation])
            rows = x.reshape(-1, x.shape[-1])
            found = found or Moments.of_size(x.shape[-1], x.device)
            if exact is None:
                found.update(rows)
                continue
            lost = {name: exact[self._nodes[node.name]] - values[node] for name, node in others.items()}
            flat = {name: difference.reshape(len(rows), -1) for name, difference in lost.items()}
            found.update(rows, exact[self._nodes[first.activation.name]].reshape(rows.shape), flat)
        assert found is not None
        return [found]

    def _expert_moments(self, segment: Segment, matmul: Matmul, experts: int) -> list[Moments]:
        offsets = expert_offsets(matmul)
        found: list[Moments] = []
        for values in self._rounded.values(segment, [matmul.activation, *([offsets] if offsets else [])]):
            x = self._prepare(values[matmul.activation])
            found = found or [Moments.of_size(x.shape[-1], x.device) for _ in range(experts)]
            parts = expert_rows(x, None if offsets is None else values[offsets], experts)
            for known, rows in zip(found, parts, strict=True):
                known.update(rows)
        return found

    def _pairs(self, segment: Segment, nodes: list[Node]) -> Iterator[tuple[Values, Values | None]]:
        rounded = self._rounded.values(segment, nodes)
        if self._exact is None:
            return zip(rounded, repeat(None), strict=False)
        own = [self._nodes[node.name] for node in nodes]
        return zip(rounded, self._exact.values(self._twins[segment], own), strict=True)
