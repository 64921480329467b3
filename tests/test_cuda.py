"""On a GPU: a deployed model compiled with fusion runs the Triton kernels and computes what it computes in eager."""

import copy
from functools import partial

import pytest
import torch
from models import build, inputs, output
from roundings import MANY, assert_same_bits, gated, hard_values, rounded_in_many_ways
from transformers import LlamaConfig, LlamaForCausalLM

import mxcompile
from mxcompile.analysis.attentions import with_exact_cache
from mxcompile.formats import MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT4, ScaleRule
from mxcompile.inductor import backend, compile_module
from mxcompile.numerics import column_rounding
from mxcompile.numerics.column_rounding import ColumnRounding
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.numerics.reference import align, quantize_dequantize
from mxcompile.ops import QUANTIZE_DEQUANTIZE
from mxcompile.passes.recipes import RECIPES
from mxcompile.tensor import planar_layout
from mxcompile.tensor.weight import unfused_matmuls

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(name, recipe, dtype=torch.bfloat16):
    model = build(name, dtype).cuda()
    example = {key: value.cuda() for key, value in inputs(name).items()}
    lowered = mxcompile.recipes()[recipe].run(mxcompile.trace(model, example))
    return example, lowered, mxcompile.deploy(lowered, model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_compiled_agrees_with_the_reference(recipe, monkeypatch):
    """With Inductor told to round where torch does. By itself it keeps bf16 intermediates in float32, and activations
    round to the neighbouring element here and there: another error, of the same size as that of the quantization.
    """
    plain = backend.compile_options
    monkeypatch.setattr(
        "mxcompile.inductor.compile.compile_options", lambda: {**plain(), "emulate_precision_casts": True}
    )
    example, lowered, deployed = on_gpu("llama", recipe)
    with torch.no_grad():
        wanted = output(build("llama", torch.bfloat16).cuda()(**example))
        uncompiled = output(deployed(**example))
        # The module's own forward has no cache, and keeps keys and values in float.
        assert torch.equal(output(with_exact_cache(lowered)(**example)), uncompiled)
        compiled = output(compile_module(deployed)(**example))
    assert sqnr_db(uncompiled, compiled) > sqnr_db(wanted, uncompiled) + 10


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_compiled_is_about_as_good_as_the_reference(recipe):
    example, _, deployed = on_gpu("llama", recipe)
    with torch.no_grad():
        wanted = output(build("llama", torch.bfloat16).cuda()(**example))
        uncompiled = output(deployed(**example))
        compiled = output(compile_module(deployed)(**example))
    assert sqnr_db(wanted, compiled) > sqnr_db(wanted, uncompiled) - 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_compiled_agrees_in_float32(recipe):
    example, _, deployed = on_gpu("llama", recipe, torch.float32)
    with torch.no_grad():
        uncompiled = output(deployed(**example))
        assert sqnr_db(uncompiled, output(compile_module(deployed)(**example))) > 60


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.bfloat16, {"_planes_kernel": 4, "_linear_kernel": 0}), (torch.float16, {"_linear_kernel": 7})],
)
def test_the_profile_shows_the_kernels(dtype, wanted):
    """In bfloat16 q, k and v are one launch, gate and up another; what planes do not serve is multiplied in rows. The
    rounding of their inputs is in kernels of norms and gated products, and in those that Inductor writes.
    """
    model = wide_llama(dtype)
    example = {"input_ids": torch.arange(20, device="cuda")[None]}
    deployed = mxcompile.quantize_and_compile(model, example, recipe="w4a8-mxint-quick", compile=False)
    compiled = compile_module(deployed)
    with torch.no_grad():
        compiled(**example, use_cache=False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            compiled(**example, use_cache=False)
            torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    for kernel, count in {**wanted, "_quantize_dequantize_kernel": 0}.items():
        assert sum(n for key, n in counts.items() if kernel in key) == count, (kernel, counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_that_inductor_compiles_has_the_bits_of_the_reference(dtype):
    """Of values from memory: subnormals, huge ones, zeros with their sign, Inf and NaN."""
    x = hard_values(128, dtype).cuda()
    results = torch.compile(rounded_in_many_ways, options=backend.compile_options())(x)
    for y, case in zip(results, MANY, strict=True):
        assert_same_bits(y, quantize_dequantize(x, *case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_aligning_has_the_bits_of_the_reference_compiled_and_not(dtype):
    def aligned(x):
        return QUANTIZE_DEQUANTIZE(x, "mxfp8_e4m3+aligned", "rceil")

    x = hard_values(128, dtype).cuda()
    wanted = align(quantize_dequantize(x, MXFP8_E4M3, ScaleRule.RCEIL))
    assert_same_bits(aligned(x), wanted)
    assert_same_bits(torch.compile(aligned, options=backend.compile_options())(x), wanted)


@pytest.mark.parametrize("tokens", [1, 40, 600])
@torch.no_grad()
def test_an_aligned_layer_compiled_agrees_with_the_reference_for_any_number_of_tokens(tokens):
    """Where the rate of 8 bits is taken and where it is not."""
    layer, x = torch.nn.Linear(256, 128).to("cuda", torch.bfloat16), torch.randn(600, 256, device="cuda").bfloat16()
    recipe = "lower-mx{weight=mxfp4,activation=mxfp8_e4m3+aligned}"
    plain = mxcompile.quantize_and_compile(layer, x, recipe=recipe, compile=False)
    compiled = compile_module(copy.deepcopy(plain))
    with unfused_matmuls():
        wanted = plain(x[:tokens])
    compiled(x[:tokens])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        given = compiled(x[:tokens])
        torch.cuda.synchronize()
    assert sqnr_db(wanted, given) > 45
    fast = tokens >= 512 and torch.cuda.get_device_capability() == (9, 0)
    assert any("_fp8_kernel" in event.key for event in profile.key_averages()) == fast


def test_a_gated_product_and_its_rounding_are_one_kernel():
    gate, up = torch.randn(2, 16, 1024, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(gated, options=backend.compile_options())
    compiled(gate, up)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled(gate, up)
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert sum(count for key, count in counts.items() if "kernel" in key or "triton" in key) == 1, counts


def wide_llama(dtype):
    """One layer whose every weight has a multiple of 64 outputs."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=320, pad_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


@pytest.mark.parametrize("rows", [1, 5, 64, 1100])
def test_arranged_weights_give_what_rows_give(rows):
    model = wide_llama(torch.bfloat16)
    example = {"input_ids": torch.randint(0, 300, (1, rows), device="cuda")}
    plain = mxcompile.quantize_and_compile(model, example, recipe="w4a8-mxint-quick", compile=False)
    arranged = copy.deepcopy(plain)
    assert planar_layout.use_planar_layout(arranged) == {}
    with torch.no_grad():
        wanted, given = plain(**example).logits, arranged(**example).logits
        assert torch.equal(arranged(**example).logits, given)
    assert sqnr_db(wanted, given) > 30  # bf16 intermediates, another order of sums
    assert arranged.to("cpu").model.layers[0].mlp.up_proj.weight.layout_.planes is None


def decoding(dtype):
    """Tokens of eager decoding with a static cache, and what gives those of compiled decoding."""
    model = wide_llama(dtype)
    prompt = torch.arange(8, device="cuda")[None]
    plain = mxcompile.quantize_and_compile(model, {"input_ids": prompt}, recipe="w4a8-mxint-quick", compile=False)
    planar_layout.use_planar_layout(plain)
    compiled = compile_module(copy.deepcopy(plain))
    how = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "cache_implementation": "static"}
    wanted = plain.generate(prompt, **how, disable_compile=True)
    return wanted, lambda: compiled.generate(prompt, **how)


def test_decoding_in_cuda_graphs_gives_the_tokens_of_eager_decoding():
    wanted, generate = decoding(torch.bfloat16)
    counters = torch._dynamo.utils.counters["inductor"]
    counters.clear()
    given = [generate() for _ in range(3)]
    assert all(torch.equal(tokens, given[0]) for tokens in given)
    assert counters["cudagraph_skips"] == 0
    assert torch.equal(given[0][:, :12], wanted[:, :12])  # near ties of a random model fall either way sooner or later


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_reads_a_static_cache_for_the_heads_that_share_it(dtype):
    """One launch a layer and token in place of torch's attention and of the copies that it takes."""
    wanted, generate = decoding(dtype)
    given = [generate() for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert torch.equal(generate(), given[0])
        torch.cuda.synchronize()
    assert all(torch.equal(tokens, given[0]) for tokens in given)
    assert torch.equal(given[0][:, :12], wanted[:, :12])  # near ties of a random model fall either way sooner or later
    counts = {event.key: event.count for event in profile.key_averages()}
    assert sum(count for key, count in counts.items() if "attend_kernel" in key) == 23, counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_from_one_device_and_loaded_to_the_other(dtype, tmp_path):
    example, _, deployed = on_gpu("llama", "w4a8-mxint-quick", dtype)
    compile_module(deployed).save_pretrained(tmp_path / "gpu")
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
    compiled = compile_module(mxcompile.deploy(lowered, build(name).cuda()))
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


@pytest.mark.parametrize("fmt", [MXINT4, MXFP4, MXFP6_E2M3], ids=str)
@pytest.mark.parametrize("rule", [None, ScaleRule.EVEN])
def test_recorded_column_rounding_is_what_its_kernels_give_one_by_one(fmt, rule, monkeypatch):
    torch.manual_seed(1)
    weight, x = (
        torch.randn(96, 256, device="cuda"),
        torch.randn(512, 256, device="cuda") * torch.rand(256, device="cuda"),
    )
    recorded = ColumnRounding(fmt, rule=rule).round(weight, x.T @ x)
    again = ColumnRounding(fmt, rule=rule).round(weight, x.T @ x)
    plain = column_rounding._round_block
    monkeypatch.setattr(column_rounding, "_RecordedRounding", lambda fmt: partial(plain, fmt=fmt))
    expected = ColumnRounding(fmt, rule=rule).round(weight, x.T @ x)
    assert all(torch.equal(*pair) for pair in zip(recorded, expected, strict=True))
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))
