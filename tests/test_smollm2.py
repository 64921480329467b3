"""SmolLM2-135M, a real model: accuracy, size, coverage. Skipped where it has not been fetched."""

from itertools import islice

import pytest
import torch

import mxcompile
from mxcompile import smollm2
from mxcompile.evaluation import evaluate, token_windows
from mxcompile.storage import stored_bytes
from mxcompile.texts import help_text
from mxcompile.weight import MXWeight

pytestmark = pytest.mark.skipif(
    not smollm2.cached_file().exists(), reason="SmolLM2 is not in the cache: python -m mxcompile.smollm2"
)


@pytest.fixture(scope="module")
def real():
    model, tokenizer = smollm2.load()
    tokens = tokenizer(help_text(), return_tensors="pt").input_ids[0]
    torch.set_num_threads(2)
    yield model, list(islice(token_windows(tokens, 2048), 4))
    torch.set_num_threads(1)


def test_w8a8_mxint_with_plain_rounding_is_within_a_percent_and_a_half(real):
    """8188 tokens of Python's help topics in windows of 2048; measured: +1.02 % perplexity."""
    model, windows = real
    quantized = mxcompile.quantize_and_compile(model, {"input_ids": windows[0]}, recipe="w8a8-mxint", compile=False)
    before, after = evaluate(model, windows), evaluate(quantized, windows, model)
    assert after.perplexity < 1.015 * before.perplexity
    assert after.top1 > 0.93
    assert after.kl < 0.02


def test_w4a8_covers_every_decoder_linear_at_its_true_size(real):
    model, windows = real
    quantized = mxcompile.quantize_and_compile(
        model, {"input_ids": windows[0]}, recipe="w4a8-mxint-quick", compile=False
    )
    packed = [p for p in quantized.parameters() if isinstance(p, MXWeight)]
    assert len(packed) == 210
    assert sum(p.packed_bytes for p in packed) * 8 == sum(p.numel() for p in packed) * 4.25
    assert stored_bytes(quantized) < 0.32 * stored_bytes(model)
