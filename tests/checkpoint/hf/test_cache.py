"""A model whose pipeline had `quantize-cache` makes its MXCache by itself, fresh, copied and loaded."""

import copy

import pytest
import torch
import transformers
from cached_reference import reference_attention
from models import inputs, two_layers
from transformers import DynamicCache, StaticCache

import mxcompile
from mxcompile.numerics.cache_format import CacheFormat

PIPELINE = "quantize-cache{{key=mxint8,value=mxint4,window={},sink=0}} | lower-mx{{weight=mxint8,activation=none}}"
PROMPT = torch.tensor([[5, 17, 99, 3, 44, 17, 5, 60, 2, 9, 31]])
LENGTHS = {None: None, "static": PROMPT.shape[1] + 12 - 1}


def quantized(window=0, kind="qwen3", **changes):
    model = two_layers(kind, head_dim=32, use_cache=True, **changes)
    model.generation_config.eos_token_id = None
    pipeline = mxcompile.Pipeline.parse(PIPELINE.format(window))
    return mxcompile.quantize_and_compile(model, inputs("llama"), recipe=pipeline, compile=False)


@pytest.fixture(scope="module")
def model():
    return quantized()


def generate(model, **options):
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    result = model.generate(PROMPT, **{**settings, **options})
    return result.sequences, result.get("cache", result.get("past_key_values"))


@pytest.mark.parametrize("implementation", LENGTHS)
@pytest.mark.parametrize("made", ["fresh", "copied", "loaded", "from_pretrained"])
def test_it_generates_with_the_cache_of_its_pipeline(model, tmp_path, made, implementation):
    if made in ("loaded", "from_pretrained"):
        mxcompile.save(model, tmp_path / "made")
        load = mxcompile.load if made == "loaded" else type(model).from_pretrained
        other = load(tmp_path / "made")
    else:
        other = copy.deepcopy(model) if made == "copied" else model
    with reference_attention(model, CacheFormat(value=mxcompile.formats.MXINT4), PROMPT.shape[1]):
        expected = type(model).generate(
            model, PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0, **exact(model)
        )
    tokens, cache = generate(other, cache_implementation=implementation)
    assert type(cache) is mxcompile.MXCache
    assert str(cache.format) == "key=mxint8,value=mxint4"
    assert cache.max_length == LENGTHS[implementation]
    assert torch.equal(tokens, expected)


def exact(model):
    name = "cache" if hasattr(transformers.generation.GenerateDecoderOnlyOutput, "cache") else "past_key_values"
    return {name: DynamicCache(config=model.config)}


def test_beams_and_candidates_get_one_too():
    model = quantized(window=3)
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
        _, cache = generate(model, **options)
        assert str(cache.format) == "key=mxint8,value=mxint4,window=3"


def test_what_the_caller_says_is_done(model):
    given = exact(model)
    tokens, cache = generate(model, **given)
    assert cache is next(iter(given.values()))
    tokens, cache = generate(model, use_cache=False)
    assert cache is None
    assert tokens.shape[1] == PROMPT.shape[1] + 12


def test_a_model_without_the_pass_keeps_transformers_caches():
    model = two_layers("qwen3", head_dim=32, use_cache=True)
    plain = mxcompile.quantize_and_compile(model, inputs("llama"), recipe="w8a8-mxint-quick", compile=False)
    assert type(generate(plain)[1]) is DynamicCache
    assert type(generate(plain, cache_implementation="static")[1]) is StaticCache


def test_dequantized_it_is_an_ordinary_model(model):
    assert type(generate(copy.deepcopy(model).dequantize())[1]) is DynamicCache
