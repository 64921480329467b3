"""Our decode loop gives what transformers' loop gives: tokens, padding, random numbers, caches, calls of users' code.

Steps are captured as on a GPU, and their reports are looked at late as there.
"""

import copy
import inspect
import pickle
from collections import deque
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import transformers
from models import inputs, llama
from packaging.version import Version
from recorded_steps import RecordedCall, recorded
from transformers import DynamicCache, StaticCache
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import mxcompile
from mxcompile.inductor import compile_module, why_no_inductor
from mxcompile.inductor.decode_step import DecodeStep
from mxcompile.inductor.generation import hook, loop
from mxcompile.inductor.generation.hook import Generate, use_our_loop, why_not_this_call, why_not_this_model

pytestmark = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")
PROMPT = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [3, 4, 5, 6, 7]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [1] * 5])
ENDS = {"eos_token_id": list(range(3, 128, 9)), "pad_token_id": 0}
GREEDY, SAMPLED = {"do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.9}
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


class LateReports:
    """Reports that arrive two steps late, as those of a GPU may."""

    def __init__(self, like):
        self.pending = deque()

    def send(self, report):
        self.pending.append(report.clone())

    def arrived(self, most=2):
        while len(self.pending) > most:
            yield self.pending.popleft()


@pytest.fixture(scope="module")
def deployed():
    return mxcompile.quantize_and_compile(llama(1), inputs("llama"), recipe="w4a8-mxint-quick", compile=False)


@pytest.fixture
def model(deployed, monkeypatch):
    module = copy.deepcopy(deployed)
    monkeypatch.setattr(loop, "Reports", LateReports)
    with recorded(module, monkeypatch):
        use_our_loop(module)
        yield module


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ended += 1


class Until(StoppingCriteria):
    """Ends a row at the first multiple of three after twelve tokens."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **_):
        self.seen.append(input_ids.tolist())
        return (input_ids[:, -1] % 3 == 0) & (input_ids.shape[1] > 12)


def both(model, monkeypatch, *, mine=True, **options):
    """What our loop and transformers' return, with what a streamer and a criterion saw. mine: whether ours decodes."""
    runs, decode = [], loop.decode
    monkeypatch.setattr(hook, "decode", lambda *args: runs.append(1) or decode(*args))
    results = []
    for generate in (model.generate, type(model).generate.__get__(model)):
        torch.manual_seed(3)
        users = {name: options[name]() for name in ("streamer", "criterion") if name in options}
        how = {"cache_implementation": "static", "attention_mask": MASK, "max_new_tokens": 24, **options, **users}
        criterion = how.pop("criterion", None)
        criteria = StoppingCriteriaList([criterion] if criterion else [])
        tokens = generate(PROMPT, stopping_criteria=criteria, **how)
        results.append((tokens, [vars(user) for user in users.values()]))
        assert len(runs) == int(mine)
    return results


def assert_equal(results):
    (tokens, seen), (wanted, wanted_seen) = results
    assert torch.equal(tokens, wanted)
    assert seen == wanted_seen


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, {**GREEDY, **ENDS}, {**SAMPLED, **ENDS}])
def test_tokens_and_padding_are_the_same(model, monkeypatch, options):
    assert_equal(both(model, monkeypatch, **options))
    assert RecordedCall.captured == 2  # the step, and what follows it
    assert model._compiled_call.refusal is None


def test_without_captured_steps_too(deployed, monkeypatch):
    module = copy.deepcopy(deployed)
    use_our_loop(module)
    assert_equal(both(module, monkeypatch, **SAMPLED, **ENDS))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["static", None])
def test_compiled_for_a_cpu(deployed, monkeypatch, cache):
    module = compile_module(copy.deepcopy(deployed))
    for options in ({**GREEDY, **ENDS}, {**SAMPLED, "criterion": Until}):
        assert_equal(both(module, monkeypatch, cache_implementation=cache, **options))
        monkeypatch.undo()


@pytest.mark.parametrize("reason", ["operation not permitted when stream is capturing"])
def test_with_steps_that_cannot_be_captured(model, monkeypatch, reason):
    def capture(self, call):
        raise RuntimeError(reason)

    monkeypatch.setattr(RecordedCall, "capture", capture)
    assert_equal(both(model, monkeypatch, **GREEDY, **ENDS))
    assert model._compiled_call.refusal == reason


@pytest.mark.parametrize("ends", [{}, ENDS])
def test_a_criterion_sees_each_length_once_and_ends_rows_where_it_says(model, monkeypatch, ends):
    results = both(model, monkeypatch, criterion=Until, **SAMPLED, **ends)
    assert_equal(results)
    assert len(results[0][1][0]["seen"]) < 24


def test_a_streamer_gets_the_tokens_up_to_the_end(model, monkeypatch):
    results = both(model, monkeypatch, streamer=Recorder, criterion=Until, **GREEDY, **ENDS)
    assert_equal(results)
    assert results[0][1][0]["ended"] == 1


