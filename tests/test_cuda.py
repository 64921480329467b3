"""On a GPU: a deployed model compiled with fusion runs the Triton kernels and computes what it computes in eager."""

import pytest
import torch
from models import build, inputs, output

import mxcompile
from mxcompile import inductor
from mxcompile.measure import sqnr_db
from mxcompile.passes.recipes import RECIPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(name, recipe, dtype=torch.bfloat16):
    model = build(name, dtype).cuda()
    example = {key: value.cuda() for key, value in inputs(name).items()}
    lowered = mxcompile.recipes()[recipe].run(mxcompile.trace(model, example))
    return example, lowered, mxcompile.deploy(lowered, model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_compiled_is_as_good_as_the_reference(recipe):
    """Inductor keeps bf16 intermediates in float32, so some activations round to the neighbouring element: the compiled
    model differs from the uncompiled one by less than the quantization itself, and is as close to float as that one.
    """
    example, lowered, deployed = on_gpu("llama", recipe)
    with torch.no_grad():
        wanted = output(build("llama", torch.bfloat16).cuda()(**example))
        uncompiled = output(deployed(**example))
        assert torch.equal(output(lowered(**example)), uncompiled)
        compiled = output(inductor.compile_module(deployed)(**example))
    assert sqnr_db(wanted, compiled) > sqnr_db(wanted, uncompiled) - 1.5
    assert sqnr_db(uncompiled, compiled) > sqnr_db(wanted, uncompiled)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_compiled_agrees_in_float32(recipe):
    example, _, deployed = on_gpu("llama", recipe, torch.float32)
    with torch.no_grad():
        uncompiled = output(deployed(**example))
        assert sqnr_db(uncompiled, output(inductor.compile_module(deployed)(**example))) > 60


def test_the_profile_shows_the_kernels():
    example, _, deployed = on_gpu("llama", "w4a8-mxint-quick")
    compiled = inductor.compile_module(deployed)
    with torch.no_grad():
        compiled(**example, use_cache=False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            compiled(**example, use_cache=False)
            torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert sum(n for key, n in counts.items() if "_linear_kernel" in key) == 7
    assert sum(n for key, n in counts.items() if "_quantize_dequantize_kernel" in key) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_from_one_device_and_loaded_to_the_other(dtype, tmp_path):
    example, _, deployed = on_gpu("llama", "w4a8-mxint-quick", dtype)
    inductor.compile_module(deployed).save_pretrained(tmp_path / "gpu")
    loaded = mxcompile.load(tmp_path / "gpu")
    assert loaded.device.type == "cpu"
    mxcompile.save(loaded, tmp_path / "cpu")
    for path in (tmp_path / "gpu").iterdir():
        assert path.read_bytes() == (tmp_path / "cpu" / path.name).read_bytes()
    moved = mxcompile.load(tmp_path / "cpu", device="cuda")
    with torch.no_grad():
        assert torch.equal(moved._call_impl(**example).logits, deployed._call_impl(**example).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generates_the_same_tokens(name, cache):
    """float32, so that the argmax does not hang on the order of a bf16 sum."""
    _, lowered, plain = on_gpu(name, "w4a8-mxint-quick", torch.float32)
    compiled = inductor.compile_module(mxcompile.deploy(lowered, build(name).cuda()))
    prompt = {key: value.cuda() for key, value in inputs(name, 2, 8, seed=7).items()}
    how = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    wanted = plain.generate(**prompt, **how, disable_compile=True)
    assert torch.equal(compiled.generate(**prompt, **how), wanted)
    assert torch.equal(plain.generate(**prompt, **how), wanted)  # transformers compiles it by itself, unfused


def test_moves_to_the_gpu_after_quantization():
    model, example = build("llama"), inputs("llama")
    deployed = mxcompile.quantize_and_compile(model, example, compile=False, recipe="w4a8-mxint-quick")
    with torch.no_grad():
        wanted = output(deployed(**example))
        moved = deployed.cuda()
        given = output(moved(**{key: value.cuda() for key, value in example.items()})).cpu()
    assert sqnr_db(wanted, given) > 30
