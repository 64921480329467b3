"""The layout that the fast kernels read: packed elements and scales -> planes, tile by tile.

    words  int16 [tiles, slabs, WORDS, 64, 32]       scales  int32 [tiles, slabs, PLANES / 4, 64]

A tile is 64 rows of the weight, a slab 32 * PLANES of its columns: column `32 * PLANES * slab + 32 * plane + lane`.
Lane `lane` of the slab's words holds one element of every plane, and a plane is one block of 32 with one scale a row,
so a kernel decodes a plane of a whole tile with a few operations on words and one multiplication. All words of a tile
and slab are neighbours in memory. Rows and columns are padded with zeros to whole tiles and slabs.

An element is stored as the bits it has in a bfloat16 (its *pattern*), scattered over the word such that one rotation
and one mask bring (most of) them back: see `Field`. Then

    value = (bfloat16(CONSTANT | pattern) + OFFSET) * 2**(scale - 127) * 2**lift

with `scale` one byte of the int32 (plane j's is byte j % 4), already shifted by the format's own exponent. Floats and
8-bit integers (as sign and magnitude) are bfloat16 subnormals or small normals times a large scale; narrower integers
are 128 + n, which a multiply-add makes n. Every product is exact.

packing.py's layout stays the definition; this one is made from it once, and gives it back. `to_bytes` shows both
tensors as rows of bytes, in which an MXWeight can hold them: `[out, slabs * WORDS * 64]` and `[out, slabs * PLANES]`,
the sizes that rows of packed elements and scales would have if they were padded to whole slabs. A row of bytes is then
no row of the weight.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, no_kernel
from mxcompile.kernels.layout import e4m3_products
from mxcompile.numerics import packing
from mxcompile.numerics.reference import element_table

TILE: Final = 64
LANES: Final = 32
_SCALES_PER_WORD: Final = 4
_BFLOAT16_SMALLEST: Final = -133


@dataclass(frozen=True)
class Field:
    """Target bits `mask` of a pattern: bit `t` is bit `(t + rotation) % 16` of word `word` of the slab."""

    word: int
    rotation: int
    mask: int


@dataclass(frozen=True)
class PlaneLayout:
    """How one element type lies in words; see the module's docstring.

    fields: for each plane of a slab, where its pattern's bits are. exponent: what is added to an E8M0 scale byte.
    shift: of the code's magnitude in the pattern (its sign goes to bit 15), or None for `code + 2**(bits - 1)`.
    """

    words: int
    constant: int
    offset: int
    exponent: int
    shift: int | None
    fields: tuple[tuple[Field, ...], ...]

    @property
    def planes(self) -> int:
        """Planes of a slab."""
        return len(self.fields)

    @property
    def columns(self) -> int:
        """Columns of a slab."""
        return LANES * self.planes

    @property
    def largest_scale(self) -> int:
        """The largest scale byte at which no intermediate overflows."""
        return 254 - (8 if self.offset else 0)


class Scaling(NamedTuple):
    """lift: the power of two that values lack. top: the largest scale byte, if elements times scales are e4m3 numbers
    times one power of two (layout/e4m3_products.py); 0 if they are not."""

    lift: int
    top: int


@dataclass(frozen=True)
class Planes:
    """A weight `[out, size]` in the fast layout: `words` and `scales` as above, and its `Scaling`."""

    words: Tensor
    scales: Tensor
    fmt: MXFormat
    out: int
    size: int
    lift: int
    top: int = 0


def plane_layout(fmt: MXFormat) -> PlaneLayout:
    """The layout of a format's element type."""
    return _LAYOUTS[fmt.name]


def why_no_format(fmt: MXFormat) -> str | None:
    """Why no weight of a format can be held in planes, in a sentence; None if it depends on the weight."""
    small = f"planes hold blocks of {LANES} or more, not {fmt.block_size}" if fmt.block_size < LANES else None
    return no_kernel(fmt) or small


