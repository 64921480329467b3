"""compressed-tensors checkpoints: both libraries decode and encode the same values and bytes."""

import copy
import json
import shutil

import pytest
import torch
from interop import PAIRS, assert_same_values, edit_config, lowered, quantized, traced
from models import build, inputs
from safetensors.torch import load_file, save_file
from torch import nn

import mxcompile
from mxcompile.analysis.folds.multiplier import insert_multiplier
from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.checkpoint.interop.element_layouts import from_rows, to_rows
from mxcompile.errors import CheckpointError, UnknownNameError
from mxcompile.formats import FORMATS, ScaleRule, parse_format, parse_scale_rule
from mxcompile.numerics import packing, reference
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXLayout, MXWeight

pytest.importorskip("compressed_tensors", reason="install the test extra")
pytestmark = pytest.mark.filterwarnings("default")

FORMAT = "compressed-tensors"
LOWER = "lower-mx{weight=mxfp4,activation=none}"
PRESETS = {
    ("mxfp4", "none"): "MXFP4A16",
    ("mxfp4", "mxfp4"): "MXFP4",
    ("mxfp6_e2m3", "none"): "MXFP6A16",
    ("mxfp6_e2m3", "mxfp8_e4m3"): "MXFP6A8",
    ("mxfp8_e4m3", "none"): "MXFP8A16",
    ("mxfp8_e4m3", "mxfp8_e4m3"): "MXFP8",
}


@pytest.fixture
def saved(tmp_path):
    """saved("mxfp4", "none") is a new checkpoint of a tiny Llama."""

    def save(weight="mxfp4", activation="none"):
        folder = tmp_path / f"{weight}-{activation}"
        mxcompile.save(quantized(weight, activation), folder, format=FORMAT)
        return folder

    return save


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_written_and_read(saved, weight, activation):
    model, loaded = quantized(weight, activation), mxcompile.load(saved(weight, activation))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same_values(loaded, model)
    wanted = None if activation == "none" else activation
    assert {p.layout_.activation for p in loaded.parameters() if isinstance(p, MXWeight)} == {wanted}
    if wanted is None:
        with torch.no_grad():
            assert torch.equal(loaded(**inputs("llama")).logits, model(**inputs("llama")).logits)


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_transformers_loads_it_through_compressed_tensors(saved, weight, activation):
    """Its weights are ours to the bit; outputs are, where inputs stay float."""
    from transformers import AutoModelForCausalLM

    folder = saved(weight, activation)
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), mxcompile.load(folder)
    with torch.no_grad():
        given, wanted = theirs(**inputs("llama")).logits, ours(**inputs("llama")).logits
    decoded = dict(theirs.named_parameters())
    for name, tensor in ours.named_parameters():
        assert torch.equal(decoded[name], tensor.dequantize() if isinstance(tensor, MXWeight) else tensor), name
    if activation == "none":
        assert torch.equal(given, wanted)
    else:
        assert (given - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(("weight", "activation"), PRESETS)
def test_the_config_is_the_preset(saved, weight, activation):
    """Field by field what `QuantizationConfig` makes of it, and what the preset of that name says."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    content = json.loads((saved(weight, activation) / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(content)
    (scheme,) = parsed.config_groups.values()
    preset = preset_name_to_scheme(PRESETS[weight, activation], ["Linear"])
    assert scheme.targets == preset.targets
    for mine, theirs in ((scheme.weights, preset.weights), (scheme.input_activations, preset.input_activations)):
        assert (mine and mine.model_dump()) == (theirs and theirs.model_dump())
    assert parsed.ignore == ["lm_head"]
    assert parsed.quantization_status == "compressed"
    assert scheme.format == parsed.format


@pytest.mark.parametrize("weight", ["mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"])
def test_what_they_compress_is_read(weight):
    """Weights rounded by compressed-tensors with its own scales."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    fmt = FORMATS[weight]
    scheme = preset_name_to_scheme(PRESETS[weight, "none"], ["Linear"])
    names = {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}
    compressor = BaseCompressor.get_value_from_registry(names[fmt.bits])
    values = (torch.randn(8, 128) * torch.randn(8, 1).exp()).bfloat16()
    blocks = values.unflatten(-1, (-1, 32))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
    stored = compressor.compress({"weight": values, "weight_scale": scale}, scheme)
    rows = stored.get("weight_packed", stored.get("weight")).view(torch.uint8)
    ours = from_rows("w", rows, stored["weight_scale"], fmt, MXLayout(weight, 128), torch.bfloat16)
    theirs = compressor.decompress(stored, scheme)["weight"]
    assert torch.equal(ours.dequantize(), theirs.bfloat16())
    assert torch.equal(to_rows(ours, fmt), rows)


@pytest.mark.parametrize("weight", ["mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"])
def test_scales_of_inputs_are_chosen_as_by_their_rule(weight):
    """By the rule that a loaded model gets; for MXFP8 but for magnitudes of exactly 1.75 * 2**n."""
    from compressed_tensors.quantization.utils import generate_mx_scales

    fmt = FORMATS[weight]
    rule = {4: ScaleRule.EVEN, 6: ScaleRule.EVEN, 8: ScaleRule.RCEIL}[fmt.bits]
    largest = torch.rand(4096) * 4 + 0.1
    if weight != "mxfp8_e4m3":
        largest = torch.cat([largest, torch.tensor([1.75, 1.9375, 3.5, 1.5, 1.0, 7.5, 6.0])])
    x = torch.zeros(len(largest), 32)
    x[:, 3] = largest
    _, scales = reference.quantize(x, fmt, rule)
    assert torch.equal(scales.flatten().float(), generate_mx_scales(largest, fmt.bits))


def test_rows_round_trip_for_every_code():
    for fmt in (FORMATS["mxfp4"], FORMATS["mxfp6_e2m3"], FORMATS["mxfp8_e4m3"]):
        codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128) & (2**fmt.bits - 1)
        weight = MXWeight(
            packing.pack(codes, fmt), torch.full((2, 4), 127, dtype=torch.uint8), MXLayout(str(fmt), 128), torch.float32
        )
        again = from_rows("w", to_rows(weight, fmt), weight.scales, fmt, weight.layout_, torch.float32)
        assert torch.equal(again.elements, weight.elements)


