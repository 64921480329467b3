"""Find the nodes that multiply a value by a weight: linear, addmm, matmul, bmm, grouped matmul.

A weight is recognised by data flow: a parameter that reaches the op's right operand through transposes alone. Matmuls
of two computed values (attention scores) are not candidates. Every other node that may multiply by a tensor of the
program (a computed weight, a buffer, a convolution, a recurrent layer, an unknown operator) is returned as an
`UnquantizedNode` with the reason.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from mxcompile.analysis.tensor_reads import Sources, ancestors, contracts, read_tensors, tensor_sources
from mxcompile.errors import WeightError
from mxcompile.graph.dataflow import (
    CASTS,
    SAME_VALUE,
    TRANSPOSES,
    is_cast_without_change,
    is_matrix_of_several,
    is_nested,
    operand,
    swapped_axes,
    target_name,
)
from mxcompile.graph.edit import parameter_name
from mxcompile.graph.program import Program, module_path, where
from mxcompile.numerics.row_slices import all_finite, row_slices
from mxcompile.ops import DEQUANTIZE

aten = torch.ops.aten


@dataclass(frozen=True)
class _Signature:
    """Positions of a matmul op's operands, and the dimension of the right one that it contracts."""

    activation: int
    weight: int
    axis: int
    bias: int | None = None


_SIGNATURES: Final = {
    "aten.linear.default": _Signature(0, 1, -1, 2),
    "aten.addmm.default": _Signature(1, 2, -2, 0),
    "aten.baddbmm.default": _Signature(1, 2, -2, 0),
    "aten.mm.default": _Signature(0, 1, -2),
    "aten.bmm.default": _Signature(0, 1, -2),
    "aten.matmul.default": _Signature(0, 1, -2),
    "aten._grouped_mm.default": _Signature(0, 1, -2),
    "transformers.grouped_mm_fallback.default": _Signature(0, 1, -2),
}
_CONVOLUTIONS: Final = frozenset(
    {
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
        *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
        *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
    }
)
_LEFT: Final = "the weight is the left operand: blocks run along the inner dimension of a right operand"
_LISTED: Final = 3
_PASSED_ON: Final = CASTS | TRANSPOSES | SAME_VALUE | {operator.getitem}
"""They only pass a weight on: the message names what comes before them."""


@dataclass(frozen=True)
class Matmul:
    """`node = activation @ weight`.

    activation: the left operand, `[..., in]`.
    root: the node that the weight comes from: the parameter's `get_attr`, or its `mx::dequantize` once lowered.
    reader: the first node on the way from root to `node` (a transpose, or `node` itself).
    axis: the dimension of root that is contracted, -1 or -2.
    is_one_of_several: root holds several weights, of which this matmul reads one: `linear(x, experts[2])`.
    """

    node: Node
    activation: Node
    root: Node
    reader: Node
    axis: int
    bias: Node | None
    is_one_of_several: bool = False

    @property
    def parameter(self) -> str:
        """Full name of the weight (of its packed elements, once lowered)."""
        return str(self._source.target)

    @property
    def name(self) -> str:
        """Full name of the weight, in float or packed."""
        return parameter_name(self._source)

    @property
    def _source(self) -> Node:
        source = self.root if self.root.op == "get_attr" else self.root.args[0]
        assert isinstance(source, Node)
        return source

    @property
    def is_lowered(self) -> bool:
        """True if the weight is already an MX one."""
        return self.root.op != "get_attr"

    @property
    def in_features(self) -> int:
        """Size of the contracted dimension."""
        return int(self.root.meta["val"].shape[self.axis])

    @property
    def module_path(self) -> str:
        """Path of the module that multiplies."""
        return module_path(self.node)

    def rows(self, weight: Tensor) -> Tensor:
        """The weight with its contracted dimension last, `[..., out, in]`; its own inverse."""
        return weight if self.axis == -1 else weight.transpose(-1, -2)


@dataclass(frozen=True)
class UnquantizedNode:
    """A node that reads tensors in float, and the reason. weights: their names. bytes: theirs together."""

    node: Node
    reason: str
    weights: tuple[str, ...]
    bytes: int

    @staticmethod
    def of(program: Program, node: Node, reason: str, weights: Iterable[str]) -> "UnquantizedNode":
        """With the bytes of the named tensors."""
        names = tuple(dict.fromkeys(weights))
        return UnquantizedNode(node, reason, names, sum(map(program.tensor_bytes, names)))


