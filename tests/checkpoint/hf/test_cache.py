"""A model whose pipeline had `quantize-cache` makes its MXCache by itself, fresh, copied and loaded."""

import copy

import pytest
import torch
import transformers
from cached_reference import reference_attention
from models import inputs, two_layers
from transformers import DynamicCache, StaticCache

import mxcompile
from mxcompile.errors import InputError
from mxcompile.numerics.cache_format import CacheFormat

PIPELINE = "quantize-cache{{key=mxint8,value=mxint4,window={},sink=0}} | lower-mx{{weight=mxint8,activation=none}}"
PROMPT = torch.tensor([[5, 17, 99, 3, 44, 17, 5, 60, 2, 9, 31]])
LENGTHS = {None: None, "static": PROMPT.shape[1] + 12 - 1}


def quantized(window=0, kind="qwen3", pipeline=PIPELINE, **changes):
    model = two_layers(kind, head_dim=32, use_cache=True, **changes)
    model.generation_config.eos_token_id = None
    pipeline = mxcompile.Pipeline.parse(pipeline.format(window))
    return mxcompile.quantize_and_compile(model, inputs("llama"), recipe=pipeline, compile=False)


@pytest.fixture(scope="module")
def model():
    return quantized()


def generate(model, prompt=PROMPT, **options):
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    result = model.generate(prompt, **{**settings, **options})
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


def test_beams_and_candidates_get_one_too(model):
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
        assert str(generate(model, **options)[1].format) == "key=mxint8,value=mxint4"


@pytest.fixture(scope="module")
def assistant():
    """It proposes much the same, and has a window of exact tokens in its own cache."""
    model = quantized(window=3)
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize("implementation", LENGTHS)
@pytest.mark.parametrize("rest", ["", ",sink=4", ",sink=14,shift=mean"])
def test_an_assistant_changes_no_token(assistant, rest, implementation):
    """Its candidates do not read the prompt exactly, nor does the mean key count them."""
    pipeline = f"quantize-cache{{{{key=mxint4,value=mxint4{rest}}}}} | lower-mx{{{{weight=mxint8,activation=none}}}}"
    model, counts = quantized(pipeline=pipeline), list[int]()
    for seed in range(6):
        prompt = torch.randint(90, (1, 6), generator=torch.Generator().manual_seed(seed)).repeat(1, 2)
        options = {"cache_implementation": implementation, "max_new_tokens": 16}
        alone, _ = generate(model, prompt, **options)
        hook = model.model.register_forward_pre_hook(
            lambda _, args, given: counts.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        assert torch.equal(generate(model, prompt, assistant_model=assistant, **options)[0], alone)
        assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=3, **options)[0], alone)
        hook.remove()
    assert counts.count(12) >= 6  # the prompt alone
    assert sum(1 < count < 12 for count in counts) > 6


def test_a_window_of_exact_tokens_refuses_candidates(model):
    windowed = quantized(window=3)
    for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(InputError, match=r"window=3\) cannot read [0-9]+ candidates .* whose window is 0"):
            generate(windowed, PROMPT.repeat(1, 2), **options)
    expected, _ = generate(model)
    assert torch.equal(generate(model, assistant_model=windowed)[0], expected)


def test_a_conversation_goes_on_after_assisted_decoding(model, assistant):
    """What comes next is read as a part of a prompt, not as candidates."""
    name = next(iter(exact(model)))
    results = []
    for options in ({}, {"assistant_model": assistant}):
        tokens, cache = generate(model, **options)
        longer = torch.cat([tokens, PROMPT], 1)
        results.append(generate(model, longer, **{name: cache})[0])
    assert torch.equal(*results)


def test_what_the_caller_says_is_done(model):
    given = exact(model)
    tokens, cache = generate(model, **given)
    assert cache is next(iter(given.values()))
    tokens, cache = generate(model, use_cache=False)
    assert cache is None
    assert tokens.shape[1] == PROMPT.shape[1] + 12


@pytest.mark.parametrize("kind", [StaticCache, mxcompile.MXCache])
def test_a_static_cache_without_room_for_the_longest_text_is_refused(model, kind):
    """Compiled, a step would write outside of it."""
    name, room = next(iter(exact(model))), PROMPT.shape[1] + 12 - 1

    def cache(length):
        is_plain = kind is StaticCache
        return {name: kind(model.config, max_cache_len=length) if is_plain else kind(model.config, max_length=length)}

    assert generate(model, **cache(room))[0].shape[1] == room + 1
    with pytest.raises(InputError, match=f"room for {room - 1} tokens, and a text of {room + 1}, .* needs {room}"):
        generate(model, **cache(room - 1))


def test_a_model_without_the_pass_keeps_transformers_caches():
    model = two_layers("qwen3", head_dim=32, use_cache=True)
    plain = mxcompile.quantize_and_compile(model, inputs("llama"), recipe="w8a8-mxint-quick", compile=False)
    assert type(generate(plain)[1]) is DynamicCache
    assert type(generate(plain, cache_implementation="static")[1]) is StaticCache


def test_dequantized_it_is_an_ordinary_model(model):
    assert type(generate(copy.deepcopy(model).dequantize())[1]) is DynamicCache
