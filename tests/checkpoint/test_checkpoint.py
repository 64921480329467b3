"""Save and load: the same module to the bit, at its packed size, from files that are read lazily."""

import copy
import json
import time
from pathlib import Path

import pytest
import torch
from checkpoints import assert_runs, assert_same, deployed, load, weight_files
from models import MODELS, build, inputs, output
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import mxcompile
from mxcompile.analysis.folds.multiplier import insert_multiplier
from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.checkpoint import Checkpoint
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import CheckpointError, InputError
from mxcompile.formats import BLOCK_SIZES, FORMATS, ScaleRule, activation_rule
from mxcompile.inductor import why_no_inductor
from mxcompile.numerics import packing, reference
from mxcompile.passes.recipes import RECIPES
from mxcompile.tensor.modules import named_tensors, stored_bytes
from mxcompile.tensor.weight import MXLayout, MXWeight


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(name, tmp_path):
    model = deployed(name)
    mxcompile.save(model, tmp_path)
    loaded = load(tmp_path, name)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert_same(loaded, model)
    with torch.no_grad():
        assert torch.equal(output(loaded(**inputs(name, 3, 11))), output(model(**inputs(name, 3, 11))))


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_block_size(name, block, tmp_path):
    """100 values to a row: the last block is not full; three dimensions, contracted along either of the last two."""
    fmt = FORMATS[name].with_block(block)
    rule = str(activation_rule(fmt))
    model, empty = nn.ParameterDict(), nn.ParameterDict()
    for transposed in (False, True):
        codes, scales = reference.quantize(torch.randn(2, 24, 100), fmt, ScaleRule.MSE)
        layout = MXLayout(str(fmt), 100, transposed, str(fmt), rule, rotation=4 if transposed else None)
        weight = MXWeight(packing.pack(codes, fmt), scales, layout, torch.bfloat16)
        model[str(transposed)] = nn.Parameter(weight, requires_grad=False)
        empty[str(transposed)] = nn.Parameter(torch.empty(weight.shape, device="meta"))
    mxcompile.save(model, tmp_path)
    assert_same(mxcompile.load(tmp_path, model=empty), model)


def test_the_files_take_the_packed_size(tmp_path):
    for name in ("llama", "llama-tied", "mixtral"):
        mxcompile.save(deployed(name), tmp_path / name)
        (file,) = weight_files(tmp_path / name)
        names = Checkpoint(tmp_path / name).names.stored()
        assert 0 < file.stat().st_size - stored_bytes(deployed(name)) < 150 * len(names)


def test_safetensors_reads_the_files(tmp_path):
    mxcompile.save(deployed("llama"), tmp_path)
    with safe_open(weight_files(tmp_path)[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
        weight = deployed("llama").model.layers[0].mlp.up_proj.weight
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(file.get_tensor(name).flatten(-2), weight.elements)
        assert torch.equal(file.get_tensor(f"{name}.scales"), weight.scales)


def test_shards_and_their_index(tmp_path):
    mxcompile.save(deployed("llama"), tmp_path, max_shard_size="20KB")
    files = [file.name for file in weight_files(tmp_path)]
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert_same(mxcompile.load(tmp_path), deployed("llama"))
    alone = [file for file in weight_files(tmp_path) if file.stat().st_size > 24_000]
    assert [len(Checkpoint(tmp_path).index.shards[file.name].tensors) for file in alone] == [1] * len(alone)


@pytest.mark.parametrize("size", ["", "5 GX", "-1", 0, "0GB"])
def test_shard_sizes_that_cannot_be(tmp_path, size):
    with pytest.raises(CheckpointError, match="max_shard_size"):
        mxcompile.save(deployed("mlp"), tmp_path, max_shard_size=size)


@pytest.mark.parametrize("include", [["lm_head"], ["lm_head", "model.embed_tokens"]], ids=["alone", "both"])
def test_tied_heads(include, tmp_path):
    """Quantized alone it is tied no more; with its embedding it shares bytes, but prepares its input."""
    model = deployed("llama-tied", include=tuple(include))
    mxcompile.save(model, tmp_path)
    loaded = mxcompile.load(tmp_path)
    assert_same(loaded, model)
    assert stored_bytes(loaded) == stored_bytes(model)
    assert loaded.config.tie_word_embeddings == (len(include) == 2)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("llama")).logits, model(**inputs("llama")).logits)


def test_a_tied_float_head_stays_one_parameter(tmp_path):
    mxcompile.save(deployed("llama-tied"), tmp_path)
    loaded = mxcompile.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "vit"])