def test_mixed_formats_take_a_group_each(tmp_path):
    model = lowered("lower-mx{weight=mxfp4,activation=none,overrides=[*.down_proj=mxfp8_e4m3,*.o_proj=none]}")
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (content["format"], len(content["config_groups"])) == ("mixed-precision", 2)
    assert_same_values(mxcompile.load(tmp_path / "out"), model)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(theirs(**inputs("llama")).logits, model(**inputs("llama")).logits)


@pytest.mark.parametrize("name", ["llama-tied", "gemma"])
def test_tied_heads_stay_tied(name, tmp_path):
    model = quantized("mxfp4", "none", name, torch.float32)
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    loaded = mxcompile.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_values(loaded, model)


def test_shards_and_what_comes_along(tmp_path, local_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local_model)
    mxcompile.save(quantized(), tmp_path / "out", format=FORMAT, max_shard_size="20KB", tokenizer=tokenizer)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert_same_values(mxcompile.load(tmp_path / "out"), quantized())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Paris").input_ids == [9]
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_module_that_transformers_does_not_know(tmp_path):
    model = quantized("mxfp4", "none", "mlp", torch.float32)
    mxcompile.save(model, tmp_path / "out", format=FORMAT)
    with torch.device("meta"):
        empty = type(model)()
    assert_same_values(mxcompile.load(tmp_path / "out", model=empty), model)
    with pytest.raises(CheckpointError, match=r"holds a None, which is not a transformers model: build one yourself"):
        mxcompile.load(tmp_path / "out")


def test_saved_again_in_our_format(saved, tmp_path):
    loaded = mxcompile.load(saved("mxfp8_e4m3", "mxfp8_e4m3"))
    loaded.save_pretrained(tmp_path / "again")
    assert_same_values(mxcompile.load(tmp_path / "again"), loaded)


def with_router() -> nn.Module:
    model = build("mixtral", torch.bfloat16)
    return mxcompile.quantize_and_compile(model, inputs("mixtral"), recipe=LOWER, include=["*.gate"], compile=False)


def with_multiplier():
    model, program = traced("llama", torch.bfloat16)
    program = program.copy()
    insert_multiplier(program, find_matmuls(program)[0][6:7])
    return mxcompile.deploy(mxcompile.Pipeline.parse(LOWER).run(program), model, check=False)


