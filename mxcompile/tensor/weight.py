"""MXWeight: a parameter that holds packed MX elements and scales in place of a float tensor.

It has the shape and dtype of the weight it stands for. A matmul with it (`F.linear`, `@`, `addmm`, `bmm`, grouped
matmul) computes what a lowered Program does: the input is multiplied by a vector, rotated, quantized and dequantized as
the weight says, the weight is dequantized, and torch's own op multiplies. `F.embedding` looks up packed rows. Any other
arithmetic is refused with the operator's name: nothing is dequantized behind the user's back. In eager mode the kernels
serve `F.linear`; inside `torch.compile` and `torch.export` every step is an op of the graph.

Survives `deepcopy`, `.to(device)`, `.to(dtype)`, `torch.compile` and `torch.export`. Compiled for a GPU its bytes may
be arranged in planes; where nothing reads these (another device or dtype, a file) they go back to rows.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.errors import MXCompileError
from mxcompile.formats import parse_format
from mxcompile.kernels.layout.planes import Scaling, scaling_for
from mxcompile.kernels.layout.rows_to_planes import planes_of_rows, range_of_rows, rows_of_planes
from mxcompile.ops import ALIGN, DEQUANTIZE, LINEARS, MULTIPLY, QUANTIZE, QUANTIZE_DEQUANTIZE, ROTATE

aten = torch.ops.aten


@dataclass(frozen=True)
class MXLayout:
    """What the bytes of an MXWeight mean, and how the input of its matmul is prepared.

    format: of the weight. size: number of values along the blocks (the inner dimension).
    transposed: the contracted dimension is the weight's second to last one; the packed form always has it last.
    activation, rule: format and scale rule of the input, or None if it stays float.
    multiplier: a name for the values that the input is multiplied by (equal names, equal values), or None.
    rotation: block of the rotation of the input (`hadamard.py`), after the multiplication, or None.
    aligned: whether the input, once rounded, is aligned (`reference.align`).
    planes: None if the bytes lie in rows (`packing.py`); if they are arranged for the GPU's fast kernels
        (`kernels/planes.py`), how their scales are shifted.
    """

    format: str
    size: int
    transposed: bool = False
    activation: str | None = None
    rule: str | None = None
    multiplier: str | None = None
    rotation: int | None = None
    aligned: bool = False
    planes: Scaling | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # Dynamo's guards hold a copy, and compare what is the same object in no time


class MXWeight(Tensor):
    """elements: uint8 `[..., out, bytes]`, scales: uint8 `[..., out, blocks]`; see `packing.py`.

    multiplier: `[in]`, in the weight's dtype, what the input is multiplied by; None if `layout.multiplier` is.
    """

    elements: Tensor
    scales: Tensor
    multiplier: Tensor | None
    layout_: MXLayout
    _flat: tuple[list[str], tuple[MXLayout, torch.dtype]]

    def __new__(
        cls, elements: Tensor, scales: Tensor, layout: MXLayout, dtype: torch.dtype, multiplier: Tensor | None = None
    ) -> Self:
        """Make a tensor without storage of its own around the packed bytes."""
        shape = [*elements.shape[:-1], layout.size]
        if layout.transposed:
            shape[-2:] = shape[-1], shape[-2]
        del multiplier
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=elements.device)  # pyright: ignore

    def __init__(
        self, elements: Tensor, scales: Tensor, layout: MXLayout, dtype: torch.dtype, multiplier: Tensor | None = None
    ) -> None:
        self.elements = elements
        self.scales = scales
        self.multiplier = multiplier
        self.layout_ = layout
        self._flat = ["elements", "scales", "multiplier"][: len(self.parts)], (layout, dtype)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"MXWeight(shape={tuple(self.shape)}, {self.layout_})"

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold it: elements, scales, and the multiplier if there is one."""
        return (
            (self.elements, self.scales) if self.multiplier is None else (self.elements, self.scales, self.multiplier)
        )

    @property
    def packed_bytes(self) -> int:
        """Bytes of its parts in memory."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def dequantize(self) -> Tensor:
        """The float values, in the weight's shape and dtype; of an expanded weight, each value is decoded once."""
        spec = self.layout_
        elements, scales = (_unexpanded(part) for part in (self.elements, self.scales))
        values = DEQUANTIZE(elements, scales, spec.format, spec.size, self.dtype, *_if_planes(spec))
        values = values.transpose(-1, -2) if spec.transposed else values
        return values if values.shape == self.shape else values.expand(self.shape)

    def prepare(self, x: Tensor) -> Tensor:
        """The input of a matmul with this weight, as the matmul sees it."""
        spec = self.layout_
        x = self.transform(x)
        if spec.activation is None:
            return x
        if not _is_traced(x):
            rounded = QUANTIZE_DEQUANTIZE(x, spec.activation, spec.rule)
        else:
            elements, scales = QUANTIZE(x, spec.activation, spec.rule)
            rounded = DEQUANTIZE(elements, scales, spec.activation, x.shape[-1], x.dtype)
        return ALIGN(rounded) if spec.aligned else rounded

    def transform(self, x: Tensor) -> Tensor:
        """The input of a matmul with this weight, before it is rounded."""
        spec = self.layout_
        if self.multiplier is not None:
            x = MULTIPLY(x, self.multiplier, str(spec.multiplier))
        return x if spec.rotation is None else ROTATE(x, spec.rotation)

    def swap_axes(self) -> "MXWeight":
        """The weight with its last two dimensions exchanged, on the same bytes."""
        spec = replace(self.layout_, transposed=not self.layout_.transposed)
        return MXWeight(self.elements, self.scales, spec, self.dtype, self.multiplier)

    def in_rows(self) -> "MXWeight":
        """The weight with its bytes in rows; itself if they are."""
        spec = self.layout_
        if spec.planes is None:
            return self
        fmt = parse_format(spec.format)
        elements, scales = rows_of_planes(self.elements, self.scales, fmt, spec.size, spec.planes)
        return MXWeight(elements, scales, replace(spec, planes=None), self.dtype, self.multiplier)

    def in_planes(self, scaling: Scaling | None = None, place: tuple[Tensor, Tensor] | None = None) -> "MXWeight":
        """The weight with its bytes in planes; itself if they are.

        scaling: for the range of its scales, found if None, which raises MXCompileError if planes cannot hold the
        weight. place: where to put the bytes.
        """
        spec = self.layout_
        if spec.planes is not None:
            return self
        fmt = parse_format(spec.format)
        if scaling is None:
            scaling = scaling_for(*range_of_rows(self.elements, self.scales, fmt, spec.size), fmt)
        elements, scales = planes_of_rows(self.elements, self.scales, fmt, spec.size, scaling, place)
        return MXWeight(elements, scales, replace(spec, planes=scaling), self.dtype, self.multiplier)

    def _stable_hash_for_caching(self) -> str:
        """What compiled graphs depend on; read by AOTAutograd's cache (torch 2.13 and later)."""
        parts = [(tuple(p.shape), p.stride(), p.device.type) for p in self.parts]
        return f"MXWeight {self.layout_} {self.dtype} {parts}"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[MXLayout, torch.dtype]]:
        return self._flat  # made once: every call of a compiled model asks every weight

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], spec: tuple[MXLayout, torch.dtype], *_: Any) -> "MXWeight":
        return MXWeight(inner["elements"], inner["scales"], *spec, inner.get("multiplier"))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func) or _CUSTOM_OPS.get(str(func))
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
        if func in _LOW_LEVEL:
            return _LOW_LEVEL[func](*args, **options)
        if func not in _COPIES or not isinstance(weight, MXWeight):
            raise MXCompileError(
                f"{func} is not defined on an MXWeight: it takes part in matmuls (right operand) and embeddings; "
                "use weight.dequantize() for the float values"
            )
        dtype = options.pop("dtype", None) or weight.dtype
        if func is aten._to_copy.default and not _keeps_planes(dtype, options.get("device"), weight):
            weight = weight.in_rows()
        elements, scales, *rest = (func(part, *args[1:], **options) for part in weight.parts)
        layout = weight.layout_
        if rest and dtype != weight.dtype:
            rest = [rest[0].to(dtype)]
            layout = replace(layout, multiplier=f"{layout.multiplier} as {dtype}")
        return MXWeight(elements, scales, layout, dtype, *rest)


