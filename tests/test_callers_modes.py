"""Modes of torch that the caller has set change neither the result of quantization nor what can be done with it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import mxcompile


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 64, generator=generator, dtype=torch.float32) for _ in range(3)]


def quantized(model: nn.Module, data: list[Tensor]) -> nn.Module:
    return mxcompile.quantize_and_compile(model, data[0], recipe="w4a8-mxint", calibration=data, compile=False)


@contextmanager
def default(setting, value, usual):
    setting(value)
    try:
        yield
    finally:
        setting(usual)


MODES = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: default(torch.set_default_dtype, torch.float16, torch.float32),
    "default device": lambda: default(torch.set_default_device, "meta", None),
    "deterministic": lambda: default(torch.use_deterministic_algorithms, True, False),
}


@pytest.fixture(scope="module")
def expected() -> Tensor:
    with torch.no_grad():
        return quantized(net(), batches())(batches()[0])


@pytest.mark.parametrize("mode", MODES)
def test_the_result_is_the_same(mode, expected):
    model, data = net(), batches()
    with MODES[mode]():
        made = quantized(model, data)
    with torch.no_grad():
        assert torch.equal(made(batches()[0]), expected)
    assert not any(parameter.is_inference() for parameter in made.parameters())
    made.to(torch.bfloat16)(batches()[0].bfloat16())


def test_model_and_data_made_in_inference_mode_and_the_result_cast_there(expected):
    with torch.inference_mode():
        made = quantized(net(), batches())
        assert torch.equal(made(batches()[0]), expected)
        assert made.to(torch.bfloat16)(batches()[0].bfloat16()).dtype == torch.bfloat16
        made.float()
    with torch.no_grad():
        torch.testing.assert_close(made(batches()[0]), expected, rtol=0.1, atol=0.05)


def test_threads_take_turns():
    models = [net() for _ in range(3)]
    expected, data = quantized(net(), batches())(batches()[0]), batches()
    with ThreadPoolExecutor(len(models)) as threads:
        made = list(threads.map(lambda model: quantized(model, data), models))
    assert all(torch.equal(model(data[0]), expected) for model in made)


def test_a_model_that_was_made_in_inference_mode():
    """Its parameters have gradients, which torch.export asks for outside of the mode."""
    with torch.inference_mode():
        model = net()
    made = quantized(model, batches())
    assert torch.equal(made(batches()[0]), quantized(net(), batches())(batches()[0]))
    assert not any(parameter.is_inference() for parameter in made.parameters())
