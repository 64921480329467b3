"""torch.compile with MX fusion: every matmul is found, generation is unchanged, a missing compiler is worked around.

Compiling a language model takes seconds, so the models have one layer and each is compiled once per module.
"""

import copy
import io
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from compiled_anew import graphs_compiled_anew
from models import build, inputs, output
from torch import nn
from torch._inductor import codecache, cpu_vec_isa

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.multiplier import insert_multiplier, multiplier_of
from mxcompile.errors import CompileError
from mxcompile.inductor import backend, compile_module, why_no_inductor
from mxcompile.inductor.compile import _compile_generate
from mxcompile.inductor.decode_step import DecodeStep
from mxcompile.inductor.rewrites.fuse import fuse
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.ops import CPU_LINEARS, LINEAR

NO_COMPILER = why_no_inductor(torch.device("cpu"))
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


def deployed(name, recipe="w4a8-mxint-quick"):
    model, example = build(name), inputs(name)
    return mxcompile.deploy(mxcompile.recipes()[recipe].run(mxcompile.trace(model, example)), model)


@contextmanager
def watching():
    """The fusion results of everything that is compiled here."""
    fuse = backend.FuseMX()
    with pytest.MonkeyPatch.context() as patch, graphs_compiled_anew():
        patch.setattr(backend, "FuseMX", lambda: fuse)
        yield fuse.results


@pytest.fixture
def watched():
    with watching() as results:
        yield results


def compiled_and_called(name):
    """A compiled model after its first call, and what was fused for that."""
    with watching() as results, torch.no_grad():
        module = compile_module(deployed(name))
        module(**inputs(name), use_cache=False)
    return module, list(results)


@pytest.fixture(scope="module")
def llama():
    return *compiled_and_called("llama"), deployed("llama")


@needs_compiler
def test_every_matmul_is_fused(llama):
    (result,) = llama[1]
    assert (result.rewrites, result.misses) == (7 + 4, ())


@pytest.mark.slow
@needs_compiler
def test_every_matmul_of_gpt2_is_fused():
    (result,) = compiled_and_called("gpt2")[1]
    assert (result.rewrites, result.misses) == (4 + 4, ())


class Gated(nn.Module):
    """Three linears and a residual read a GELU."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        h = nn.functional.gelu(x)
        return h + self.q(h) * self.k(h) + self.v(h)


@needs_compiler
@pytest.mark.parametrize(
    ("lower", "activations"), [("lower-mx{weight=mxint4,activation=mxint8}", 1), ("lower-mx{weight=mxint4}", 0)]
)
def test_readers_of_one_multiplied_value_share_the_product_and_its_quantization(watched, lower, activations):
    """Also after a deepcopy, where every weight has a multiplier in memory of its own."""
    model, x = Gated(), torch.randn(3, 64)
    program = mxcompile.trace(model, x)
    product = insert_multiplier(program, choose(program).matmuls)
    program.set_tensor(str(multiplier_of(program, product)), torch.rand(64) + 0.5)
    lowered = mxcompile.Pipeline.parse(lower).run(program)
    module = copy.deepcopy(mxcompile.deploy(lowered, model))
    with torch.no_grad():
        torch.testing.assert_close(compile_module(module)(x), lowered(x), rtol=0, atol=1e-5)
    (result,) = watched
    assert (result.rewrites, result.misses) == (1 + activations + 3, ())


@needs_compiler
def test_near_misses_are_reported_with_reasons(watched):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 64, 32))

        def forward(self, x):
            return torch.baddbmm(x[..., :32], x, self.weight)

    model, x = Experts(), torch.randn(2, 5, 64)
    module = mxcompile.quantize_and_compile(model, x, recipe="w4a8-mxint-quick")
    reference = mxcompile.quantize_and_compile(model, x, compile=False, recipe="w4a8-mxint-quick")
    with torch.no_grad():
        torch.testing.assert_close(module(x), reference(x), rtol=0, atol=1e-5)
    (result,) = watched
    assert [miss.reason for miss in result.misses] == [
        "no fused kernel for aten.baddbmm.default: its weight is dequantized first"
    ]


@needs_compiler
@pytest.mark.parametrize(("batch", "length"), [(2, 8), (3, 13)])
def test_compiled_equals_uncompiled_at_other_sizes(llama, batch, length):
    """Float32 reassociation may flip a rounding of an activation; on this model and input none does."""
    compiled, _, plain = llama
    example = {**inputs("llama", batch, length, seed=batch), "use_cache": False}
    with torch.no_grad():
        torch.testing.assert_close(output(compiled(**example)), output(plain(**example)), rtol=0, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize(
    ("cache", "other"),
    [(None, (3, 5)), pytest.param("static", (1, 5), marks=pytest.mark.slow)],
)
def test_generates_the_same_tokens(llama, cache, other):
    """A batch of one is compiled apart."""
    compiled, _, plain = llama
    how = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    for batch, length in ((2, 8), other):
        prompt = inputs("llama", batch, length, seed=7)
        assert torch.equal(compiled.generate(**prompt, **how), plain.generate(**prompt, **how))


@needs_compiler
def test_many_models_in_one_process_stay_compiled():
    """Dynamo gives up on a code object after eight graphs; each compiled module has one of its own."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    for seed in range(10):
        torch.manual_seed(seed)
        module = mxcompile.quantize_and_compile(nn.Linear(64, 32 + seed), torch.randn(3, 64), recipe="w4a8-mxint-quick")
        module(torch.randn(5, 64))
    assert counters["stats"]["unique_graphs"] == before + 10


