"""A decode step that is called again with the same tensors: the same logits as through Dynamo, or Dynamo again."""

import pytest
import torch
import transformers
from models import build, inputs
from packaging.version import Version
from transformers import StaticCache

import mxcompile
from mxcompile.inductor import why_no_inductor
from mxcompile.inductor.captured_step import StepInputs
from mxcompile.inductor.repeated_step import RepeatedStep

pytestmark = [
    pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler"),
    pytest.mark.slow,
]
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return mxcompile.quantize_and_compile(
        build("llama"), inputs("llama"), recipe="w4a8-mxint-quick", include=["lm_head"]
    )


def steps(module, count=8):
    """Logits of `count` tokens after a prompt, by a function that is called for each, with the same tensors."""
    cache = StaticCache(config=module.config, max_cache_len=32)
    ids, position = torch.tensor([[3]]), torch.tensor([[8]])
    with torch.no_grad():
        module(input_ids=torch.arange(8)[None], **{CACHE_NAME: cache})
        step = StepInputs.of({"input_ids": ids, "position_ids": position, CACHE_NAME: cache, "use_cache": True})
        repeated = RepeatedStep(module, step)
        for _ in range(count):
            yield repeated, step
            ids += 1
            position += 1


def test_repeated_steps_give_the_same_logits_without_dynamo(module, monkeypatch):
    expected = [module(**step.kwargs).logits.clone() for _, step in steps(module)]
    called = []
    monkeypatch.setattr(module, "_compiled_call_impl", counted(module._compiled_call_impl, called))
    actual = [repeated() for repeated, _ in steps(module)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(called) == 2  # the prompt and the first step


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    return call


def test_weights_that_change_in_place_are_seen(module):
    actual = []
    for index, (repeated, _) in enumerate(steps(module, 4)):
        if index == 3:
            with torch.no_grad():
                module.model.norm.weight.mul_(0)
        actual.append(repeated())
    with torch.no_grad():
        module.model.norm.weight.fill_(1)
    assert not actual[3].any()
    assert actual[2].any()


def test_a_cache_tensor_that_is_replaced_ends_the_repetition(module):
    """Its graph would go on reading the old one."""
    (repeated, step), *_ = steps(module, 1)
    with torch.no_grad():
        repeated()
    assert repeated._run is not None
    known = repeated._known
    repeated._known = {key: value for key, value in known.items() if value is not step.cache_tensors[0]}
    assert not repeated._is_all(repeated._run, repeated._run.outputs[0])
