"""A plane of a 4-bit weight (planes.py) -> e4m3 elements, in PTX: the product can then run at the rate of 8 bits.

An element times its block's scale over the largest one of the weight is itself an e4m3 number, where the scales do not
differ by too much (`fp8.largest_span`). The bits of an element make a float16 (of a float: shifted further than for
bfloat16; of an integer: 1024 + n), one multiplication or multiply-add scales two, and one conversion packs them. All
of it is exact.

The scale is the float16 number with exponent field `byte - top + TOP_FIELDS`, `byte` being the stored one and `top` the
largest of the weight. So an element of the weight is e4m3 times 2**power(fmt, top, lift).
"""

from functools import cache
from typing import Final

from mxcompile.formats import MXFormat
from mxcompile.kernels.fp8 import TOP_FIELDS
from mxcompile.kernels.planes import Field, plane_layout
from mxcompile.kernels.triton_decode import doubled, shift_to_place

_FLOAT16_BIAS: Final = 15
_FLOAT_TO_HALF: Final = 3  # mantissa bits that a float16 has more than a bfloat16
_INTEGER: Final = 0x6400  # 1024, whose last place is 1


def power(fmt: MXFormat, top: int, lift: int) -> int:
    """The power of two that the e4m3 elements of a weight lack."""
    offset = -254 if plane_layout(fmt).constant == 0 else -132
    return top + lift + offset


def pair_offset(fmt: MXFormat, top: int) -> int:
    """What is added to `byte * 0x04000400` (mod 2**32) for a pair of float16 scales; a signed 32-bit number."""
    fields = (TOP_FIELDS[fmt.name] - top) * 0x04000400 % 2**32
    return fields - 2**32 if fields >= 2**31 else fields


@cache
def assembly(fmt: MXFormat) -> tuple[str, ...]:
    """PTX for each plane, of four neighbouring elements: $0 = values, $1 and $2 = words, $3 = scale, $7 = addend (pairs
    of float16, which Triton passes four times); and for the addend, from $1 = scale.
    """
    layout = plane_layout(fmt)
    constant = _INTEGER if layout.constant else 0
    planes = [_plane([_half_fields(field, constant) for field in fields], constant) for fields in layout.fields]
    offset = f"{{ .reg .b32 c; mov.b32 c, {doubled(0xE408)}; mul.rn.f16x2 $0, $1, c; }}"  # -1032
    return (*planes, offset)


def _half_fields(field: Field, constant: int) -> list[Field]:
    """The same bits as they are wanted in a float16: the sign stays, a float's other bits are higher up."""
    if constant:
        return [field]
    sign, rest = field.mask & 0x8000, (field.mask & 0x7FFF) << _FLOAT_TO_HALF
    moved = Field(field.word, (field.rotation - _FLOAT_TO_HALF) % 16, rest)
    return [*([Field(field.word, field.rotation, sign)] if sign else []), *([moved] if rest else [])]


def _plane(fields: list[list[Field]], constant: int) -> str:
    flat = [field for part in fields for field in part]
    lines = [line for source in ("$1", "$2") for line in _two(flat, constant, source)]
    return f"{{ .reg .b32 p, t; .reg .b16 low, high; {' '.join(lines)} mov.b32 $0, {{low, high}}; }}"


def _two(fields: list[Field], constant: int, source: str) -> list[str]:
    """Two elements, of one register of words."""
    lines: list[str] = []
    for field in fields:
        shift = shift_to_place(field)
        if shift is not None:
            lines.append(shift % source)
        bits, first = "t" if shift else source, field is fields[0]
        if first and not constant:
            lines.append(f"and.b32 p, {bits}, {doubled(field.mask)};")
        else:
            other = doubled(constant) if first else "p"
            lines.append(f"lop3.b32 p, {bits}, {doubled(field.mask)}, {other}, 0xEA;")
    lines.append("fma.rn.f16x2 p, p, $3, $7;" if constant else "mul.rn.f16x2 p, p, $3;")
    return [*lines, f"cvt.rn.satfinite.e4m3x2.f16x2 {'low' if source == '$1' else 'high'}, p;"]