@pytest.mark.slow
@needs_compiler
def test_torchs_own_attention_layers_compile():
    layer, x = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval(), torch.randn(2, 5, 64)
    compiled = mxcompile.quantize_and_compile(layer, x, recipe="w4a8-mxint-quick")
    plain = mxcompile.quantize_and_compile(layer, x, compile=False, recipe="w4a8-mxint-quick")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_without_a_compiler_the_model_runs_fused_and_says_so(monkeypatch):
    def missing():
        raise backend.InvalidCxxCompiler

    monkeypatch.setattr(backend, "get_cpp_compiler", missing)
    seen = []
    monkeypatch.setattr("mxcompile.inductor.compile.fuse", lambda graph: (fuse(graph), seen.append(graph))[0])
    model, x = build("mlp"), inputs("mlp")
    with pytest.warns(
        UserWarning, match=r"^torch.compile needs a C\+\+ compiler .* and there is none: .* uncompiled$"
    ) as caught:
        module = mxcompile.quantize_and_compile(model, x, recipe="w4a8-mxint-quick")
    assert {warning.filename for warning in caught} == {__file__}
    reference = mxcompile.quantize_and_compile(model, x, compile=False, recipe="w4a8-mxint-quick")
    with torch.no_grad():
        assert torch.equal(module(**x), reference(**x))
    assert [len([n for n in graph.nodes if n.target in (LINEAR, CPU_LINEARS)]) for graph in seen] == [2]


@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_what_the_keys_of_the_cache_hold_is_found_while_dynamo_traces():
    backend._probing.cache_clear()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    codecache.CacheBase.get_system.cache_clear()
    backend.start_probing(torch.device("cuda")).join(120)
    assert codecache.CacheBase.get_system.cache_info().currsize == 1
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0
    backend.start_probing(torch.device("cpu")).join(120)
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 1
    assert backend.start_probing(torch.device("cpu")) is backend.start_probing(torch.device("cpu", 0))


def test_with_a_compiler_nothing_is_said():
    if NO_COMPILER is not None:
        pytest.skip(NO_COMPILER)
    mxcompile.quantize_and_compile(build("mlp"), inputs("mlp"), recipe="w4a8-mxint-quick")  # a warning is an error


@pytest.mark.parametrize(
    "name",
    [
        *(
            "formats.py",
            "ops/linears.py",
            "ops/experts.py",
            "numerics/gates.py",
            "numerics/reference.py",
            "kernels/dispatch.py",
            "graph/rules.py",
        ),
        *("kernels/configs/sm90.jsonl", "kernels/cpu/mx_cpu.cpp", "kernels/cpu/mx_cpu_dot.h"),
    ],
)
def test_the_cache_key_follows_the_code(name, tmp_path, monkeypatch):
    """Any file that decides what a compiled graph computes; the copies have the same names, the key has no path."""
    keys = []
    for folder, text in (("same", ""), ("again", ""), ("changed", "# another line\n")):
        shutil.copytree(backend._PACKAGE, tmp_path / folder / "mxcompile", ignore=shutil.ignore_patterns("__pycache__"))
        with (tmp_path / folder / "mxcompile" / name).open("a") as file:
            file.write(text)
        monkeypatch.setattr(backend, "_PACKAGE", tmp_path / folder / "mxcompile")
        keys.append(backend.FuseMX().uuid())
        monkeypatch.undo()
    assert keys[0] == keys[1] != keys[2]
    assert backend.FuseMX().uuid() == keys[0]


