"""Layers that are compiled once compute what whole compilation computes, up to the roundings that fusion leaves out.

In one kernel Inductor keeps the sum of two bfloat16 values in float32, also over the border between two layers; at a
border of pieces it is stored in bfloat16. With each sum rounded as the uncompiled model does, both ways give the same
bits; without that, both are as far from the model in float32.
"""

import copy

import pytest
import torch
from compiled_anew import graphs_compiled_anew
from models import inputs, llama

import mxcompile
from mxcompile.inductor import backend, compile_module, why_no_inductor
from mxcompile.inductor import compile as compiling

LAYERS = 4
CPU_REASON = why_no_inductor(torch.device("cpu"))
on_cpu = pytest.mark.skipif(CPU_REASON is not None, reason=str(CPU_REASON))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double().cpu()


def error(result, expected):
    return float((result - expected).norm() / expected.norm())


def compiled_both_ways(model, ids, monkeypatch, **options):
    """Logits with layers compiled once, and of whole compilation."""
    plain, split, repetitions = backend.compile_options, backend.compile_in_pieces, []

    def watched(*args):
        made = split(*args)
        repetitions.append(made and made.repetitions)
        return made

    results = []
    with monkeypatch.context() as patched:
        patched.setattr(compiling, "compile_options", lambda: {**plain(), **options})
        for way in (watched, lambda *_: None):
            patched.setattr(backend, "compile_in_pieces", way)
            results.append(logits(compile_module(copy.deepcopy(model)), ids))
    assert repetitions == [LAYERS - 1]
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "recipe"),
    [
        pytest.param("cpu", "w4a8-mxint-quick", marks=on_cpu),
        pytest.param("cuda", "w4a8-mxint-quick", marks=on_gpu),
        pytest.param("cuda", "w4a16-mxint-quick", marks=on_gpu),
    ],
)
def test_the_ways_differ_by_roundings_alone(device, recipe, monkeypatch):
    ids = inputs("llama")["input_ids"]
    model = llama(LAYERS).bfloat16()
    model = mxcompile.quantize_and_compile(model, {"input_ids": ids}, recipe=recipe, compile=False)
    expected = logits(copy.deepcopy(model).float(), ids)
    model, ids = model.to(device), ids.to(device)
    uncompiled = error(logits(model, ids), expected)
    with graphs_compiled_anew():
        once, whole = compiled_both_ways(model, ids, monkeypatch, emulate_precision_casts=True)
        assert torch.equal(once, whole)
        once, whole = (error(way, expected) for way in compiled_both_ways(model, ids, monkeypatch))
    assert 0 < once < 1.25 * max(whole, uncompiled)
    assert whole < 1.25 * max(once, uncompiled)
