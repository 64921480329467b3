"""linear(x, w) -> linear(mx::multiply(x, T), w T^-1): matrices T for runs of channels, with which y is unchanged.

Like a rotation, but each run has its own matrix (`block_transforms.py`). `deploy` stores them in the MXWeight as its
multiplier. A vector that already multiplies x is folded into them.
"""

from collections.abc import Collection

from torch import Tensor, nn
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.multiplier import multiplier_digest, multiplier_of, unused_name
from mxcompile.analysis.matmuls import finite_rows, replace_activation
from mxcompile.graph.edit import insert_call, insert_tensor
from mxcompile.graph.program import Program
from mxcompile.numerics.block_transforms import undo_in_weight
from mxcompile.ops import MULTIPLY


def transform(program: Program, names: Collection[str], transforms: Tensor, importance: Tensor) -> None:
    """Transform the one value that the named matmul nodes read, and their weights `[out, in]`.

    transforms: `[in / n, n, n]`. importance: mean square of each channel of the transformed value `[in]`. The program
    may be another copy of the one in which the names were found.
    """
    matmuls = [matmul for matmul in choose(program).matmuls if matmul.node.name in names]
    value = before = matmuls[0].activation
    device, dtype = program.device(matmuls[0].parameter), value.meta["val"].dtype
    transforms = transforms.to(device)
    stored = transforms.to(dtype)
    for parameter, matmul in {matmul.parameter: matmul for matmul in matmuls}.items():
        rows = undo_in_weight(finite_rows(program, matmul), stored)
        program.set_tensor(parameter, matmul.rows(rows).contiguous())
        program.importance[parameter] = importance
    if (multiplier := multiplier_of(program, value)) is not None:
        assert isinstance(value.args[0], Node)
        factors = program.tensor(multiplier).detach().to(transforms.dtype)
        stored = (transforms * factors.view(len(transforms), 1, -1)).to(dtype)
        value = value.args[0]
    name = unused_name(program, f"{matmuls[0].parameter}_input_transform")
    program.set_tensor(name, nn.Parameter(stored.contiguous(), requires_grad=False))
    nodes = {matmul.node for matmul in matmuls}
    first = next(node for node in program.graph.nodes if node in nodes)
    read = insert_tensor(program, first, name)
    args = (value, read, multiplier_digest(stored))
    product = insert_call(program, first, MULTIPLY, args, f"{value.name}_transformed")
    for node in nodes:
        replace_activation(node, product)
    _erase_unread(program, before)
    program.graph_module.recompile()


def _erase_unread(program: Program, product: Node) -> None:
    """Erase the product of an input and its multiplier if nothing reads it any more."""
    if multiplier_of(program, product) is not None and not product.users:
        _, multiplier, *_ = product.args
        program.graph.erase_node(product)
        if isinstance(multiplier, Node) and not multiplier.users:
            program.erase_tensor_node(multiplier)
