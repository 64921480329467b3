"""A model in a wrapper is saved as itself; one that nothing could open again is refused, with what to do."""

import pytest
import torch
from checkpoints import assert_same, deployed, load
from models import build, inputs
from torch import nn

import mxcompile
from mxcompile.errors import CheckpointError


def quantized() -> nn.Module:
    return mxcompile.quantize_and_compile(build("llama"), inputs("llama"), recipe="w4a8-mxint-quick", compile=False)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))], ids=["alone", "compiled inside"]
)
def test_the_model_inside_is_saved(wrap, tmp_path):
    mxcompile.save(wrap(deployed("llama")), tmp_path)
    assert_same(load(tmp_path, "llama"), deployed("llama"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_adapters_are_saved_by_peft_and_the_rest_by_us(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(quantized(), peft.LoraConfig(target_modules=["q_proj"]))
    for part in (model, model.get_base_model(), nn.DataParallel(model)):
        with pytest.raises(CheckpointError, match=r"holds adapters of peft, .* peft's own save_pretrained"):
            mxcompile.save(part, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    mxcompile.save(model.unload(), tmp_path / "model")
    assert_same(load(tmp_path / "model", "llama"), deployed("llama"))


def test_a_wrapper_inside_a_transformers_model_is_refused(tmp_path):
    model = quantized()
    model.model.layers[0] = torch.compile(model.model.layers[0])
    with pytest.raises(CheckpointError, match=r"model\.layers\.0 is wrapped in a OptimizedModule"):
        mxcompile.save(model, tmp_path / "model")
    model.model.layers[0] = model.model.layers[0]._orig_mod
    mxcompile.save(model, tmp_path / "model")