@pytest.mark.parametrize("first", ["awq-fold", "rotate"])
def test_what_other_passes_leave(name, first, tmp_path):
    """Conv1D with a multiplier, three-dimensional experts, norms that have changed, rotations."""
    formats = "weight=mxint4,activation=mxint8"
    recipe = f"{first}{{{formats}}} | round-weights{{format=mxint4}} | lower-mx{{{formats}}}"
    model = mxcompile.quantize_and_compile(build(name), inputs(name), recipe=recipe, compile=False)
    multiplied = [p for p in model.parameters() if isinstance(p, MXWeight) and p.multiplier is not None]
    assert multiplied or (name, first) != ("gpt2", "awq-fold")
    mxcompile.save(model, tmp_path)
    assert_same(mxcompile.load(tmp_path), model)


class Multiplied(nn.Module):
    """q, k and v read a GELU; a table outside of the state dict; a buffer in it; one weight under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.again = self.v
        self.register_buffer("table", torch.randn(64), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", None)

    def forward(self, x):
        h = F.gelu(x)
        return h + self.q(h) * self.k(h) + self.again(h) * self.table + self.count


def multiplied() -> nn.Module:
    model = Multiplied()
    program = mxcompile.trace(model, torch.randn(3, 64))
    insert_multiplier(program, find_matmuls(program)[0])
    program.set_tensor("q.weight_input_multiplier", torch.rand(64) + 0.5)
    return mxcompile.deploy(
        mxcompile.Pipeline.parse("lower-mx{weight=mxint4,activation=mxint8}").run(program), model, check=False
    )


@pytest.mark.parametrize("copied", [False, True])
def test_a_shared_multiplier_is_stored_once(tmp_path, copied):
    """Also from a copy, where every weight has it in memory of its own."""
    model = copy.deepcopy(multiplied()) if copied else multiplied()
    mxcompile.save(model, tmp_path)
    names = Checkpoint(tmp_path).names.stored()
    assert [name for name in names if name.endswith(".multiplier")] == ["q.weight.multiplier"]
    loaded = mxcompile.load(tmp_path, model=Multiplied())
    assert_same(loaded, model)
    assert loaded.q.weight.multiplier.data_ptr() == loaded.k.weight.multiplier.data_ptr()


def test_names_of_one_module_and_buffers_outside_of_the_state_dict(tmp_path):
    model = multiplied()
    mxcompile.save(model, tmp_path)
    with torch.device("meta"):
        empty = Multiplied()
    loaded = mxcompile.load(tmp_path, model=empty)
    assert loaded is empty
    assert loaded.again is loaded.v
    assert torch.equal(loaded.table, model.table)
    assert "table" not in loaded.state_dict()
    x = torch.randn(5, 64)
    assert torch.equal(loaded(x), model(x))


def test_tensors_of_odd_shapes_and_dtypes(tmp_path):
    """Not contiguous, empty, without dimensions, and in every dtype that a file can hold."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.turned = nn.Parameter(torch.randn(6, 4).T)
            self.spread = nn.Parameter(torch.randn(1, 4).expand(3, 4), requires_grad=False)
            self.register_buffer("empty", torch.empty(0, 3))
            for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int16):
                self.register_buffer(str(dtype).replace(".", "_"), torch.ones(3).to(dtype))

        def forward(self, x):
            return self.linear(x)

    model = Odd()
    quantized = mxcompile.quantize_and_compile(model, torch.randn(2, 64), recipe="w8a16-mxint", compile=False)
    mxcompile.save(quantized, tmp_path)
    assert_same(mxcompile.load(tmp_path, model=Odd()), quantized)


def test_what_made_it_is_kept(tmp_path):
    model = copy.deepcopy(deployed("mlp", "w8a8-mxint-quick"))
    provenance = Provenance.of(model)
    assert provenance.recipe == RECIPES["w8a8-mxint-quick"]
    assert provenance.versions["torch"] == torch.__version__
    mxcompile.save(model, tmp_path)
    loaded = mxcompile.load(tmp_path, model=build("mlp"))
    assert Provenance.of(loaded) == Provenance.of(copy.deepcopy(loaded)) == provenance
    assert Checkpoint(tmp_path).config.provenance == provenance


