"""MXWeight: a parameter that holds packed MX elements and scales in place of a float tensor.

It has the shape and dtype of the weight it replaces. A matmul with it (`F.linear`, `@`, `addmm`, `bmm`, grouped
matmul) computes what a lowered Program does: the input is multiplied by a vector, rotated, quantized and dequantized as
the layout specifies, the weight is dequantized, and torch's own op multiplies. `F.embedding` looks up packed rows. Any
other arithmetic raises an error that names the operator: nothing is dequantized implicitly. In eager mode fused kernels
run `F.linear`; inside `torch.compile` and `torch.export` every step is an op of the graph. The weight has no gradient;
inputs and biases have theirs, rounding passes it unchanged.

Supports `deepcopy`, `.to(device)`, `.to(dtype)`, `torch.compile` and `torch.export`. Compiling for a GPU may convert it
to the planar layout; it goes back to row-major where nothing reads planes (another device or dtype, a file).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from mxcompile.errors import MXCompileError
from mxcompile.formats import parse_format
from mxcompile.kernels.layout.planes import PlanarScaling, scaling_for
from mxcompile.kernels.layout.rows_to_planes import (
    ScaleRange,
    convert_to_planes,
    convert_to_rows,
    weight_scale_range,
    why_shape_not_planar,
)
from mxcompile.numerics.hadamard import rotate_input
from mxcompile.ops import DEQUANTIZE, MULTIPLY, QUANTIZE, QUANTIZE_DEQUANTIZE, ROTATE
from mxcompile.tensor.layout import MXLayout
from mxcompile.tensor.refusals import float_into, forward_mode, not_defined
from mxcompile.tensor.unfused import is_for_shapes, is_traced, needs_gradient, unfused_matmuls

__all__ = ["MXLayout", "MXWeight", "unfused_matmuls"]

aten = torch.ops.aten

HANDLERS: Final[dict[Any, Callable[..., Any]]] = {}
"""Function of torch -> what it does with an MXWeight; filled by `operators.py`."""
CUSTOM_OPS: Final[dict[str, Callable[..., Any]]] = {}
"""The same for operators of other libraries, by name."""
LOW_LEVEL: Final[dict[Any, Callable[..., Any]]] = {}
"""Aten operator -> the same, where `__torch_function__` is disabled, as in nn.MultiheadAttention."""


class MXWeight(Tensor):
    """elements: uint8 `[..., out, bytes]`, scales: uint8 `[..., out, blocks]`; see `packing.py`.

    multiplier: `[in]`, in the weight's dtype, multiplied with the input, or matrices `[in / n, n, n]` for runs of its
        channels; None if `layout.multiplier` is.
    """

    elements: Tensor
    scales: Tensor
    multiplier: Tensor | None
    layout_: MXLayout
    _flat: tuple[list[str], tuple[MXLayout, torch.dtype]]

    def __new__(
        cls,
        elements: Tensor,
        scales: Tensor | None = None,
        layout: MXLayout | None = None,
        dtype: torch.dtype | None = None,
        multiplier: Tensor | None = None,
        *,
        requires_grad: bool = False,
    ) -> Self:
        """Wrap the packed bytes in a tensor without storage of its own.

        `MXWeight(weight, requires_grad=False)` wraps those of another MXWeight: accelerate makes parameters that way.
        """
        del scales, multiplier
        if isinstance(elements, MXWeight):
            elements, layout, dtype = elements.elements, elements.layout_, elements.dtype
        if layout is None or dtype is None:
            raise TypeError("MXWeight(elements, scales, layout, dtype) needs all four")
        shape = [*elements.shape[:-1], layout.size]
        if layout.transposed:
            shape[-2:] = shape[-1], shape[-2]
        options: dict[str, Any] = {"dtype": dtype, "device": elements.device, "requires_grad": requires_grad}
        return Tensor._make_wrapper_subclass(cls, shape, **options)  # pyright: ignore

    def __init__(
        self,
        elements: Tensor,
        scales: Tensor | None = None,
        layout: MXLayout | None = None,
        dtype: torch.dtype | None = None,
        multiplier: Tensor | None = None,
        *,
        requires_grad: bool = False,
    ) -> None:
        del requires_grad
        if isinstance(elements, MXWeight):
            scales, layout, dtype, multiplier = elements.scales, elements.layout_, elements.dtype, elements.multiplier
            elements = elements.elements
        assert scales is not None
        assert layout is not None
        assert dtype is not None  # checked by __new__
        self.elements = elements
        self.scales = scales
        self.multiplier = multiplier
        self.layout_ = layout
        self._flat = ["elements", "scales", "multiplier"][: len(self.parts)], (layout, dtype)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"MXWeight(shape={tuple(self.shape)}, {self.layout_})"

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The component tensors: elements, scales, and the multiplier if there is one."""
        return (
            (self.elements, self.scales) if self.multiplier is None else (self.elements, self.scales, self.multiplier)
        )

    @property
    def packed_bytes(self) -> int:
        """Bytes of the component tensors."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def dequantize(self) -> Tensor:
        """The float values, in the weight's shape and dtype; an expanded weight is decoded once."""
        spec = self.layout_
        if is_for_shapes(self.elements):
            return self.elements.new_empty(self.shape, dtype=self.dtype)
        elements, scales = (_unexpanded(part) for part in (self.elements, self.scales))
        values = DEQUANTIZE(elements, scales, spec.format, spec.size, self.dtype, *planes_argument(spec))
        values = values.transpose(-1, -2) if spec.transposed else values
        return values if values.shape == self.shape else values.expand(self.shape)

    @property
    def is_prepared(self) -> bool:
        """Whether the input of a matmul is multiplied or rotated."""
        return self.multiplier is not None or self.layout_.rotation is not None

    def float_weight(self) -> Tensor:
        """The weight with which an input that is not prepared gives the same matmul, but for the input's rounding.

        In the weight's shape and dtype: `dequantize()`, rotated back and multiplied, in float32.
        """
        values = self.dequantize()
        if not self.is_prepared:
            return values
        rows = (values.transpose(-1, -2) if self.layout_.transposed else values).float()
        rows = rows if self.layout_.rotation is None else rotate_input(rows, self.layout_.rotation)
        if self.multiplier is not None:
            back = self.multiplier.float() if self.multiplier.dim() == 1 else self.multiplier.float().transpose(-1, -2)
            rows = MULTIPLY(rows, back, str(self.layout_.multiplier))
        return (rows.transpose(-1, -2) if self.layout_.transposed else rows).to(self.dtype)

    def prepare(self, x: Tensor) -> Tensor:
        """The input of a matmul with this weight, transformed and quantized."""
        spec = self.layout_
        x = self.transform(x)
        if spec.activation is None or is_for_shapes(x):
            return x
        if not is_traced(x) or needs_gradient(x):
            rounded = QUANTIZE_DEQUANTIZE(x, spec.activation, spec.rule)
        else:
            elements, scales = QUANTIZE(x, spec.activation, spec.rule)
            rounded = DEQUANTIZE(elements, scales, spec.activation, x.shape[-1], x.dtype)
        return rounded

    def transform(self, x: Tensor) -> Tensor:
        """The input of a matmul with this weight, multiplied and rotated but not quantized.

        Raises MXCompileError for an input with a forward-mode derivative: the operators would drop it in silence.
        """
        spec = self.layout_
        if not is_traced(x) and unpack_dual(x).tangent is not None:
            raise MXCompileError(forward_mode(self.shape, spec.format))
        if self.multiplier is not None:
            x = MULTIPLY(x, self.multiplier, str(spec.multiplier))
        return x if spec.rotation is None else ROTATE(x, spec.rotation)

    def swap_axes(self) -> "MXWeight":
        """The weight with its last two dimensions swapped, on the same bytes."""
        spec = replace(self.layout_, transposed=not self.layout_.transposed)
        return MXWeight(self.elements, self.scales, spec, self.dtype, self.multiplier)

    def to_row_major(self) -> "MXWeight":
        """The weight in the row-major layout; itself if it is row-major."""
        spec = self.layout_
        if spec.planes is None:
            return self
        fmt = parse_format(spec.format)
        elements, scales = convert_to_rows(*self._as_matrix(), fmt, spec.size, spec.planes)
        elements, scales = (part.view(*self.elements.shape[:-1], -1) for part in (elements, scales))
        return MXWeight(elements, scales, replace(spec, planes=None), self.dtype, self.multiplier)

    def to_planar(self, scaling: PlanarScaling | None = None, out: tuple[Tensor, Tensor] | None = None) -> "MXWeight":
        """The weight in the planar layout; itself if it is planar.

        scaling: for the range of its scales. If None, it is computed, which raises MXCompileError if the weight cannot
        be planar. out: where to store the bytes.
        """
        spec = self.layout_
        if spec.planes is not None:
            return self
        fmt = parse_format(spec.format)
        if scaling is None:
            scaling = scaling_for(*self.planar_scale_range(), fmt)
        elements, scales = convert_to_planes(*self._as_matrix(), fmt, spec.size, scaling, out)
        elements, scales = (part.view(*self.elements.shape[:-1], -1) for part in (elements, scales))
        return MXWeight(elements, scales, replace(spec, planes=scaling), self.dtype, self.multiplier)

    def planar_scale_range(self) -> ScaleRange:
        """The range of its scales, for `scaling_for`. Raises MXCompileError if the weight must stay row-major."""
        fmt = parse_format(self.layout_.format)
        if (reason := why_shape_not_planar(self.elements.shape[-2], fmt)) is not None:
            raise MXCompileError(reason)
        return weight_scale_range(*self._as_matrix(), fmt, self.layout_.size)

    def _as_matrix(self) -> tuple[Tensor, Tensor]:
        """Elements and scales `[rows, bytes]`: the rows of all experts, one after the other."""
        elements, scales = (_unexpanded(part) for part in (self.elements, self.scales))
        return elements.flatten(0, -2), scales.flatten(0, -2)

    def _stable_hash_for_caching(self) -> str:
        """The properties that compiled graphs depend on, for AOTAutograd's cache (torch 2.13 and later)."""
        parts = [(tuple(p.shape), p.stride(), p.device.type) for p in self.parts]
        return f"MXWeight {self.layout_} {self.dtype} {parts}"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[MXLayout, torch.dtype]]:
        return self._flat  # precomputed: every call of a compiled model flattens every weight

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], spec: tuple[MXLayout, torch.dtype], *_: Any) -> "MXWeight":
        return MXWeight(inner["elements"], inner["scales"], *spec, inner.get("multiplier"))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(func) or CUSTOM_OPS.get(str(func))
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage] - keeps results plain
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        weight, options = args[0], dict(kwargs or {})
        if func is aten.copy_.default and isinstance(weight, MXWeight) and isinstance(args[1], MXWeight):
            return _copy_into(weight, args[1])
        if func is aten.copy_.default and isinstance(weight, MXWeight):
            raise MXCompileError(float_into(weight.shape, weight.layout_.format))
        if func is aten.copy_.default:
            raise MXCompileError(
                "an MXWeight cannot be copied into a float tensor: replace it (model.requires_grad_(False), then "
                "load_state_dict(..., assign=True)), or copy weight.dequantize()"
            )
        if func in LOW_LEVEL:
            return LOW_LEVEL[func](*args, **options)
        if func not in _COPIES or not isinstance(weight, MXWeight):
            if torch.is_inference_mode_enabled():  # composite ops such as aten.to arrive as they are
                result = func.decompose(*args, **options)
                if result is not NotImplemented:
                    return result
            raise MXCompileError(not_defined(str(func)))
        dtype = options.pop("dtype", None) or weight.dtype
        if func is aten._to_copy.default and not _stays_planar(dtype, options.get("device"), weight):
            weight = weight.to_row_major()
        elements, scales, *rest = (func(part, *args[1:], **options) for part in weight.parts)
        layout = weight.layout_
        if rest and dtype != weight.dtype:
            rest = [rest[0].to(dtype)]
            layout = replace(layout, multiplier=f"{layout.multiplier} as {dtype}")
        return MXWeight(elements, scales, layout, dtype, *rest)