def find_matmuls(program: Program) -> tuple[list[Matmul], list[UnquantizedNode]]:
    """All matmuls by a weight, and the nodes that multiply by a weight which cannot be quantized, in graph order."""
    results = _candidates(program, tensor_sources(program.graph))
    inner = _inside_computed_weights(program, results)
    sources = tensor_sources(program.graph, results.keys() - inner)
    results = {node: result for node, result in _candidates(program, sources).items() if node not in inner}
    unsupported: list[UnquantizedNode] = []
    for node in program.graph.nodes:
        result = results.get(node)
        if isinstance(result, str):
            weights = _operand_tensors(program, node, sources)
            unsupported.append(UnquantizedNode.of(program, node, result, weights))
        elif result is None and node not in sources and contracts(node):
            weights = [str(tensor.target) for tensor in read_tensors(node, sources)]
            unsupported += [UnquantizedNode.of(program, node, _why_unknown(node, weights), weights)] if weights else []
    return [result for result in results.values() if isinstance(result, Matmul)], unsupported


def finite_rows(program: Program, matmul: Matmul) -> Tensor:
    """The weight `[..., out, in]`; raises WeightError if it holds NaN or Inf."""
    weight = program.tensor(matmul.parameter).detach()
    if not all_finite(weight):
        bad = sum(int((~torch.isfinite(part)).sum()) for (part,) in row_slices(weight))
        raise WeightError(
            f"parameter {matmul.parameter!r} ({where(matmul.node)}) holds {bad} NaN or Inf values and cannot be "
            "quantized: repair the checkpoint, or keep the layer in float with exclude"
        )
    return matmul.rows(weight)


def replace_activation(node: Node, value: Node) -> None:
    """Replace a matmul's activation by another value; a bias that is the same node stays."""
    index = _SIGNATURES[str(node.target)].activation
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(node.target._schema.arguments[index].name, value)  # pyright: ignore


def activation_of(node: Node) -> Node | None:
    """The left operand of a node that multiplies, None for another node."""
    signature = _SIGNATURES.get(str(node.target))
    return None if signature is None else operand(node, signature.activation)


def multiply(matmul: Matmul, values: Mapping[Node, Any], activation: Tensor, weight: Tensor) -> Tensor:
    """The result of a matmul for another input and another weight, in their dtype.

    values: of all nodes that the matmul's node reads. weight: as the parameter is, `[..., out, in]` or transposed.
    """
    right = operand(matmul.node, _SIGNATURES[str(matmul.node.target)].weight)
    path: list[Node] = []
    step = right
    while step is not matmul.root:
        path.append(step)
        step = operand(step, 0)
    for node in reversed(path):
        weight = weight if node.target in CASTS else cast(Any, node.target)(weight, *node.args[1:], **node.kwargs)
    replaced = {**values, matmul.activation: activation, right: weight}

    def value(node: Node) -> Any:
        other = replaced[node]
        is_float = isinstance(other, Tensor) and other.is_floating_point()
        return other.to(activation.dtype) if is_float else other

    args, kwargs = map_arg((matmul.node.args, matmul.node.kwargs), value)
    return cast(Any, matmul.node.target)(*args, **kwargs)


def _candidates(program: Program, sources: Sources) -> dict[Node, Matmul | str]:
    """Each matmul by a weight: a Matmul, or the reason why it cannot be quantized."""
    results = {node: _as_matmul(program, node, sources) for node in program.graph.nodes}
    return {node: result for node, result in results.items() if result is not None}


def _inside_computed_weights(program: Program, results: Mapping[Node, Matmul | str]) -> set[Node]:
    """The candidates that only make a weight: `B @ A` of `linear(x, W + B @ A)`."""
    sources = tensor_sources(program.graph)
    inner: set[Node] = set()
    for node, result in results.items():
        weight = operand(node, _SIGNATURES[str(node.target)].weight)
        if isinstance(result, str) and weight in sources:
            inner |= {each for each in ancestors(weight, sources) if each in results}
    return {node for node in inner if node.target is not aten.linear.default}


def _as_matmul(program: Program, node: Node, sources: Sources) -> Matmul | str | None:
    """A Matmul, the reason why a candidate cannot be quantized, or None for a node that is not a candidate."""
    signature = _SIGNATURES.get(str(node.target))
    if signature is None:
        return None
    activation, weight = operand(node, signature.activation), operand(node, signature.weight)
    if weight not in sources:
        is_weight = any(_is_weight(program, source) for source in sources.get(activation, ()))
        return _LEFT if is_weight else None
    root, reader, axis, is_one_of_several = _origin(node, weight, signature.axis)
    if root.target is not DEQUANTIZE and (root.op != "get_attr" or not program.is_parameter(str(root.target))):
        return _why_no_parameter(program, root, sources)
    bias = None if signature.bias is None else operand(node, signature.bias)
    bias = bias if isinstance(bias, Node) else None
    matmul = Matmul(node, activation, root, reader, axis, bias, is_one_of_several)
    return _why_unusable(matmul) or matmul