def test_a_quantized_model_is_not_quantized_again(tmp_path):
    mxcompile.save(deployed("llama"), tmp_path)
    with pytest.raises(InputError, match=r"this LlamaForCausalLM is quantized already: trace the float model"):
        mxcompile.trace(mxcompile.load(tmp_path), inputs("llama"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: None, r"MLP has no MX weights: quantize it first"),
        (lambda model: model.register_buffer("x", torch.ones(2).to_sparse()), r"x is a Tensor \(torch.sparse_coo\)"),
        (lambda model: model.register_buffer("x", torch.ones(2, device="meta")), r"x is on the meta device"),
        (lambda model: model.add_module("x", nn.LazyLinear(2)), r"x.weight is a UninitializedParameter"),
        (lambda model: model.add_module("x", Stateful()), r"x \(Stateful\) has extra state"),
        (lambda model: model.register_buffer("x", torch.ones(2).cfloat().to(torch.complex128)), r"x is torch.complex"),
    ],
)
def test_what_cannot_be_saved(change, message, tmp_path):
    model = build("mlp") if "no MX" in message else copy.deepcopy(deployed("mlp"))
    change(model)
    with pytest.raises(CheckpointError, match=message):
        mxcompile.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Stateful(nn.Module):
    def get_extra_state(self):
        return {}


def test_a_skeleton_must_be_the_saved_module(tmp_path):
    mxcompile.save(deployed("mlp"), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a MLP, `model` is a CNN"):
        mxcompile.load(tmp_path, model=build("cnn"))
    with pytest.raises(
        CheckpointError, match=r"holds a MLP, which is not a transformers model: build one .*model=\.\.\."
    ):
        mxcompile.load(tmp_path)
    for change, difference in (
        (
            lambda model: setattr(model, "up", nn.Linear(64, 64)),
            r"of another shape: up.bias \[128\], not \[64\], up.weight \[128, 64\]",
        ),
        (lambda model: delattr(model, "norm"), r"only saved: norm.weight, norm.bias"),
        (lambda model: setattr(model, "more", nn.Linear(2, 2)), r"only in MLP: more.weight, more.bias"),
        (lambda model: setattr(model, "more", torch.ones(2, device="meta")), r"more of `model` is on the meta"),
    ):
        model = build("mlp")
        change(model)
        before = named_tensors(model)
        with pytest.raises(CheckpointError, match=difference):
            mxcompile.load(tmp_path, model=model)
        assert all(tensor is before[name] for name, tensor in named_tensors(model).items())


MEASURED = """
import sys
import torch
import torch.distributed.tensor  # torch imports it for the first parameter that is a tensor subclass
from torch import nn
import mxcompile

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

for verify in (False, True):
    with torch.device("meta"):
        model = nn.ParameterList([torch.empty(4096, 4096, dtype=torch.bfloat16) for _ in range(8)])
    before = peak()
    loaded = mxcompile.load(sys.argv[1], model=model, verify=verify)
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
def test_peak_memory_of_loading(tmp_path):
    """138 MB of weights: with checksums every page is touched once, without none is."""
    model = nn.ParameterList()
    for seed in range(8):
        elements = torch.randint(256, (4096, 4096), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        scales = torch.full((4096, 128), 120, dtype=torch.uint8)
        model.append(nn.Parameter(MXWeight(elements, scales, MXLayout("mxint8", 4096), torch.bfloat16), False))
    mxcompile.save(model, tmp_path)
    lazily, verified = (int(line) / stored_bytes(model) for line in assert_runs(MEASURED, tmp_path).split())
    assert lazily < 0.05
    assert 0.9 < verified < 1.05


COMPILED = """
import sys
import torch
import mxcompile
from torch._dynamo.utils import counters

torch.set_num_threads(1)  # as in tests; graphs for other numbers differ
model = mxcompile.load(sys.argv[1], model=torch.nn.Linear(64, int(sys.argv[2])), compile=True)
with torch.no_grad():
    model(torch.ones(3, 64))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""
NO_COMPILER = why_no_inductor(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_another_process_finds_what_was_compiled(tmp_path):
    """Hits and misses of torch's cache, for a layer of a width that no earlier run has left there."""
    layer = nn.Linear(64, 1000 + time.time_ns() % 100_000)
    quantized = mxcompile.quantize_and_compile(layer, torch.randn(3, 64), recipe="w4a8-mxint-quick", compile=False)
    mxcompile.save(quantized, tmp_path)
    first, second = (assert_runs(COMPILED, tmp_path, layer.out_features).split() for _ in range(2))
    assert (first, second) == (["0", "1"], ["1", "0"])
