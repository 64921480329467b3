"""On a GPU: a compiled model reads the packed bytes of an MXCache, and its exact tokens beside them, and computes what
an uncompiled one computes of decoded states."""

import copy

import pytest
import torch
import transformers
from models import inputs, llama
from packaging.version import Version

import mxcompile
from mxcompile.inductor import compile_module
from mxcompile.kernels import dispatch
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.metrics import sqnr_db

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
LAYERS, PROMPT, STEPS = 2, 9, 12


@pytest.fixture(scope="module")
def models():
    """The same model, uncompiled and compiled."""
    example = {name: value.cuda() for name, value in inputs("llama").items()}
    source = llama(LAYERS).bfloat16().cuda()
    plain = mxcompile.quantize_and_compile(source, example, recipe="w8a8-mxint-quick", compile=False)
    return plain, compile_module(copy.deepcopy(plain))


@pytest.mark.parametrize("room", [None, 64])
@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        ("key=mxint8,value=mxint4,window=4,sink=2", "attend_packed_exact"),
        ("key=mxint4,value=mxint4,window=32,rotate=head", "attend_packed_exact"),
        ("key=mxint8,value=mxint8", "attend_packed"),
    ],
)
@torch.no_grad()
def test_packed_bytes_are_read(models, form, kernel, room, monkeypatch):
    calls: list[str] = []
    for name in (kernel, "attend_packed_next"):
        attend = getattr(dispatch, name)
        monkeypatch.setattr(dispatch, name, lambda *args, attend=attend, name=name: calls.append(name) or attend(*args))
    cache = mxcompile.MXCache.of(models[0].config, CacheFormat.parse(form), room)
    ids = torch.randint(100, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(0)).cuda()
    for part in ids.split([PROMPT, *[1] * STEPS], 1):
        same = copy.deepcopy(cache)  # an element that rounds the other way would be read again in every later step
        wanted, logits = (
            model(part, **{CACHE_NAME: held}).logits[:, -1].float()
            for model, held in zip(models, (same, cache), strict=True)
        )
        assert sqnr_db(wanted, logits) > 20  # other sums in bfloat16, so few elements round the other way
    expected = kernel if kernel == "attend_packed_exact" or room is None else "attend_packed_next"
    assert calls.count(expected) >= (
        STEPS * LAYERS if room is None else LAYERS
    )  # a step with a static cache is captured
