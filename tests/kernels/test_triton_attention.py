"""attention/one_token.py against float64 in Triton's interpreter, and compiled for Hopper without a GPU."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from torch import Tensor

from mxcompile.errors import MXCompileError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OverBound = Callable[..., float]


def tensors(
    dtype: torch.dtype, batch: int, heads: int, shared: int, keys: int, size: int, vsize: int | None = None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(keys)
    shapes = (batch, heads, 1, size), (batch, shared, keys, size), (batch, shared, keys, vsize or size)
    return [(torch.randn(*shape, generator=generator) * 2).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 2, 1, 16),
        (2, 3, 1, 37, 40, 24),
        (1, 8, 2, 300, 64),
        (1, 4, 4, 129, 128),
        (1, 20, 1, 65, 80),
        (2, 6, 2, 33, 256),
    ],
    ids=str,
)
def test_values_are_those_of_float64(
    interpreted: SimpleNamespace, attention_over_bound: OverBound, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Groups of 1, 3, 4 and 20 heads, one key and odd numbers of them, sizes that are powers of two and not."""
    given = tensors(dtype, *shape)
    y = interpreted.one_token.attend(*given, None, 0.2)
    assert (y.shape, y.dtype) == ((*shape[:2], 1, given[2].shape[3]), dtype)
    assert y.is_contiguous()
    assert attention_over_bound(y, *given, None, 0.2) <= 1


