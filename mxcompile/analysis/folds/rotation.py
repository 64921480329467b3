"""linear(x, w) -> linear(mx::rotate(x), w R): the same rotation of blocks of channels on both, so y is unchanged.

A rotation (`hadamard.py`) spreads an outlier over the channels of its block, so that values that share an MX scale have
similar magnitudes. Like a multiplier (`multiplier.py`), `deploy` stores it in the MXWeight, which rotates its input.
"""

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul, finite_rows, replace_activation
from mxcompile.graph.edit import insert_call
from mxcompile.graph.program import Program
from mxcompile.numerics.hadamard import rotate_weight
from mxcompile.ops import MULTIPLY, ROTATE


def rotate(program: Program, names: Collection[str], block: int, importance: Tensor | None = None) -> None:
    """Rotate the one value that the named matmul nodes read, and their weights.

    importance: mean square of each channel of the rotated value `[in]`, if it has been measured. The program may be
    another copy of the one in which the names were found.
    """
    matmuls = [matmul for matmul in choose(program).matmuls if matmul.node.name in names]
    rotated = _insert(program, matmuls, block)
    for parameter, matmul in {matmul.parameter: matmul for matmul in matmuls}.items():
        rows = rotate_weight(finite_rows(program, matmul), block)
        program.set_tensor(parameter, matmul.rows(rows).contiguous())
        program.importance.pop(parameter, None)
        if importance is not None:
            program.importance[parameter] = importance
    for matmul in matmuls:
        replace_activation(matmul.node, rotated)
    program.graph_module.recompile()


def is_rotated(value: Node) -> bool:
    """Whether `rotate` or `transform` made a value."""
    return value.target is ROTATE or value.target is MULTIPLY


def rotation_of(value: Node) -> int | None:
    """The block of the rotation that made a value, None if none did."""
    return int(value.args[1]) if value.target is ROTATE else None  # pyright: ignore[reportArgumentType]


def _insert(program: Program, matmuls: Sequence[Matmul], block: int) -> Node:
    """The rotated value, inserted in front of its first reader; an existing rotation of the same value is reused."""
    value = matmuls[0].activation
    for user in value.users:
        if rotation_of(user) == block:
            return user
    first = next(node for node in program.graph.nodes if node in {matmul.node for matmul in matmuls})
    return insert_call(program, first, ROTATE, (value, block), f"{value.name}_rotated")