@pytest.mark.parametrize("user", ["streamer", "criterion"])
def test_the_first_token_is_told_before_the_decode_step_is_compiled(model, monkeypatch, user):
    told, captured = [], DecodeStep.captured
    watcher = {"streamer": Recorder, "criterion": Until}[user]()

    def counting(self, step):
        told.append(len(watcher.tokens if user == "streamer" else watcher.seen))
        return captured(self, step)

    monkeypatch.setattr(DecodeStep, "captured", counting)
    how = {"streamer": watcher} if user == "streamer" else {"stopping_criteria": StoppingCriteriaList([watcher])}
    model.generate(PROMPT, cache_implementation="static", attention_mask=MASK, max_new_tokens=24, **how, **GREEDY)
    assert told == [2 if user == "streamer" else 1]  # a streamer gets the prompt, too


def test_nothing_is_compiled_if_the_first_token_is_the_last(model, monkeypatch):
    class AtOnce(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.ones(len(input_ids), dtype=torch.bool)

    monkeypatch.setattr(DecodeStep, "captured", lambda *_: pytest.fail("the decode step is not needed"))
    how = {"cache_implementation": "static", "attention_mask": MASK, "max_new_tokens": 24, **GREEDY}
    tokens = model.generate(PROMPT, stopping_criteria=StoppingCriteriaList([AtOnce()]), **how)
    assert tokens.shape == (3, 6)


def test_one_token(model, monkeypatch):
    assert_equal(both(model, monkeypatch, **GREEDY, max_new_tokens=1))


@pytest.mark.parametrize("minimum", [{"min_new_tokens": 9}, {"min_length": 11}])
def test_minimum_lengths(model, monkeypatch, minimum):
    assert_equal(both(model, monkeypatch, **GREEDY, **ENDS, **minimum))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4, "attention_mask": torch.ones_like(MASK)},
        {"min_p": 0.05},
        {"typical_p": 0.8},
        {"epsilon_cutoff": 0.02, "renormalize_logits": True, "remove_invalid_values": True},
    ],
)
def test_processors(model, monkeypatch, options):
    assert_equal(both(model, monkeypatch, **SAMPLED, **ENDS, **options))


def test_a_recording_serves_other_ends_minima_and_lengths(model, monkeypatch):
    cache = StaticCache(config=model.config, max_cache_len=64)
    given = {CACHE_NAME: cache, "do_sample": False, "pad_token_id": 0}
    for count, minimum, end in ((20, 4, 7), (12, 8, 5), (30, 0, 9)):
        options = {**given, "eos_token_id": [end, end + 50], "min_new_tokens": minimum, "max_new_tokens": count}
        cache.reset()
        tokens = model.generate(PROMPT, attention_mask=MASK, **options)
        wanted = type(model).generate(
            model, PROMPT, attention_mask=MASK, **{**options, CACHE_NAME: None, "cache_implementation": "static"}
        )
        assert torch.equal(tokens, wanted)


def static(config, **formats):
    """A static cache; with formats, one that is an MXCache."""
    return mxcompile.MXCache(config, **formats, max_length=64) if formats else StaticCache(config, max_cache_len=64)


@pytest.mark.parametrize("formats", [{}, {"value": "mxint4"}, {"key": "mxint4", "window": 3, "sink": 6}])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_surplus_steps_leave_no_trace_in_a_cache_that_goes_on(model, options, formats):
    results = []
    for generate in (model.generate, type(model).generate.__get__(model)):
        torch.manual_seed(5)
        cache = static(model.config, **formats)
        how = {"max_new_tokens": 20, **options, CACHE_NAME: cache, "return_dict_in_generate": True}
        first = generate(PROMPT[1:2], **how, eos_token_id=list(range(0, 128, 5)), pad_token_id=0)
        length = int(cache.layers[0].cumulative_length)
        torch.manual_seed(6)
        second = generate(torch.cat([first.sequences, PROMPT[2:]], 1), **how, eos_token_id=None)
        assert second[CACHE_NAME] is cache
        results.append((first.sequences.tolist(), length, second.sequences.tolist()))
    assert results[0] == results[1]
    assert results[0][1] == len(results[0][0][0]) - 1
    assert RecordedCall.captured == 3  # the step, and what follows it in each of two calls
    assert model._compiled_call.refusal is None


def test_probabilities_that_are_no_numbers_are_an_error_as_in_torch(model):
    with torch.no_grad():
        model.model.norm.weight.mul_(float("nan"))
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        model.generate(PROMPT, attention_mask=MASK, cache_implementation="static", max_new_tokens=9, **SAMPLED)


def test_a_change_of_the_model_between_two_calls_is_seen(model, monkeypatch):
    both(model, monkeypatch, **GREEDY)
    model.model.norm.weight = torch.nn.Parameter(-model.model.norm.weight, requires_grad=False)
    assert_equal(both(model, monkeypatch, **GREEDY))


