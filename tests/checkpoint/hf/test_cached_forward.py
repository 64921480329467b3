"""A forward over whole texts that reads its cache: what the lowered program computes, and what evaluation counts."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import mxcompile
from mxcompile.checkpoint.hf.cached_forward import cache_of, reading_its_cache
from mxcompile.graph.agreement import agreement_db
from mxcompile.pipeline.pipeline import Pipeline

TINY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32}
FOUR_BITS = "quantize-cache{key=mxint4,value=mxint4}"
WINDOW = "quantize-cache{key=mxint4,value=mxint4,window=4,sink=1}"
IDS = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))


def llama(implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, num_hidden_layers=2, num_key_value_heads=2, attn_implementation=implementation)
    return LlamaForCausalLM(config).eval()


def quantized(model: torch.nn.Module, spec: str) -> tuple[mxcompile.Program, torch.nn.Module]:
    lowered = Pipeline.parse(f"{spec} | lower-mx{{weight=mxint8}}").run(mxcompile.trace(model, {"input_ids": IDS}))
    return lowered, mxcompile.deploy(lowered, model)


@pytest.mark.parametrize("spec", [FOUR_BITS, WINDOW])
@pytest.mark.parametrize("padded", [False, True])
def test_it_computes_what_the_lowered_program_does(spec, padded):
    lowered, module = quantized(llama(), spec)
    batch = {"input_ids": IDS}
    if padded:
        batch["attention_mask"] = (torch.arange(16) >= torch.tensor([[0], [5]])).long()
        lowered = Pipeline.parse(f"{spec} | lower-mx{{weight=mxint8}}").run(mxcompile.trace(llama(), batch))
    with reading_its_cache(module, cache_of(module)), torch.no_grad():
        actual = module(**batch, use_cache=False).logits
    visible = batch.get("attention_mask", torch.ones_like(IDS)).bool()
    with torch.no_grad():
        expected, exact = lowered(**batch).logits, module(**batch, use_cache=False).logits
    assert agreement_db({"y": expected[visible]}, {"y": actual[visible]})[0] > 90
    assert agreement_db({"y": exact[visible]}, {"y": actual[visible]})[0] < 50


def test_evaluation_counts_what_the_cache_loses():
    model = llama()
    lowered, module = quantized(model, FOUR_BITS)
    with torch.no_grad():
        kl = mxcompile.evaluate(module, [IDS], reference=model).kl
        expected, logits = model(input_ids=IDS).logits, lowered(input_ids=IDS).logits
    wanted = torch.nn.functional.kl_div(
        logits[:, :-1].log_softmax(-1), expected[:, :-1].log_softmax(-1), log_target=True, reduction="none"
    )
    assert kl == pytest.approx(wanted.sum(-1).mean().item(), rel=1e-3)
    _, plain = quantized(model, "quantize-cache{key=none,value=none}")
    assert kl > 2 * mxcompile.evaluate(plain, [IDS], reference=model).kl
    assert module.config._attn_implementation == "sdpa"


def test_layers_with_a_sliding_window_stay_exact():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**TINY, num_hidden_layers=2, num_key_value_heads=2, sliding_window=8, layer_types=kinds)
    lowered, module = quantized(Gemma3ForCausalLM(config).eval(), FOUR_BITS)
    with reading_its_cache(module, cache_of(module)), torch.no_grad():
        actual = module(input_ids=IDS, use_cache=False).logits
    with torch.no_grad():
        assert agreement_db({"y": lowered(input_ids=IDS).logits}, {"y": actual})[0] > 90


def test_attention_that_cannot_be_reached_is_named():
    _, module = quantized(llama("eager"), FOUR_BITS)
    with pytest.warns(UserWarning, match="is evaluated with keys and values in float, not as key=mxint4,value=mxint4"):
        mxcompile.evaluate(module, [IDS])