def _if_planes(layout: MXLayout) -> tuple[Scaling, ...]:
    """The operators' last argument, where it is not what they take if it is left out."""
    return () if layout.planes is None else (layout.planes,)


def _keeps_planes(dtype: torch.dtype, device: torch.device | str | None, weight: MXWeight) -> bool:
    """Whether a weight of that dtype, there, is read by the kernels for planes."""
    kind = weight.device.type if device is None else torch.device(device).type
    return dtype == torch.bfloat16 and kind == "cuda"


def _unexpanded(part: Tensor) -> Tensor:
    for dim in range(part.dim() - 2):
        if part.stride(dim) == 0:
            part = part.narrow(dim, 0, 1)
    return part


_COPIES = frozenset({aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default})


def _copy_into(weight: MXWeight, other: MXWeight) -> MXWeight:
    """Write the other's parts over the weight's. Its layout stays: compiled graphs do not look at it again."""
    other = other.in_rows() if weight.layout_.planes is None else other.in_planes()
    if weight.layout_ != other.layout_:
        raise MXCompileError(
            f"cannot copy {other.layout_} into {weight.layout_}: put the other weight in its place "
            "(load_state_dict(..., assign=True))"
        )
    for part, values in zip(weight.parts, other.parts, strict=True):
        part.copy_(values)
    return weight


