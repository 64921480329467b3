"""Calibration data of one scale group during a sweep, and the error of its factors on them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.groups import ScaleGroup
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.row_order import values_with_selected_rows
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.ranks.exchange import ALONE, Ranks
from mxcompile.calibration.runs.altered_run import AlteredRun, Prepare
from mxcompile.calibration.runs.run import BoundBatch
from mxcompile.calibration.searches.factor_search import Operand, per_channel
from mxcompile.calibration.statistics.observers import ChannelImportance, Observer, TokenSample
from mxcompile.graph.binding import NodeValues
from mxcompile.graph.program import Program
from mxcompile.numerics.importance import token_weights
from mxcompile.numerics.row_slices import matrices, row_wise

_LARGEST_SAMPLE = 1 << 22
_BLOCK_TOKENS = 2048


@dataclass(frozen=True)
class GroupFacts:
    """segment: that of the group's last matmul. block_inputs: its inputs for the first batches, empty if they were not
    kept. statistics: observed on the group's inputs.
    """

    segment: Segment
    block_inputs: list[BoundBatch]
    statistics: Mapping[Node, Mapping[type[Observer], Tensor]]

    def encloses(self, group: ScaleGroup) -> bool:
        """Whether all matmuls of the group are in the segment."""
        return all(matmul in self.segment.matmuls for matmul, _ in group.matmuls)

    def operands(self, group: ScaleGroup, weights: Mapping[Node, Tensor]) -> list[Operand]:
        """One operand for every input value of the group; matmuls that read the same value share it."""
        shared: dict[Node, list[tuple[Matmul, Tensor]]] = {}
        for matmul, channels in group.matmuls:
            shared.setdefault(matmul.activation, []).append((matmul, channels))
        operands: list[Operand] = []
        for value, readers in shared.items():
            own = list_matrices(weights[matmul.node] for matmul, _ in readers)
            sample = subsample_tokens(self.statistics[value][TokenSample], own)
            importance = self.statistics[value][ChannelImportance]
            operands.append(Operand(sample, importance, own, readers[0][1].to(own[0].device)))
        return operands

    def _compared(self, program: Program) -> tuple[Node, ...]:
        """The float outputs of the segment whose rows stay the same tokens when a weight of the model is rounded."""
        selected = values_with_selected_rows(program)
        values = ((node, node.meta.get("val")) for node in self.segment.outputs if node not in selected)
        return tuple(node for node, value in values if isinstance(value, Tensor) and value.is_floating_point())

    def block_error(
        self, program: Program, group: ScaleGroup, quantizers: Quantizers
    ) -> Callable[[Tensor], float] | None:
        """A function from factors `[count]` to the squared error of the segment's outputs.

        None if the segment has no float output whose rows stay the same tokens when a weight is rounded.
        """
        compared = self._compared(program)
        if not compared:
            return None
        runner = AlteredRun(program, {})

        def outputs(state: BoundBatch) -> NodeValues:
            nodes = self.segment.nodes
            values = runner.run_nodes(nodes, state.fork(nodes), None, compared)
            return {node: state.visibility.rows(node, value) for node, value in values.items()}

        expected = [outputs(state) for state in self.block_inputs]

        def error(factors: Tensor) -> float:
            runner.tensors = {}
            divided: dict[Node, Prepare] = {}
            prepare: dict[Node, tuple[Node, Prepare]] = {}
            for matmul, channels in group.matmuls:
                rows = finite_rows(program, matmul)
                scale = per_channel(factors, channels.to(rows.device))
                importance = self.statistics[matmul.activation][ChannelImportance] / scale.square()
                rounded = partial(_round_in_scale, scale, importance, quantizers)
                runner.tensors[matmul.parameter] = matmul.rows(row_wise(rounded, rows)[0])
                shared = divided.setdefault(matmul.activation, partial(_round_divided, scale, quantizers))
                prepare[matmul.node] = matmul.activation, shared
            runner.prepare = prepare
            pairs = zip(expected, self.block_inputs, strict=True)
            return sum(_squared_error(exact, outputs(state)) * state.visibility.weight for exact, state in pairs)

        return error


def _round_in_scale(scale: Tensor, importance: Tensor, quantizers: Quantizers, rows: Tensor) -> tuple[Tensor]:
    return ((quantizers.round_weight(rows * scale, importance) / scale).to(rows.dtype),)


def _round_divided(scale: Tensor, quantizers: Quantizers, x: Tensor) -> Tensor:
    return (quantizers.round_input(x / scale) * scale).to(x.dtype)


def _squared_error(expected: NodeValues, actual: NodeValues) -> float:
    total = 0.0
    for node, exact in expected.items():
        rows = exact.reshape(-1, exact.shape[-1] if exact.dim() else 1).float()
        difference = actual[node].reshape(rows.shape).float() - rows
        total += (difference.square() * token_weights(rows)).sum().item()
    return total


def list_matrices(weights: Iterable[Tensor]) -> list[Tensor]:
    """Weights `[..., out, in]` as one matrix, or, if there are experts among them, as one for each, which are views."""
    weights = list(weights)
    if all(weight.dim() == 2 for weight in weights):
        return [torch.cat(weights)]
    return [matrix for weight in weights for matrix in matrices(weight)]


def subsample_tokens(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Rows `[tokens, in]`, reduced so that outputs `[tokens, out]` stay below 4M elements: many experts have many rows.

    Takes every n-th row, because a `TokenSample` begins with its largest tokens.
    """
    return rows[:: -(-len(rows) // max(16, _LARGEST_SAMPLE // sum(map(len, weights))))]


def first_batches(
    states: Sequence[BoundBatch],
    segment: Segment,
    ready: Callable[[BoundBatch], BoundBatch] | None = None,
    ranks: Ranks = ALONE,
) -> list[BoundBatch]:
    """Inputs of a segment for the first batches, about 2048 visible tokens (counted in their largest tensor).

    Of batches with several weights, at least one of each. ready: puts the values of a chosen one on the device. Of
    several processes, those of the first batches of all that this one has.
    """
    chosen: list[BoundBatch] = []
    by_process = ranks.gather([(state.visibility.weight, _visible_tokens(state)) for state in states])
    start = sum(map(len, by_process[: ranks.number]))
    missing, seen = {weight for pairs in by_process for weight, _ in pairs}, 0
    for index, (weight, tokens) in enumerate((pair for pairs in by_process for pair in pairs), -start):
        if seen >= _BLOCK_TOKENS and weight not in missing:
            continue
        missing.discard(weight)
        seen += tokens
        if 0 <= index < len(states):
            state = states[index] if ready is None else ready(states[index])
            copied = state.fork(segment.nodes)
            chosen.append(replace(copied, values=dict(copied.values)))
    return chosen


def _visible_tokens(state: BoundBatch) -> int:
    values = [(node, value) for node, value in state.values.items() if _is_activation(value)]
    masks = [(state.visibility.mask(node, value), value) for node, value in values]
    return max((v.numel() // v.shape[-1] if mask is None else int(mask.sum()) for mask, v in masks), default=0)


def _is_activation(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and value.numel() > 0