class Doubled(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores * 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "generation mode beam_search"),
        ({"prompt_lookup_num_tokens": 2, "cache_implementation": None}, "generation mode assisted_generation"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"logits_processor": LogitsProcessorList([Doubled()])}, "Doubled"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"use_cache": False, "cache_implementation": None}, "use_cache=False"),
        ({"disable_compile": True}, "disable_compile"),
    ],
)
def test_what_is_not_served_runs_transformers_loop_and_says_why(model, monkeypatch, caplog, options, reason):
    if "num_beams" in options or "prompt_lookup_num_tokens" in options:
        options = {**options, "attention_mask": MASK[1:2]}
        monkeypatch.setitem(globals(), "PROMPT", PROMPT[1:2])
    with caplog.at_level("DEBUG", logger="mxcompile.inductor.generation"):
        (first, _), (wanted, _) = both(model, monkeypatch, mine=False, **GREEDY, **options)
    named = getattr(first, "sequences", first), getattr(wanted, "sequences", wanted)
    assert torch.equal(*named)
    assert reason in caplog.text


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)])
@pytest.mark.parametrize("options", [{**GREEDY, **ENDS}, {**SAMPLED, **ENDS}])
def test_a_cache_that_grows_on_a_cpu(deployed, monkeypatch, options, mask):
    module = copy.deepcopy(deployed)
    use_our_loop(module)
    how = {**options, "cache_implementation": None, "attention_mask": mask, "criterion": Until, "streamer": Recorder}
    assert_equal(both(module, monkeypatch, **how))


@pytest.mark.parametrize("formats", [None, {"key": "mxint4", "window": 3, "sink": 6}])
def test_a_cache_that_grows_goes_on_in_a_second_call(deployed, formats, monkeypatch):
    results, runs, decode = [], [], loop.decode
    monkeypatch.setattr(hook, "decode", lambda *args: runs.append(1) or decode(*args))
    module = copy.deepcopy(deployed)
    use_our_loop(module)
    for generate in (module.generate, type(module).generate.__get__(module)):
        made = DynamicCache if formats is None else partial(mxcompile.MXCache, **formats)
        cache = made(config=module.config)
        how = {"max_new_tokens": 12, **GREEDY, CACHE_NAME: cache, "return_dict_in_generate": True}
        first = generate(PROMPT[1:2], **how, eos_token_id=list(range(0, 128, 5)), pad_token_id=0)
        second = generate(torch.cat([first.sequences, PROMPT[2:]], 1), **how, eos_token_id=None)
        assert second[CACHE_NAME] is cache
        results.append((first.sequences.tolist(), second.sequences.tolist(), cache.get_seq_length()))
    assert results[0] == results[1]
    assert len(runs) == 2  # of our loop


def test_a_cache_that_grows_on_a_gpu_is_transformers_loop(model, monkeypatch):
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    reason = why_not_this_call(model, {}, {"max_new_tokens": 4, CACHE_NAME: DynamicCache(config=model.config)})
    assert reason == 'the cache is not static: cache_implementation="static" makes it so'


def test_a_cache_with_a_sliding_window_is_transformers_loop(model, monkeypatch):
    config = copy.deepcopy(model.config)
    config.sliding_window, config.layer_types = 4, ["sliding_attention"]
    cache = StaticCache(config=config, max_cache_len=16)
    monkeypatch.setattr(hook, "decode", lambda *_: pytest.fail("its layers are not plain"))
    model.generate(PROMPT, attention_mask=MASK, max_new_tokens=2, **GREEDY, **{CACHE_NAME: cache})


def test_the_hook_is_on_the_instance_and_copies_have_their_own(model):
    assert isinstance(model.generate, Generate)
    assert model.generate.__doc__ == type(model).generate.__doc__
    assert inspect.signature(model.generate) == inspect.signature(type(model).generate.__get__(model))
    del model._compiled_call
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.generate, Generate)
        assert other.generate._module is other


def test_a_model_with_its_own_loop_keeps_it():
    class Own(transformers.LlamaForCausalLM):
        def _sample(self, *args, **kwargs):
            raise NotImplementedError

    module = Own(llama(1).config)
    assert why_not_this_model(module) == "Own has a _sample of its own"
    use_our_loop(module)
    assert "generate" not in vars(module)


def test_after_each_step_on_a_cpu_it_is_asked_whether_others_want_the_cores(deployed, monkeypatch):
    """Not in it: torch's matmuls leave work undone if they get fewer threads than they expect."""
    order = []

    @contextmanager
    def ask():
        order.append("asked")
        yield
        order.append("over")

    monkeypatch.setattr(loop, "alone_if_busy", ask)
    module = copy.deepcopy(deployed)
    module.register_forward_pre_hook(lambda *_: order.append("model"))
    use_our_loop(module)
    module.generate(PROMPT[1:2], max_new_tokens=4, cache_implementation="static", **GREEDY)
    assert order == ["model", *["model", "asked", "over"] * 3]  # the first of four tokens comes from the prompt
