"""One decode step of models from transformers: what its graph calls, compiled for the CPU as if that were a GPU."""

import inspect
from collections import Counter

import pytest
import torch
import transformers
from fused_steps import Recorded, as_on_a_gpu
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import mxcompile
from mxcompile.inductor import backend, why_no_inductor
from mxcompile.ops import ADD_NORM, ATTEND, ATTEND_NEXT, GATE_PRODUCT, NORM, QUANTIZE_DEQUANTIZE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler"),
]
LAYERS = 2


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What `fuse_attention` makes of attention on a GPU, for one token."""
    if query.shape[2] > 1:
        y = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
        return y.transpose(1, 2), None
    return ATTEND(query, key, value, attention_mask, scaling).transpose(1, 2), None


def model_of(name, **more):
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    transformers.AttentionInterface.register("attend", attend)
    AttentionMaskInterface.register("attend", sdpa_mask)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    quantized = mxcompile.quantize_and_compile(
        model, {"input_ids": torch.arange(16)[None]}, recipe="w4a8-mxint-quick", compile=False, probe=False
    )
    quantized.set_attn_implementation("attend")
    return quantized


def decode(model, call):
    """Logits of three steps after a prompt, with a static cache, each computed by `call`."""
    cache, forward = transformers.StaticCache(config=model.config, max_cache_len=24), inspect.signature(model.forward)
    kept = {"cache" if "cache" in forward.parameters else "past_key_values": cache, "use_cache": True}
    ids, mask, logits = torch.arange(9).expand(2, 9), torch.ones(2, 9, dtype=torch.int64), []
    mask[0, :3] = 0
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, **kept)
        for token in range(3):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            allowed = torch.zeros(2, 1, 1, 24, dtype=torch.bool)
            allowed[..., : mask.shape[1]] = mask[:, None, None].bool()
            step = {"input_ids": torch.full((2, 1), 40 + token), "attention_mask": allowed}
            step["position_ids"] = mask.sum(1, keepdim=True) - 1
            logits.append(call(**step, **kept).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(
    ("name", "options", "norms"),
    [("Qwen3", {}, 2 * LAYERS), ("Gemma2", {"attn_logit_softcapping": None}, 2 * LAYERS)],
)
def test_what_a_layer_calls(name, options, norms):
    """Besides the matmuls: a norm before attention and one before the MLP, attention, a gated product."""
    model, fuse = model_of(name, **options), Recorded()
    expected = decode(model, model)
    torch._dynamo.reset()
    with fresh_cache(), as_on_a_gpu():
        compiled = torch.compile(model, options=backend.compile_options(fuse))
        actual = decode(model, compiled)
    calls = Counter(fuse.calls)
    assert calls[ATTEND_NEXT] == calls[GATE_PRODUCT] == LAYERS
    assert calls[NORM] + calls[ADD_NORM] == norms
    assert calls[QUANTIZE_DEQUANTIZE] == calls[ATTEND] == 0
    assert ((actual - expected).norm() / expected.norm()).item() <= 1e-2