REFUSED = {
    "mxint4": (
        lambda: lowered("lower-mx{weight=mxint4,activation=none}"),
        r"q_proj.weight: compressed-tensors has no mxint4; of .* it has only mxfp4, mxfp6_e2m3, mxfp8_e4m3, in blocks",
    ),
    "mxfp6_e3m2": (lambda: lowered("lower-mx{weight=mxfp6_e3m2,activation=none}"), r"has no mxfp6_e3m2; of"),
    "block": (lambda: lowered("lower-mx{weight=mxfp4:64,activation=none}"), r"q_proj.weight: .* no mxfp4:64"),
    "input": (
        lambda: lowered("lower-mx{weight=mxfp4,activation=mxint8}"),
        r"q_proj.weight: compressed-tensors has no mxint8 for inputs; of",
    ),
    "rotation": (
        lambda: lowered(
            recipe="rotate{weight=mxfp4,activation=mxfp8_e4m3} | lower-mx{weight=mxfp4,activation=mxfp8_e4m3}"
        ),
        r"an input that is rotated \(use a recipe without rotate\)",
    ),
    "multiplier": (with_multiplier, r"an input that is multiplied by a vector \(use awq-fold{multiply=false}\)"),
    "conv1d": (
        lambda: lowered(LOWER, "gpt2"),
        r"c_attn.weight: .* a weight that is not an nn.Linear's \(skip it with excl",
    ),
    "router": (with_router, r"layers.0.mlp.gate.weight: .* a weight that is not an nn.Linear's"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_equivalent_is_refused(what, tmp_path):
    make, message = REFUSED[what]
    with pytest.raises(CheckpointError, match=message):
        mxcompile.save(make(), tmp_path / "out", format=FORMAT)
    assert not list(tmp_path.iterdir())


def test_rows_that_are_no_multiple_of_a_block_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(40, 8))
    quantized = mxcompile.quantize_and_compile(
        model, torch.randn(2, 40), recipe="lower-mx{weight=mxfp4,activation=none}", compile=False, include=["*"]
    )
    with pytest.raises(CheckpointError, match=r"0.weight: .* a row of 40 values, not a multiple of 32"):
        mxcompile.save(quantized, tmp_path / "out", format=FORMAT)


def test_names_of_formats_and_places_that_are_taken(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown checkpoint format 'ggml'"):
        mxcompile.save(quantized(), tmp_path / "out", format="ggml")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already: name a new folder"):
        mxcompile.save(quantized(), tmp_path / "out", format=FORMAT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("mxcompile.checkpoint.shards.write", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(disk full\)"):
        mxcompile.save(quantized(), tmp_path / "out", format=FORMAT)
    assert not list(tmp_path.iterdir())


def group(content):
    return content["quantization_config"]["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: group(c).update(format="nvfp4-pack-quantized"),
            r"'nvfp4-pack-quantized', mxcompile reads mxfp4-pack",
        ),
        (lambda c: group(c).update(format=[1]), r"is in '\[1\]', mxcompile reads"),
        (lambda c: group(c).update(output_activations={"num_bits": 8}), r"rounds its outputs"),
        (lambda c: group(c)["weights"].update(group_size=16), r"is not an MX format: mxcompile reads mxfp4-pack"),
        (lambda c: group(c)["weights"].update(type="int"), r"is not an MX format"),
        (lambda c: group(c)["weights"].update(num_bits=8), r"weights of 8 bits, but mxfp4-pack-quantized has 4"),
        (lambda c: group(c)["weights"].update(num_bits="4"), r"'num_bits' is not of type int"),
        (lambda c: group(c).update(weights=None), r"'num_bits' is missing"),
        (lambda c: group(c).update(input_activations=[3]), r"'num_bits' is missing"),
        (lambda c: group(c).pop("targets"), r"'targets' is missing"),
        (lambda c: c["quantization_config"].update(config_groups=[]), r"'config_groups' is not of type dict"),
        (lambda c: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8}), r"has a kv_cache_scheme"),
        (lambda c: c["quantization_config"].update(transform_config={"a": 1}), r"has a transform_config"),
        (lambda c: c.update(num_hidden_layers=10**9), r"claims 1000000000 layers and holds"),
        (lambda c: c.update(num_hidden_layers=2), r"does not hold model.layers.1"),
        (
            lambda c: c.update(vocab_size=10**12),
            r"shape \[128, 64\], in a LlamaForCausalLM .* it has \[10000",
        ),
        (lambda c: c.update(hidden_size="x"), r"transformers cannot build the model"),
        (lambda c: c.update(architectures=["Trainer"]), r"holds a Trainer, which is not a transformers model"),
        (lambda c: c.update(architectures=[["os"]]), r"which is not a transformers model"),
        (lambda c: c["quantization_config"].update(quant_method=["x"]), r"quantized by \['x'\]"),
    ],
)
def test_configs_that_cannot_be(saved, change, message):
    folder = saved()
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=message):
        mxcompile.load(folder)