def scale_range(elements: Tensor, scales: Tensor, fmt: MXFormat) -> tuple[int, int]:
    """Smallest and largest scale byte, shifted by the format's exponent, over blocks that are not all zero.

    Raises MXCompileError if planes cannot hold the weight whatever its scales are.
    """
    if reason := why_no_format(fmt):
        raise MXCompileError(reason)
    if elements.dim() != 2 or elements.shape[1] == 0:
        raise MXCompileError(f"planes hold 2-D weights with at least one column, not {tuple(elements.shape)}")
    codes = packing.unpack(elements, fmt)
    if _patterns(fmt, codes.device)[codes.long()].lt(0).any():
        raise MXCompileError(f"the weight holds {fmt.name} codes (Inf, NaN, or -128) that planes cannot hold")
    if bool((scales == 255).any()):
        raise MXCompileError("the weight has a NaN scale")
    shifted = (scales.int() + plane_layout(fmt).exponent)[~_zero_blocks(codes, fmt)]
    return (int(shifted.min()), int(shifted.max())) if shifted.numel() else (1, 1)


def scaling_for(smallest: int, largest: int, fmt: MXFormat) -> Scaling:
    """For `scale_range`'s results, with the least lift. Raises MXCompileError if they are too far apart."""
    layout = plane_layout(fmt)
    lift = max(0, largest - layout.largest_scale)
    unit = smallest - 127 - layout.exponent + fmt.emin - fmt.mantissa_bits
    if smallest - lift < 1 or (lift and unit - lift < _BFLOAT16_SMALLEST):
        raise MXCompileError(f"the weight's scales span 2**{largest - smallest}, too much for planes")
    most = e4m3_products.largest_span(fmt)
    return Scaling(lift, largest - lift if most is not None and largest - smallest <= most else 0)