def planes_argument(layout: MXLayout) -> tuple[PlanarScaling, ...]:
    """The `planes` argument of the operators; omitted where it is the default."""
    return () if layout.planes is None else (layout.planes,)


def _stays_planar(dtype: torch.dtype, device: torch.device | str | None, weight: MXWeight) -> bool:
    """Whether the planar kernels can read the weight with that dtype on that device."""
    device_type = weight.device.type if device is None else torch.device(device).type
    return dtype == torch.bfloat16 and device_type == "cuda"


def _unexpanded(part: Tensor) -> Tensor:
    for dim in range(part.dim() - 2):
        if part.stride(dim) == 0:
            part = part.narrow(dim, 0, 1)
    return part


_COPIES = frozenset({aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default})


def _copy_into(weight: MXWeight, other: MXWeight) -> MXWeight:
    """Copy the component tensors of `other` into `weight`. The layout stays: compiled graphs do not check it again."""
    other = other.to_row_major() if weight.layout_.planes is None else other.to_planar()
    if weight.layout_ != other.layout_:
        raise MXCompileError(
            f"cannot copy {other.layout_} into {weight.layout_}: replace the weight instead "
            "(load_state_dict(..., assign=True))"
        )
    for part, values in zip(weight.parts, other.parts, strict=True):
        part.copy_(values)
    return weight