def test_a_torch_without_the_private_api_compiles_plainly(monkeypatch):
    """One name is taken away: the model is compiled by torch alone, with the same results, and one line says so."""
    from torch._dynamo import eval_frame

    module, x = deployed("llama"), inputs("llama")
    expected = module(**x, use_cache=False).logits
    monkeypatch.delattr(eval_frame, "_debug_get_cache_entry_list")
    monkeypatch.delitem(sys.modules, "mxcompile.inductor.private_api", raising=False)
    monkeypatch.delattr("mxcompile.inductor.private_api", raising=False)
    mxcompile.inductor.supported.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match="lacks what mxcompile's fusion needs.*plain torch.compile runs the model"
        ) as said:
            compile_module(module)
        (ours,) = (str(warning.message) for warning in said if "mxcompile" in str(warning.message))
        assert "_debug_get_cache_entry_list" in ours
        assert "_debug_get_cache_entry_list" in str(why_no_inductor(torch.device("cpu")))
        with pytest.raises(CompileError, match="_debug_get_cache_entry_list"):
            mxcompile.inductor.compile_ahead(None, None)
    finally:
        monkeypatch.undo()
        mxcompile.inductor.supported.cache_clear()
    torch.testing.assert_close(module(**x, use_cache=False).logits, expected, rtol=0, atol=1e-4)
    assert mxcompile.inductor.supported() is None


def test_no_global_setting_changes():
    from torch._inductor import config

    before = config.get_config_copy()
    mxcompile.quantize_and_compile(build("mlp"), inputs("mlp"), recipe="w4a8-mxint-quick")
    assert config.get_config_copy() == before


def pickled(module):
    """As `torch.save` and `torch.load` copy it."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@needs_compiler
@torch.no_grad()
def test_the_parts_of_weights_are_inputs_that_stay_where_they_are(monkeypatch):
    """Or a CUDA graph would copy them before each replay: what is not static is what the call was given."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.utils import fresh_cache

    moving = []

    def inner(graph, values, **options):
        kept = set(options["static_input_idxs"])
        moving.extend(
            value.dtype for i, value in enumerate(values) if isinstance(value, torch.Tensor) and i not in kept
        )
        assert len(kept) >= 4  # elements and scales of two weights
        return compile_fx_inner(graph, values, **options)

    def call(self, graph, values):
        return compile_fx(graph, values, inner_compile=inner, config_patches=self.config)

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", call)
    with fresh_cache():
        compile_module(deployed("mlp"))(**inputs("mlp"))
    assert moving == [torch.float32]


@needs_compiler
@torch.no_grad()
def test_a_graph_that_was_compiled_before_comes_from_torch_s_cache():
    """That of AOTAutograd too: nothing is traced again but by Dynamo."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    module = deployed("mlp")
    with fresh_cache():
        for count in ("autograd_cache_miss", "autograd_cache_hit"):
            torch._dynamo.reset()
            counters.clear()
            compile_module(copy.deepcopy(module))(**inputs("mlp"))
            assert counters["aot_autograd"][count] == 1


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("copied", [copy.deepcopy, pytest.param(pickled, marks=pytest.mark.slow)])
@torch.no_grad()
def test_what_generate_compiles_on_a_gpu_is_the_module_s_own(copied):
    """`generate` is given its decode step compiled; that of a copy is the copy's, and other weights are seen."""
    module = deployed("llama")
    _compile_generate(module, torch.device("cuda"))
    example = inputs("llama")
    wanted = output(module(**example, use_cache=False))
    step = module.get_compiled_call(copy.deepcopy(module.generation_config).compile_config)
    assert isinstance(step, DecodeStep)
    assert sqnr_db(wanted, output(step(**example, use_cache=False))) > 40
    other = copied(module)
    other.model.norm.weight.zero_()
    assert not output(other.get_compiled_call(other.generation_config.compile_config)(**example, use_cache=False)).any()
    assert output(step(**example, use_cache=False)).any()
    module.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.zeros(64, 128))
    expected = output(module(**example, use_cache=False))
    assert sqnr_db(expected, output(step(**example, use_cache=False))) > 40


@needs_compiler
@pytest.mark.slow
def test_a_compiled_model_passes_the_gradients_of_the_eager_one():
    """The forward graph of training is fused as that of inference is; weights stay packed until the backward pass."""
    module = deployed("mlp")
    x = inputs("mlp")["x"]
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = module(eager)
    expected.square().sum().backward()
    with watching() as results:
        result = compile_module(copy.deepcopy(module))(compiled)
        result.square().sum().backward()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=0, atol=1e-3 * eager.grad.abs().max().item())
    forward, backward = results
    assert (forward.rewrites, forward.misses) == (0, ())  # nothing is left to fuse: it has mx::linear from the start
    assert all("aten.mm.default: its weight is dequantized" in miss.reason for miss in backward.misses)
    assert eager.grad.abs().min() > 0