PROJ = "model.layers.0.mlp.up_proj"


def put(tensors, name, value):
    tensors[name] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PROJ}.weight_packed"), r"up_proj has scales but no elements"),
        (lambda t: t.pop(f"{PROJ}.weight_scale"), r"up_proj.weight_packed belongs to no MX weight"),
        (lambda t: t.pop("model.norm.weight"), r"does not hold model.norm.weight, which a LlamaForCausalLM needs"),
        (lambda t: put(t, "more.weight", torch.ones(2)), r"holds more.weight, which a LlamaForCausalLM"),
        (lambda t: put(t, f"{PROJ}.weight_packed", torch.zeros(3, 7).byte()), r"up_proj has elements \[3, 7\]"),
        (
            lambda t: put(t, f"{PROJ}.weight_packed", torch.zeros(127, 32).byte()),
            r"which do not form a weight in mxfp4",
        ),
        (lambda t: put(t, f"{PROJ}.weight_packed", torch.zeros(128, 32)), r"which do not form a weight in mxfp4"),
        (lambda t: put(t, f"{PROJ}.weight_scale", torch.zeros(128, 2)), r"which do not form a weight in mxfp4"),
        (lambda t: put(t, f"{PROJ}.weight_scale", torch.tensor(3).byte()), r"which match no group of its quantization"),
        (lambda t: put(t, f"{PROJ}.weight_scale", torch.full((128, 2), 255).byte()), r"has a scale that is NaN"),
        (
            lambda t: put(t, f"{PROJ}.weight_global_scale", torch.ones(1)),
            r"weight_global_scale belongs to no MX weight",
        ),
        (lambda t: put(t, "model.norm.weight", torch.ones(63)), r"model.norm.weight has shape \[63\]"),
    ],
)
def test_tensors_that_cannot_be(saved, change, message):
    folder = saved()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        mxcompile.load(folder)


def test_files_that_are_missing_or_outside(tmp_path):
    mxcompile.save(quantized(), tmp_path / "whole", format=FORMAT, max_shard_size="20KB")
    index = "model.safetensors.index.json"
    for n, (change, message) in enumerate(
        [
            (lambda f: next(iter(f.glob("*.safetensors"))).unlink(), r"-of-\d+.safetensors is missing"),
            (lambda f: (f / index).unlink(), r"model.safetensors is missing"),
            (lambda f: (f / index).write_text("{"), r"cannot be read as JSON"),
            (
                lambda f: (f / index).write_text('{"weight_map": {"x": "../y.safetensors"}}'),
                r"is not a valid name for a file",
            ),
            (lambda f: (f / index).write_text('{"weight_map": {"x": "model.bin"}}'), r"is not a valid name for a file"),
        ]
    ):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(n))
        change(folder)
        with pytest.raises(CheckpointError, match=message):
            mxcompile.load(folder)


def test_a_generation_config_that_cannot_be(saved):
    folder = saved()
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="transformers cannot load the LlamaForCausalLM"):
        mxcompile.load(folder)


def test_a_model_that_does_not_fit_is_not_touched(saved):
    model = build("llama")
    before = named_tensors(model)
    folder = saved()
    del model.lm_head
    with pytest.raises(CheckpointError, match=r"does not have the saved tensors \(only saved: lm_head.weight"):
        mxcompile.load(folder, model=model)
    assert all(tensor is before[name] for name, tensor in named_tensors(model).items())


