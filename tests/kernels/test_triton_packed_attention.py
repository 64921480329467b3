"""attention/packed_attention.py against float64 in Triton's interpreter, and compiled for Hopper without a GPU."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from torch import Tensor

from mxcompile.formats import (
    FORMATS,
    MXFP6_E2M3,
    MXFP8_E4M3,
    MXINT4,
    MXINT6,
    MXINT8,
    MXFormat,
    ScaleRule,
    activation_rule,
    integer,
    parse_format,
)
from mxcompile.numerics import packing, reference
from mxcompile.numerics.packed_attention import PackedStates, attend_packed
from mxcompile.ops import QUANTIZE

OverBound = Callable[..., float]


def packed(states: Tensor, fmt: MXFormat) -> PackedStates:
    return PackedStates(*QUANTIZE(states, str(fmt), str(activation_rule(fmt))), fmt, states.shape[-1])


def tensors(batch: int, heads: int, kv_heads: int, queries: int, tokens: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (batch, heads, queries, size), (batch, kv_heads, tokens, size), (batch, kv_heads, tokens, size)
    return [torch.randn(*shape, generator=generator).bfloat16() * 2 for shape in shapes]


def over_bound(
    bound: OverBound, y: Tensor, query: Tensor, keys: PackedStates, values: PackedStates, mask: ...
) -> float:
    """Queries are taken one by one: the bound is that of one."""
    decoded = keys.values(torch.float32), values.values(torch.float32)
    rows = range(query.shape[2])
    masks = [mask if mask is None or mask.shape[2] == 1 else mask[:, :, i : i + 1] for i in rows]
    return max(bound(y[:, :, i : i + 1], query[:, :, i : i + 1], *decoded, masks[i], 0.2) for i in rows)


PAIRS = [(MXINT8, MXINT4), *((fmt, fmt) for fmt in FORMATS.values()), (MXINT4, MXFP8_E4M3), (MXFP6_E2M3, MXINT8)]


@pytest.mark.parametrize(
    ("pair", "shape"),
    crossed(PAIRS, [(1, 8, 2, 1, 200, 128), (2, 3, 1, 4, 37, 80), (1, 2, 2, 1, 1, 64), (1, 8, 1, 1, 33, 256)]),
    ids=lambda values: "-".join(map(str, values)),
)
def test_values_are_those_of_float64(
    interpreted: SimpleNamespace,
    attention_over_bound: OverBound,
    pair: tuple[MXFormat, MXFormat],
    shape: tuple[int, ...],
) -> None:
    query, key, value = tensors(*shape)
    keys, values = packed(key, pair[0]), packed(value, pair[1])
    y = interpreted.packed_attention.attend(query, keys, values, None, 0.2)
    assert (y.shape, y.dtype) == ((*query.shape[:3], shape[5]), torch.bfloat16)
    assert over_bound(attention_over_bound, y, query, keys, values, None) <= 1


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("left_as_is", [False, True])
def test_instructions_decode_every_element(
    interpreted: SimpleNamespace, fmt: MXFormat, block: int, left_as_is: bool
) -> None:
    """Each finite code in each place of a word: the PTX of a plane gives the elements that `element_of` names."""
    from ptx import execute, pairs

    fmt, module = fmt.with_block(block), interpreted.packed_states
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**fmt.bits, (4096, 2 * block), generator=generator, dtype=torch.uint8)
    values = reference.decode(codes, fmt)
    codes = torch.where(values.isfinite(), codes, 0)
    described = module.plane_constants(fmt, 2 * block, left_as_is)
    unit, added, is_half = described["NUMBERS"]
    assert added != 0 or not fmt.is_integer or not left_as_is
    values = reference.decode(codes, fmt).where(values.isfinite(), 0.0) / unit + added
    dtype = torch.float16 if is_half else torch.bfloat16
    _, _, columns, words, planes = described["FORMAT"]
    rows = packing.pack(codes, fmt).view(torch.int16).to(torch.int64).unflatten(1, (2, words)) & 0xFFFF
    parts = [rows[..., start : start + columns] for start in range(0, words, columns)]
    registers = [(part[..., ::2] | part[..., 1::2] << 16).flatten(1) for part in parts]
    registers = (registers * 3)[:3] if len(registers) == 1 else registers
    for plane in range(planes):
        operands = {f"${i + 1}": register for i, register in enumerate(registers)}
        decoded = pairs(execute(described["ASSEMBLY"][plane], operands), dtype).flatten(1).float()
        elements = [element(column, plane, described["FORMAT"]) for column in range(2 * columns)]
        assert torch.equal(decoded, values[:, elements]), plane


def test_instructions_multiply_by_the_scales_of_blocks(interpreted: SimpleNamespace) -> None:
    from ptx import execute, join, pairs

    kernel = interpreted.packed_attention_kernel
    generator = torch.Generator().manual_seed(0)
    scales = torch.randint(1, 255, (2, 1000, 4), generator=generator)
    exponentials = torch.rand(2, 1000, generator=generator)
    words, floats = join(scales, 8), exponentials.view(torch.int32).to(torch.int64)
    for block in range(4):
        factors = torch.exp2(scales[..., block].double() - 127)
        bits = execute(f" {kernel.SCALE_OF_BLOCK.value}", {"$1": words[0], "$2": (23 - 8 * block) & 31})
        assert torch.equal(bits.to(torch.int32).view(torch.float32).double(), factors[0])
        selector = 0x4400 + 0x1111 * block
        operands = {"$1": words[0], "$2": words[1], "$3": selector, "$4": selector, "$5": floats[0], "$6": floats[1]}
        weights = pairs(execute(kernel.WEIGHTS_OF_BLOCK.value, operands), torch.bfloat16)
        assert torch.equal(weights, (exponentials.bfloat16().double() * factors).bfloat16().T)


def element(column: int, plane: int, shape: tuple[int, ...]) -> int:
    """`element_of` in Python."""
    bits, block, columns, _, _ = shape
    first, word = column // columns * block, column % columns
    if bits == 8:
        return first + 2 * word + plane
    return first + 2 * word + plane % 4 // 2 + block // 2 * (plane % 2) + block // 4 * (plane // 4)


@pytest.mark.parametrize("kind", ["bool", "float", "of heads", "of queries"])
def test_masks(interpreted: SimpleNamespace, attention_over_bound: OverBound, kind: str) -> None:
    query, key, value = tensors(3, 4, 2, 3, 70, 64)
    keys, values = packed(key, MXINT8), packed(value, MXINT4)
    mask = torch.ones(3, 1, 1, 70, dtype=torch.bool)
    mask[0, ..., :7], mask[1, ..., 20:], mask[2] = False, False, False
    if kind == "float":
        mask = torch.where(mask, 0.0, -torch.inf).bfloat16()
    elif kind == "of heads":
        mask = torch.randn(3, 4, 3, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    elif kind == "of queries":
        mask = torch.ones(3, 70, dtype=torch.bool).tril(67).expand(3, 1, 3, 70)
    y = interpreted.packed_attention.attend(query, keys, values, mask, 0.2)
    assert over_bound(attention_over_bound, y, query, keys, values, mask) <= 1
    if kind in ("bool", "float"):
        assert (y[2] == 0).all()


def test_however_it_is_cut_and_again(interpreted: SimpleNamespace, attention_over_bound: OverBound) -> None:
    query, key, value = tensors(1, 6, 2, 1, 330, 64)
    keys, values = packed(key, MXINT4), packed(value, MXINT8)
    attend, config = interpreted.packed_attention.attend, interpreted.one_token.Config
    for splits, block in ((1, 64), (2, 64), (7, 16), (20, 16)):
        y = attend(query, keys, values, None, 0.2, config(splits, block))
        assert over_bound(attention_over_bound, y, query, keys, values, None) <= 1, splits
        assert torch.equal(attend(query, keys, values, None, 0.2, config(splits, block)), y), splits


@pytest.mark.parametrize("position", [0, 31, 50, 200])
def test_tokens_after_a_position_are_not_read(
    interpreted: SimpleNamespace, attention_over_bound: OverBound, position: int
) -> None:
    query, key, value = tensors(2, 2, 1, 1, 70, 64)
    keys, values = packed(key, MXINT4), packed(value, MXINT8)
    mask = torch.arange(70).expand(2, 1, 1, 70) >= torch.tensor([0, min(position, 9)]).view(2, 1, 1, 1)
    attend, config = interpreted.packed_attention.attend, interpreted.one_token.Config
    is_read = mask & (torch.arange(70) <= position)
    for splits, block in ((1, 64), (4, 16)):
        at = torch.tensor([position])
        y = attend(query, keys, values, mask, 0.2, config(splits, block), None, at)
        assert over_bound(attention_over_bound, y, query, keys, values, is_read) <= 1, splits
        expected = attend_packed(query, keys, values, mask, 0.2, at)
        assert torch.equal(expected, attend_packed(query, keys, values, is_read, 0.2))


def test_any_stride(interpreted: SimpleNamespace, attention_over_bound: OverBound) -> None:
    """A partly filled cache, whose rows are contiguous, and tokens before heads."""
    query, key, value = tensors(2, 6, 2, 1, 90, 64)
    whole = [packed(part, MXINT8) for part in (key, value)]
    for tokens in (slice(5, 50), slice(None)):
        states = [PackedStates(each.elements[:, :, tokens], each.scales[:, :, tokens], MXINT8, 64) for each in whole]
        y = interpreted.packed_attention.attend(query, *states, None, 0.2)
        assert over_bound(attention_over_bound, y, query, *states, None) <= 1
    swapped = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (whole[0].elements, whole[0].scales)]
    keys = PackedStates(*swapped, MXINT8, 64)
    again = interpreted.packed_attention.attend(query, keys, whole[1], None, 0.2)
    assert torch.equal(again, interpreted.packed_attention.attend(query, *whole, None, 0.2))


def test_the_result_is_rounded_bit_for_bit(interpreted: SimpleNamespace) -> None:
    query, key, value = tensors(2, 8, 2, 1, 50, 128)
    keys, values = packed(key, MXINT8), packed(value, MXINT8)
    attend = interpreted.packed_attention.attend
    y = attend(query, keys, values, None, 0.2)
    for rounding in ((MXINT8, ScaleRule.FLOOR), (MXFP8_E4M3, ScaleRule.EVEN)):
        rounded = attend(query, keys, values, None, 0.2, None, rounding)
        assert torch.equal(rounded, reference.quantize_dequantize(y, *rounding))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_block_with_nan_makes_its_channels_nan(interpreted: SimpleNamespace) -> None:
    query, key, value = tensors(1, 2, 2, 1, 40, 64)
    value[0, 1, 3, 40] = torch.nan
    y = interpreted.packed_attention.attend(query, packed(key, MXINT8), packed(value, MXINT8), None, 0.2)
    assert y[0, 0].isfinite().all()
    assert y[0, 1, 0, :32].isfinite().all()
    assert y[0, 1, 0, 32:].isnan().all()


def test_nothing_to_attend_to(interpreted: SimpleNamespace) -> None:
    query, key, value = tensors(2, 4, 2, 1, 10, 64)
    attend = interpreted.packed_attention.attend
    empty = [packed(part[:, :, :0], MXINT8) for part in (key, value)]
    assert (attend(query, *empty, None, 1.0) == 0).all()
    nobody = [packed(part[:0], MXINT8) for part in (key, value)]
    assert attend(query[:0], *nobody, None, 1.0).shape == (0, 4, 1, 64)


@pytest.mark.parametrize("tokens", [1, 98, 2048, 32768])
@pytest.mark.parametrize("programs", [1, 8, 100, 1000])
@pytest.mark.parametrize("fmt", [MXINT8, MXINT6, MXINT4], ids=str)
def test_as_many_programs_as_run_at_a_time(
    interpreted: SimpleNamespace, tokens: int, programs: int, fmt: MXFormat
) -> None:
    states = packed(torch.zeros(1, 1, 1, 128), fmt)
    config = interpreted.packed_attention.config_for(tokens, programs, states, states, True)
    blocks = -(-tokens // config.block)
    assert 1 <= config.splits <= blocks
    assert config.splits == 1 or programs * config.splits <= 264
    assert programs * config.splits >= min(132, programs * blocks)


def test_supports_says_why_not(interpreted: SimpleNamespace) -> None:
    supports = interpreted.packed_attention.supports
    query, key, value = tensors(1, 8, 1, 1, 10, 128)
    keys, values = packed(key, MXINT8), packed(value, MXINT8)
    assert "need a CUDA device" in supports(query, keys, values, None)
    assert "takes bfloat16, not float16" in supports(query.half(), keys, values, None)
    assert "too many rows" in supports(query.expand(1, 8, 4, 128), keys, values, None)
    assert "there is no kernel for mxint3" in supports(query, packed(key, integer(3)), values, None)
    assert "bool or float" in supports(query, keys, values, torch.zeros(10, dtype=torch.int64))
    assert "mse" in supports(query, keys, values, None, (MXINT8, ScaleRule.MSE))
    larger = [packed(part.repeat(1, 1, 1, 3), MXINT8) for part in (key, value)]
    assert "head sizes up to 256" in supports(query.repeat(1, 1, 1, 3), *larger, None)


@pytest.mark.parametrize("name", ["mxint8", pytest.param("mxint4", marks=pytest.mark.slow)])
def test_compiles_for_hopper(name: str) -> None:
    """Words are copied to shared memory asynchronously, decoded in registers, and nothing spills."""
    pytest.importorskip("triton")
    from sass import SHARED_BYTES, packed_attention_report

    report, config = packed_attention_report(parse_format(name))
    assert report.spilled_bytes == 0
    assert report.registers <= 255
    assert report.count("LDGSTS") >= 4  # words and scales of keys and values
    assert report.count("LDG.") <= config.block // config.warps // 4  # of the mask, by the threads that need it
    assert report.count("BAR.SYNC") == 2  # for copies: warps exchange nothing
    assert report.count("HMMA") == 2 * config.block // config.warps
    assert report.shared_bytes * 2 <= SHARED_BYTES
