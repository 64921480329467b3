"""`MXCache` gives the tokens of the reference operator, however a model generates with it."""

from dataclasses import replace

import pytest
import torch
import transformers
from cached_reference import reference_attention
from models import two_layers
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from mxcompile.errors import InputError
from mxcompile.formats import MXFP4, MXINT4, MXINT8
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import mean_key, rounded_keys, rounded_values
from mxcompile.tensor.cache import MXCache
from mxcompile.tensor.cache_layers import FixedLayer, GrowingLayer

CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
PROMPT = torch.tensor([[5, 17, 99, 3, 44, 17, 5, 60, 2, 9, 31]])
FORMS = [
    CacheFormat(),
    CacheFormat(MXINT4, MXFP4),
    CacheFormat(MXINT4, MXINT4, window=4, sink=2),
    CacheFormat(MXINT4, None, window=1, rotate=True),
    CacheFormat(None, MXINT4, sink=14),
    CacheFormat(MXINT4, MXINT4, window=3, sink=1, rotate=True, shift=True),
]
ROOMS = [None, 48]


@pytest.fixture(scope="module")
def model():
    return decoder("qwen3")


def decoder(kind, **changes):
    """Two layers, whose heads have 32 channels; of these, changes are made to the config."""
    model = two_layers(kind, head_dim=32, use_cache=True, **changes)
    model.generation_config.eos_token_id = None
    return model


def expected(model, form, prompt=PROMPT, count=16, prompt_length=None, **options):
    """Tokens and logits with the reference operator."""
    with reference_attention(model, form, prompt.shape[1] if prompt_length is None else prompt_length):
        return generate(model, prompt, count, cache=DynamicCache(config=model.config), **options)


def generate(model, prompt=PROMPT, count=16, cache=None, **options):
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, **options}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(prompt, **{CACHE_NAME: cache}, **settings)


def assert_same(result, reference):
    assert torch.equal(result.sequences, reference.sequences)
    pairs = zip(result.logits, reference.logits, strict=True)
    assert max((one - other).abs().max().item() for one, other in pairs) < 1e-4


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tokens_are_those_of_the_reference_operator(model, form, room):
    result = generate(model, cache=MXCache.of(model.config, form, room))
    assert_same(result, expected(model, form))
    exact = generate(model)
    assert (result.logits[-1] - exact.logits[-1]).abs().max() > 1e-3  # the operator rounds


@pytest.mark.parametrize("room", ROOMS)
def test_padding_on_the_left(model, room):
    form = CacheFormat(MXINT4, MXINT4, window=3)
    prompt = torch.cat([PROMPT, PROMPT.flip(1)])
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    result = generate(model, prompt, cache=MXCache.of(model.config, form, room), attention_mask=mask)
    assert_same(result, expected(model, form, prompt, attention_mask=mask))


@pytest.mark.parametrize("room", ROOMS)
def test_beams(model, room):
    form = CacheFormat(MXINT4, MXINT4, window=3, sink=2)
    result = generate(model, cache=MXCache.of(model.config, form, room), num_beams=3, output_logits=False)
    reference = expected(model, form, num_beams=3, output_logits=False)
    assert torch.equal(result.sequences, reference.sequences)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_each_call_reads(form, room):
    """A prompt, two parts of a later one, single tokens, tokens taken back, candidates."""
    torch.manual_seed(0)
    layer = GrowingLayer(form) if room is None else FixedLayer(room, form)
    history = torch.randn(2, 2, 3, 0, 32)
    for count, crop in ((5, 0), (4, 0), (3, 0), (1, 0), (1, 2), (1, 0), (6, 5), (1, 0)):
        new = torch.randn(2, 2, 3, count, 32)
        if count == 6:
            layer.activate_past_recording()
        if count == 6 and form.window > 0:
            with pytest.raises(InputError, match="cannot read 6 candidates of assisted decoding"):
                layer.update(*new)
            continue
        size = layer.get_mask_sizes(count)
        read = layer.update(*new)
        start, history = history.shape[3], torch.cat([history, new], 3)
        shift = mean_key(history[0, :, :, :5]) if form.shift else 0.0
        held = history[0] - shift if start else history[0]
        assert size == (read[0].shape[2], 0)
        is_own = start == 0 or count in (3, 4) or form.window > 0
        places = torch.arange(history.shape[3])
        is_exact = (places > start - form.window if is_own else places < 0) | (places < form.sink)
        is_exact |= (places >= start) & is_own
        rounded = rounded_keys(held, replace(form, shift=False)), rounded_values(history[1], form)
        for states, exact, lossy in zip(read, (held, history[1]), rounded, strict=True):
            expected = torch.where(is_exact[:, None], exact, lossy)
            assert torch.equal(states[:, :, : len(places)], expected)
        if crop:
            layer.crop(-crop)
            history = history[:, :, :, :-crop]
        assert int(layer.get_seq_length()) == history.shape[3]