def _origin(node: Node, weight: Node, axis: int) -> tuple[Node, Node, int, bool]:
    """Follow a right operand back through transposes, and from one of several weights in a parameter to all of them.

    Returns (root, the root's first reader, its contracted dimension, whether the operand is one of several).
    """
    reader, is_one_of_several = node, False
    while True:
        is_one = is_matrix_of_several(weight)
        if not (is_one or weight.target in TRANSPOSES or weight.target in SAME_VALUE or is_cast_without_change(weight)):
            return weight, reader, axis, is_one_of_several
        is_one_of_several |= is_one
        if weight.target is operator.getitem:  # of unbind
            weight = operand(weight, 0)
        source = weight.args[0]
        assert isinstance(source, Node)
        axes = swapped_axes(weight, source.meta["val"].dim())
        if axes is not None:
            axis = axes[axis % len(axes)] - len(axes)
        reader, weight = weight, source


def _why_unusable(matmul: Matmul) -> str | None:
    dims, dtype = matmul.root.meta["val"].dim(), matmul.root.meta["val"].dtype
    if not dtype.is_floating_point:
        return f"the weight is of {dtype}: only real floats are quantized"
    if dims < 2 or matmul.axis not in (-1, -2):
        return f"the weight is contracted over dimension {matmul.axis} of {dims}"
    if any(matmul.node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return "addmm with alpha or beta other than 1"
    return None


def _is_weight(program: Program, source: Node) -> bool:
    """True for a parameter, and for a buffer or constant of two or more dimensions."""
    return source.meta["val"].dim() >= 2 or program.is_parameter(str(source.target))


def _operand_tensors(program: Program, node: Node, sources: Sources) -> list[str]:
    """Names of the weights of which a matmul's two operands are made."""
    signature = _SIGNATURES[str(node.target)]
    operands = (operand(node, signature.activation), operand(node, signature.weight))
    tensors = [source for value in operands for source in sources.get(value, ())]
    return [str(source.target) for source in tensors if _is_weight(program, source)]


def _why_no_parameter(program: Program, root: Node, sources: Sources) -> str | None:
    """Why a right operand that is not a plain parameter cannot be quantized; None if it is not a weight."""
    names = [str(source.target) for source in sources[root] if _is_weight(program, source)]
    if not names:
        return None
    if root.op == "get_attr":
        return (
            f"the weight {names[0]!r} is a buffer or a constant, which are not quantized: make it an nn.Parameter "
            "(requires_grad=False will do)"
        )
    source = root
    while source.target in _PASSED_ON:
        source = operand(source, 0)
    if source.op == "get_attr":
        dtype = root.meta["val"].dtype
        return (
            f"the weight {names[0]!r} is cast to {dtype} at run time, as in an autocast region: convert its module to "
            f"that dtype, with .to({dtype})"
        )
    return (
        f"the weight is computed at run time by {target_name(source)} from {_listed(names)}: store it as a "
        f"parameter{_remover(source, names)}"
    )


def _remover(source: Node, names: Iterable[str]) -> str:
    """The function that stores a computed weight, in parentheses, where torch has one."""
    if any("parametrizations." in name for name in names):
        return " (torch.nn.utils.parametrize.remove_parametrizations)"
    if source.target is aten._weight_norm.default:
        return " (torch.nn.utils.remove_weight_norm)"
    endings = {"_mask": "torch.nn.utils.prune.remove", "_orig": "torch.nn.utils.remove_spectral_norm"}
    return next((f" ({call})" for end, call in endings.items() if any(name.endswith(end) for name in names)), "")


def _why_unknown(node: Node, weights: list[str]) -> str:
    if node.target in _CONVOLUTIONS:
        return "a convolution: MX quantization covers matmuls only, it stays float"
    if is_nested(node):
        return (
            f"{target_name(node)} reads {_listed(weights)} in a graph of its own, which no pass changes: call these "
            "layers outside of it"
        )
    return (
        f"{node.target} reads {_listed(weights)} in float: only F.linear, x @ w, addmm, bmm and grouped_mm take MX "
        "weights"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
