"""Words of packed rows (`numerics/packing.py`) -> planes of bfloat16 elements in registers, without their scales.

A row of a cache is read as 16-bit words. Plane `p` of a tile of words has one element of each: an 8-bit format has two
planes, a 4-bit format four, a 6-bit format eight, of which each takes four bits from one of two words and two bits from
a third. Which element of the row that is says `element_of`. Two elements are decoded at a time: bit fields are shifted
to where bfloat16 has them, one LOP3 each, and one addition (integers: 128 + n is a bfloat16) or multiplication (floats:
their exponents start at bfloat16's smallest) makes them right. Every value is exact.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from mxcompile.formats import MXFormat
from mxcompile.kernels.triton.elements import decode, element_constants

PLANES = {8: 2, 4: 4, 6: 8}


@cache
def plane_constants(fmt: MXFormat, size: int, left_as_is: bool = False) -> dict[str, Any]:
    """The constexpr arguments that describe rows of `size` values.

    FORMAT: bits, block, words of a block that have a column of their own, words of a block, planes. COLUMNS: of words,
    and the power of two above. ASSEMBLY: PTX of every plane. ELEMENT: for `decode`, in the interpreter. NUMBERS: what a
    plane's numbers are to be multiplied by, what has been added to them, and whether they are float16.

    left_as_is: without the last addition or multiplication, which whoever multiplies with them makes up for: integers
    are the numbers `128 + 2**(bits - 1) + n` in bfloat16, or `1152 + n` in float16 for 8 bits; floats are float16 with
    the smallest exponents.
    """
    planes, blocks = PLANES[fmt.bits], fmt.blocks(size)
    columns, words = fmt.block_size // planes, fmt.block_bytes // 2
    names = ("BITS", "EXPONENT_BITS", "MANTISSA_BITS", "EMIN", "MAX_CODE")
    return {
        "FORMAT": (fmt.bits, fmt.block_size, columns, words, planes),
        "COLUMNS": (blocks * columns, max(16, triton.next_power_of_2(blocks * columns))),
        "ASSEMBLY": tuple(_assembly(fmt, plane, left_as_is) for plane in range(planes)),
        "ELEMENT": tuple(element_constants(fmt)[name] for name in names),
        "NUMBERS": _numbers(fmt, left_as_is),
    }


def _numbers(fmt: MXFormat, left_as_is: bool) -> tuple[float, float, bool]:
    is_half = left_as_is and (not fmt.is_integer or fmt.bits == 8)
    if fmt.is_integer:
        added = (1024.0 if is_half else 128.0) + 2 ** (fmt.bits - 1) if left_as_is else 0.0
        return 2.0**-fmt.mantissa_bits, added, is_half
    return (2.0 ** (14 + fmt.emin) if left_as_is else 1.0), 0.0, is_half


def _fields(fmt: MXFormat, plane: int) -> list[tuple[str, int, int, int]]:
    """(PTX operand, lowest bit there, lowest bit in the code, width) of the bit fields of an element of a plane."""
    if fmt.bits == 8:
        return [("$1", 8 * plane, 0, 8)]
    if fmt.bits == 4:
        return [("$1", 4 * plane, 0, 4)]
    nibble, second = plane % 4, plane // 4
    pair = 8 * (nibble // 2) + 2 * (second + 2 * (nibble % 2))
    return [("$2" if second else "$1", 4 * nibble, 0, 4), ("$3", pair, 4, 2)]


def _assembly(fmt: MXFormat, plane: int, left_as_is: bool) -> str:
    """PTX that decodes two adjacent elements: $0 = values, $1, $2, $3 = words."""
    sources = _fields(fmt, plane)
    if fmt.is_integer and fmt.bits == 8:
        lines = _int8_as_is(plane) if left_as_is else _int8_lines(sources[0])
    elif fmt.is_integer:
        lines = _integer_lines(fmt, sources, left_as_is)
    else:
        lines = _float_lines(fmt, sources, left_as_is)
    return f"{{ .reg .b32 p, t, a, o; {' '.join(lines)} }}"


def _int8_as_is(plane: int) -> list[str]:
    """0x6400 + (n + 128), a float16; the bytes of two words go to their own halves by one PRMT."""
    low, high = plane, plane + 2
    return ["xor.b32 t, $1, 0x80808080; mov.b32 o, 0x64646464;", f"prmt.b32 $0, t, o, 0x4{high}4{low};"]


def _int8_lines(source: tuple[str, int, int, int]) -> list[str]:
    return [
        _shift(source[1]) % source[0],
        "lop3.b32 p, t, 0x007F007F, 0x43004300, 0xEA;",  # 128 + the low seven bits
        "lop3.b32 a, t, 0x00800080, 0xC300C300, 0xEA;",  # -128, or -256 for a negative element
        "mov.b32 o, 0x3F803F80; fma.rn.bf16x2 $0, p, o, a;",
    ]


def _integer_lines(fmt: MXFormat, sources: list[tuple[str, int, int, int]], left_as_is: bool) -> list[str]:
    """128 + 2**(bits - 1) + n is a bfloat16."""
    sign = 1 << (fmt.bits - 1)
    lines = [f"mov.b32 p, {_both(0x4300 | sign)};"]
    for operand, low, target, width in sources:
        mask = _both(((1 << width) - 1) << target)
        lines += [_shift(low - target) % operand, f"lop3.b32 p, t, {mask}, p, 0x6A;"]
    if left_as_is:
        return [*lines, "mov.b32 $0, p;"]
    addend = _both(_bfloat16_bits(-128.0 - sign))
    return [*lines, f"mov.b32 o, 0x3F803F80; mov.b32 a, {addend}; fma.rn.bf16x2 $0, p, o, a;"]


def _float_lines(fmt: MXFormat, sources: list[tuple[str, int, int, int]], left_as_is: bool) -> list[str]:
    """The sign goes to bit 15, the other bits to the top of the mantissa and the end of the exponent."""
    to_magnitude = (10 if left_as_is else 7) - fmt.mantissa_bits
    lines, sign = ["mov.b32 p, 0;"], fmt.bits - 1
    for operand, low, target, width in sources:
        top = min(target + width, sign)
        pieces = [(target, top - target, target + to_magnitude)] if top > target else []
        pieces += [(sign, 1, 15)] if target <= sign < target + width else []
        for first, count, place in _joined(pieces):
            mask = _both(((1 << count) - 1) << place)
            lines += [_shift(low + first - target - place) % operand, f"lop3.b32 p, t, {mask}, p, 0xEA;"]
    if left_as_is:
        return [*lines, "mov.b32 $0, p;"]
    factor = _both(_bfloat16_bits(2.0 ** (126 + fmt.emin)))
    return [*lines, f"mov.b32 a, 0x80008000; mov.b32 o, {factor}; fma.rn.bf16x2 $0, p, o, a;"]


def _joined(pieces: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(lowest bit in the code, width, lowest bit in the result): sign and magnitude are one piece if adjacent."""
    if len(pieces) == 2 and pieces[0][2] + pieces[0][1] == 15:
        return [(pieces[0][0], pieces[0][1] + 1, pieces[0][2])]
    return pieces


