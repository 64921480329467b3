"""linear(x, w) -> linear(x * m, w), m a vector `[in]` of ones that absorbs factors where no parameter before x can.

No parameter can divide the output of GELU, of softmax, or of an embedding that the residual stream reads too, for its
matmuls alone. An explicit multiply in front of them can, at the cost of one multiplication per token and channel.
`find_groups` then finds a scale group in which the multiplier is divided, `fold` folds the factors into it, and
`deploy` stores it in the MXWeight, which multiplies its input by it.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from mxcompile.analysis.choice import choose, exclude_shared_weights
from mxcompile.analysis.folds.groups import ScaleGroup, UnfoldableInput, find_groups, fold
from mxcompile.analysis.folds.rotation import is_rotated
from mxcompile.analysis.matmuls import Matmul, replace_activation
from mxcompile.errors import MXCompileError
from mxcompile.graph.dataflow import effective_readers
from mxcompile.graph.edit import insert_call, insert_tensor
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Miss
from mxcompile.ops import MULTIPLY
from mxcompile.tensor.digest import tensor_sha256

_MULTIPLIED = "mx_multiplied"  # key of `Node.meta` on an inserted multiply; the user's own multiplies have none
_MUL = torch.ops.aten.mul.Tensor


def insert_multiplier(program: Program, matmuls: Sequence[Matmul]) -> Node:
    """Make float matmuls that read one value x read x * m instead, and return that product; other readers keep x.

    m: ones `[in]` in x's dtype, a parameter of the program, named after the first matmul's parameter. Matmuls that
    read such a product already keep theirs. `matmuls` may be of a program that this one was copied from; afterwards
    their `activation` is out of date: find them again.
    Raises MXCompileError if the matmuls are lowered or read different values.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    wanted = {matmul.node.name: matmul for matmul in matmuls}
    inputs = {matmul.activation.name for matmul in matmuls}
    if len(inputs) != 1 or any(matmul.is_lowered for matmul in matmuls):
        readers = ", ".join(where(matmul.node) for matmul in matmuls) or "none"
        raise MXCompileError(f"a multiplier goes in front of float matmuls that read one value, these are: {readers}")
    x = nodes[inputs.pop()]
    if multiplier_of(program, x) is not None:
        return x
    ordered = [name for name in nodes if name in wanted]
    product = _insert(program, x, wanted[ordered[0]], nodes[ordered[0]])
    for name in ordered:
        replace_activation(nodes[name], product)
    program.graph_module.recompile()
    return product


def insert_multipliers(program: Program, matmuls: Iterable[Matmul]) -> tuple[list[Node], list[Miss]]:
    """`insert_multiplier` for each value that some of the matmuls read; returns the new products.

    Missed: values that are rotated behind a multiplier, and weights that are multiplied with other values too.
    """
    readers: dict[Node, list[Matmul]] = {}
    for matmul in matmuls:
        readers.setdefault(matmul.activation, []).append(matmul)
    products, misses = list[Node](), list[Miss]()
    for value, group in readers.items():
        if is_rotated(value):
            misses.append(
                Miss(where(group[0].node), "its input is rotated: a multiplier would stand before the rotation")
            )
        elif any(effective_readers(matmul.root) - {other.node for other in group} for matmul in group):
            misses.append(Miss(where(group[0].node), "its weight is also multiplied with other values"))
        elif multiplier_of(program, value) is None:
            products.append(insert_multiplier(program, group))
    return products, misses


def remove_multipliers(program: Program, products: Iterable[Node]) -> None:
    """Undo `insert_multipliers`."""
    for product in products:
        value, multiplier = cast(Node, product.args[0]), cast(Node, product.args[1])
        product.replace_all_uses_with(value)
        program.graph.erase_node(product)
        program.erase_tensor_node(multiplier)
    program.graph_module.recompile()


def _insert(program: Program, x: Node, matmul: Matmul, before: Node) -> Node:
    """Insert x * m in front of a node, m being `[in]` ones of the matmul's size."""
    name = unused_name(program, f"{matmul.parameter}_input_multiplier")
    device = program.device(matmul.parameter)
    ones = torch.ones(matmul.in_features, dtype=x.meta["val"].dtype, device=device)
    program.set_tensor(name, nn.Parameter(ones, requires_grad=False))
    multiplier = insert_tensor(program, before, name)
    product = insert_call(program, before, _MUL, (x, multiplier), f"{x.name}_multiplied")
    product.meta[_MULTIPLIED] = True
    return product


def fold_into_multiplier(program: Program, names: Collection[str], factors: Tensor) -> None:
    """Divide the value that the named matmul nodes read by factors `[in]`, with an explicit multiply.

    Their weights absorb the factors. The program may be another copy of the one in which the names were found.
    """
    insert_multiplier(program, [m for m in choose(program).matmuls if m.node.name in names])
    matmuls = [m for m in choose(program).matmuls if m.node.name in names]
    groups, _ = find_groups(program, matmuls)
    channels = groups[0].matmuls[0][1]
    numbered = torch.ones(groups[0].count, dtype=torch.float32)
    numbered[channels] = factors.cpu().float()
    fold(program, groups[0], numbered)


def multiplier_groups(program: Program, misses: Iterable[UnfoldableInput]) -> list[ScaleGroup]:
    """The group that `fold_into_multiplier` would make, for each value that no parameter can divide."""
    lowered = exclude_shared_weights(program, choose(program)).matmuls
    by_value: dict[Node, list[Matmul]] = {}
    for miss in misses:
        if not miss.by_choice and miss.matmul in lowered and multiplier_of(program, miss.matmul.activation) is None:
            by_value.setdefault(miss.matmul.activation, []).append(miss.matmul)
    groups: list[ScaleGroup] = []
    for value, matmuls in by_value.items():
        if is_rotated(value):
            continue  # an input is multiplied before it is rotated
        if any(effective_readers(matmul.root) - {m.node for m in matmuls} for matmul in matmuls):
            continue  # the weight is multiplied with other values too: they would all need this multiplier
        size = matmuls[0].in_features
        half = value.meta["val"].dtype.itemsize < 4
        readers = tuple((matmul, torch.arange(size)) for matmul in matmuls)
        groups.append(ScaleGroup(value, size, readers, (), frozenset(), half))
    return groups


def multiplier_of(program: Program, value: Node) -> str | None:
    """Full name of the multiplier if the value is a product that `insert_multiplier` inserted."""
    if value.target is not MULTIPLY and (value.target is not _MUL or _MULTIPLIED not in value.meta):
        return None
    multiplier = cast(Node, value.args[1])
    is_held = multiplier.op == "get_attr" and program.has_tensor(str(multiplier.target))
    return str(multiplier.target) if is_held else None


def multiplier_digest(multiplier: Tensor) -> str:
    """The `digest` argument of `mx::multiply`: the first 16 hexadecimal digits of the values' SHA-256.

    Of matrices for runs of n channels, with `n:` in front.
    """
    run = f"{multiplier.shape[-1]}:" if multiplier.dim() > 1 else ""
    return f"{run}{tensor_sha256(multiplier)[:16]}"


def unused_name(program: Program, name: str) -> str:
    """The name, with a number behind it if the program has a tensor of that name."""
    candidate, count = name, 1
    while program.has_tensor(candidate):
        count += 1
        candidate = f"{name}_{count}"
    return candidate
