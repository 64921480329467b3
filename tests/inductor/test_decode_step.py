"""The decode step that `generate` gets on a GPU: when it is captured, when replayed, and when neither."""

import copy

import pytest
import torch
import transformers
from models import build, inputs
from packaging.version import Version
from torch import nn
from transformers import DynamicCache, StaticCache

import mxcompile
from mxcompile.inductor import backend, why_no_inductor
from mxcompile.inductor.captured_step import StepInputs
from mxcompile.inductor.compiled_forward import CompiledForward
from mxcompile.inductor.decode_step import DecodeStep

pytestmark = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")


class Graph:
    """A CudaGraph for the CPU: a replay makes the call again. `taken` and `replayed` count over all of them."""

    taken = replayed = 0

    def capture(self, call):
        Graph.taken += 1
        self.call = call
        lengths = [layer.cumulative_length for layer in CACHE[0].layers]
        before = [length.clone() for length in lengths]
        self.result = call()
        for length, known in zip(lengths, before, strict=True):
            length.copy_(known)
        return self.result

    def replay(self):
        Graph.replayed += 1
        self.result.logits.copy_(self.call().logits)


CACHE = []
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


@pytest.fixture
def compiled_step():
    """A decode step that is compiled as in a model."""
    Graph.taken = Graph.replayed = 0
    module = mxcompile.quantize_and_compile(build("llama"), inputs("llama"), recipe="w4a8-mxint-quick", compile=False)
    mx_backend = backend.MXBackend(backend.compile_options())
    with torch.no_grad():
        yield DecodeStep(*(CompiledForward(module, mx_backend) for _ in range(2)), Graph)


@pytest.fixture
def step(monkeypatch, compiled_step):
    """One whose graphs run as Dynamo traced them: the guards that are tested here are the same."""
    monkeypatch.setattr(backend.InductorBackend, "__call__", lambda self, module, inputs, **options: module)
    return compiled_step


def prefilled(module, cls=StaticCache, length=32):
    cache = cls(config=module.config, max_cache_len=length) if cls is StaticCache else cls(config=module.config)
    module(input_ids=torch.arange(8)[None], **{CACHE_NAME: cache})
    CACHE[:] = [cache]
    return cache


def tokens(step, cache, count=4, **options):
    """Logits of some tokens, one after the other."""
    given = []
    for place in range(8, 8 + count):
        ids, position = torch.tensor([[place + 3]]), torch.tensor([[place]])
        kwargs = {CACHE_NAME: cache, "use_cache": True, **options}
        given.append(step(input_ids=ids, position_ids=position, **kwargs).logits)
    return torch.cat(given, 1)


def counts():
    return Graph.taken, Graph.replayed


def assert_equal_up_to_compilation(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-3)


def test_is_captured_once_for_a_cache_and_replayed_from_then_on(compiled_step):
    step = compiled_step
    module = step.forward.module
    wanted = tokens(module, prefilled(module))
    assert_equal_up_to_compilation(tokens(step, prefilled(module)), wanted)
    assert counts() == (1, 3)  # the first step is compiled
    assert_equal_up_to_compilation(tokens(step, prefilled(module)), wanted)
    assert counts() == (2, 7)  # what is compiled is captured at once
    assert step.refusal is None


def test_generate_replays_from_the_third_token_on_and_gives_the_tokens_of_the_model(compiled_step, monkeypatch):
    step = compiled_step
    module, ids, sort = step.forward.module, torch.arange(8)[None], StepInputs.of

    def of(kwargs):
        sorted_ = sort(kwargs)
        CACHE[:] = [sorted_.cache]
        return sorted_

    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    wanted = module.generate(ids, **how)
    monkeypatch.setattr(StepInputs, "of", staticmethod(of))
    module._valid_auto_compile_criteria = lambda *_, **__: True  # as on a GPU
    module.get_compiled_call = lambda _: step
    assert torch.equal(module.generate(ids, **how), wanted)
    assert counts() == (1, 10)
    assert torch.equal(module.generate(ids, **how), wanted)
    assert counts() == (2, 21)


def test_another_cache_in_the_same_place_needs_no_new_capture(step):
    """As the memory of a cache that is freed is often given to the next."""
    module = step.forward.module
    tokens(step, prefilled(module))
    other, wanted = prefilled(module), tokens(module, prefilled(module))
    first = CACHE[0] = step._captures[0]._cache()
    for mine, known in zip(other.layers, first.layers, strict=True):
        for name in ("keys", "values", "cumulative_length"):
            getattr(known, name).copy_(getattr(mine, name))
            setattr(mine, name, getattr(known, name))
    CACHE[0] = other
    given = step(
        **{CACHE_NAME: other}, input_ids=torch.tensor([[11]]), position_ids=torch.tensor([[8]]), use_cache=True
    )
    assert counts() == (1, 4)
    assert_equal_up_to_compilation(given.logits, wanted[:, :1])
    assert given[CACHE_NAME] is other