def _right_operand(op: Callable[..., Tensor], place: int) -> Callable[..., Tensor]:
    """op with its operand at `place` being an MXWeight, and the one before it the input to prepare."""

    def multiply(*args: Any, **kwargs: Any) -> Tensor:
        weight = args[place] if len(args) > place else None
        if not isinstance(weight, MXWeight):
            raise MXCompileError(f"{op.__name__}: an MXWeight can only be the right operand of a matmul")
        before, after = args[: place - 1], args[place + 1 :]
        return op(*before, weight.prepare(args[place - 1]), weight.dequantize(), *after, **kwargs)

    return multiply


def _linear(input: Tensor, weight: MXWeight, bias: Tensor | None = None) -> Tensor:
    if _served_by_kernels(input, weight):
        spec = weight.layout_
        args = ([weight.elements], [weight.scales], [bias], spec.format, spec.activation, spec.rule)
        return LINEARS(weight.transform(input), *args, spec.planes, spec.aligned)[0]
    return F.linear(weight.prepare(input), weight.dequantize(), bias)


def _served_by_kernels(x: Tensor, weight: MXWeight) -> bool:
    """Outside `torch.compile`, whose graphs show every step, for a product without gradients of the right dtype."""
    plain = weight.dim() == 2 and not weight.layout_.transposed and x.dtype == weight.dtype
    return plain and not _is_traced(x) and not (torch.is_grad_enabled() and x.requires_grad)


def _is_traced(x: Tensor) -> bool:
    """Whether every step has to be seen: by `torch.compile` or `torch.export`, that is Dynamo or (torch 2.11) what
    comes after it, or because `step_by_step` asks for it.
    """
    return torch.compiler.is_compiling() or type(x) is not Tensor or _STEP_BY_STEP.get()


@contextmanager
def step_by_step() -> Generator[None]:
    """Matmuls with MX weights as the operators that a lowered Program has, one by one, without the kernels that do all
    of them at once and sum in another order.
    """
    token = _STEP_BY_STEP.set(True)
    try:
        yield
    finally:
        _STEP_BY_STEP.reset(token)