def masks(dtype: torch.dtype) -> dict[str, Tensor]:
    """For a batch of 3, 4 heads and 70 keys; per-batch masks mask every key of the last batch entry."""
    bias = torch.randn(3, 4, 1, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    padding = torch.ones(3, 1, 1, 70, dtype=torch.bool)
    padding[0, ..., :7], padding[1, ..., 20:], padding[2] = False, False, False
    return {
        "of each head": bias,
        "of all": bias[:1, :1],
        "of keys alone": bias[0, 0],
        "expanded": bias[:1, :1].expand(3, 4, 1, 70),
        "strided": torch.stack([bias, bias], -1)[..., 1],
        "in another type": bias.float(),
        "bool": padding,
        "bool, of all": padding[1:2],
        "minus infinity": torch.where(padding, 0.0, -torch.inf).to(dtype),
        "a large number": torch.where(padding, 0.0, -65536.0).to(torch.bfloat16),
        "the lowest number": torch.where(padding, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16),
    }


@pytest.mark.parametrize(("kind", "dtype"), crossed(masks(torch.float32), DTYPES), ids=str)
def test_masks(interpreted: SimpleNamespace, attention_over_bound: OverBound, kind: str, dtype: torch.dtype) -> None:
    given, mask = tensors(dtype, 3, 4, 2, 70, 32), masks(dtype)[kind]
    y = interpreted.one_token.attend(*given, mask, 0.2)
    assert attention_over_bound(y, *given, mask, 0.2) <= 1
    if kind in ("bool", "minus infinity"):
        assert (y[2] == 0).all()
    elif kind in ("a large number", "the lowest number"):
        assert not (y[2] == 0).any()


def test_however_it_is_cut_and_again(interpreted: SimpleNamespace, attention_over_bound: OverBound) -> None:
    given = tensors(torch.bfloat16, 1, 6, 2, 330, 32)
    attend, config = interpreted.one_token.attend, interpreted.one_token.Config
    for splits, block in ((1, 64), (2, 64), (7, 16), (20, 16)):
        y = attend(*given, None, 0.2, config(splits, block))
        assert attention_over_bound(y, *given, None, 0.2) <= 1, splits
        assert torch.equal(attend(*given, None, 0.2, config(splits, block)), y), splits


def test_any_stride_in_bounds(interpreted: SimpleNamespace, attention_over_bound: OverBound, accesses: ...) -> None:
    """A partly filled cache, heads after tokens, and values that are not contiguous."""
    query, cache, _ = tensors(torch.float32, 2, 6, 2, 90, 24)
    views = (
        (query, cache[:, :, 5:50], cache[:, :, 40:85]),
        (query.transpose(1, 2).contiguous().transpose(1, 2), *[cache.transpose(1, 2).contiguous().transpose(1, 2)] * 2),
        (query, cache, cache[..., ::2]),
    )
    for view in views:
        y = interpreted.one_token.attend(*view, None, 0.3)
        assert attention_over_bound(y, *view, None, 0.3) <= 1
    accesses.loads.clear(), accesses.stores.clear()
    y = interpreted.one_token.attend(*views[0], None, 0.3, interpreted.one_token.Config(1, 16))
    accesses.assert_within([*views[0]], y)


def test_nothing_to_attend_to(interpreted: SimpleNamespace) -> None:
    query, key, value = tensors(torch.float32, 2, 4, 2, 10, 16)
    attend = interpreted.one_token.attend
    assert (attend(query, key[:, :, :0], value[:, :, :0], None, 1.0) == 0).all()
    assert attend(query[:0], key[:0], value[:0], None, 1.0).shape == (0, 4, 1, 16)


def next_token(module: ..., dtype: torch.dtype, batch: int, shared: int, size: int, vsize: int, place: int) -> ...:
    generator = torch.Generator().manual_seed(place)
    tokens = [torch.randn(batch, 1, shared, n, generator=generator).to(dtype).transpose(1, 2) for n in (size, vsize)]
    angles = 6 * torch.rand(1, 1, 1, size // 2, generator=generator).repeat(1, 1, 1, 2)
    return module.NewToken(*tokens, torch.tensor(place), angles.cos().to(dtype), angles.sin().to(dtype))


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "place"), [((1, 8, 2, 100, 64), 57), ((2, 4, 4, 33, 32), 32), ((2, 20, 1, 70, 40, 24), 0)], ids=str
)
def test_the_next_token(
    interpreted: SimpleNamespace,
    attention_over_bound: OverBound,
    shape: tuple[int, ...],
    place: int,
    dtype: torch.dtype,
    splits: int | None,
) -> None:
    """The new token is rotated, written to the cache, and attended to; what was in its place is not."""
    from mxcompile.numerics.next_token import rotate

    query, keys, values = tensors(dtype, *shape)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    new = next_token(interpreted.one_token, dtype, shape[0], shape[2], shape[4], values.shape[3], place)
    mask = (torch.arange(shape[3]) <= place).expand(shape[0], 1, 1, shape[3]).clone()
    mask[0, ..., : place // 9] = False
    written = [part.clone() for part in (keys, values)]
    config = None if splits is None else interpreted.one_token.Config(splits, 16)
    y = interpreted.one_token.attend(query, *written, mask, 0.2, config, new)
    keys[:, :, place], values[:, :, place] = written[0][:, :, place], new.value[:, :, 0]
    assert torch.equal(written[0], keys)
    assert torch.equal(written[1], values)
    expected = rotate(new.key, new.cos, new.sin)[:, :, 0]
    torch.testing.assert_close(keys[:, :, place], expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    turned = rotate(query.double(), new.cos.double(), new.sin.double()) if dtype == torch.float32 else None
    turned = rotate(query, new.cos, new.sin) if turned is None else turned.to(dtype)
    assert attention_over_bound(y, turned, keys, values, mask, 0.2) <= (1 if dtype == torch.float32 else 1.5)


def test_the_next_token_of_a_batch_and_its_rounding(interpreted: SimpleNamespace) -> None:
    """Each batch entry has angles of its own; the result is rounded bit for bit as the reference rounds it."""
    from mxcompile.formats import MXFP8_E4M3, MXINT8, ScaleRule
    from mxcompile.numerics.reference import quantize_dequantize

    module = interpreted.one_token
    query, keys, values = tensors(torch.bfloat16, 2, 6, 2, 50, 64)
    new = next_token(module, torch.bfloat16, 2, 2, 64, 64, 40)
    both = [torch.cat([part, part.flip(3)]) for part in (new.cos, new.sin)]
    new = module.NewToken(new.key, new.value, new.position, *both)
    mask = torch.arange(50)[None, None, None] <= 40

    def attend(first: int, last: int, rounding: ... = None) -> Tensor:
        part = module.NewToken(*[each if each.dim() == 0 else each[first:last] for each in vars(new).values()])
        caches = (keys[first:last].clone(), values[first:last].clone())
        return module.attend(query[first:last], *caches, mask, 0.2, module.Config(2, 16), part, rounding)

    y = attend(0, 2)
    assert torch.equal(y, torch.cat([attend(0, 1), attend(1, 2)]))
    for rounding in ((MXINT8, ScaleRule.FLOOR), (MXFP8_E4M3, ScaleRule.EVEN)):
        assert torch.equal(attend(0, 2, rounding), quantize_dequantize(y, *rounding))


def test_nothing_is_written_beyond_the_cache(interpreted: SimpleNamespace, accesses: ...) -> None:
    query, keys, values = tensors(torch.float32, 1, 4, 2, 20, 32)
    cache, module = [part.clone() for part in (keys, values)], interpreted.one_token
    for place in (20, -1):
        new = next_token(module, torch.float32, 1, 2, 32, 32, place)
        accesses.stores.clear()
        y = module.attend(query, keys, values, None, 0.2, module.Config(1, 16), new)
        assert sum(len(stored) for stored in accesses.stores) == y.numel()
    assert torch.equal(keys, cache[0])
    assert torch.equal(values, cache[1])


@pytest.mark.parametrize("keys", [1, 98, 2048, 8192, 100000])
@pytest.mark.parametrize("places", [1, 8, 100, 1000])
def test_as_many_programs_as_run_at_a_time(interpreted: SimpleNamespace, keys: int, places: int) -> None:
    key = torch.empty(1, dtype=torch.bfloat16).expand(1, 1, keys, 128)
    config = interpreted.one_token.config_for(key, places)
    blocks = -(-keys // config.block)
    assert 1 <= config.splits <= blocks
    assert config.splits == 1 or places * config.splits <= 264
    assert places * config.splits >= min(132, places * max(1, blocks // 2))


def test_supports_says_why_not(interpreted: SimpleNamespace) -> None:
    supports = interpreted.one_token.supports
    query, key, value = tensors(torch.bfloat16, 1, 4, 2, 10, 16)
    assert "need a CUDA device" in supports(query, key, value, None)
    assert "one query per head" in supports(key, key, value, None)
    assert "different dtypes" in supports(query, key, value.float(), None)
    assert "head sizes up to 256" in supports(*tensors(torch.bfloat16, 1, 4, 2, 10, 272), None)
    assert "cannot share" in supports(query[:, :3], key, value, None)
    assert "bool or float" in supports(query, key, value, torch.zeros(10, dtype=torch.int64))
    assert "bfloat16, float16 or float32" in supports(*tensors(torch.float64, 1, 4, 2, 10, 16), None)


def test_shapes_that_disagree(interpreted: SimpleNamespace) -> None:
    query, key, value = tensors(torch.float32, 1, 4, 2, 10, 16)
    attend = interpreted.one_token.attend
    for given in (
        (query, key, value[:, :, 1:]),
        (query[..., 1:], key, value),
        (key, key, value),
        (query[0], key, value),
    ):
        with pytest.raises(MXCompileError, match="cannot attend"):
            attend(*given, None, 1.0)
    with pytest.raises(MXCompileError, match="cannot share"):
        attend(query[:, :3], key, value, None, 1.0)
    new = next_token(interpreted.one_token, torch.float32, 1, 2, 16, 16, 3)
    parts = vars(new)
    for bad, match in (
        ({"key": new.key[:, :1]}, "cannot be written"),
        ({"value": new.value.bfloat16()}, "cannot be written"),
        ({"cos": new.cos[..., :8]}, "cos and sin"),
        ({"sin": None}, "cos and sin"),
        ({"position": torch.arange(2)}, "one number"),
    ):
        with pytest.raises(MXCompileError, match=match):
            attend(query, key, value, None, 1.0, None, interpreted.one_token.NewToken(**{**parts, **bad}))
    with pytest.raises(MXCompileError, match="cannot be written"):
        attend(query, key.mT.contiguous().mT, value, None, 1.0, None, new)


@pytest.mark.parametrize(
    ("dtype", "size", "group"),
    [
        ("bf16", 128, 4),
        pytest.param("fp16", 64, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 128, 16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("next_token", [False, True])
def test_compiles_for_hopper(dtype: str, size: int, group: int, next_token: bool) -> None:
    """Keys and values are copied to shared memory, 16 bytes per thread, before the first matmul; hardly any spills."""
    pytest.importorskip("triton")
    from sass import SHARED_BYTES, attention_report

    report, config = attention_report(dtype, size, group, next_token)
    assert report.spilled_bytes <= 8  # a pair of registers, with Triton 3.9
    assert report.registers <= 255
    copies = report.sass[: report.sass.index("MMA")].count("LDGSTS")
    assert copies >= 2 * 2 * config.block * size * 2 // (16 * 32 * config.warps)
    assert report.shared_bytes <= SHARED_BYTES // 2
