"""Stored tensors of a quantized checkpoint -> the float tensors that they stand for, decoded when they are read.

    q_proj.weight float8_e4m3fn, q_proj.weight_scale_inv [out/128, in/128]          DeepSeek, Qwen ("fp8")
    experts.down_proj_blocks, experts.down_proj_scales                              gpt-oss ("mxfp4")
    q_proj.weight_packed int32, weight_scale, weight_shape, weight_zero_point       compressed-tensors: 4, 8 bits
    q_proj.weight_packed uint8 or weight float8_e4m3fn, weight_scale uint8          compressed-tensors: MXFP4, 6, 8
    q_proj.weight float8_e4m3fn, weight_scale [out, 1], [1] or [out/128, in/128]    compressed-tensors: FP8

A weight in an MX format also has its elements and scales as they are (`StoredTensor.packed`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from mxcompile.checkpoint.config_json import METHOD as OWN
from mxcompile.checkpoint.interop.element_layouts import STORED, from_rows
from mxcompile.checkpoint.stored_files import StoredTensor
from mxcompile.errors import CheckpointError
from mxcompile.formats import MXFP4, MXFormat
from mxcompile.tensor.dtypes import FLOAT_DTYPES
from mxcompile.tensor.weight import MXLayout, MXWeight

_FP8: Final = torch.float8_e4m3fn
_ROWS: Final = 1024
_BITS: Final = (4, 8)


@dataclass(frozen=True)
class _Source:
    """A quantized checkpoint. dtype: of the values that it is decoded to."""

    folder: Path
    quantization: Mapping[str, Any]
    dtype: torch.dtype
    stored: Mapping[str, StoredTensor]


def decoded(folder: Path, config: Mapping[str, Any], stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensors with float tensors in the place of quantized ones; the same ones if nothing is quantized.

    config: the folder's config.json. Raises CheckpointError for a quantization that mxcompile cannot decode.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return stored
    method = str(cast(Any, quantization).get("quant_method"))
    if method not in _DECODERS:
        what = "is a checkpoint of mxcompile" if method == OWN else f"is quantized by {method!r}"
        raise CheckpointError(
            f"{folder} {what}: quantize the float model that it was made from (of quantized ones, mxcompile decodes "
            f"{', '.join(_DECODERS)})"
        )
    stated = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    source = _Source(folder, cast(Any, quantization), FLOAT_DTYPES.get(stated, torch.bfloat16), stored)
    return dict(_DECODERS[method](source))


def _fp8(source: _Source) -> Iterator[tuple[str, StoredTensor]]:
    """Of every `NAME` with a `NAME_scale_inv`, the values NAME * scale."""
    block = source.quantization.get("weight_block_size")
    sizes = (int(block[0]), int(block[1])) if block else None
    used = {f"{name}_scale_inv" for name in source.stored}
    for name, tensor in source.stored.items():
        scales = source.stored.get(f"{name}_scale_inv")
        if scales is not None:
            yield name, _scaled(source, name, tensor, scales, sizes)
        elif name not in used and not name.endswith((".activation_scale", ".input_scale")):
            _check_plain(source, name, tensor)
            yield name, tensor


def _mxfp4(source: _Source) -> Iterator[tuple[str, StoredTensor]]:
    """Of every `NAME_blocks` with `NAME_scales`, the experts `[experts, in, out]`."""
    for name, tensor in source.stored.items():
        path, _, kind = name.rpartition("_")
        if kind == "blocks":
            scales = _needed(source, name, f"{path}_scales")
            if tensor.shape[:-1] != scales.shape or tensor.shape[-1] != MXFP4.block_bytes or len(scales.shape) != 3:
                raise _misfit(source, name, tensor, scales)
            layout = MXLayout(str(MXFP4), 32 * scales.shape[-1], transposed=True)
            read = _block_reader(tensor)
            shape = torch.Size((scales.shape[0], layout.size, scales.shape[1]))
            yield path, _packed(source, path, tensor, read, scales, MXFP4, layout, shape)
        elif kind != "scales" or f"{path}_blocks" not in source.stored:
            yield name, tensor


def _compressed_tensors(source: _Source) -> Iterator[tuple[str, StoredTensor]]:
    parts = ("weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale")
    scaled = {name.removesuffix("_scale") for name in source.stored if name.endswith(".weight_scale")}
    for name, tensor in source.stored.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            yield f"{path}.weight", _unpacked(source, f"{path}.weight", tensor)
        elif leaf == "weight" and name in scaled:
            yield name, _unpacked(source, name, tensor)
        elif leaf not in parts:
            if leaf.startswith("weight_"):
                raise CheckpointError(f"{tensor.file}: {name} belongs to a format that mxcompile cannot decode")
            yield name, tensor


_DECODERS: Final[dict[str, Callable[[_Source], Iterator[tuple[str, StoredTensor]]]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}


def _unpacked(source: _Source, name: str, tensor: StoredTensor) -> StoredTensor:
    """A weight of compressed-tensors: its elements `tensor` with the scales that stand beside them."""
    scales = _needed(source, name, f"{name}_scale")
    if tensor.dtype == torch.int32:
        return _integers(source, name, tensor, scales)
    if scales.dtype == torch.uint8 and tensor.dtype in (torch.uint8, _FP8) and len(scales.shape) == 2:
        size = 32 * scales.shape[-1]
        fmt = STORED.get(8 * tensor.shape[-1] // max(1, size))
        if fmt is None or tensor.shape[:-1] != scales.shape[:-1]:
            raise _misfit(source, name, tensor, scales)
        shape = torch.Size((*tensor.shape[:-1], size))
        return _packed(source, name, tensor, tensor.read, scales, fmt, MXLayout(str(fmt), size), shape)
    if tensor.dtype == _FP8:
        return _scaled(source, name, tensor, scales, None)
    raise _misfit(source, name, tensor, scales)


def _scaled(
    source: _Source, name: str, tensor: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None
) -> StoredTensor:
    """FP8 with a scale for each block of rows and columns; block: its size, None if that divides the weight."""
    rows, columns = tensor.shape[-2:]
    grid = scales.shape[-2:] if len(scales.shape) > 1 else (1, 1)
    sizes = block or (-(-rows // grid[0]), -(-columns // grid[1]))
    if tensor.dtype != _FP8 or scales.shape.numel() != tensor.shape[:-2].numel() * grid[0] * grid[1]:
        raise _misfit(source, name, tensor, scales)
    if (-(-rows // sizes[0]), -(-columns // sizes[1])) != tuple(grid):
        raise _misfit(source, name, tensor, scales)

    def read() -> Tensor:
        elements, factors = tensor.read(), _as_float(scales.read()).reshape(*tensor.shape[:-2], *grid)
        values = torch.empty(tensor.shape, dtype=source.dtype)
        wide = factors.repeat_interleave(sizes[1], -1)[..., :columns]
        for start in range(0, rows, step := sizes[0] * max(1, _ROWS // sizes[0])):
            own = slice(start, min(start + step, rows))
            tall = wide[..., start // sizes[0] : -(-own.stop // sizes[0]), :].repeat_interleave(sizes[0], -2)
            values[..., own, :] = elements[..., own, :].float() * tall[..., : own.stop - start, :]
        return values

    where = f"FP8 (E4M3) with a scale for each {sizes[0]} x {sizes[1]}" if block else "FP8 (E4M3) with float scales"
    size = tensor.stored_bytes + scales.stored_bytes
    return replace(tensor, dtype=source.dtype, read=read, note=where, encoded=size, offset=None)


def _integers(source: _Source, name: str, tensor: StoredTensor, scales: StoredTensor) -> StoredTensor:
    """Integers of 4 or 8 bits in int32 words, with a scale, and perhaps a zero point, for each group of a row."""
    stated = _needed(source, name, f"{name}_shape").read().tolist()
    zeros, order = source.stored.get(f"{name}_zero_point"), source.stored.get(f"{name}_g_idx")
    out, size = (int(each) for each in stated) if len(stated) == 2 else (0, 0)
    bits = 32 * tensor.shape[-1] // max(1, size)
    groups = scales.shape[-1]
    if (
        bits not in _BITS
        or tensor.shape[0] != out
        or scales.shape != (out, groups)
        or (size % groups and order is None)
    ):
        raise _misfit(source, name, tensor, scales)

    def read() -> Tensor:
        factors = scales.read()
        offsets = None if zeros is None else _words(zeros.read().t(), bits)[:, :out].t().to(factors.dtype)
        columns = torch.arange(size) // -(-size // groups) if order is None else order.read().long()
        words, values = tensor.read(), torch.empty(out, size, dtype=source.dtype)
        for start in range(0, out, _ROWS):
            own = slice(start, start + _ROWS)
            part = _words(words[own], bits)[:, :size].to(factors.dtype)
            part = part if offsets is None else part - offsets[own][:, columns]
            values[own] = part * factors[own][:, columns]
        return values

    kind = f"{bits}-bit integers with {'scales' if zeros is None else 'scales and zero points'} by group"
    held = sum(each.stored_bytes for each in (tensor, scales, zeros, order) if each is not None)
    shape = torch.Size((out, size))
    return replace(tensor, shape=shape, dtype=source.dtype, read=read, note=kind, encoded=held, offset=None)


def _words(words: Tensor, bits: int) -> Tensor:
    """The integers in int32 words `[rows, words]`, the first in the lowest bits: int32 `[rows, words * 32 / bits]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2) - 2 ** (bits - 1)


def _packed(
    source: _Source,
    name: str,
    tensor: StoredTensor,
    elements: Callable[[], Tensor],
    scales: StoredTensor,
    fmt: MXFormat,
    layout: MXLayout,
    shape: torch.Size,
) -> StoredTensor:
    """A weight in an MX format, of that shape."""

    def packed() -> MXWeight:
        rows = elements().view(torch.uint8)
        return from_rows(f"{tensor.file}: {name}", rows, scales.read(), fmt, layout, source.dtype)

    note = f"{str(fmt).upper()} with blocks of {fmt.block_size}"
    size = tensor.stored_bytes + scales.stored_bytes
    return StoredTensor(shape, source.dtype, tensor.file, lambda: packed().dequantize(), packed, note, encoded=size)


def _block_reader(tensor: StoredTensor) -> Callable[[], Tensor]:
    return lambda: tensor.read().flatten(-2)


def _as_float(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents (E8M0)."""
    return scales.view(torch.float8_e8m0fnu).float() if scales.dtype == torch.uint8 else scales.float()


def _needed(source: _Source, name: str, part: str) -> StoredTensor:
    if part not in source.stored:
        raise CheckpointError(f"{source.folder} does not hold {part}, without which {name} cannot be decoded")
    return source.stored[part]


def _check_plain(source: _Source, name: str, tensor: StoredTensor) -> None:
    if tensor.dtype == _FP8:
        raise CheckpointError(f"{tensor.file}: {name} is FP8 and {source.folder} holds no {name}_scale_inv")


def _misfit(source: _Source, name: str, tensor: StoredTensor, scales: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: {name} has elements {list(tensor.shape)} ({tensor.dtype}) and scales {list(scales.shape)} "
        f"({scales.dtype}), which mxcompile cannot decode as {source.quantization.get('quant_method')!r}"
    )
