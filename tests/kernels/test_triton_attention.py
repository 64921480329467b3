"""triton/attention.py against float64 in Triton's interpreter, and compiled for Hopper on a machine without a GPU."""

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
    y = interpreted.attention.attend(*given, None, 0.2)
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
    y = interpreted.attention.attend(*given, mask, 0.2)
    assert attention_over_bound(y, *given, mask, 0.2) <= 1
    if kind in ("bool", "minus infinity"):
        assert (y[2] == 0).all()
    elif kind in ("a large number", "the lowest number"):
        assert not (y[2] == 0).any()


def test_however_it_is_cut_and_again(interpreted: SimpleNamespace, attention_over_bound: OverBound) -> None:
    given = tensors(torch.bfloat16, 1, 6, 2, 330, 32)
    attend, config = interpreted.attention.attend, interpreted.attention.Config
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
        y = interpreted.attention.attend(*view, None, 0.3)
        assert attention_over_bound(y, *view, None, 0.3) <= 1
    accesses.loads.clear(), accesses.stores.clear()
    y = interpreted.attention.attend(*views[0], None, 0.3, interpreted.attention.Config(1, 16))
    accesses.assert_within([*views[0]], y)


def test_nothing_to_attend_to(interpreted: SimpleNamespace) -> None:
    query, key, value = tensors(torch.float32, 2, 4, 2, 10, 16)
    attend = interpreted.attention.attend
    assert (attend(query, key[:, :, :0], value[:, :, :0], None, 1.0) == 0).all()
    assert attend(query[:0], key[:0], value[:0], None, 1.0).shape == (0, 4, 1, 16)


@pytest.mark.parametrize("keys", [1, 98, 2048, 8192, 100000])
@pytest.mark.parametrize("places", [1, 8, 100, 1000])
def test_as_many_programs_as_run_at_a_time(interpreted: SimpleNamespace, keys: int, places: int) -> None:
    key = torch.empty(1, dtype=torch.bfloat16).expand(1, 1, keys, 128)
    config = interpreted.attention.config_for(key, places)
    blocks = -(-keys // config.block)
    assert 1 <= config.splits <= blocks
    assert config.splits == 1 or places * config.splits <= 264
    assert places * config.splits >= min(132, places * blocks)


def test_supports_says_why_not(interpreted: SimpleNamespace) -> None:
    supports = interpreted.attention.supports
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
    attend = interpreted.attention.attend
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


@pytest.mark.parametrize(
    ("dtype", "size", "group"),
    [
        ("bf16", 128, 4),
        pytest.param("fp16", 64, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 128, 16, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_hopper(dtype: str, size: int, group: int) -> None:
    """Keys and values are copied to shared memory, 16 bytes per thread, before the first matmul; no spills."""
    pytest.importorskip("triton")
    from sass import SHARED_BYTES, attention_report

    report, config = attention_report(dtype, size, group)
    assert report.spilled_bytes == 0
    assert report.registers <= 255
    copies = report.sass[: report.sass.index("MMA")].count("LDGSTS")
    assert copies >= 2 * 2 * config.block * size * 2 // (16 * 128)
    assert report.shared_bytes <= SHARED_BYTES // 2
