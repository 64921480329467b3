"""The packed (row-major) layout: `[..., blocks * block_size]` codes <-> `[..., blocks * block_bytes]` bytes.

Packing works inside one block, so a row is a sequence of blocks and blocks never share a byte. The bits of an element
are split, from the low ones up, into fields of 8, 4, 2 or 1 bits, the widest first. A block stores the first fields of
all its elements, then their second fields:

- 8 bits: one byte each.
- 4 bits: byte i holds element i in its low nibble and element i + block_size/2 in its high one.
- 6 bits: the low four bits of every element packed as above, then their high two bits: byte i of that second part
  holds elements i, i + block_size/4, i + 2*block_size/4 and i + 3*block_size/4, from the low bits up.
- 3 bits: two bits of every element, then one; 5 and 7 bits likewise (4 + 1, 4 + 2 + 1).

Splitting a block into contiguous parts (instead of interleaving neighbours) lets a kernel unpack with one shift and one
mask per part. Scales are one E8M0 byte per block, `[..., blocks]`.
"""

import torch
from torch import Tensor

from mxcompile.formats import MXFormat


def pack(codes: Tensor, fmt: MXFormat) -> Tensor:
    """Codes (uint8, one a byte) `[..., blocks * block_size]` to packed bytes `[..., blocks * block_bytes]`."""
    blocks = codes.unflatten(-1, (-1, fmt.block_size))
    joined = [_join((blocks >> low) & _mask(width), parts=8 // width) for low, width in fields(fmt.bits)]
    return torch.cat(joined, dim=-1).flatten(-2)


def unpack(packed: Tensor, fmt: MXFormat) -> Tensor:
    """The inverse of `pack`."""
    blocks = packed.unflatten(-1, (-1, fmt.block_bytes))
    parts = fields(fmt.bits)
    sections = blocks.split([fmt.block_size * width // 8 for _, width in parts], dim=-1)
    codes = _split(sections[0], parts=8 // parts[0][1])
    for (low, width), section in zip(parts[1:], sections[1:], strict=True):
        codes = codes | (_split(section, parts=8 // width) << low)
    return codes.flatten(-2)


def fields(bits: int) -> list[tuple[int, int]]:
    """(lowest bit, width) of each field of an element."""
    widths = [width for width in (8, 4, 2, 1) if bits & width]
    return [(sum(widths[:index]), width) for index, width in enumerate(widths)]


def _mask(width: int) -> int:
    return (1 << width) - 1


def _join(values: Tensor, parts: int) -> Tensor:
    """Values of 8/parts bits, `[..., n]`, to bytes `[..., n / parts]`: part p goes to bits p*8/parts and up."""
    width = 8 // parts
    pieces = values.chunk(parts, dim=-1)
    packed = pieces[0]
    for part, piece in enumerate(pieces[1:], start=1):
        packed = packed | (piece << (part * width))
    return packed


def _split(packed: Tensor, parts: int) -> Tensor:
    """The inverse of `_join`."""
    width = 8 // parts
    return torch.cat([(packed >> (part * width)) & _mask(width) for part in range(parts)], dim=-1)