def test_results_are_not_overwritten_by_the_next_step(step):
    cache = prefilled(step.forward.module)
    tokens(step, cache, 2)
    first = tokens(step, cache, 1)
    kept = first.clone()
    tokens(step, cache, 1)
    assert torch.equal(first, kept)


def test_what_a_cache_holds_after_the_steps_is_right(step):
    module = step.forward.module
    plain, cache = prefilled(module), prefilled(module)
    tokens(module, plain)
    CACHE[:] = [cache]
    tokens(step, cache)
    assert int(cache.layers[0].cumulative_length) == 12
    for layer, wanted in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(layer.keys, wanted.keys, rtol=0, atol=1e-3)


def changed_setting(module):
    module.model.layers[0].input_layernorm.variance_epsilon = 0.5


def changed_weight(module):
    module.model.norm.weight = nn.Parameter(module.model.norm.weight * 2, requires_grad=False)


def changed_data(module):
    module.model.norm.weight.data = module.model.norm.weight.data * 2


def changed_mx_weight(module):
    proj = module.model.layers[0].mlp.down_proj
    proj.weight = copy.deepcopy(proj.weight)


@pytest.mark.parametrize("change", [changed_setting, changed_weight, changed_data, changed_mx_weight])
def test_a_change_of_the_model_between_two_steps_is_seen(step, change):
    """Also one that only Dynamo's guards see: the step is taken back and done again."""
    module = step.forward.module
    plain, cache = prefilled(module), prefilled(module)
    tokens(module, plain)
    tokens(step, cache)
    before = counts()
    change(module)
    kwargs = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[12]]), "use_cache": True}
    given = step(**{CACHE_NAME: cache}, **kwargs).logits
    assert_equal_up_to_compilation(given, module(**{CACHE_NAME: plain}, **kwargs).logits)
    assert int(cache.layers[0].cumulative_length) == 13
    assert step.refusal is None
    assert counts()[0] == before[0] + (change in (changed_weight, changed_data, changed_mx_weight))


def test_an_input_of_another_shape_or_kind_is_seen(step):
    module = step.forward.module
    plain, cache = prefilled(module), prefilled(module)
    tokens(step, cache)
    tokens(module, plain)
    two = {"input_ids": torch.tensor([[5, 6]]), "position_ids": torch.tensor([[12, 13]])}
    wanted = module(**{CACHE_NAME: plain}, **two)
    assert_equal_up_to_compilation(step(**{CACHE_NAME: cache}, **two).logits, wanted.logits)


def test_a_view_of_another_part_is_seen(step):
    """Steps may be given places of one tensor, one after the other."""
    module = step.forward.module
    plain, cache, places = prefilled(module), prefilled(module), torch.arange(32)[None]
    for place in range(8, 14):
        kwargs = {"input_ids": torch.tensor([[place]]), "position_ids": places[:, place : place + 1], "use_cache": True}
        CACHE[:] = [cache]
        given = step(**{CACHE_NAME: cache}, **kwargs).logits
        assert_equal_up_to_compilation(given, module(**{CACHE_NAME: plain}, **kwargs).logits)


def test_other_caches_are_compiled_with_torch_s_own_graphs(step):
    module = step.forward.module
    given = tokens(step, prefilled(module, DynamicCache))
    assert_equal_up_to_compilation(given, tokens(module, prefilled(module)))
    assert counts() == (0, 0)
    assert step.forward._compiled is None


def test_a_model_that_counts_its_calls_is_not_captured(step):
    """A replay would leave out what Python does."""
    module = step.forward.module
    layer, forward = module.model.layers[0], module.model.layers[0].forward
    layer.calls = 0

    def counting(*args, **kwargs):
        layer.calls = layer.calls + 1
        return forward(*args, **kwargs)

    layer.forward = counting
    cache = prefilled(module)
    before = layer.calls
    tokens(step, cache)
    assert layer.calls == before + 4
    assert counts()[1] == 0


def test_a_model_in_pieces_is_not_captured(step):
    module = step.forward.module
    layer, forward = module.model.layers[0], module.model.layers[0].forward

    def broken(*args, **kwargs):
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    layer.forward = broken
    plain, cache = prefilled(module), prefilled(module)
    assert_equal_up_to_compilation(tokens(step, cache), tokens(module, plain))
    assert counts() == (0, 0)
    assert step.refusal is not None
    assert "graph breaks" in step.refusal


def test_a_recording_that_fails_is_said_and_done_without(step, monkeypatch):
    def capture(self, call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graph, "capture", capture)
    module = step.forward.module
    plain, cache = prefilled(module), prefilled(module)
    assert_equal_up_to_compilation(tokens(step, cache), tokens(module, plain))
    assert step.refusal == "operation not permitted when stream is capturing"


def test_a_cache_is_freed_with_its_owner_and_weights_are_no_longer_held(step):
    import gc
    import weakref

    cache = prefilled(step.forward.module)
    tokens(step, cache)
    known = weakref.ref(cache.layers[0].keys)
    captured = step._captures[0]
    captured.graph = None
    assert captured._held
    CACHE.clear()
    del cache
    gc.collect()
    assert known() is None
    assert not captured._held
