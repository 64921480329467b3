"""linear(x, w) -> linear(mx::rotate(x), w R): both rotated over short runs of channels, the product as before.

A rotation (`hadamard.py`) mixes the channels of a run: an outlier is spread over it, and the values that share an MX
scale become alike. It is part of how a weight prepares its input, like a multiplier (`multiplier.py`), and `deploy`
carries it.
"""

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul, finite_rows, read_instead
from mxcompile.graph.edit import insert_call
from mxcompile.graph.program import Program
from mxcompile.numerics.hadamard import rotate_weight
from mxcompile.ops import ROTATE


def rotate(program: Program, names: Collection[str], block: int, importance: Tensor | None = None) -> None:
    """Let the matmuls of these node names, which read one value, read it rotated, and rotate their weights.

    importance: mean square of each channel of the rotated value `[in]`, if it is known. The program may be another copy
    of the one in which the names were found.
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
        read_instead(matmul.node, rotated)
    program.graph_module.recompile()


def rotation_of(value: Node) -> int | None:
    """The block of the rotation that made a value, None if none did."""
    return int(value.args[1]) if value.target is ROTATE else None  # pyright: ignore[reportArgumentType]


def _insert(program: Program, matmuls: Sequence[Matmul], block: int) -> Node:
    """The rotated value, in front of its first reader; readers rotated earlier share it."""
    value = matmuls[0].activation
    for user in value.users:
        if rotation_of(user) == block:
            return user
    first = next(node for node in program.graph.nodes if node in {matmul.node for matmul in matmuls})
    return insert_call(program, first, ROTATE, (value, block), f"{value.name}_rotated")
