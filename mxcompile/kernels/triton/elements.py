"""MX element codes and scale bytes -> float32 values, inside Triton kernels.

Shared by the kernels of this folder: reading codes from the packed layout of packing.py, decoding them, exact
conversion between float32 and the tensor's dtype, detecting the last of several programs, and the check whether Triton
runs on a tensor's device.

One block of `BLOCK` elements is `BLOCK * BITS / 8` bytes. It splits into `PARTS` runs of `WIDTH = BLOCK / PARTS`
adjacent elements that are stored in the same bytes: 1 part for 8 bits, 2 for 4 bits (low and high nibbles), 4 for 6
bits (nibbles and bit pairs of a quarter block). A kernel works part by part: part `p`, lane `i` is element
`p * WIDTH + i` of its block.

Two things make the results exact. Multiplying by a power of two is exact, including subnormal operands and results,
because Triton emits `mul.f32` without `.ftz` (numpy, in the interpreter, keeps subnormals too). And bfloat16 is
converted with integer operations: Triton's interpreter gets bfloat16 subnormals wrong and does not round to even.
"""

# ruff: noqa: N803, N806, SIM300  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# Triton ships no types for jit functions (their arguments are neither Python's nor torch's, tl.static_range is "not
# iterable"), so strict checking reports false errors there. Host code is fully typed all the same.

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxcompile.formats import MXFormat

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported_device(x: Tensor) -> str | None:
    """Why the kernels of this folder cannot run where `x` is, in a sentence; None if they can."""
    if x.device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {x.device.type}"
    if torch.version.hip is not None:
        return "the Triton kernels rely on float32 subnormals being kept, which was verified on NVIDIA GPUs only"
    major, minor = capability(x.device)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability."""
    return torch.cuda.get_device_capability(device)


def starts_early(x: Tensor) -> bool:
    """Whether kernels may start while the previous one still runs (programmatic dependent launch); they must then wait
    for it before they read or write what another kernel writes."""
    return x.is_cuda and capability(x.device) >= (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """The GPU's number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def unsupported_dtype(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot read or write `dtype`, in a sentence; None if they can."""
    if dtype in FLOAT_DTYPES:
        return None
    return f"the Triton kernels take bfloat16, float16 or float32, not {str(dtype).removeprefix('torch.')}"


def element_constants(fmt: MXFormat) -> dict[str, int]:
    """The constexpr arguments that describe a format."""
    return {
        "BITS": fmt.bits,
        "EXPONENT_BITS": fmt.exponent_bits,
        "MANTISSA_BITS": fmt.mantissa_bits,
        "EMIN": fmt.emin,
        "MAX_CODE": fmt.max_code,
        "BLOCK": fmt.block_size,
        "PARTS": parts(fmt),
    }


def parts(fmt: MXFormat) -> int:
    """Number of runs of elements that share bytes in one block."""
    return {8: 1, 4: 2, 6: 4}[fmt.bits]


@triton.jit
def element_offsets(column, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Byte offset of lane `column % WIDTH` of block `column // WIDTH`; see load_codes."""
    return column + (column // WIDTH) * (2 * WIDTH) if BITS == 6 else column


@triton.jit
def load_codes(pointers, mask, part, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """The codes of one part as int32, zero where masked; `pointers` point at `element_offsets`."""
    if BITS == 8:
        codes = tl.load(pointers, mask=mask, other=0).to(tl.int32)
    elif BITS == 4:
        codes = (tl.load(pointers, mask=mask, other=0).to(tl.int32) >> (4 * part)) & 0xF
    else:
        nibbles = tl.load(pointers + (part % 2) * WIDTH, mask=mask, other=0).to(tl.int32)
        pairs = tl.load(pointers + 2 * WIDTH, mask=mask, other=0).to(tl.int32)
        codes = ((nibbles >> (4 * (part // 2))) & 0xF) | (((pairs >> (2 * part)) & 0x3) << 4)
    return codes


@triton.jit
def decode(
    codes,
    BITS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MAX_CODE: tl.constexpr,
):
    """Codes (int32) to element values (float32), Inf and NaN codes included."""
    if EXPONENT_BITS == 0:
        # The sign is shifted into bit 31; UNIT undoes the shift.
        UNIT: tl.constexpr = 2.0 ** (BITS - 32 - MANTISSA_BITS)
        values = (codes << (32 - BITS)).to(tl.float32) * UNIT
    else:
        # Exponent and mantissa moved to the fields of float32 are the value times 2**(1 - EMIN - 127);
        # subnormal elements become subnormals of float32.
        REBIAS: tl.constexpr = 2.0 ** (126 + EMIN)
        magnitude = codes & (2 ** (BITS - 1) - 1)
        finite = (magnitude << (23 - MANTISSA_BITS)).to(tl.float32, bitcast=True) * REBIAS
        bits = finite.to(tl.int32, bitcast=True)
        if EXPONENT_BITS == 5:
            bits = tl.where(magnitude == MAX_CODE + 1, 0x7F800000, bits)
            bits = tl.where(magnitude > MAX_CODE + 1, 0x7FC00000, bits)
        elif BITS == 8:
            bits = tl.where(magnitude > MAX_CODE, 0x7FC00000, bits)
        values = (bits | ((codes >> (BITS - 1)) << 31)).to(tl.float32, bitcast=True)
    return values


@triton.jit
def scale_value(scales):
    """E8M0 bytes (any integer type) to float32: 2**(byte - 127), 255 is NaN."""
    scales = scales.to(tl.int32)
    bits = tl.where(scales == 0, 0x00400000, scales << 23)
    return tl.where(scales == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """2**exponent as float32 for int32 exponents in [-127, 127]; -127 is subnormal."""
    bits = tl.where(exponent <= -127, 0x00400000, (exponent + 127) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """bfloat16, float16 or float32 to float32, exactly."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 to DTYPE, rounded to nearest, ties to even."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        result = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def arrives_last(counter, count):
    """Whether this program is the last of `count` to arrive; it then sees their stores. Resets the counter."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == count - 1:
        tl.store(counter, 0)
    return arrived == count - 1