def to_planes(elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, scaling: Scaling | None = None) -> Planes:
    """Repack elements `[out, blocks * block_bytes]` and scales `[out, blocks]` (see packing.py).

    scaling: as `scaling_for` gives it for these rows and others; for these if None, which raises MXCompileError, with
    the reason, for a weight that planes cannot hold.
    """
    if scaling is None:
        scaling = scaling_for(*scale_range(elements, scales, fmt), fmt)
    layout, codes, (lift, top) = plane_layout(fmt), packing.unpack(elements, fmt), scaling
    zero = _zero_blocks(codes, fmt)
    shifted = scales.int() + layout.exponent - lift
    shifted = torch.where(zero, top or shifted.clamp(1, layout.largest_scale), shifted)
    shifted = shifted.repeat_interleave(fmt.block_size // LANES, dim=-1)
    words = _join_words(_tiled(codes, layout.columns), fmt)
    bytes_ = _tiled(shifted, layout.planes, value=top or 127).unflatten(-1, (-1, _SCALES_PER_WORD))
    packed = sum(bytes_[..., i].long() << (8 * i) for i in range(_SCALES_PER_WORD))
    packed = torch.as_tensor(packed).transpose(-1, -2).to(torch.int32)
    return Planes(words, packed.contiguous(), fmt, elements.shape[0], size, lift, top)


def from_planes(planes: Planes) -> tuple[Tensor, Tensor]:
    """Packed elements and scales again: the values of `to_planes`' arguments (a block of zeros may change its scale,
    and -0 stays -0)."""
    fmt, layout = planes.fmt, plane_layout(planes.fmt)
    blocks = fmt.blocks(planes.size)
    codes = _split_words(planes.words, fmt).transpose(1, 2).flatten(0, 1).flatten(1)
    codes = codes[: planes.out, : blocks * fmt.block_size]
    bytes_ = [(planes.scales >> (8 * i)) & 0xFF for i in range(_SCALES_PER_WORD)]
    scales = torch.stack(bytes_, dim=-1).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
    scales = scales[: planes.out, :: fmt.block_size // LANES][:, :blocks] - layout.exponent + planes.lift
    return packing.pack(codes.contiguous(), fmt), scales.clamp(0, 254).to(torch.uint8)


def to_bytes(planes: Planes) -> tuple[Tensor, Tensor]:
    """Words and scales as uint8 `[out, bytes]` and `[out, blocks]`, on the same memory."""
    parts = (planes.words, planes.scales)
    elements, scales = (part.view(torch.uint8).reshape(planes.out, -1) for part in parts)
    return elements, scales


def from_bytes(elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, scaling: Scaling) -> Planes:
    """The inverse of `to_bytes`, on the same memory; both contiguous."""
    layout, out = plane_layout(fmt), len(elements)
    words = elements.view(torch.int16).view(out // TILE, -1, layout.words, TILE, LANES)
    exponents = scales.view(torch.int32).view(out // TILE, -1, layout.planes // _SCALES_PER_WORD, TILE)
    return Planes(words, exponents, fmt, out, size, *scaling)


def padded_bytes(fmt: MXFormat, size: int) -> tuple[int, int]:
    """Bytes of elements and of scales that a row of `size` values takes in planes."""
    layout = plane_layout(fmt)
    slabs = -(-size // layout.columns)
    return slabs * layout.words * 2 * LANES, slabs * layout.planes


def _tiled(values: Tensor, width: int, value: int = 0) -> Tensor:
    """`[out, n]` to `[tiles, slabs, 64, width]`, padded with `value`."""
    out, n = values.shape
    padding = (0, -n % width, 0, -out % TILE)
    padded = torch.nn.functional.pad(values, padding, value=value)
    return padded.unflatten(0, (-1, TILE)).unflatten(-1, (-1, width)).transpose(1, 2)


def _zero_blocks(codes: Tensor, fmt: MXFormat) -> Tensor:
    magnitude = codes if fmt.is_integer else codes & (2 ** (fmt.bits - 1) - 1)
    return magnitude.unflatten(-1, (-1, fmt.block_size)).amax(-1) == 0


def _patterns(fmt: MXFormat, device: torch.device) -> Tensor:
    return torch.tensor(_pattern_table(fmt), dtype=torch.int32, device=device)


@cache
def _pattern_table(fmt: MXFormat) -> tuple[int, ...]:
    """The pattern of every code, -1 where it has none."""
    layout, half = plane_layout(fmt), 2 ** (fmt.bits - 1)
    if layout.shift is None:
        return tuple((code + half) % (2 * half) for code in range(2 * half))
    table: list[int] = []
    for code in range(2 * half):
        sign = code // half
        magnitude = (2 * half - code) * sign if fmt.is_integer and sign else code - sign * half
        if fmt.is_integer and sign == 0:
            magnitude = code
        finite = abs(element_table(fmt)[code]) <= fmt.max_value
        table.append((sign << 15) | (magnitude << layout.shift) if finite else -1)
    return tuple(table)


def _join_words(codes: Tensor, fmt: MXFormat) -> Tensor:
    """Codes `[tiles, slabs, 64, columns]` to words `[tiles, slabs, WORDS, 64, 32]`."""
    layout = plane_layout(fmt)
    patterns = _patterns(fmt, codes.device)
    words = [torch.zeros(1, dtype=torch.int32, device=codes.device)] * layout.words
    for plane, fields in enumerate(layout.fields):
        pattern = patterns[codes[..., plane * LANES : (plane + 1) * LANES].long()]
        for field in fields:
            words[field.word] = words[field.word] | _rotate_left(pattern & field.mask, field.rotation)
    joined = torch.stack(torch.broadcast_tensors(*words), dim=2)
    return torch.where(joined >= 0x8000, joined - 0x10000, joined).to(torch.int16)


def _split_words(words: Tensor, fmt: MXFormat) -> Tensor:
    """Words `[tiles, slabs, WORDS, 64, 32]` to codes `[tiles, slabs, 64, columns]`."""
    layout, table = plane_layout(fmt), _pattern_table(fmt)
    code_of = torch.zeros(0x10000, dtype=torch.uint8, device=words.device)
    code_of[torch.tensor([p for p in table if p >= 0], device=words.device)] = torch.tensor(
        [code for code, p in enumerate(table) if p >= 0], dtype=torch.uint8, device=words.device
    )
    unsigned = words.int() & 0xFFFF
    planes: list[Tensor] = []
    for fields in layout.fields:
        parts = [_rotate_left(unsigned[:, :, f.word], 16 - f.rotation) & f.mask for f in fields]
        planes.append(code_of[torch.stack(parts).sum(0)])
    return torch.cat(planes, dim=-1)


def _rotate_left(values: Tensor, by: int) -> Tensor:
    """16-bit rotation of int32 values in [0, 2**16)."""
    by %= 16
    return ((values << by) | (values >> (16 - by))) & 0xFFFF


def _four(word: int) -> tuple[tuple[Field, ...], ...]:
    """Four planes of sign (bit 15) and three bits (8 to 6) in one word. No rotations of that set fill a word, so the
    last plane is in three pieces."""
    return (
        (Field(word, 0, 0x81C0),),
        (Field(word, 13, 0x81C0),),
        (Field(word, 10, 0x81C0),),
        (Field(word, 15, 0x8000), Field(word, 3, 0x0180), Field(word, 7, 0x0040)),
    )


def _nibbles(word: int, first: int) -> tuple[tuple[Field, ...], ...]:
    """Four planes of four neighbouring bits, the lowest being bit `first`."""
    return tuple((Field(word, (4 * j - first) % 16, 0xF << first),) for j in range(4))


def _with(
    planes: tuple[tuple[Field, ...], ...], others: tuple[tuple[Field, ...], ...]
) -> tuple[tuple[Field, ...], ...]:
    return tuple(a + b for a, b in zip(planes, others, strict=True))


_PAIRS: Final = tuple((Field(2, (2 * j - 4) % 16, 0x0030),) for j in range(8))
_SIGN_AND_LAST: Final = (
    *((Field(2, -j % 16, 0x8020),) for j in range(6)),
    (Field(2, 10, 0x8000), Field(2, 3, 0x0020)),
    (Field(2, 8, 0x8000), Field(2, 1, 0x0020)),
)


def _bytes(*fields: tuple[tuple[int, int], ...]) -> tuple[tuple[Field, ...], ...]:
    """Two planes a word, two words a slab; `fields` are (rotation, mask) of the first and second plane of a word."""
    return tuple(tuple(Field(word, *field) for field in plane) for word in range(2) for plane in fields)


_LAYOUTS: Final = {
    "mxint4": PlaneLayout(1, 0x4300, -136, -2, None, _nibbles(0, 0)),
    "mxfp4": PlaneLayout(1, 0, 0, 126, 6, _four(0)),
    "mxint6": PlaneLayout(3, 0x4300, -160, -4, None, _with(_nibbles(0, 0) + _nibbles(1, 0), _PAIRS)),
    "mxfp6_e2m3": PlaneLayout(3, 0, 0, 126, 4, _with(_four(0) + _four(1), _PAIRS)),
    "mxfp6_e3m2": PlaneLayout(3, 0, 0, 124, 5, _with(_nibbles(0, 6) + _nibbles(1, 6), _SIGN_AND_LAST)),
    "mxint8": PlaneLayout(2, 0, 0, 127, 0, _bytes(((0, 0x807F),), ((8, 0x807F),))),
    "mxfp8_e4m3": PlaneLayout(2, 0, 0, 120, 4, _bytes(((0, 0x87F0),), ((15, 0x8000), (3, 0x0700), (12, 0x00F0)))),
    "mxfp8_e5m2": PlaneLayout(2, 0, 0, 112, 5, _bytes(((0, 0x8FE0),), ((15, 0x8000), (2, 0x0C00), (11, 0x03E0)))),
}