@pytest.mark.parametrize("room", ROOMS)
def test_a_conversation_goes_on(model, room):
    cache = MXCache(model.config, None, MXINT4, max_length=room)
    known = MXCache(model.config, None, MXINT4, max_length=room, window=99)
    exact = DynamicCache(config=model.config)
    results = [PROMPT] * 3
    for _ in range(2):
        for index, one in enumerate((cache, known, exact)):
            longer = torch.cat([results[index], PROMPT], 1)
            results[index] = generate(model, longer, cache=one, count=3).sequences
    assert torch.equal(results[1], results[2])
    assert cache.get_seq_length() == exact.get_seq_length() == results[0].shape[1] - 1


@pytest.mark.parametrize("room", ROOMS)
def test_after_a_reset_nothing_is_left(model, room):
    form = CacheFormat(MXINT4, MXINT4, window=4, sink=2)
    cache = MXCache.of(model.config, form, room)
    first = generate(model, cache=cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert_same(generate(model, cache=cache), first)


@pytest.mark.parametrize("room", ROOMS)
def test_tokens_that_were_taken_back_are_written_again(model, room):
    form = CacheFormat(MXINT4, MXINT4, sink=13)
    cache = MXCache.of(model.config, form, room)
    first = generate(model, cache=cache)
    cache.crop(-6)
    again = generate(model, first.sequences[:, :-6], cache=cache, count=6)
    assert torch.equal(again.sequences, first.sequences)


@pytest.mark.parametrize("room", ROOMS)
def test_assisted_decoding_gives_the_same_tokens(model, room):
    form = CacheFormat(MXINT4, MXINT4)
    options = {"prompt_lookup_num_tokens": 3, "output_logits": False}
    result = generate(model, cache=MXCache.of(model.config, form, room), **options)
    assert torch.equal(result.sequences, expected(model, form, output_logits=False).sequences)


@pytest.mark.parametrize("room", ROOMS)
def test_a_prompt_in_chunks(model, room):
    """With all tokens in the window, it gives the tokens of the whole prompt."""
    result = generate(model, cache=MXCache(model.config, window=48, max_length=room), prefill_chunk_size=4)
    assert_same(result, generate(model))


def test_memory_is_counted_and_small():
    model = decoder("qwen3")
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    layers, length = model.config.num_hidden_layers, 64
    prompt = torch.arange(length)[None] % 100
    for key, value, share in ((MXINT8, MXINT8, 8.25), (MXINT8, MXINT4, 6.25)):
        for room in (None, length):
            cache = MXCache(model.config, key, value, max_length=room)
            model(prompt, **{CACHE_NAME: cache})
            packed = layers * length * heads * 2 * size * share / 8
            assert packed <= cache.nbytes <= packed + 8 * layers
    plain = StaticCache(model.config, max_cache_len=length)
    model(prompt, **{CACHE_NAME: plain})
    floats = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert cache.nbytes < 0.2 * floats


@pytest.mark.parametrize("room", ROOMS)
def test_layers_with_a_sliding_window_stay_as_they_are(room):
    model = decoder("gemma3_text", layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    cache = MXCache(model.config, MXINT4, MXINT4, max_length=room)
    kinds = {type(layer).__name__ for layer in cache.layers}
    assert len(kinds) == 2
    result = generate(model, cache=cache)
    assert result.sequences.shape[1] == PROMPT.shape[1] + 16


def test_models_with_other_states_are_refused_by_name():
    from transformers import DeepseekV3Config, Qwen3NextConfig, T5Config

    with pytest.raises(InputError, match="layer 0 of this model needs a LinearAttention"):
        MXCache(Qwen3NextConfig(num_hidden_layers=4))
    with pytest.raises(InputError, match="decoders"):
        MXCache(T5Config())
    with pytest.raises(InputError, match="caches the latents"):
        MXCache(DeepseekV3Config())


def test_errors_name_what_is_wrong(model):
    with pytest.raises(InputError, match="max_length"):
        MXCache(model.config, max_length=0)
    with pytest.raises(InputError, match=r"crop\(3\)"):
        MXCache(model.config).crop(3)
    with pytest.raises(InputError, match="11 tokens do not fit into an MXCache with max_length=8"):
        model(PROMPT, **{CACHE_NAME: MXCache(model.config, max_length=8)})
    with pytest.raises(
        InputError, match="1 tokens do not fit into an MXCache with max_length=12, of which 12 are taken"
    ):
        generate(model, cache=MXCache(model.config, max_length=12))
    assert repr(MXCache(model.config, "mxint8", "mxint4", 2)) == "MXCache(key=mxint8,value=mxint4,window=2)"
