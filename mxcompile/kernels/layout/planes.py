"""The planar layout of the GPU kernels: packed elements and scales -> planes of 32 columns, tile by tile.

    words  int16 [tiles, k_steps, WORDS, 64, 32]       scales  int32 [tiles, k_steps, PLANES / 4, 64]

A tile is 64 rows of the weight. A K-step is 32 * PLANES columns: column `32 * PLANES * k_step + 32 * plane + lane`.
Lane `lane` of the words of a K-step holds one element of every plane. A plane is one block of 32 with one scale per
row, so a kernel decodes a plane of a whole tile with a few operations on words and one multiplication. The words of one
tile and K-step are contiguous in memory. Rows and columns are padded with zeros to whole tiles and K-steps.

An element is stored as its bits in a bfloat16 (its *pattern*), scattered over the word such that one rotation and one
mask recover (most of) them: see `BitField`. Then

    value = (bfloat16(CONSTANT | pattern) + OFFSET) * 2**(scale - 127) * 2**lift

where `scale` is one byte of the int32 (byte j % 4 for plane j), already shifted by the format's own exponent. Floats
and 8-bit integers (as sign and magnitude) are bfloat16 subnormals or small normals times a large scale; narrower
integers are 128 + n, from which a multiply-add makes n. Every product is exact.

The packed layout of packing.py remains the definition; the conversion to planes is done once and is reversible.
`to_bytes` views both tensors as rows of bytes, the form in which an MXWeight stores them: `[out, k_steps * WORDS * 64]`
and `[out, k_steps * PLANES]`, the sizes of packed rows padded to whole K-steps. A row of these bytes is not a row of
the weight.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, why_no_kernel
from mxcompile.kernels.layout import fp8_eligibility
from mxcompile.numerics import packing
from mxcompile.numerics.reference import element_table

TILE: Final = 64
LANES: Final = 32
_SCALES_PER_WORD: Final = 4
_BFLOAT16_SMALLEST: Final = -133


@dataclass(frozen=True)
class BitField:
    """Where bits `mask` of a pattern are stored: bit `t` is bit `(t + rotation) % 16` of word `word` of the K-step."""

    word: int
    rotation: int
    mask: int


@dataclass(frozen=True)
class PlaneLayout:
    """How elements of one type are stored in words; see the module's docstring.

    fields: for each plane of a K-step, where the bits of its pattern are. exponent: added to an E8M0 scale byte.
    shift: left shift of the code's magnitude in the pattern (its sign is bit 15), or None for `code + 2**(bits - 1)`.
    """

    words: int
    constant: int
    offset: int
    exponent: int
    shift: int | None
    fields: tuple[tuple[BitField, ...], ...]

    @property
    def planes(self) -> int:
        """Planes per K-step."""
        return len(self.fields)

    @property
    def columns(self) -> int:
        """Columns per K-step."""
        return LANES * self.planes

    @property
    def largest_scale(self) -> int:
        """The largest scale byte at which no intermediate overflows."""
        return 254 - (8 if self.offset else 0)


class PlanarScaling(NamedTuple):
    """How the scales of a planar weight are stored.

    lift: log2 of the factor by which the stored values are too small. top: the largest scale byte if elements times
    scales are e4m3 numbers times one power of two (layout/fp8_eligibility.py), else 0.
    """

    lift: int
    top: int


@dataclass(frozen=True)
class PlanarWeight:
    """A weight `[out, size]` in the planar layout: `words` and `scales` as above, and its `PlanarScaling`."""

    words: Tensor
    scales: Tensor
    fmt: MXFormat
    out: int
    size: int
    lift: int
    top: int = 0


def plane_layout(fmt: MXFormat) -> PlaneLayout:
    """The planar layout of a format's element type."""
    return _LAYOUTS[fmt.name]


def why_format_not_planar(fmt: MXFormat) -> str | None:
    """Why no weight of a format can be planar, in a sentence; None if it depends on the weight."""
    small = (
        f"the planar layout needs blocks of {LANES} or more, not {fmt.block_size}" if fmt.block_size < LANES else None
    )
    return why_no_kernel(fmt) or small


def scale_range(elements: Tensor, scales: Tensor, fmt: MXFormat) -> tuple[int, int]:
    """Smallest and largest scale byte, shifted by the format's exponent, over blocks that are not all zero.

    Raises MXCompileError if the weight cannot be planar whatever its scales are.
    """
    if reason := why_format_not_planar(fmt):
        raise MXCompileError(reason)
    if elements.dim() != 2 or elements.shape[1] == 0:
        raise MXCompileError(
            f"the planar layout needs a 2-D weight with at least one column, not {tuple(elements.shape)}"
        )
    codes = packing.unpack(elements, fmt)
    if _patterns(fmt, codes.device)[codes.long()].lt(0).any():
        raise MXCompileError(
            f"the weight holds {fmt.name} codes (Inf, NaN, or -128) that the planar layout cannot hold"
        )
    if bool((scales == 255).any()):
        raise MXCompileError("the weight has a NaN scale")
    shifted = (scales.int() + plane_layout(fmt).exponent)[~_zero_blocks(codes, fmt)]
    return (int(shifted.min()), int(shifted.max())) if shifted.numel() else (1, 1)


