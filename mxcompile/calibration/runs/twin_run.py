"""Run the same batches, in lockstep, through the model being quantized and through the float ("exact") model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul
from mxcompile.analysis.row_order import values_with_selected_rows
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.analysis.visibility import Visibility
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.altered_run import AlteredRun, Prepare
from mxcompile.calibration.runs.not_finite import check_statistics
from mxcompile.calibration.runs.run import BoundBatch
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.calibration.statistics.expert_moments import ExpertStatistics, expert_offsets, expert_rows, rows_of_all
from mxcompile.calibration.statistics.second_moments import SecondMoments, residual_operand, sum_moments
from mxcompile.graph.binding import NodeValues
from mxcompile.graph.program import Program

_LARGEST_STATE = 4 << 30  # bytes of activations that may be kept inside a segment


class TwinRun:
    """segments: the program's segments, to be advanced over in order. prepare: rounds a matmul's input as at run time.

    with_exact: also run a copy of the program as it is now, without rounding, to measure the quantization error.
    """

    def __init__(
        self, program: Program, matmuls: Sequence[Matmul], prepare: Mapping[Matmul, Prepare], with_exact: bool
    ) -> None:
        self.segments = find_segments(program, matmuls)
        self._program, self._selected = program, values_with_selected_rows(program)
        self._prepare = prepare
        runner = AlteredRun(program, {matmul: prepare[matmul] for matmul in matmuls})
        self._rounded = Sweep(program, program.batches, runner)
        self._twins: dict[Segment, Segment] = {}
        self._nodes: dict[str, Node] = {}
        self._exact: Sweep | None = None
        self._exact_passed: Segment | None = None
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
        self._advance_exact(segment)

    def _advance_exact(self, segment: Segment) -> None:
        if self._exact is not None and self._exact_passed is not segment:
            self._exact_passed = segment
            self._exact.advance(self._twins[segment])
            self._free_weights(self._twins[segment])

    @property
    def batches(self) -> list[BoundBatch]:
        """The batches of this process in the quantized model, behind the last segment or where `moments` has advanced
        them to; `ready` brings them to the device."""
        return list(self._rounded.batches)

    def exact_batches(self, segment: Segment) -> list[BoundBatch]:
        """The same batches in the exact model, behind a segment; there are no `moments` of it afterwards."""
        assert self._exact is not None
        self._advance_exact(segment)
        return list(self._exact.batches)

    def ready(self, batch: BoundBatch) -> BoundBatch:
        """A batch with its values on the device."""
        return self._rounded.ready(batch)

    @property
    def exact(self) -> Program:
        """The exact model, without the weights of passed segments."""
        return self._copy

    def exact_node(self, node: Node) -> Node:
        """The node of the exact model that computes the same value."""
        return self._nodes[node.name]

    def moments(
        self,
        segment: Segment,
        readers: Sequence[Matmul],
        residual: bool,
        experts: ExpertStatistics = ExpertStatistics(),  # noqa: B008 - frozen
    ) -> Iterator[SecondMoments]:
        """Second moments of the value that some matmuls of a segment read; for a 3-D weight, one for each expert.

        Those of some experts at a time: the batches run again for each group of them.

        With the exact model they include the error of the value, but not where the model itself selects the rows
        (experts, `row_order.py`), which may be other tokens in the two models. residual: also the error of what is
        added to the matmuls' outputs. experts: how those of one expert use the tokens of all. Of several processes, all
        have the sums over all batches, but those of an expert its owner alone.
        Advances the batches to the node that computes the value if its state is small enough to keep, so the weights of
        all matmuls before it must be final. Raises InputError, which names the batch, if the value is not finite.
        """
        first = readers[0]
        exact_node = first.node if _smaller_by_output(readers) else first.activation
        self._approach(segment, first.activation, exact_node)
        for moments in self._gathered(segment, readers, exact_node, residual, experts):
            check_statistics(self._program, self._program.batches, first.activation, [each.inputs for each in moments])
            yield from moments
            del moments  # frees them before the next are gathered

    def _gathered(
        self,
        segment: Segment,
        readers: Sequence[Matmul],
        exact_node: Node,
        residual: bool,
        experts: ExpertStatistics,
    ) -> Iterator[list[SecondMoments]]:
        first, shape = readers[0], readers[0].root.meta["val"].shape
        if len(shape) == 3:
            yield from self._moments_of_experts(segment, first, experts)
        else:
            moments = self._matmul_moments(segment, readers, exact_node, residual)
            sum_moments(moments, ranks_of(self._program))
            yield moments

    def _matmul_moments(
        self, segment: Segment, readers: Sequence[Matmul], exact_node: Node, residual: bool
    ) -> list[SecondMoments]:
        first = readers[0]
        if self._exact is None or first.activation in self._selected:
            return [self._plain_moments(segment, first)]
        residuals = {matmul.node.name: residual_operand(matmul) for matmul in readers} if residual else {}
        added = {n: node for n, node in residuals.items() if node is not None and node not in self._selected}
        compared: SecondMoments | None = None
        with suppress(_UnpairedRowsError):
            compared = self._compared_moments(segment, first, exact_node, added)
        unpaired = ranks_of(self._program).any(compared is None)
        return [self._plain_moments(segment, first) if compared is None or unpaired else compared]

    def _plain_moments(self, segment: Segment, matmul: Matmul) -> SecondMoments:
        moments = SecondMoments(matmul.in_features, self._program.device(matmul.parameter))
        for values, visible in self._visible_values(segment, [matmul.activation]):
            rows = _rows(self._prepare[matmul](visible.rows(matmul.activation, values[matmul.activation])))
            moments.update(rows, weight=visible.weight)
        return moments

    def _compared_moments(
        self, segment: Segment, matmul: Matmul, exact_node: Node, added: Mapping[str, Node]
    ) -> SecondMoments:
        """exact_node: the value, or the matmul if its outputs are compared. added: residuals by the matmul's name.

        Raises _UnpairedRowsError if the two models have other numbers of rows.
        """
        moments = SecondMoments(matmul.in_features, self._program.device(matmul.parameter))
        value, nodes = matmul.activation, list(added.values())
        for values, visible, exact in self._pairs(segment, [value, *nodes], [exact_node, *nodes]):
            mask = visible.mask(value, values[value])
            rows = _rows(self._prepare[matmul](values[value]))
            exact_rows = _rows(exact[self._nodes[exact_node.name]])
            pairs = {n: (_rows(exact[self._nodes[node.name]]), _rows(values[node])) for n, node in added.items()}
            if any(len(other) != len(rows) for other in (exact_rows, *chain.from_iterable(pairs.values()))):
                raise _UnpairedRowsError
            if mask is not None:
                rows, exact_rows = rows[mask], exact_rows[mask]
                pairs = {name: (expected[mask], actual[mask]) for name, (expected, actual) in pairs.items()}
            errors = {name: expected - actual for name, (expected, actual) in pairs.items()}
            if exact_node is matmul.node:
                outputs = {matmul.node.name: exact_rows}
                moments.update(rows, None, errors, outputs, visible.weight)
            else:
                moments.update(rows, exact_rows, errors, weight=visible.weight)
        return moments

    def _moments_of_experts(
        self, segment: Segment, matmul: Matmul, experts: ExpertStatistics
    ) -> Iterator[list[SecondMoments]]:
        """Those of some experts at a time. All experts' tokens are gathered with the first of them."""
        ranks, device = ranks_of(self._program), self._program.device(matmul.parameter)
        step = -(-_experts_at_once(matmul) // ranks.count) * ranks.count  # each process rounds some of them
        count = int(matmul.root.meta["val"].shape[0])
        everyone = SecondMoments(matmul.in_features, device) if experts.uses_all else None
        for start in range(0, count, step):
            wanted = range(start, min(start + step, count))
            moments = [SecondMoments(matmul.in_features if experts.uses_own else 0, device) for _ in wanted]
            for rows, weight in self._expert_rows(segment, matmul, count):
                for of_expert, index in zip(moments, wanted, strict=True):
                    of_expert.update(rows[index], weight=weight, count_only=not experts.uses_own)
                if everyone is not None and start == 0:
                    everyone.update(rows_of_all(rows), weight=weight)
            if everyone is not None and start == 0:
                sum_moments([everyone], ranks)
            sum_moments(moments, ranks, by_owners=True)
            yield [experts.combine(each, everyone) for each in moments]

    def _expert_rows(self, segment: Segment, matmul: Matmul, experts: int) -> Iterator[tuple[list[Tensor], float]]:
        """For every batch, the rows `[tokens, in]` that each expert multiplies, and their weight."""
        offsets = expert_offsets(matmul)
        for values, visible in self._visible_values(segment, [matmul.activation, *([offsets] if offsets else [])]):
            x = self._prepare[matmul](values[matmul.activation])
            ends = None if offsets is None else values[offsets]
            yield expert_rows(x, ends, experts, visible.mask(matmul.activation, x)), visible.weight

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
    ) -> Iterator[tuple[NodeValues, Visibility, NodeValues]]:
        assert self._exact is not None
        twins = [self._nodes[node.name] for node in exact_nodes]
        exact = self._exact.values(self._twins[segment], twins)
        for (values, visible), exact_values in zip(self._visible_values(segment, nodes), exact, strict=True):
            yield values, visible, exact_values

    def _visible_values(self, segment: Segment, nodes: Sequence[Node]) -> Iterator[tuple[NodeValues, Visibility]]:
        batches = [batch.visibility for batch in self._rounded.batches]
        return zip(self._rounded.values(segment, nodes), batches, strict=True)


class _UnpairedRowsError(Exception):
    """A value has other numbers of rows in the rounded and in the exact model."""


def _rows(value: Tensor) -> Tensor:
    """`[..., size]` as `[rows, size]`, also without rows."""
    return value.flatten(0, -2) if value.dim() > 1 else value.unsqueeze(0)


def _experts_at_once(matmul: Matmul) -> int:
    """How many experts' second moments, float32 `[in, in]` each, need at most half the memory of all their weights."""
    weight: Tensor = matmul.root.meta["val"]
    return max(1, int(weight.numel() * weight.element_size()) // (8 * matmul.in_features**2))


def _smaller_by_output(readers: Sequence[Matmul]) -> bool:
    """Whether Y of the value's only reader is smaller than D of the value (`second_moments.py`)."""
    first, shape = readers[0], readers[0].root.meta["val"].shape
    outputs = int(shape[-1] if first.axis == -2 else shape[-2])
    return len(readers) == 1 and len(shape) == 2 and first.bias is None and outputs < first.in_features
