"""Saved and loaded: the same module to the bit, at its packed size, from files that are read when they are needed."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import LANGUAGE_MODELS, MODELS, build, inputs, output
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import mxcompile
from mxcompile import inductor, packing, reference
from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.checkpoint import Checkpoint, register
from mxcompile.errors import CheckpointError, InputError
from mxcompile.formats import BLOCK_SIZES, FORMATS, ScaleRule, activation_rule
from mxcompile.multiplier import insert_multiplier
from mxcompile.passes.recipes import RECIPES
from mxcompile.provenance import Provenance
from mxcompile.storage import own_tensors, stored_bytes
from mxcompile.weight import MXLayout, MXWeight

OWN = ("mlp", "cnn")
"""Modules that transformers does not know."""


@pytest.fixture(scope="module")
def deployed():
    """deployed("llama") is that model quantized, always the same object."""
    made: dict[object, nn.Module] = {}

    def get(name: str, recipe: str = "w4a8-mxint-quick", **options) -> nn.Module:
        key = (name, recipe, *map(str, options.items()))
        if key not in made:
            program = mxcompile.trace(build(name), inputs(name), **options)
            made[key] = mxcompile.deploy(
                mxcompile.Pipeline.parse(RECIPES.get(recipe, recipe)).run(program), build(name)
            )
        return made[key]

    return get


def skeleton(name: str) -> nn.Module:
    with torch.device("meta"):
        return type(build(name))()


def load(path: Path, name: str) -> nn.Module:
    return mxcompile.load(path, model=skeleton(name) if name in OWN else None)


def assert_same(given: nn.Module, wanted: nn.Module) -> None:
    mine, theirs = own_tensors(given), own_tensors(wanted)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        other = mine[name]
        assert (type(other), other.dtype, other.shape) == (type(tensor), tensor.dtype, tensor.shape), name
        pairs = [(other, tensor)]
        if isinstance(tensor, MXWeight):
            assert other.layout_ == tensor.layout_, name
            pairs = list(zip(other.parts, tensor.parts, strict=True))
        assert all(torch.equal(*pair) for pair in pairs), name


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(deployed, name, tmp_path):
    model = deployed(name)
    mxcompile.save(model, tmp_path)
    loaded = load(tmp_path, name)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert_same(loaded, model)
    with torch.no_grad():
        assert torch.equal(output(loaded(**inputs(name, 3, 11))), output(model(**inputs(name, 3, 11))))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN])
def test_transformers_loads_and_saves_it(deployed, name, tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM

    model, kind = deployed(name), AutoModelForCausalLM if name in LANGUAGE_MODELS else AutoModel
    model.save_pretrained(tmp_path / "first")
    loaded = kind.from_pretrained(tmp_path / "first")
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "second")
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert files == {path.name for path in (tmp_path / "second").iterdir()}
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    with torch.no_grad():
        assert torch.equal(output(loaded(**inputs(name))), output(model(**inputs(name))))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_is_loaded_generates(deployed, name, tmp_path):
    mxcompile.save(deployed(name), tmp_path)
    how = {**inputs(name, 1, 5), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(load(tmp_path, name).generate(**how), deployed(name).generate(**how))


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_block_size(name, block, tmp_path):
    """100 values to a row: the last block is not full; three dimensions, contracted along either of the last two."""
    fmt = FORMATS[name].with_block(block)
    rule = str(activation_rule(fmt))
    model, empty = nn.ParameterDict(), nn.ParameterDict()
    for transposed in (False, True):
        codes, scales = reference.quantize(torch.randn(2, 24, 100), fmt, ScaleRule.MSE)
        layout = MXLayout(str(fmt), 100, transposed, str(fmt), rule)
        weight = MXWeight(packing.pack(codes, fmt), scales, layout, torch.bfloat16)
        model[str(transposed)] = nn.Parameter(weight, requires_grad=False)
        empty[str(transposed)] = nn.Parameter(torch.empty(weight.shape, device="meta"))
    mxcompile.save(model, tmp_path)
    assert_same(mxcompile.load(tmp_path, model=empty), model)


def test_the_files_take_the_packed_size(deployed, tmp_path):
    for name in ("llama", "llama-tied", "mixtral"):
        mxcompile.save(deployed(name), tmp_path / name)
        (file,) = weight_files(tmp_path / name)
        names = Checkpoint(tmp_path / name).names.stored()
        assert 0 < file.stat().st_size - stored_bytes(deployed(name)) < 150 * len(names)


def test_safetensors_reads_the_files(deployed, tmp_path):
    mxcompile.save(deployed("llama"), tmp_path)
    with safe_open(weight_files(tmp_path)[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
        weight = deployed("llama").model.layers[0].mlp.up_proj.weight
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(file.get_tensor(name).flatten(-2), weight.elements)
        assert torch.equal(file.get_tensor(f"{name}.scales"), weight.scales)


def test_shards_and_their_index(deployed, tmp_path):
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
def test_shard_sizes_that_cannot_be(deployed, tmp_path, size):
    with pytest.raises(CheckpointError, match="max_shard_size"):
        mxcompile.save(deployed("mlp"), tmp_path, max_shard_size=size)


@pytest.mark.parametrize("include", [["lm_head"], ["lm_head", "model.embed_tokens"]], ids=["alone", "both"])
def test_tied_heads(deployed, include, tmp_path):
    """Quantized alone it is tied no more; with its embedding it shares bytes, but prepares its input."""
    model = deployed("llama-tied", include=include)
    mxcompile.save(model, tmp_path)
    loaded = mxcompile.load(tmp_path)
    assert_same(loaded, model)
    assert stored_bytes(loaded) == stored_bytes(model)
    assert loaded.config.tie_word_embeddings == (len(include) == 2)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("llama")).logits, model(**inputs("llama")).logits)


def test_a_tied_float_head_stays_one_parameter(deployed, tmp_path):
    mxcompile.save(deployed("llama-tied"), tmp_path)
    loaded = mxcompile.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = mxcompile.quantize_and_compile(
        build("llama", dtype), inputs("llama"), recipe="w4a8-mxint-quick", compile=False
    )
    mxcompile.save(model, tmp_path)
    loaded = mxcompile.load(tmp_path)
    assert_same(loaded, model)
    assert loaded.config.dtype == dtype


def test_transformers_casts_as_asked(deployed, tmp_path):
    """As `.to(dtype)` does, but for buffers outside of the state dict, which transformers keeps."""
    from transformers import LlamaForCausalLM

    mxcompile.save(deployed("llama"), tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = copy.deepcopy(deployed("llama")).to(torch.bfloat16)
    wanted.model.rotary_emb = copy.deepcopy(deployed("llama").model.rotary_emb)
    assert_same(loaded, wanted)


def test_parameters_of_another_dtype_than_the_model_s(deployed, tmp_path):
    from transformers import LlamaForCausalLM

    model = copy.deepcopy(deployed("llama"))
    model.model.norm.to(torch.float64)
    mxcompile.save(model, tmp_path)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path), model)


def test_a_compiled_module_is_saved_as_it_is_uncompiled(deployed, tmp_path):
    model = copy.deepcopy(deployed("llama"))
    mxcompile.save(model, tmp_path / "plain")
    compiled = inductor.compile_module(model)
    inductor._compile_generate(model, torch.device("cuda"))  # as on a GPU, where it leaves a compile_config
    compiled.save_pretrained(tmp_path / "compiled")
    mxcompile.save(torch.compile(compiled), tmp_path / "wrapped")
    for path in (tmp_path / "plain").iterdir():
        for other in ("compiled", "wrapped"):
            assert path.read_bytes() == (tmp_path / other / path.name).read_bytes()


def test_what_made_it_is_kept(deployed, tmp_path):
    model = copy.deepcopy(deployed("mlp", "w8a8-mxint"))
    provenance = Provenance.of(model)
    assert provenance.recipe == RECIPES["w8a8-mxint"]
    assert provenance.versions["torch"] == torch.__version__
    mxcompile.save(model, tmp_path)
    loaded = mxcompile.load(tmp_path, model=build("mlp"))
    assert Provenance.of(loaded) == Provenance.of(copy.deepcopy(loaded)) == provenance
    assert Checkpoint(tmp_path).card.provenance == provenance


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_saves_itself(deployed, copied, tmp_path):
    """Its `save_pretrained` is its own, not that of the module it was copied from."""
    copied = copied(deployed("llama"))
    with torch.no_grad():
        copied.model.norm.weight.zero_()
    copied.save_pretrained(tmp_path)
    assert not mxcompile.load(tmp_path).model.norm.weight.any()


def test_tokenizer_and_generation_config_come_along(deployed, local_model, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(local_model)
    model = copy.deepcopy(deployed("llama"))
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
    mxcompile.save(model, tmp_path, tokenizer=tokenizer, processor=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert mxcompile.load(tmp_path).generation_config.max_new_tokens == 7
    assert {"tokenizer.json", "generation_config.json"} <= Checkpoint(tmp_path).card.files.keys()


def test_a_file_that_came_along_may_be_changed_but_not_in_silence(deployed, tmp_path):
    mxcompile.save(deployed("llama"), tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 3}))
    with pytest.warns(UserWarning, match=r"generation_config.json has been changed since it was saved"):
        loaded = mxcompile.load(tmp_path)
    assert loaded.generation_config.max_new_tokens == 3


def test_options_of_save_pretrained(deployed, tmp_path):
    model = deployed("llama")
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    with pytest.raises(CheckpointError, match="save_pretrained cannot take push_to_hub, variant"):
        model.save_pretrained(tmp_path, push_to_hub=True, variant="fp8", safe_serialization=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 3


def test_a_quantized_model_is_not_quantized_again(deployed, tmp_path):
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
        (lambda model: model.add_module("x", Stateful()), r"x \(Stateful\) keeps state of its own"),
        (lambda model: model.register_buffer("x", torch.ones(2).cfloat().to(torch.complex128)), r"x is torch.complex"),
    ],
)
def test_what_cannot_be_saved(deployed, change, message, tmp_path):
    model = build("mlp") if "no MX" in message else copy.deepcopy(deployed("mlp"))
    change(model)
    with pytest.raises(CheckpointError, match=message):
        mxcompile.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Stateful(nn.Module):
    def get_extra_state(self):
        return {}


def test_a_skeleton_must_be_the_saved_module(deployed, tmp_path):
    mxcompile.save(deployed("mlp"), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a MLP, the model given is a CNN"):
        mxcompile.load(tmp_path, model=build("cnn"))
    with pytest.raises(
        CheckpointError, match=r"holds a MLP that is no model of transformers: build one .*model=\.\.\."
    ):
        mxcompile.load(tmp_path)
    for change, difference in (
        (
            lambda model: setattr(model, "up", nn.Linear(64, 64)),
            r"of another shape: up.bias \[128\], not \[64\], up.weight \[128, 64\]",
        ),
        (lambda model: delattr(model, "norm"), r"only saved: norm.weight, norm.bias"),
        (lambda model: setattr(model, "more", nn.Linear(2, 2)), r"only in MLP: more.weight, more.bias"),
        (lambda model: setattr(model, "more", torch.ones(2, device="meta")), r"more of the model given is on the meta"),
    ):
        model = build("mlp")
        change(model)
        before = own_tensors(model)
        with pytest.raises(CheckpointError, match=difference):
            mxcompile.load(tmp_path, model=model)
        assert all(tensor is before[name] for name, tensor in own_tensors(model).items())


def test_transformers_is_told_when_a_model_of_another_class_is_asked_for(deployed, tmp_path):
    from transformers import AutoModel

    mxcompile.save(deployed("llama"), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a LlamaForCausalLM, not a LlamaModel: load that"):
        AutoModel.from_pretrained(tmp_path)


IN_A_FRESH_PROCESS = """
import sys
import mxcompile
assert not any(name.startswith("transformers") for name in sys.modules)
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "MXWeight"
"""


def test_transformers_is_not_imported_but_told_when_it_is(deployed, tmp_path):
    mxcompile.save(deployed("llama"), tmp_path)
    assert_runs(IN_A_FRESH_PROCESS, tmp_path)


def test_transformers_may_have_been_imported_before(deployed, tmp_path, monkeypatch):
    """Without mxcompile a model in eight bits, whose elements are as many as its values, is refused."""
    from transformers import LlamaForCausalLM
    from transformers.quantizers import auto

    mxcompile.save(deployed("llama", "w8a8-mxint"), tmp_path)
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", dict(auto.AUTO_QUANTIZER_MAPPING))
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    del auto.AUTO_QUANTIZER_MAPPING["mxcompile"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["mxcompile"]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    for _ in range(2):
        register()
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path), deployed("llama", "w8a8-mxint"))


MEASURED = """
import sys
import torch
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
from models import build, inputs
import mxcompile
from torch._dynamo.utils import counters

model = mxcompile.load(sys.argv[1], model=build("mlp"), compile=True)
with torch.no_grad():
    model(**inputs("mlp"))
assert counters["inductor"]["fxgraph_cache_hit"] == 1, counters
assert counters["inductor"]["fxgraph_cache_miss"] == 0, counters
"""
NO_COMPILER = inductor.why_no_inductor(torch.device("cpu"))


@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_another_process_finds_what_was_compiled(deployed, tmp_path, monkeypatch):
    mxcompile.save(deployed("mlp"), tmp_path)
    model = mxcompile.load(tmp_path, model=build("mlp"), compile=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs("mlp")), deployed("mlp")(**inputs("mlp")), rtol=0, atol=1e-5)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert_runs(COMPILED, tmp_path)


def assert_runs(program: str, *arguments: object) -> str:
    """In a process of its own; returns what it prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
