"""How codes lie in memory: `[..., blocks * block_size]` codes <-> `[..., blocks * block_bytes]` bytes.

Packing works inside one block, so a row is a run of blocks and blocks never share a byte:

- 8 bits: a byte each.
- 4 bits: byte i holds element i in its low nibble and element i + block_size/2 in its high one.
- 6 bits: the low four bits of every element packed as above, then their high two bits: byte i of that second part
  holds elements i, i + block_size/4, i + 2*block_size/4 and i + 3*block_size/4, from the low bits up.

Splitting a block into contiguous parts (instead of interleaving neighbours) lets a kernel unpack with one shift and one
mask per part. Scales are one E8M0 byte a block, `[..., blocks]`.
"""

import torch
from torch import Tensor

from mxcompile.formats import MXFormat


def pack(codes: Tensor, fmt: MXFormat) -> Tensor:
    """Codes (uint8, one a byte) `[..., blocks * block_size]` to packed bytes `[..., blocks * block_bytes]`."""
    blocks = codes.unflatten(-1, (-1, fmt.block_size))
    match fmt.bits:
        case 8:
            packed = blocks
        case 4:
            packed = _join(blocks, parts=2)
        case 6:
            packed = torch.cat([_join(blocks & 0xF, parts=2), _join(blocks >> 4, parts=4)], dim=-1)
        case _:
            raise NotImplementedError(f"no packing for {fmt.bits}-bit elements")
    return packed.flatten(-2).contiguous()


def unpack(packed: Tensor, fmt: MXFormat) -> Tensor:
    """The inverse of `pack`."""
    blocks = packed.unflatten(-1, (-1, fmt.block_bytes))
    match fmt.bits:
        case 8:
            codes = blocks
        case 4:
            codes = _split(blocks, parts=2)
        case 6:
            half = fmt.block_size // 2
            codes = _split(blocks[..., :half], parts=2) | (_split(blocks[..., half:], parts=4) << 4)
        case _:
            raise NotImplementedError(f"no packing for {fmt.bits}-bit elements")
    return codes.flatten(-2)


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
    mask = (1 << width) - 1
    return torch.cat([(packed >> (part * width)) & mask for part in range(parts)], dim=-1)
