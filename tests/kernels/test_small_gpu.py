"""What a decode step launches between its matmuls, on a GPU: attention of the next token, norms, gated products."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mxcompile.formats import MXFP8_E4M3, MXINT8, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.next_token import attend_next
from mxcompile.numerics.norms import Norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DTYPES = (torch.bfloat16, torch.float32)
ROUNDING = (MXINT8, ScaleRule.FLOOR)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def relative(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "place"),
    [((1, 32, 8, 2047, 128), 1900), ((8, 32, 8, 300, 128), 299), ((2, 20, 1, 90, 96), 0), ((40, 8, 8, 65, 64), 12)],
    ids=str,
)
def test_the_next_token(shape: tuple[int, ...], place: int, dtype: torch.dtype, dependent: bool) -> None:
    """Also bit-identical on repeat; and the rounded result is the rounding of the one that is not."""
    from mxcompile.kernels import dispatch
    from mxcompile.kernels.triton.attention import one_token

    if dependent and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launch needs compute capability 9.0")
    dispatch.prepare(torch.device("cuda", torch.cuda.current_device()))
    batch, heads, shared, keys, size = shape
    query, key, value = (random(batch, 1, n, size, dtype=dtype).transpose(1, 2) for n in (heads, shared, shared))
    angles = 6 * torch.rand(1, 1, 1, size // 2, device="cuda").repeat(1, 1, 1, 2)
    new: Any = (key, value, torch.tensor(place, device="cuda"), angles.cos().to(dtype), angles.sin().to(dtype))
    caches = [random(batch, shared, keys, size, dtype=dtype, seed=seed) for seed in (1, 2)]
    mask = (torch.arange(keys, device="cuda") <= place).expand(batch, 1, 1, keys).clone()
    mask[0, ..., : place // 9] = False
    config = one_token.config_for(caches[0], batch * shared * -(-heads // shared // 16))
    config = one_token.Config(config.splits, config.block, config.warps, config.stages, dependent)

    def run(rounding: Any = None) -> tuple[Tensor, ...]:
        written = [part.clone() for part in caches]
        args = (query, *written, mask, size**-0.5, config, one_token.NewToken(*new), rounding)
        return one_token.attend(*args), *written

    y, *written = run()
    expected_caches = [part.clone() for part in caches]
    expected = attend_next(query, *expected_caches, new, mask, size**-0.5)
    assert relative(y, expected) <= (6e-3 if dtype == torch.bfloat16 else 1e-5)
    assert relative(written[0], expected_caches[0]) <= (1e-3 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(written[1], expected_caches[1])
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(run(), (y, *written), strict=True))
    for rounding in (ROUNDING, (MXFP8_E4M3, ScaleRule.EVEN)):
        assert torch.equal(run(rounding)[0], reference.quantize_dequantize(y, *rounding))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "norm", [Norm(1e-6, narrowed=True), Norm(1e-5, offset=1.0), Norm(1e-5, centered=True)], ids=str
)
@pytest.mark.parametrize(("rows", "size"), [(1, 4096), (9, 576), (2048, 1024), (3, 16384)])
def test_norms(rows: int, size: int, norm: Norm, dtype: torch.dtype) -> None:
    from mxcompile.kernels.triton.norm import add_norm

    x, residual = (random(rows, size, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, bias = random(size, dtype=dtype, seed=2), random(size, dtype=dtype, seed=3) if norm.centered else None
    total, y = add_norm(x, residual, weight, bias, norm, ROUNDING)
    assert torch.equal(total, x + residual)
    expected = reference.quantize_dequantize(norm(x + residual, weight, bias), *ROUNDING)
    assert (y != expected).double().mean() <= 5e-3
    assert relative(y, expected) <= 1e-3


@pytest.mark.parametrize("function", ["swish", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", [1, 300])
def test_gated_products(function: Any, rows: int) -> None:
    from mxcompile.kernels.triton.gate_product import multiply_and_round

    gate, up = (random(rows, 14336, seed=seed) for seed in (0, 1))
    expected = reference.quantize_dequantize(Gate(function)(torch.cat([gate, up], -1)), *ROUNDING)
    y = multiply_and_round(gate, up, Gate(function), ROUNDING)
    assert (y != expected).double().mean() <= 5e-3
    assert relative(y, expected) <= 1e-3