_STEP_BY_STEP: ContextVar[bool] = ContextVar("mxcompile.step_by_step", default=False)


def _grouped_mm(mat_a: Tensor, mat_b: MXWeight, *args: Any, **kwargs: Any) -> Tensor:
    return torch._grouped_mm(mat_b.prepare(mat_a), mat_b.dequantize(), *args, **kwargs)  # pyright: ignore


def _grouped_mm_fallback(input: Tensor, weight: MXWeight, offs: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(weight.prepare(input), weight.dequantize(), offs)


def _embedding(input: Tensor, weight: MXWeight, *args: Any, **kwargs: Any) -> Tensor:
    del args, kwargs  # padding_idx and the like only matter for gradients
    spec = weight.layout_
    weight = weight.in_rows()
    rows = [F.embedding(input, part) for part in (weight.elements, weight.scales)]
    return DEQUANTIZE(*rows, spec.format, spec.size, weight.dtype)


def _transpose(weight: MXWeight, dim0: int = -2, dim1: int = -1) -> MXWeight:
    last = {weight.dim() - 1, weight.dim() - 2}
    if {dim0 % weight.dim(), dim1 % weight.dim()} != last:
        raise MXCompileError("only the last two dimensions of an MXWeight can be exchanged")
    return weight.swap_axes()


def _expand(weight: MXWeight, sizes: Sequence[int]) -> MXWeight:
    if tuple(sizes[-2:]) != tuple(weight.shape[-2:]):
        raise MXCompileError("only leading dimensions of an MXWeight can be expanded")
    elements, scales = (part.expand(*sizes[:-2], *part.shape[-2:]) for part in (weight.elements, weight.scales))
    return MXWeight(elements, scales, weight.layout_, weight.dtype, weight.multiplier)


def _view(weight: MXWeight, sizes: Sequence[int]) -> MXWeight:
    if tuple(sizes) != tuple(weight.shape):
        raise MXCompileError(f"an MXWeight of shape {tuple(weight.shape)} cannot be viewed as {tuple(sizes)}")
    return MXWeight(weight.elements, weight.scales, weight.layout_, weight.dtype, weight.multiplier)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.matmul: _right_operand(torch.matmul, 1),
    Tensor.matmul: _right_operand(torch.matmul, 1),
    Tensor.__matmul__: _right_operand(torch.matmul, 1),
    torch.mm: _right_operand(torch.mm, 1),
    Tensor.mm: _right_operand(torch.mm, 1),
    torch.bmm: _right_operand(torch.bmm, 1),
    Tensor.bmm: _right_operand(torch.bmm, 1),
    torch.addmm: _right_operand(torch.addmm, 2),
    Tensor.addmm: _right_operand(torch.addmm, 2),
    torch.baddbmm: _right_operand(torch.baddbmm, 2),
    Tensor.baddbmm: _right_operand(torch.baddbmm, 2),
    torch.t: _transpose,
    Tensor.t: _transpose,
    Tensor.T.__get__: _transpose,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.mT.__get__: _transpose,  # pyright: ignore[reportAttributeAccessIssue]
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    torch._grouped_mm: _grouped_mm,  # pyright: ignore[reportPrivateUsage] - what F.grouped_mm calls
}
# What F.linear and the like become where torch functions are switched off (nn.MultiheadAttention does that).
_LOW_LEVEL: dict[Any, Callable[..., Any]] = {
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.linear.default: _linear,
    aten.mm.default: _right_operand(torch.mm, 1),
    aten.bmm.default: _right_operand(torch.bmm, 1),
    aten.addmm.default: _right_operand(torch.addmm, 2),
}
_CUSTOM_OPS: dict[str, Callable[..., Any]] = {
    "transformers.grouped_mm_fallback": _grouped_mm_fallback,
    "transformers.grouped_mm_fallback.default": _grouped_mm_fallback,
}