def scaling_for(smallest: int, largest: int, fmt: MXFormat) -> PlanarScaling:
    """The scaling with the least lift for a range of `scale_range`. Raises MXCompileError if the range is too large."""
    layout = plane_layout(fmt)
    lift = max(0, largest - layout.largest_scale)
    unit = smallest - 127 - layout.exponent + fmt.emin - fmt.mantissa_bits
    if smallest - lift < 1 or (lift and unit - lift < _BFLOAT16_SMALLEST):
        raise MXCompileError(f"the weight's scales span 2**{largest - smallest}, too much for the planar layout")
    max_span = fp8_eligibility.largest_span(fmt)
    return PlanarScaling(lift, largest - lift if max_span is not None and largest - smallest <= max_span else 0)


def to_planes(
    elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, scaling: PlanarScaling | None = None
) -> PlanarWeight:
    """Repack elements `[out, blocks * block_bytes]` and scales `[out, blocks]` (see packing.py).

    scaling: from `scaling_for`, possibly shared with other weights. If None, it is computed for this weight, which
    raises MXCompileError with the reason if the weight cannot be planar.
    """
    if scaling is None:
        scaling = scaling_for(*scale_range(elements, scales, fmt), fmt)
    layout, codes, (lift, top) = plane_layout(fmt), packing.unpack(elements, fmt), scaling
    zero = _zero_blocks(codes, fmt)
    shifted = scales.int() + layout.exponent - lift
    shifted = torch.where(zero, top or shifted.clamp(1, layout.largest_scale), shifted)
    shifted = shifted.repeat_interleave(fmt.block_size // LANES, dim=-1)
    words = _join_words(_to_tiles(codes, layout.columns), fmt)
    scale_bytes = _to_tiles(shifted, layout.planes, value=top or 127).unflatten(-1, (-1, _SCALES_PER_WORD))
    packed = sum(scale_bytes[..., i].long() << (8 * i) for i in range(_SCALES_PER_WORD))
    packed = torch.as_tensor(packed).transpose(-1, -2).to(torch.int32)
    return PlanarWeight(words, packed.contiguous(), fmt, elements.shape[0], size, lift, top)


def from_planes(planes: PlanarWeight) -> tuple[Tensor, Tensor]:
    """The inverse of `to_planes`: packed elements and scales of the same values, including -0. The scale of an all-zero
    block may differ."""
    fmt, layout = planes.fmt, plane_layout(planes.fmt)
    blocks = fmt.blocks(planes.size)
    codes = _split_words(planes.words, fmt).transpose(1, 2).flatten(0, 1).flatten(1)
    codes = codes[: planes.out, : blocks * fmt.block_size]
    scale_bytes = [(planes.scales >> (8 * i)) & 0xFF for i in range(_SCALES_PER_WORD)]
    scales = torch.stack(scale_bytes, dim=-1).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
    scales = scales[: planes.out, :: fmt.block_size // LANES][:, :blocks] - layout.exponent + planes.lift
    return packing.pack(codes.contiguous(), fmt), scales.clamp(0, 254).to(torch.uint8)


def to_bytes(planes: PlanarWeight) -> tuple[Tensor, Tensor]:
    """Views of words and scales as uint8 `[out, bytes]` and `[out, blocks]`."""
    parts = (planes.words, planes.scales)
    elements, scales = (part.view(torch.uint8).reshape(planes.out, -1) for part in parts)
    return elements, scales


def from_bytes(elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, scaling: PlanarScaling) -> PlanarWeight:
    """The inverse of `to_bytes`: views of two contiguous tensors."""
    layout, out = plane_layout(fmt), elements.shape[0]
    words = elements.view(torch.int16).view(out // TILE, -1, layout.words, TILE, LANES)
    exponents = scales.view(torch.int32).view(out // TILE, -1, layout.planes // _SCALES_PER_WORD, TILE)
    return PlanarWeight(words, exponents, fmt, out, size, *scaling)


def padded_bytes(fmt: MXFormat, size: int) -> tuple[int, int]:
    """Bytes of elements and of scales per row of `size` values in the planar layout."""
    layout = plane_layout(fmt)
    k_steps = -(-size // layout.columns)
    return k_steps * layout.words * 2 * LANES, k_steps * layout.planes


def _to_tiles(values: Tensor, width: int, value: int = 0) -> Tensor:
    """`[out, n]` to `[tiles, k_steps, 64, width]`, padded with `value`."""
    out, n = values.shape
    padding = (0, -n % width, 0, -out % TILE)
    padded = torch.nn.functional.pad(values, padding, value=value)
    return padded.unflatten(0, (-1, TILE)).unflatten(-1, (-1, width)).transpose(1, 2)


def _zero_blocks(codes: Tensor, fmt: MXFormat) -> Tensor:
    magnitude = codes if fmt.is_integer else codes & (2 ** (fmt.bits - 1) - 1)
    return magnitude.unflatten(-1, (-1, fmt.block_size)).amax(-1) == 0


def _patterns(fmt: MXFormat, device: torch.device) -> Tensor:
    """The pattern of every code, -1 for codes without one. Computed on the device: a CUDA graph cannot record a copy of
    a table from the host."""
    layout, half = plane_layout(fmt), 2 ** (fmt.bits - 1)
    codes = torch.arange(2 * half, dtype=torch.int32, device=device)
    if layout.shift is None:
        return (codes + half) % (2 * half)
    sign, magnitude = codes // half, codes % half
    if fmt.is_integer:
        magnitude = torch.where(sign == 1, half - magnitude, magnitude)
    return torch.where(magnitude <= _largest_magnitude(fmt), (sign << 15) | (magnitude << layout.shift), -1)


@cache
def _largest_magnitude(fmt: MXFormat) -> int:
    """The bits of the largest finite element without its sign."""
    return element_table(fmt).index(fmt.max_value)


def _join_words(codes: Tensor, fmt: MXFormat) -> Tensor:
    """Codes `[tiles, k_steps, 64, columns]` to words `[tiles, k_steps, WORDS, 64, 32]`."""
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
    """Words `[tiles, k_steps, WORDS, 64, 32]` to codes `[tiles, k_steps, 64, columns]`."""
    layout, patterns = plane_layout(fmt), _patterns(fmt, words.device)
    code_of = torch.zeros(0x10001, dtype=torch.uint8, device=words.device)
    codes = torch.arange(len(patterns), device=words.device).to(torch.uint8)
    code_of[torch.where(patterns < 0, 0x10000, patterns).long()] = codes
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


def _four_planes(word: int) -> tuple[tuple[BitField, ...], ...]:
    """Four planes of sign (bit 15) and three bits (8 to 6) in one word. No four rotations of that mask fill a word, so
    the last plane is stored in three pieces."""
    return (
        (BitField(word, 0, 0x81C0),),
        (BitField(word, 13, 0x81C0),),
        (BitField(word, 10, 0x81C0),),
        (BitField(word, 15, 0x8000), BitField(word, 3, 0x0180), BitField(word, 7, 0x0040)),
    )


def _nibbles(word: int, first: int) -> tuple[tuple[BitField, ...], ...]:
    """Four planes of four adjacent bits, the lowest of which is bit `first`."""
    return tuple((BitField(word, (4 * j - first) % 16, 0xF << first),) for j in range(4))


def _combined(
    planes: tuple[tuple[BitField, ...], ...], others: tuple[tuple[BitField, ...], ...]
) -> tuple[tuple[BitField, ...], ...]:
    return tuple(a + b for a, b in zip(planes, others, strict=True))


_PAIRS: Final = tuple((BitField(2, (2 * j - 4) % 16, 0x0030),) for j in range(8))
_SIGN_AND_LAST: Final = (
    *((BitField(2, -j % 16, 0x8020),) for j in range(6)),
    (BitField(2, 10, 0x8000), BitField(2, 3, 0x0020)),
    (BitField(2, 8, 0x8000), BitField(2, 1, 0x0020)),
)


def _bytes(*fields: tuple[tuple[int, int], ...]) -> tuple[tuple[BitField, ...], ...]:
    """Two planes per word, two words per K-step; `fields`: (rotation, mask) of the first and second plane of a word."""
    return tuple(tuple(BitField(word, *field) for field in plane) for word in range(2) for plane in fields)


_LAYOUTS: Final = {
    "mxint4": PlaneLayout(1, 0x4300, -136, -2, None, _nibbles(0, 0)),
    "mxfp4": PlaneLayout(1, 0, 0, 126, 6, _four_planes(0)),
    "mxint6": PlaneLayout(3, 0x4300, -160, -4, None, _combined(_nibbles(0, 0) + _nibbles(1, 0), _PAIRS)),
    "mxfp6_e2m3": PlaneLayout(3, 0, 0, 126, 4, _combined(_four_planes(0) + _four_planes(1), _PAIRS)),
    "mxfp6_e3m2": PlaneLayout(3, 0, 0, 124, 5, _combined(_nibbles(0, 6) + _nibbles(1, 6), _SIGN_AND_LAST)),
    "mxint8": PlaneLayout(2, 0, 0, 127, 0, _bytes(((0, 0x807F),), ((8, 0x807F),))),
    "mxfp8_e4m3": PlaneLayout(2, 0, 0, 120, 4, _bytes(((0, 0x87F0),), ((15, 0x8000), (3, 0x0700), (12, 0x00F0)))),
    "mxfp8_e5m2": PlaneLayout(2, 0, 0, 112, 5, _bytes(((0, 0x8FE0),), ((15, 0x8000), (2, 0x0C00), (11, 0x03E0)))),
}
