"""A plane of a 4-bit weight (planes.py) -> e4m3 elements, in PTX: the product can then run at the rate of 8 bits.

An element times its block's scale over the largest one of the weight is itself an e4m3 number, where the scales do not
differ by too much (`fp8.largest_span`). Four elements of a row become a register of e4m3, exactly:

* integers: the bits of two make float16 numbers 1024 + n, one multiply-add brings scale and offset, one conversion
  packs them;
* floats: there are eight magnitudes, whose e4m3 bytes on a block's scale are two registers. The bits of an element are
  the place of its byte in them: one byte permutation finds four. Signs are set in the result.

Both want two registers of a block, that are `byte * steps(fmt) + offsets(fmt, top)`, byte being the stored scale and
`top` the largest of the weight: two pairs of float16, scale and -1032 * scale, or the eight bytes. An element of the
weight is e4m3 times 2**power(fmt, top, lift).
"""

from functools import cache
from typing import Final

from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.e4m3_products import TOP_FIELDS
from mxcompile.kernels.layout.planes import Field, plane_layout
from mxcompile.kernels.triton.decode_planes import doubled, shift_to_place

_HALF_PAIR: Final = 0x04000400  # one more in the exponent fields of two float16
_INTEGER: Final = 0x6400  # 1024 in float16, whose last place is 1
_MINUS_1032: Final = 0xA808A808  # what makes scales -1032 * scales
_FIRST_BYTES: Final = (0x08080800, 0x0C080000)  # 0, 0.5, 1, 1.5: what a step of the scale adds, and on field 0 of 0.5
_LAST_BYTES: Final = (0x08080808, 0x1C181410)  # 2, 3, 4, 6


def power(fmt: MXFormat, top: int, lift: int) -> int:
    """The power of two that the e4m3 elements of a weight lack."""
    offset = -259 if plane_layout(fmt).constant == 0 else -132
    return top + lift + offset


def steps(fmt: MXFormat) -> tuple[int, int]:
    """What the next scale adds to a block's two registers."""
    return (_HALF_PAIR, _HALF_PAIR) if plane_layout(fmt).constant else (_FIRST_BYTES[0], _LAST_BYTES[0])


def offsets(fmt: MXFormat, top: int) -> tuple[int, int]:
    """What is added to `byte * step`, mod 2**32, as signed 32-bit numbers."""
    fields = TOP_FIELDS[fmt.name] - top
    bases = (0, _MINUS_1032) if plane_layout(fmt).constant else (_FIRST_BYTES[1], _LAST_BYTES[1])
    sums = [(fields * step + base) % 2**32 for step, base in zip(steps(fmt), bases, strict=True)]
    first, second = (total - 2**32 if total >= 2**31 else total for total in sums)
    return first, second


@cache
def assembly(fmt: MXFormat) -> tuple[str, ...]:
    """PTX for each plane, of four neighbouring elements: $0 = values, $1 and $2 = words, $3 and $7 = the block's
    registers (which Triton passes four times)."""
    layout = plane_layout(fmt)
    return tuple(_integers(fields) if layout.constant else _floats(fields) for fields in layout.fields)


def _integers(fields: tuple[Field, ...]) -> str:
    lines: list[str] = []
    for source, target in (("$1", "low"), ("$2", "high")):
        other = doubled(_INTEGER)
        for field in fields:
            shift = shift_to_place(field)
            lines += [shift % source] if shift else []
            lines.append(f"lop3.b32 p, {'t' if shift else source}, {doubled(field.mask)}, {other}, 0xEA;")
            other = "p"
        lines += ["fma.rn.f16x2 p, p, $3, $7;", f"cvt.rn.satfinite.e4m3x2.f16x2 {target}, p;"]
    return f"{{ .reg .b32 p, t; .reg .b16 low, high; {' '.join(lines)} mov.b32 $0, {{low, high}}; }}"


def _floats(fields: tuple[Field, ...]) -> str:
    """Lower and upper bytes of the four words, in the order 0, 2, 1, 3; of them the three bits of each magnitude; which
    one shift and addition make the selector of a permutation."""
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


def _parts(fields: tuple[Field, ...]) -> list[tuple[str, int, int]]:
    """Of a magnitude's bits: the register of bytes they are in, a shift to the right, a mask of those then in place."""
    masks: dict[tuple[str, int], int] = {}
    for index in range(3):
        bit = _source(6 + index, fields)
        key = ("h" if bit >= 8 else "l", bit % 8 - index)
        masks[key] = masks.get(key, 0) | (0x01010101 << index)
    return [(source, shift, mask) for (source, shift), mask in masks.items()]


def _source(target: int, fields: tuple[Field, ...]) -> int:
    """The bit of a word that is bit `target` of a pattern."""
    (field,) = (field for field in fields if field.mask >> target & 1)
    return (target + field.rotation) % 16
