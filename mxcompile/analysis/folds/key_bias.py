"""The bias of a linear layer that makes keys -> 0, where no position rotates them behind it.

    softmax(q @ (k + b).T) = softmax(q @ k.T + (q @ b)) = softmax(q @ k.T)      the last term is one number for all keys

A bias adds the same large values to all keys, which cost blocks of few bits most of their precision. Behind a rotary
embedding it differs from key to key, so such a bias stays.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mxcompile.analysis.attentions import Attention
from mxcompile.analysis.folds.value_rotation import MOVES, moves_heads
from mxcompile.analysis.matmuls import Matmul, find_matmuls
from mxcompile.graph.dataflow import operand
from mxcompile.graph.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class KeyBias:
    """Values `start` to `stop` of a bias, which keys alone read."""

    layer: str
    bias: str
    start: int
    stop: int

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors that change."""
        return (self.bias,)

    def apply(self, program: Program) -> None:
        """Set it to zero in a program."""
        bias = program.tensor(self.bias).detach().clone()
        bias[self.start : self.stop] = 0
        program.set_tensor(self.bias, bias)


def key_bias(program: Program, attention: Attention) -> KeyBias | None:
    """The bias of an attention's keys that changes nothing but their rounding; None if there is none, or it is zero."""
    matmuls = {matmul.node: matmul for matmul in find_matmuls(program)[0]}
    found = _maker(attention, matmuls)
    if found is None:
        return None
    matmul, start = found
    bias = matmul.bias
    if bias is None or bias.op != "get_attr" or len(bias.users) > 1 or bias.meta["val"].dim() != 1:
        return None
    if len(program.aliases.get(str(bias.target), ())) > 1:
        return None
    stop = start + attention.key.node.meta["val"].shape[-3] * attention.key.size
    is_zero = not program.tensor(str(bias.target))[start:stop].any()
    return None if is_zero else KeyBias(attention.layer, str(bias.target), start, stop)


def _maker(attention: Attention, matmuls: dict[Node, Matmul]) -> tuple[Matmul, int] | None:
    """The matmul that makes the keys, and which of its output channels is their first."""
    node: Any = attention.key.node
    first, start = attention.key.reader, 0
    if attention.key.node.meta["val"].dim() != 4:
        return None
    while isinstance(node, Node) and node not in matmuls:
        if set(node.users) - {first}:
            return None
        if node.target is operator.getitem:
            split = operand(node, 0)
            if start or split.target is not aten.split.Tensor or not _is_last(split, operand(split, 2)):
                return None
            start = operand(node, 1) * operand(split, 1)
            node = operand(split, 0)
            return (matmuls[node], start) if node in matmuls else _behind_views(node, start, matmuls)
        if node.target not in MOVES or not moves_heads(node):
            return None
        first, node = node, operand(node, 0)
    width = attention.key.node.meta["val"].shape[-3] * attention.key.size
    is_whole = node in matmuls and set(node.users) == {first} and node.meta["val"].shape[-1] == width
    return (matmuls[node], 0) if is_whole else None


def _behind_views(node: Any, start: int, matmuls: dict[Node, Matmul]) -> tuple[Matmul, int] | None:
    """Behind views that keep the channels, as those of GPT-2's Conv1D."""
    while isinstance(node, Node) and node not in matmuls:
        source = operand(node, 0)
        if node.target not in MOVES or not isinstance(source, Node):
            return None
        if node.meta["val"].shape[-1] != source.meta["val"].shape[-1] or not moves_heads(node):
            return None
        node = source
    return (matmuls[node], start) if isinstance(node, Node) else None


def _is_last(split: Node, dim: int) -> bool:
    return dim in (-1, split.meta["val"][0].dim() - 1)
