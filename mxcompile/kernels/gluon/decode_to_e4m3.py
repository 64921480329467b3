"""Decode one plane of a 4-bit planar weight (planes.py) to e4m3, in PTX, for the FP8 tensor cores.

An element times its block's scale, divided by the largest scale of the weight, is itself an e4m3 number if the scales
do not differ too much (`fp8_eligibility.largest_span`). Four elements of a row become one register of e4m3, exactly:

* integers: the bits of two elements form float16 numbers 1024 + n; one multiply-add applies scale and offset, one
  conversion packs them;
* floats: the e4m3 bytes of the eight magnitudes, times the block's scale, fill two registers. The bits of an element
  index its byte there: one byte permutation looks up four. Signs are set in the result.

Both need two registers per block, `byte * steps(fmt) + offsets(fmt, top)`, where `byte` is the stored scale and `top`
the largest of the weight: two float16 pairs, scale and -1032 * scale, or the eight bytes. An element of the weight is
its e4m3 number times 2**power(fmt, top, lift).
"""

from functools import cache
from typing import Final

from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.fp8_eligibility import MAX_EXPONENT_FIELD
from mxcompile.kernels.layout.planes import BitField, plane_layout
from mxcompile.kernels.triton.decode_planes import in_both_halves, shift_instruction

_HALF_PAIR: Final = 0x04000400  # increments the exponent fields of two float16
_INTEGER: Final = 0x6400  # 1024 in float16, with a ulp of 1
_MINUS_1032: Final = 0xA808A808  # turns scales into -1032 * scales
_FIRST_BYTES: Final = (
    0x08080800,
    0x0C080000,
)  # 0, 0.5, 1, 1.5: increment per scale step; values for exponent field 0 of 0.5
_LAST_BYTES: Final = (0x08080808, 0x1C181410)  # 2, 3, 4, 6


def power(fmt: MXFormat, top: int, lift: int) -> int:
    """The log2 of the factor by which the e4m3 elements of a weight are too small."""
    offset = -259 if plane_layout(fmt).constant == 0 else -132
    return top + lift + offset


def steps(fmt: MXFormat) -> tuple[int, int]:
    """The increments of a block's two registers per step of the scale byte."""
    return (_HALF_PAIR, _HALF_PAIR) if plane_layout(fmt).constant else (_FIRST_BYTES[0], _LAST_BYTES[0])


def offsets(fmt: MXFormat, top: int) -> tuple[int, int]:
    """The constants added to `byte * step`, mod 2**32, as signed 32-bit numbers."""
    fields = MAX_EXPONENT_FIELD[fmt.name] - top
    bases = (0, _MINUS_1032) if plane_layout(fmt).constant else (_FIRST_BYTES[1], _LAST_BYTES[1])
    sums = [(fields * step + base) % 2**32 for step, base in zip(steps(fmt), bases, strict=True)]
    first, second = (total - 2**32 if total >= 2**31 else total for total in sums)
    return first, second


@cache
def assembly(fmt: MXFormat) -> tuple[str, ...]:
    """PTX per plane that decodes four adjacent elements: $0 = values, $1 and $2 = words, $3 and $7 = the block's two
    registers (each passed four times by Triton)."""
    layout = plane_layout(fmt)
    return tuple(_integers(fields) if layout.constant else _floats(fields) for fields in layout.fields)


def _integers(fields: tuple[BitField, ...]) -> str:
    lines: list[str] = []
    for source, target in (("$1", "low"), ("$2", "high")):
        other = in_both_halves(_INTEGER)
        for field in fields:
            shift = shift_instruction(field)
            lines += [shift % source] if shift else []
            lines.append(f"lop3.b32 p, {'t' if shift else source}, {in_both_halves(field.mask)}, {other}, 0xEA;")
            other = "p"
        lines += ["fma.rn.f16x2 p, p, $3, $7;", f"cvt.rn.satfinite.e4m3x2.f16x2 {target}, p;"]
    return f"{{ .reg .b32 p, t; .reg .b16 low, high; {' '.join(lines)} mov.b32 $0, {{low, high}}; }}"


def _floats(fields: tuple[BitField, ...]) -> str:
    """Collect lower and upper bytes of the four words, in the order 0, 2, 1, 3, and from them the three bits of each
    magnitude; one shift and one addition turn these into the selector of a byte permutation."""
    parts = _parts(fields)
    lines = ["prmt.b32 l, $1, $2, 0x6240;", "prmt.b32 h, $1, $2, 0x7351;", "prmt.b32 s, $1, $2, 0x7531;"]
    for i, (source, shift, mask) in enumerate(parts):
        if shift:
            lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 t, {source}, {abs(shift)};")
        bits = "t" if shift else source
        lines.append(f"lop3.b32 e, {bits}, {mask:#010x}, e, 0xEA;" if i else f"and.b32 e, {bits}, {mask:#010x};")
    lines += ["shr.b32 t, e, 12;", "add.u32 e, e, t;", "prmt.b32 e, $3, $7, e;"]
    sign = _source(15, fields)
    lines += [f"shl.b32 s, s, {15 - sign};"] if sign < 15 else []
    return f"{{ .reg .b32 l, h, s, t, e; {' '.join(lines)} lop3.b32 $0, s, 0x80808080, e, 0xEA; }}"


def _parts(fields: tuple[BitField, ...]) -> list[tuple[str, int, int]]:
    """For bits of a magnitude: the register that holds them, a right shift, and the mask to apply after the shift."""
    masks: dict[tuple[str, int], int] = {}
    for index in range(3):
        bit = _source(6 + index, fields)
        key = ("h" if bit >= 8 else "l", bit % 8 - index)
        masks[key] = masks.get(key, 0) | (0x01010101 << index)
    return [(source, shift, mask) for (source, shift), mask in masks.items()]


def _source(target: int, fields: tuple[BitField, ...]) -> int:
    """The bit of a word that holds bit `target` of a pattern."""
    (field,) = (field for field in fields if field.mask >> target & 1)
    return (target + field.rotation) % 16
