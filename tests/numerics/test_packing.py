"""Packed bytes: as many as the format promises, laid out as packing.py documents, and `unpack` undoes `pack`."""

import pytest
import torch
from torch import Tensor

from mxcompile.formats import BLOCK_SIZES, FORMATS, MXFP4, MXFP6_E3M2, MXINT8, MXFormat, ScaleRule, integer
from mxcompile.numerics.packing import pack, unpack
from mxcompile.numerics.reference import quantize

WIDTHS = [integer(bits) for bits in (2, 3, 5, 7)]  # those that no built-in format has
each_block = pytest.mark.parametrize(
    "fmt", [f.with_block(block) for f in (*FORMATS.values(), *WIDTHS) for block in BLOCK_SIZES], ids=str
)


def random_codes(fmt: MXFormat, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(fmt.bits)
    return torch.randint(0, 2**fmt.bits, shape, generator=generator).to(torch.uint8)


@each_block
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)], ids=str)
def test_unpack_undoes_pack(fmt, lead):
    codes = random_codes(fmt, *lead, 5 * fmt.block_size)
    packed = pack(codes, fmt)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (*lead, 5 * fmt.block_bytes)
    assert torch.equal(unpack(packed, fmt), codes)


@each_block
def test_every_code_survives_at_every_place(fmt):
    codes = torch.arange(2**fmt.bits).to(torch.uint8)[:, None].expand(-1, fmt.block_size)
    assert torch.equal(unpack(pack(codes, fmt), fmt), codes)


@each_block
def test_every_byte_is_used(fmt):
    """`pack` undoes `unpack` as well: no bit of a packed byte is left over."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (3, 4 * fmt.block_bytes), generator=generator).to(torch.uint8)
    assert torch.equal(pack(unpack(packed, fmt), fmt), packed)


@each_block
def test_blocks_never_share_a_byte(fmt):
    codes = random_codes(fmt, 4, fmt.block_size)
    assert torch.equal(pack(codes.flatten(), fmt), pack(codes, fmt).flatten())


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp4", 4.25),
        ("mxint4", 4.25),
        ("mxfp6_e3m2", 6.25),
        ("mxfp6_e2m3", 6.25),
        ("mxint6", 6.25),
        ("mxfp8_e4m3", 8.25),
        ("mxfp8_e5m2", 8.25),
        ("mxint8", 8.25),
    ],
)
def test_bits_per_value_at_block_32(name, bits):
    codes, scales = quantize(torch.ones(3, 256), FORMATS[name], ScaleRule.FLOOR)
    stored = pack(codes, FORMATS[name]).nbytes + scales.nbytes
    assert stored * 8 / (3 * 256) == bits


@each_block
@pytest.mark.parametrize("size", [1, 100, 128])
def test_bytes_are_those_the_format_states(fmt, size):
    codes, scales = quantize(torch.ones(3, size), fmt, ScaleRule.FLOOR)
    stored = pack(codes, fmt).nbytes + scales.nbytes
    assert stored == fmt.storage_bytes(3, size)
    if size == 128:
        assert stored * 8 == fmt.bits_per_value * 3 * size


def test_layout_of_four_bits():
    codes = torch.arange(16).to(torch.uint8)
    expected = [0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7]
    assert pack(codes, MXFP4.with_block(16)).tolist() == expected


def test_layout_of_six_bits():
    """Low nibbles as in four bits, then the high pairs: byte i of them holds elements i, i + 4, i + 8 and i + 12."""
    codes = torch.tensor([(i + i // 4) % 4 << 4 | i for i in range(16)]).to(torch.uint8)
    nibbles = [0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7]
    pairs = [0b11_10_01_00, 0b00_11_10_01, 0b01_00_11_10, 0b10_01_00_11]
    assert pack(codes, MXFP6_E3M2.with_block(16)).tolist() == nibbles + pairs


def test_layout_of_eight_bits():
    codes = random_codes(MXINT8, 64)
    assert pack(codes, MXINT8).tolist() == codes.tolist()


@each_block
def test_each_element_lies_where_the_documentation_says(fmt):
    codes = random_codes(fmt, fmt.block_size)
    packed = pack(codes, fmt).tolist()
    fields = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}[fmt.bits]
    for i, code in enumerate(codes.tolist()):
        start = 0
        for width in fields:
            part, byte = divmod(i, fmt.block_size * width // 8)
            assert packed[start + byte] >> (width * part) & (2**width - 1) == code & (2**width - 1)
            start, code = start + fmt.block_size * width // 8, code >> width  # noqa: PLW2901


def test_input_is_left_alone_and_may_be_strided():
    codes = random_codes(MXFP4, 64, 3)
    before = codes.clone()
    assert torch.equal(pack(codes.T, MXFP4), pack(codes.T.contiguous(), MXFP4))
    assert torch.equal(codes, before)
