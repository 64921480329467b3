"""A Hadamard rotation of every value head, folded into the rows that make values and the columns that read results.

    v_proj: w @ x + b -> R (w @ x + b)      attention is linear in values      o_proj: w @ y -> (w R^-1) @ y

Rotated values have no outlying channels, which costs blocks of few bits most of their precision.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mxcompile.analysis.attentions import Attention
from mxcompile.analysis.matmuls import Matmul, find_matmuls
from mxcompile.graph.dataflow import SAME_VALUE, TRANSPOSES, effective_readers, operand
from mxcompile.graph.program import Program
from mxcompile.numerics.cache_format import head_rotation
from mxcompile.numerics.hadamard import rotate_input, rotate_weight

aten = torch.ops.aten
_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
MOVES = _RESHAPES | SAME_VALUE | TRANSPOSES
"""What may stand between a matmul and an attention that reads its output channels as heads."""


@dataclass(frozen=True)
class RotatedValues:
    """The parameters to rotate. maker, reader: weights `[out, in]` of the matmuls around the attention, by rows."""

    layer: str
    maker: str
    maker_axis: int
    bias: str | None
    reader: str
    reader_axis: int
    block: int

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weights."""
        return self.maker, self.reader

    def apply(self, program: Program) -> None:
        """Rotate the parameters of a program."""
        maker, reader = program.tensor(self.maker).detach(), program.tensor(self.reader).detach()
        rows = maker if self.maker_axis == -1 else maker.T
        rotated = rotate_input(rows.T, self.block).T
        program.set_tensor(self.maker, (rotated if self.maker_axis == -1 else rotated.T).contiguous())
        if self.bias is not None:
            program.set_tensor(self.bias, rotate_input(program.tensor(self.bias).detach(), self.block))
        columns = reader if self.reader_axis == -1 else reader.T
        turned = rotate_weight(columns, self.block)
        program.set_tensor(self.reader, (turned if self.reader_axis == -1 else turned.T).contiguous())
        for name in self.parameters:
            program.importance.pop(name, None)


def rotated_values(program: Program, attention: Attention) -> RotatedValues | str:
    """The parameters that rotate the values of an attention, or why there are none."""
    matmuls = {matmul.node: matmul for matmul in find_matmuls(program)[0]}
    size = attention.value.size
    block = head_rotation(size)
    if block < 2:
        return f"its values have {size} channels, an odd number, which no Hadamard rotation divides"
    maker = _maker(attention, matmuls)
    reader = _reader(attention, matmuls)
    for matmul, role in ((maker, "makes its values"), (reader, "reads its result")):
        if matmul is None:
            return f"no single matmul {role}, with nothing but views between"
        if matmul.is_lowered or matmul.parameter in program.rounded:
            return f"{matmul.name!r} is rounded: put quantize-cache in front of the passes that round weights"
        if effective_readers(matmul.root) != {matmul.node} or len(program.aliases.get(matmul.parameter, ())) > 1:
            return f"{matmul.name!r} has other readers"
    assert maker is not None
    assert reader is not None
    bias = maker.bias
    if bias is not None and (bias.op != "get_attr" or len(bias.users) > 1):
        return f"the bias of {maker.name!r} is not a parameter of its own"
    return RotatedValues(
        attention.layer,
        maker.parameter,
        maker.axis,
        None if bias is None else str(bias.target),
        reader.parameter,
        reader.axis,
        block,
    )


def _maker(attention: Attention, matmuls: dict[Node, Matmul]) -> Matmul | None:
    """The matmul whose output channels, in order, are the channels of the value heads."""
    node: Any = attention.value.node
    first = attention.value.reader
    while isinstance(node, Node) and node not in matmuls:
        if node.target not in MOVES or set(node.users) - {first} or not moves_heads(node):
            return None
        first, node = node, operand(node, 0)
    matmul = matmuls.get(node)
    shape = attention.value.node.meta["val"].shape
    if matmul is None or set(node.users) != {first} or node.meta["val"].shape[-1] != shape[-3] * shape[-1]:
        return None
    return matmul


def _reader(attention: Attention, matmuls: dict[Node, Matmul]) -> Matmul | None:
    """The matmul whose input channels, in order, are the channels of the heads' results."""
    node = attention.node
    while len(node.users) == 1:
        (user,) = node.users
        if user in matmuls:
            matmul = matmuls[user]
            shape = attention.node.meta["val"].shape
            channels = shape[-3] * shape[-1] if len(shape) == 4 else None
            return matmul if matmul.activation is node and matmul.in_features == channels else None
        if user.target not in MOVES or operand(user, 0) is not node or not moves_heads(user):
            return None
        node = user
    return None


def moves_heads(node: Node) -> bool:
    """Whether a transpose exchanges heads and tokens alone; other ops keep the order of values."""
    if node.target not in TRANSPOSES:
        return True
    if node.target is not aten.transpose.int:
        return False
    rank = node.meta["val"].dim()
    return {operand(node, 1) % rank, operand(node, 2) % rank} == {rank - 3, rank - 2} and rank == 4
