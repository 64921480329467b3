"""On a GPU: our decode loop gives what transformers' loop gives with the same compiled steps."""

import pytest
import torch
from models import inputs, llama
from transformers import StaticCache
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import mxcompile
from mxcompile.inductor.generation import hook

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPT = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [3, 4, 5, 6, 7]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [1] * 5])
ENDS = {"eos_token_id": list(range(3, 128, 9)), "pad_token_id": 0}
GREEDY, SAMPLED = {"do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.9}


@pytest.fixture(scope="module")
def model():
    example = {name: value.cuda() for name, value in inputs("llama").items()}
    return mxcompile.quantize_and_compile(llama(5).bfloat16().cuda(), example, recipe="w4a8-mxint-quick")


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


class Until(StoppingCriteria):
    """Stops a row at the first multiple of seven after `least` tokens."""

    def __init__(self, least):
        self.least, self.lengths = least, []

    def __call__(self, input_ids, scores, **_):
        self.lengths.append(input_ids.shape[1])
        return (input_ids[:, -1] % 7 == 0) & (input_ids.shape[1] > self.least)


def both(model, monkeypatch, **options):
    """What the loops return, and a random number drawn after each; asserts that the first was ours."""
    runs, decode = [], hook.decode
    monkeypatch.setattr(hook, "decode", lambda *args: runs.append(1) or decode(*args))
    results = []
    for generate in (model.generate, type(model).generate.__get__(model)):
        torch.manual_seed(3)
        given = {name: make() if name in ("streamer", "criteria") else make for name, make in options.items()}
        criteria = [given.pop("criteria")] if "criteria" in given else []
        how = {"cache_implementation": "static", "attention_mask": MASK.cuda(), "max_new_tokens": 30, **given}
        tokens = generate(PROMPT.cuda(), stopping_criteria=StoppingCriteriaList(criteria), **how)
        seen = [vars(given["streamer"])] if "streamer" in given else []
        seen += [one.lengths for one in criteria]
        results.append((tokens, torch.rand(1, device="cuda"), seen))
        assert len(runs) == 1
    return results


def assert_equal(results):
    (tokens, number, seen), (wanted, wanted_number, wanted_seen) = results
    assert torch.equal(tokens, wanted)
    assert torch.equal(number, wanted_number)
    assert seen == wanted_seen


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, {**GREEDY, **ENDS}, {**SAMPLED, **ENDS}])
def test_tokens_padding_and_random_numbers_are_the_same(model, monkeypatch, options):
    for _ in range(2):  # captured, and replayed
        assert_equal(both(model, monkeypatch, **options))
    assert model._compiled_call.refusal is None


@pytest.mark.parametrize("ends", [{}, ENDS])
def test_stopping_criteria_are_called_with_each_length_and_end_rows_where_they_say(model, monkeypatch, ends):
    assert_equal(both(model, monkeypatch, criteria=lambda: Until(12), **SAMPLED, **ends))


def test_a_minimum_length_and_a_repetition_penalty(model, monkeypatch):
    ones = torch.ones_like(MASK).cuda()
    options = {"repetition_penalty": 1.3, "min_new_tokens": 12, "attention_mask": ones}
    assert_equal(both(model, monkeypatch, **GREEDY, **ENDS, **options))


def test_a_streamer_gets_the_tokens_up_to_the_end(model, monkeypatch):
    assert_equal(both(model, monkeypatch, streamer=Recorder, **GREEDY, **ENDS))


def test_a_cache_goes_on_in_a_second_call(model):
    """The surplus steps of the first call leave no trace in it."""
    results = []
    name = "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"
    for generate in (model.generate, type(model).generate.__get__(model)):
        cache = StaticCache(config=model.config, max_cache_len=64)
        how = {"max_new_tokens": 20, **GREEDY, name: cache, "return_dict_in_generate": True}
        first = generate(PROMPT[1:2].cuda(), **how, eos_token_id=list(range(0, 128, 3)), pad_token_id=0)
        length = int(cache.layers[0].cumulative_length)
        second = generate(torch.cat([first.sequences, PROMPT[2:].cuda()], 1), **how, eos_token_id=None)
        assert second[name] is cache
        results.append((first.sequences.tolist(), length, second.sequences.tolist()))
    assert results[0] == results[1]
