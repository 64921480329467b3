"""Engines of vLLM on tiny checkpoints: log-probabilities of prompts, against transformers."""

import engines
import pytest
from torch import Tensor

import mxcompile

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(engines.why_no_engine), reason=engines.why_no_engine)]
IDS = engines.prompts()
MOST = 3  # times the distance of the float model


@pytest.fixture(scope="module")
def model():
    return engines.tiny_llama()


@pytest.fixture(scope="module")
def float_distance(model, tmp_path_factory) -> float:
    folder = tmp_path_factory.mktemp("float") / "model"
    model.save_pretrained(folder)
    return _distance(engines.log_probabilities(folder, IDS), engines.expected(model, IDS))


def _distance(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().mean().item()


@pytest.mark.parametrize("recipe", ["w4a8-mxint-quick"])
def test_own_checkpoints_run_as_in_transformers(recipe, model, float_distance, tmp_path):
    quantized = mxcompile.quantize_and_compile(model, {"input_ids": IDS}, recipe=recipe, compile=False)
    mxcompile.save(quantized, tmp_path / "model")
    distance = _distance(engines.log_probabilities(tmp_path / "model", IDS), engines.expected(quantized, IDS))
    print(f"distance of {recipe}: {distance:.4f}, of the float model: {float_distance:.4f}")
    assert distance <= MOST * float_distance
