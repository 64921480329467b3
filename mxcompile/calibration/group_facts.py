"""What is known of a scale group when its turn in a sweep comes, and the errors that follow from it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.folds.groups import ScaleGroup
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.altered_run import AlteredRun, Prepare
from mxcompile.calibration.factor_search import Operand, per_channel
from mxcompile.calibration.observers import ChannelImportance, Observer, TokenSample
from mxcompile.calibration.quantizers import Quantizers
from mxcompile.calibration.run import NodeValues, copied_if_mutated
from mxcompile.graph.program import Program
from mxcompile.numerics.importance import token_weights

_LARGEST_SAMPLE = 1 << 22
_BLOCK_TOKENS = 2048


@dataclass(frozen=True)
class GroupFacts:
    """segment: the one that the group's last matmul is in. before: batches in front of it, if they were kept. known:
    statistics of the group's inputs.
    """

    segment: Segment
    before: list[NodeValues]
    known: Mapping[Node, Mapping[type[Observer], Tensor]]

    def encloses(self, group: ScaleGroup) -> bool:
        """True if all matmuls of the group are in the segment."""
        return all(matmul in self.segment.matmuls for matmul, _ in group.matmuls)

    def operands(self, group: ScaleGroup, weights: Mapping[Node, Tensor]) -> list[Operand]:
        """One operand for every input value of the group: matmuls that read the same value are tried together."""
        shared: dict[Node, list[tuple[Matmul, Tensor]]] = {}
        for matmul, channels in group.matmuls:
            shared.setdefault(matmul.activation, []).append((matmul, channels))
        operands: list[Operand] = []
        for value, readers in shared.items():
            weight = torch.cat([weights[matmul.node].flatten(0, -2) for matmul, _ in readers])
            sample = subsample_tokens(self.known[value][TokenSample], weight)
            importance = self.known[value][ChannelImportance]
            operands.append(Operand(sample, importance, weight, readers[0][1].to(weight.device)))
        return operands

    def block_error(self, program: Program, group: ScaleGroup, quantizers: Quantizers) -> Callable[[Tensor], float]:
        """Squared error of the values that the segment gives on, as a function of the factors `[count]`."""
        runner = AlteredRun(program, {})

        def given(state: NodeValues) -> NodeValues:
            segment = self.segment
            return runner.run_nodes(segment.nodes, copied_if_mutated(state, segment.nodes), None, segment.gives)

        wanted = [given(state) for state in self.before]

        def error(factors: Tensor) -> float:
            runner.tensors = {}
            divided: dict[Node, Prepare] = {}
            prepare: dict[Node, tuple[Node, Prepare]] = {}
            for matmul, channels in group.matmuls:
                rows = finite_rows(program, matmul)
                scale = per_channel(factors, channels.to(rows.device))
                importance = self.known[matmul.activation][ChannelImportance] / scale.square()
                rounded = quantizers.round_weight(rows * scale, importance) / scale
                runner.tensors[matmul.parameter] = matmul.rows(rounded).to(rows.dtype)
                shared = divided.setdefault(matmul.activation, partial(_round_divided, scale, quantizers))
                prepare[matmul.node] = matmul.activation, shared
            runner.prepare = prepare
            return sum(_squared_error(exact, given(state)) for exact, state in zip(wanted, self.before, strict=True))

        return error


def _round_divided(scale: Tensor, quantizers: Quantizers, x: Tensor) -> Tensor:
    return (quantizers.round_input(x / scale) * scale).to(x.dtype)


def _squared_error(wanted: NodeValues, given: NodeValues) -> float:
    total = 0.0
    for node, exact in wanted.items():
        if isinstance(exact, Tensor) and exact.is_floating_point():
            rows = exact.reshape(-1, exact.shape[-1]).float()
            difference = given[node].reshape(rows.shape).float() - rows
            total += (difference.square() * token_weights(rows)).sum().item()
    return total


def subsample_tokens(rows: Tensor, weight: Tensor) -> Tensor:
    """Fewer tokens for the stacked weights of many experts: outputs `[tokens, out]` are held at once.

    Every n-th one: a sample begins with its largest tokens.
    """
    return rows[:: -(-len(rows) // max(16, _LARGEST_SAMPLE // len(weight)))]


def first_batches(states: Iterable[NodeValues], segment: Segment) -> list[NodeValues]:
    """The first batches in front of a segment, about 2048 tokens (by the largest value they carry)."""
    chosen: list[NodeValues] = []
    tokens = 0
    for state in states:
        chosen.append(dict(copied_if_mutated(state, segment.nodes)))
        tokens += max((v.numel() // v.shape[-1] for v in state.values() if _is_activation(v)), default=0)
        if tokens >= _BLOCK_TOKENS:
            break
    return chosen


def _is_activation(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and value.numel() > 0