def _shift(right: int) -> str:
    """PTX that puts a register, shifted to the right or left, into t. Bits that come from the other half are masked."""
    if right == 0:
        return "mov.b32 t, %s;"
    return f"shr.b32 t, %s, {right};" if right > 0 else f"shl.b32 t, %s, {-right};"


def _both(half: int) -> str:
    return f"0x{half:04X}{half:04X}"


def _bfloat16_bits(value: float) -> int:
    return int(torch.tensor(value).to(torch.bfloat16).view(torch.int16)) & 0xFFFF


@triton.jit
def element_of(column, plane, SIDE: tl.constexpr):
    """The element of a row that a column of words has in a plane."""
    HALF: tl.constexpr = SIDE[0][1] // 2
    block, word = column // SIDE[0][2], column % SIDE[0][2]
    if SIDE[0][0] == 8:
        inside = 2 * word + plane
    elif SIDE[0][0] == 4:
        inside = 2 * word + plane // 2 + HALF * (plane % 2)
    else:
        inside = 2 * word + plane % 4 // 2 + HALF * (plane % 2) + HALF // 2 * (plane // 4)
    return block * SIDE[0][1] + inside


@triton.jit
def load_words(pointer, start, local, stride, SIDE: tl.constexpr):
    """The words of tokens `start + local`, `[slices, tokens, SIDE[1][1]]`, three times: those of 6 bits differ."""
    column = tl.arange(0, SIDE[1][1])
    offset = column // SIDE[0][2] * SIDE[0][3] + column % SIDE[0][2] if SIDE[0][0] == 6 else column
    pointers = pointer + start * stride + (tl.expand_dims(local * stride, 2) + offset[None, None, :])
    if SIDE[1][0] == SIDE[1][1]:
        first = tl.load(pointers)
    else:
        first = tl.load(pointers, mask=(column < SIDE[1][0])[None, None, :], other=0)
    second, third = first, first
    if SIDE[0][0] == 6:
        in_bounds = (column < SIDE[1][0])[None, None, :]
        second = tl.load(pointers + SIDE[0][2], mask=in_bounds, other=0)
        third = tl.load(pointers + 2 * SIDE[0][2], mask=in_bounds, other=0)
    return first, second, third


@triton.jit
def plane_of(words, plane: tl.constexpr, SIDE: tl.constexpr, INTERPRETED: tl.constexpr):
    """A plane of a tile of words as `NUMBERS` says, bfloat16 or float16; float32 if interpreted."""
    if INTERPRETED:
        first = words[0].to(tl.int32)
        if SIDE[0][0] == 8:
            codes = (first >> (8 * plane)) & 0xFF
        elif SIDE[0][0] == 4:
            codes = (first >> (4 * plane)) & 0xF
        else:
            nibbles = first if plane < 4 else words[1].to(tl.int32)
            pair: tl.constexpr = 8 * (plane % 4 // 2) + 2 * (plane // 4 + 2 * (plane % 2))
            codes = ((nibbles >> (4 * (plane % 4))) & 0xF) | (((words[2].to(tl.int32) >> pair) & 3) << 4)
        values = decode(codes, SIDE[3][0], SIDE[3][1], SIDE[3][2], SIDE[3][3], SIDE[3][4])
        values = values * (1.0 / SIDE[4][0]) + SIDE[4][1]
    else:
        values = tl.inline_asm_elementwise(
            SIDE[5 + plane],
            "=r,r,r,r",
            [words[0], words[1], words[2]],
            dtype=tl.float16 if SIDE[4][2] else tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return values
