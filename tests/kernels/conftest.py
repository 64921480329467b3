"""Triton kernels on CPU tensors, edge-case inputs for them, and bounds on float32 accumulation error.

`interpreted` imports *private copies* of the kernel modules while Triton's interpreter knob is on, then restores
everything: the modules that other tests and mxcompile import stay compiled, no environment variable stays set, and
Inductor is unaffected. The price: Triton's own jit functions (tl.max, tl.zeros, tl.cdiv), which exist since Triton was
imported, cannot be interpreted, so the kernels avoid them.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mxcompile.formats import MXFormat
from mxcompile.numerics.reference import element_table

_PACKAGE = "mxcompile.kernels.triton"
_MODULES = (
    "align",
    "attention.one_token",
    "attention.one_token_kernel",
    "elements",
    "decode_planes",
    "dequantize",
    "rows_linear",
    "planes_linear",
    "quantize",
    "reductions",
    "gates",
    "held_slices",
    "held_planes",
    "integer_planes",
    "expert_slices",
    "expert_sums",
    "grouped_planes",
    "routing",
    "gate_rows",
    "norm",
    "gate_product",
    "attention.append_token",
    "attention.packed_states",
    "attention.exact_tokens",
    "attention.packed_queries",
    "attention.append_packed",
    "attention.packed_start",
    "attention.packed_attention_kernel",
    "attention.packed_attention",
)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[SimpleNamespace]:
    """The modules rows_linear, planes_linear, quantize ..., interpreted, as `.linear`, `.planes` and so on.

    `.larger` is the original combining function of quantize's maximum (see below).
    """
    pytest.importorskip("triton")
    copies = _import_interpreted()
    linear, quantize = copies["rows_linear"], copies["quantize"]
    larger = quantize.maximum
    with pytest.MonkeyPatch.context() as patch:
        _let_scalars_be_range_bounds(patch)
        _round_to_e4m3(patch)
        _patch_the_language_once_a_launch(patch)
        _remember_types(patch)
        # The interpreter recognizes Triton's own maximum and sum; it calls others once per element: 100 times slower.
        standard = importlib.import_module("triton.language.standard")
        for copy in copies.values():
            for name, own in (("maximum", standard._elementwise_max), ("plus", standard._sum_combine)):
                if hasattr(copy, name):
                    patch.setattr(copy, name, own)
        names = ("align", "dequantize", "grouped_planes", "expert_sums", "routing", "gate_rows")
        names += (
            "one_token",
            "norm",
            "gate_product",
            "append_token",
            "held_planes",
            "integer_planes",
            "packed_attention",
            "packed_attention_kernel",
            "packed_states",
        )
        others = {name: copies[name] for name in names}
        yield SimpleNamespace(linear=linear, planes=copies["planes_linear"], quantize=quantize, larger=larger, **others)


def _import_interpreted() -> dict[str, ModuleType]:
    import triton

    names = [f"{_PACKAGE}.{name}" for name in _MODULES]
    packages = [importlib.import_module(name.rpartition(".")[0]).__dict__ for name in names]
    leaves = [name.rpartition(".")[2] for name in names]
    real = [sys.modules.pop(name, None) for name in names]
    attributes = [package.pop(leaf, None) for package, leaf in zip(packages, leaves, strict=True)]
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            return {leaf: importlib.import_module(name) for name, leaf in zip(names, leaves, strict=True)}
    finally:
        for i, name in enumerate(names):
            _restore(sys.modules, name, real[i])
            _restore(packages[i], leaves[i], attributes[i])


def _restore(table: dict[str, Any], name: str, value: ModuleType | None) -> None:
    table.pop(name, None)
    if value is not None:
        table[name] = value


def _let_scalars_be_range_bounds(patch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 interprets `range(0, n)` by int() of a one-element array, which numpy 2.5 refuses."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.setattr(interpreter, "_patch_lang_tensor", patched)


def _patch_the_language_once_a_launch(patch: pytest.MonkeyPatch) -> None:
    """The interpreter replaces the functions of `tl` when a kernel starts, and again in each call of a jit function,
    where nothing is left to replace: a third of the time of a kernel. All kernels have `tl` and nothing else of it."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_language, language, launches = interpreter._patch_lang, importlib.import_module("triton.language"), []

    def patched(function: Any) -> Any:
        if launches:
            return interpreter._LangPatchScope()
        assert language.core not in [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        scope = patch_language(function)
        restore = scope.restore
        launches.append(scope)
        scope.restore = lambda: (launches.clear(), restore())
        return scope

    patch.setattr(interpreter, "_patch_lang", patched)


def _remember_types(patch: pytest.MonkeyPatch) -> None:
    """The interpreter describes the type and the shape of each value anew: half of the time of a kernel."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    core = importlib.import_module("triton.language").core
    plain_type, plain_tensor = core.block_type.__init__, core.tensor.__init__
    plain_numpy_type = interpreter._get_np_dtype
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}
    numpy_types: dict[str, np.dtype[Any]] = {}

    def block_type(self: Any, element_type: Any, shape: Any) -> None:
        key = element_type.name, *shape
        if key not in types:
            plain_type(self, element_type, shape)
            types[key] = vars(self)
        vars(self).update(types[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            plain_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    def numpy_type(type: Any) -> np.dtype[Any]:
        if type.name not in numpy_types:
            numpy_types[type.name] = plain_numpy_type(type)
        return numpy_types[type.name]

    patch.setattr(core.block_type, "__init__", block_type)
    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(interpreter, "_get_np_dtype", numpy_type)


def _round_to_e4m3(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter truncates float32 -> e4m3, where GPUs and torch round to nearest, ties to even."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert, language = interpreter._convert_float, importlib.import_module("triton.language")

    def converted(given: np.ndarray, before: Any, after: Any, mode: Any) -> np.ndarray:
        if (before, after) != (language.float32, language.float8e4nv):
            return convert(given, before, after, mode)
        values = torch.from_numpy(np.ascontiguousarray(given).view(np.float32))
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(given.shape)

    patch.setattr(interpreter, "_convert_float", converted)


@dataclass
class Accesses:
    """All addresses that an interpreted kernel loads from and stores to."""

    loads: list[np.ndarray] = field(default_factory=list)
    stores: list[np.ndarray] = field(default_factory=list)

    def assert_within(self, inputs: list[Tensor], output: Tensor) -> None:
        """Loads touch only elements of the inputs; stores touch every element of the output exactly once."""
        allowed = np.concatenate([_addresses(t) for t in inputs])
        assert np.isin(np.concatenate(self.loads), allowed).all()
        assert np.array_equal(np.sort(np.concatenate(self.stores)), np.sort(_addresses(output)))


def _addresses(t: Tensor) -> np.ndarray:
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return (t.data_ptr() + offsets.flatten() * t.element_size()).numpy().astype(np.uint64)


@pytest.fixture
def accesses(interpreted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Accesses:
    """Records the loads and stores of interpreted kernels from here on."""
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    load, store, seen = builder.create_masked_load, builder.create_masked_store, Accesses()

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        seen.loads.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        return load(self, pointers, mask, *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        seen.stores.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        return store(self, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    return seen


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[Tensor, Tensor], None]:
    """Asserts bitwise equality, including signs of zeros; any NaN equals any other."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
        same = actual.view(bits) == expected.view(bits)
        same |= actual.isnan() & expected.isnan()
        wrong = (~same).nonzero()[:8]
        found = [(tuple(i), actual[tuple(i)].item(), expected[tuple(i)].item()) for i in wrong.tolist()]
        assert same.all(), f"{int((~same).sum())} values differ; (index, actual, expected): {found}"

    return check


@pytest.fixture(scope="session")
def error_over_bound() -> Callable[..., float]:
    """The largest |y - y64| / bound over the outputs of `y = x @ weight.T + bias`; at most 1 is allowed.

    y64 is the matmul of the same x and weight (already rounded to x's dtype) in float64. The kernel accumulates K
    products and the bias in float32. Each of those n = K + 1 steps loses at most u = 2**-23 of the largest partial sum
    (half of that if it rounds to nearest; tensor cores truncate), and no partial sum exceeds
    S = sum |x| |w| + |b|, so |acc - y64| <= E = n u / (1 - n u) S. The result is rounded once to x's dtype:
    |y - acc| <= eps/2 |acc| + tiny/2 with tiny the smallest subnormal. In all: E + eps/2 (|y64| + E) + tiny/2.
    """

    def ratio(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
        x64, w64 = x.double(), weight.double()
        b64 = torch.zeros(weight.shape[0], dtype=torch.float64, device=x.device) if bias is None else bias.double()
        exact = x64 @ w64.T + b64
        n_u = (x.shape[-1] + 1) * 2.0**-23
        error = n_u / (1 - n_u) * (x64.abs() @ w64.abs().T + b64.abs())
        info = torch.finfo(y.dtype)
        bound = error + info.eps / 2 * (exact.abs() + error) + info.smallest_normal * info.eps / 2
        assert y.isfinite().all()
        return ((y.double() - exact).abs() / bound).max().item() if y.numel() else 0.0

    return ratio


@pytest.fixture(scope="session")
def attention_over_bound() -> Callable[..., float]:
    """The largest |y - y64| / bound over the outputs of attention, `y = softmax(q @ k.T * scale + mask) @ v`; zero
    where every key is masked.

    u = 2**-23 is the largest relative error of a float32 operation. A score is off by at most
    (size + 3) u (sum |q| |k| scale + |mask|), which is a relative error of its exponential. Computing the exponential
    and rescaling it to the maximum score, whose own error cancels, adds 8 u times its distance from the maximum, and
    16 u per block of keys. The exponential is rounded to the dtype of the values, by eps/2 of it or half a subnormal,
    and accumulation over the keys loses u per step. All of this affects the numerator; the denominator has the same
    errors except for the values and that rounding. The result is rounded once.
    """

    def ratio(y: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> float:
        group, (keys, size), u, info = query.shape[1] // key.shape[1], key.shape[2:], 2.0**-23, torch.finfo(y.dtype)
        q, k, v = query.double(), *(part.double().repeat_interleave(group, 1) for part in (key, value))
        added = torch.zeros((), dtype=torch.float64, device=q.device) if mask is None else mask.double()
        if mask is not None and mask.dtype == torch.bool:
            added = torch.where(mask, 0.0, -torch.inf).double()
        scores = q @ k.mT * scale + added
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        powers = (scores - top).exp()
        total = powers.sum(-1, keepdim=True).clamp(min=info.smallest_normal)
        shares, magnitude = powers / total, q.abs() @ k.abs().mT * scale + added.abs()
        off = u * ((size + 3) * magnitude + 8 * (top - scores) + keys + 16 * (keys // 16 + 1))
        off = torch.where(shares > 0, shares * off, 0.0)
        subnormal, rounding = info.smallest_normal * info.eps, 0.0 if y.dtype == torch.float32 else info.eps / 2
        exact = shares @ v
        error = (off + shares * rounding + subnormal / total) @ v.abs() + exact.abs() * off.sum(-1, keepdim=True)
        error *= 1.01
        bound = error + info.eps / 2 * (exact.abs() + error) + subnormal / 2
        assert y.isfinite().all()
        return ((y.double() - exact).abs() / bound).max().item() if y.numel() else 0.0

    return ratio


@pytest.fixture(scope="session")
def nasty_blocks() -> Callable[[MXFormat, torch.dtype], Tensor]:
    """`[blocks, 32]`: blocks whose largest magnitude lies on and next to every rule's threshold, at every kind of
    exponent, filled with elements and with the midpoints between them; and blocks of zeros, Inf, NaN and subnormals.
    """

    def make(fmt: MXFormat, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        amax = _threshold_values(dtype)
        elements = torch.tensor([v for v in element_table(fmt) if 0 <= v <= fmt.max_value]).double().unique()
        grid = torch.cat([elements, (elements[1:] + elements[:-1]) / 2])
        choice = torch.randint(len(grid), (len(amax), 31), generator=generator)
        unit = torch.exp2(torch.frexp(amax.double()).exponent.double() - 1 - fmt.emax)
        sign = torch.randint(2, choice.shape, generator=generator) * 2 - 1
        rest = (grid[choice] * unit[:, None] * sign).to(dtype)
        return torch.cat([torch.cat([amax[:, None], rest], dim=1), _special_blocks(dtype, generator)])

    return make


def _threshold_values(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    top, bottom = int(info.max).bit_length() - 1, int(np.log2(info.smallest_normal))
    tiny = bottom + int(np.log2(info.eps))
    exponents = {tiny, tiny + 1, *range(bottom - 3, bottom + 3), -1, 0, 1, top - 9, top - 5, *range(top - 2, top + 1)}
    mantissas = [1.0, 1.5, 1.75, 1.8125, 1.875, 1.9375, 2 - 2.0**-6, 2 - 2.0**-7]
    values = torch.tensor([m * 2.0**e for e in sorted(exponents) for m in mantissas], dtype=torch.float64).to(dtype)
    bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16)
    near = torch.cat([(bits + step).clamp(min=0) for step in (-1, 0, 1)]).view(dtype)
    return near.clamp(max=info.max)


def _special_blocks(dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    info = torch.finfo(dtype)
    x = torch.randn(12, 32, generator=generator).to(dtype)
    x[0], x[1], x[2] = 0.0, -0.0, info.max
    x[3, 5], x[4, 31], x[5, 0] = torch.inf, -torch.inf, torch.nan
    x[6] = torch.inf
    x[7] *= info.smallest_normal
    x[8] *= info.smallest_normal * info.eps * 4
    x[9, 7] = -info.max
    x[10] = (x[10].double() * torch.exp2(torch.arange(32) - 16.0)).to(dtype)
    x[11] = -info.smallest_normal * info.eps
    return x