def test_rules_that_a_loaded_model_gets(saved):
    weight = mxcompile.load(saved("mxfp4", "mxfp4")).model.layers[0].mlp.up_proj.weight
    assert (parse_format(weight.layout_.activation), parse_scale_rule(weight.layout_.rule)) == (
        FORMATS["mxfp4"],
        ScaleRule.EVEN,
    )
    assert copy.deepcopy(weight).layout_ == weight.layout_


def test_every_reason_is_given_at_once_with_its_layers(tmp_path):
    overrides = "[*.q_proj=mxfp4,*.k_proj=mxfp8_e4m3,*.o_proj=mxint8,*.down_proj=mxfp6_e3m2]"
    model = lowered(f"lower-mx{{weight=mxint4,activation=none,overrides={overrides}}}")
    with pytest.raises(CheckpointError) as raised:
        mxcompile.save(model, tmp_path / "out", format=FORMAT)
    lines = str(raised.value).splitlines()
    assert [line.partition(": ")[0].removeprefix("model.layers.0.") for line in lines[:3]] == [
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    ]
    assert "(also model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight)" in lines[0]
    assert "self_attn: q_proj, k_proj, v_proj: vLLM runs these layers as one" in lines[3]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("overrides", "layers", "formats"),
    [
        ("*.v_proj=mxfp8_e4m3", "q_proj, k_proj, v_proj", "v_proj mxfp8_e4m3 with float inputs"),
        ("*.v_proj=none", "q_proj, k_proj, v_proj", "v_proj float"),
        ("*.up_proj=mxfp6_e2m3", "gate_proj, up_proj", "up_proj mxfp6_e2m3 with float inputs"),
    ],
)
def test_layers_that_vllm_joins_need_one_format(overrides, layers, formats, tmp_path):
    model = lowered(f"lower-mx{{weight=mxfp4,activation=none,overrides=[{overrides}]}}")
    with pytest.raises(CheckpointError, match=f"{layers}: vLLM runs these layers as one .*{formats}"):
        mxcompile.save(model, tmp_path / "out", format=FORMAT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_of_another_dtype_runs_where_weights_are_decoded_to_bfloat16(dtype, tmp_path):
    """Its values come back as they were saved."""
    from transformers import AutoModelForCausalLM

    model = quantized("mxfp4", "none", "llama-tied", dtype)
    with pytest.warns(
        UserWarning, match=r"this model is in float\d+, but compressed-tensors decodes MX weights to bf"
    ) as caught:
        mxcompile.save(model, tmp_path / "out", format=FORMAT)
    assert {warning.filename for warning in caught} == {__file__}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        given, wanted = theirs(**inputs("llama")).logits, model(**inputs("llama")).logits
    assert given.dtype == torch.bfloat16
    assert (given.float() - wanted.float()).norm() < 0.02 * wanted.float().norm()
    assert_same_values(mxcompile.load(tmp_path / "out"), model)


def test_a_dtype_that_config_json_does_not_state_is_that_of_the_tensors(saved):
    folder = saved()
    edit_config(folder, lambda content: content.pop("dtype"))
    loaded = mxcompile.load(folder)
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.dtype == torch.bfloat16


def test_targets_may_be_regular_expressions(tmp_path):
    recipe = "lower-mx{weight=mxfp4,activation=none,overrides=[*.down_proj=mxfp8_e4m3]}"
    mxcompile.save(lowered(recipe), tmp_path / "out", format=FORMAT)
    plain = mxcompile.load(tmp_path / "out")
    targets = {4: "re:.*(attn|gate|up_).*", 8: "re:.*down_proj$"}

    def match(content):
        for entry in content["quantization_config"]["config_groups"].values():
            entry["targets"] = [targets[entry["weights"]["num_bits"]]]

    edit_config(tmp_path / "out", match)
    assert_same_values(mxcompile.load(tmp_path / "out"), plain)


def test_a_cache_in_mx_formats_is_named_once(tmp_path):
    """The file says nothing of it, and a warning says so."""
    model = build("llama")
    pipeline = mxcompile.Pipeline.parse("quantize-cache | lower-mx{weight=mxfp4,activation=mxfp4}")
    deployed = mxcompile.deploy(pipeline.run(mxcompile.trace(model, inputs("llama"))), model)
    with pytest.warns(UserWarning, match=r"kv_cache_scheme has no caches in MX formats \(key=mxint8,value=mxint8\)"):
        mxcompile.save(deployed, tmp_path / "written", format="compressed-tensors")
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] is None
