"""Find the nodes that multiply a value by a weight: linear, addmm, matmul, bmm, grouped matmul.

A weight is recognised by data flow: a parameter that reaches the op's right operand through transposes alone. Matmuls
of two computed values (attention scores) are not candidates. A candidate that cannot be quantized is returned as an
`UnquantizedNode` with the reason.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.errors import WeightError
from mxcompile.graph.dataflow import SAME_VALUE, TRANSPOSES, is_cast_without_change, is_constant, operand, swapped_axes
from mxcompile.graph.program import Program, module_path, where
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
_OTHER_CONTRACTIONS: Final = frozenset({aten.einsum.default, aten.bilinear.default, aten.tensordot.default})


@dataclass(frozen=True)
class Matmul:
    """`node = activation @ weight`.

    activation: the left operand, `[..., in]`.
    root: the node that the weight comes from: the parameter's `get_attr`, or its `mx::dequantize` once lowered.
    reader: the first node on the way from root to `node` (a transpose, or `node` itself).
    axis: the dimension of root that is contracted, -1 or -2.
    """

    node: Node
    activation: Node
    root: Node
    reader: Node
    axis: int
    bias: Node | None

    @property
    def parameter(self) -> str:
        """Full name of the weight (of its packed elements, once lowered)."""
        source = self.root if self.root.op == "get_attr" else self.root.args[0]
        assert isinstance(source, Node)
        return str(source.target)

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
    """A node whose weight stays in float, the reason, and how many matmul weight bytes that is."""

    node: Node
    reason: str
    bytes: int


def find_matmuls(program: Program) -> tuple[list[Matmul], list[UnquantizedNode]]:
    """All matmuls by a weight, in graph order, and those that cannot be quantized."""
    matmuls: list[Matmul] = []
    unsupported: list[UnquantizedNode] = []
    for node in program.graph.nodes:
        if node.target in _CONVOLUTIONS:
            unsupported.append(
                UnquantizedNode(node, "a convolution: MX quantization covers matmuls only, it stays float", 0)
            )
        if node.target in _OTHER_CONTRACTIONS and (size := _parameter_bytes(program, node)):
            reason = f"{node.target} of a parameter is not supported: write it as F.linear or x @ w"
            unsupported.append(UnquantizedNode(node, reason, size))
        signature = _SIGNATURES.get(str(node.target))
        result = None if signature is None else _as_matmul(program, node, signature)
        if isinstance(result, Matmul):
            matmuls.append(result)
        elif isinstance(result, str):
            unsupported.append(UnquantizedNode(node, result, _weight_bytes(node, signature)))
    return matmuls, unsupported


def finite_rows(program: Program, matmul: Matmul) -> Tensor:
    """The weight `[..., out, in]`; raises WeightError if it holds NaN or Inf."""
    weight = program.tensor(matmul.parameter).detach()
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
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


def _as_matmul(program: Program, node: Node, signature: _Signature) -> Matmul | str | None:
    """A Matmul, the reason why a candidate cannot be quantized, or None for a node that is not a candidate."""
    activation, weight = operand(node, signature.activation), operand(node, signature.weight)
    if not isinstance(activation, Node) or not isinstance(weight, Node):
        return None
    if _reads_parameter(program, activation) and not _reads_parameter(program, weight):
        return "the weight is the left operand: blocks run along the inner dimension of a right operand"
    root, reader, axis = _origin(node, weight, signature.axis)
    if root.target is not DEQUANTIZE:
        if root.op != "get_attr":
            return _why_computed_weight(program, root)
        if not program.is_parameter(str(root.target)):
            return None
    bias = None if signature.bias is None else operand(node, signature.bias)
    matmul = Matmul(node, activation, root, reader, axis, bias if isinstance(bias, Node) else None)
    return _why_unusable(matmul) or matmul


def _origin(node: Node, weight: Node, axis: int) -> tuple[Node, Node, int]:
    """Follow a right operand back through transposes: (root, the root's first reader, its contracted dimension)."""
    reader = node
    while weight.target in TRANSPOSES or weight.target in SAME_VALUE or is_cast_without_change(weight):
        source = weight.args[0]
        assert isinstance(source, Node)
        axes = swapped_axes(weight, source.meta["val"].dim())
        if axes is not None:
            axis = axes[axis % len(axes)] - len(axes)
        reader, weight = weight, source
    return weight, reader, axis


def _why_unusable(matmul: Matmul) -> str | None:
    dims = matmul.root.meta["val"].dim()
    if dims < 2 or matmul.axis not in (-1, -2):
        return f"the weight is contracted over dimension {matmul.axis} of {dims}"
    if any(matmul.node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return "addmm with alpha or beta other than 1"
    return None


def _reads_parameter(program: Program, node: Node) -> bool:
    while node.target in TRANSPOSES or node.target in SAME_VALUE:
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node.op == "get_attr" and program.is_parameter(str(node.target))


def _why_computed_weight(program: Program, weight: Node) -> str | None:
    """Why a right operand that is not a plain parameter cannot be quantized; None if it is not a weight."""
    if not is_constant(weight):
        return None
    sources = [str(n.target) for n in weight.all_input_nodes if n.op == "get_attr"]
    names = [name for name in sources if program.is_parameter(name)]
    if not names and weight.op != "get_attr":
        return None
    return (
        f"the weight is computed at run time by {weight.target} from {', '.join(names) or 'constants'}: store it as a "
        "parameter (torch.nn.utils.parametrize.remove_parametrizations)"
    )


def _parameter_bytes(program: Program, node: Node) -> int:
    values = [source.meta["val"] for source in node.all_input_nodes if _reads_parameter(program, source)]
    return sum(value.numel() * value.element_size() for value in values)


def _weight_bytes(node: Node, signature: _Signature | None) -> int:
    weight = None if signature is None else operand(node, signature.weight)
    value = weight.meta.get("val") if isinstance(weight, Node) and is_constant(weight) else None
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
