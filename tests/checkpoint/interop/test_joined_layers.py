"""What vLLM asks of compressed-tensors folders: layers that it runs as one, the output head, formats it has."""

import json

import pytest
import torch
from interop import assert_same_values, lowered, traced
from models import HIDDEN, VOCABULARY, build
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

import mxcompile
from mxcompile.checkpoint.interop.compressed_layers import vllm_notes
from mxcompile.checkpoint.interop.joined_layers import different_by_data_flow, different_by_name, shared_inputs
from mxcompile.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:the code of:UserWarning")

FORMAT = "compressed-tensors"
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


class Block(nn.Module):
    """Three linears of one tensor and one of another, with names that no architecture has."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("red", "green", "blue"):
            setattr(self, name, nn.Linear(HIDDEN, HIDDEN))
        self.last = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.last(self.red(x) * self.green(x) + self.blue(x))


class Unfamiliar(PreTrainedModel):
    """A model of someone's own."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.block = nn.Embedding(VOCABULARY, HIDDEN), Block()
        self.post_init()

    def forward(self, input_ids):
        return self.block(self.embedding(input_ids))


class WithoutExample(Unfamiliar):
    """It needs more than token ids."""

    def forward(self, input_ids, pixel_values):
        return self.block(self.embedding(input_ids) + pixel_values)


def saved_config(model, folder):
    mxcompile.save(model, folder, format=FORMAT)
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def unfamiliar(kind=Unfamiliar, overrides="block.green=none", **inputs):
    model = kind(LlamaConfig(hidden_size=HIDDEN, vocab_size=VOCABULARY)).to(torch.bfloat16).eval()
    recipe = f"lower-mx{{weight=mxfp4,activation=none,overrides=[{overrides}]}}"
    example = {"input_ids": torch.arange(8)[None], **inputs}
    return mxcompile.quantize_and_compile(model, example, recipe=recipe, compile=False, allow_partial=True)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", [(ATTENTION, ["q_proj", "k_proj", "v_proj"]), (MLP, ["gate_proj", "up_proj"])]),
        ("mixtral", [(ATTENTION, ["q_proj", "k_proj", "v_proj"])]),
        ("bert", [("encoder.layer.0.attention.self", ["query", "key", "value"])]),
        ("gpt2", []),
    ],
)
def test_shared_inputs_are_found_by_a_run_without_values(name, groups):
    model = build(name)
    before = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    assert shared_inputs(model) == groups
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == before


def test_layers_with_familiar_names_are_an_error():
    formats = {f"{ATTENTION}.{leaf}": "mxfp4" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert not list(different_by_name(formats))
    ((reason, layers),) = different_by_name(formats | {f"{ATTENTION}.k_proj": "float"})
    assert layers == f"{ATTENTION}: q_proj, k_proj, v_proj"
    assert reason.endswith("not q_proj mxfp4, k_proj float, v_proj mxfp4")
    assert not list(different_by_name(formats | {f"{ATTENTION}.o_proj": "float"}))


def test_layers_with_other_names_are_a_warning(tmp_path):
    model = unfamiliar()
    match = r"^block: red, green, blue: vLLM may run .* not red mxfp4 with float inputs, green float, blue mxfp4 with"
    with pytest.warns(UserWarning, match=match) as caught:
        config = saved_config(model, tmp_path / "out")
    assert [warning.filename for warning in caught if "vLLM" in str(warning.message)] == [__file__]
    assert config["ignore"] == ["block.green"]


def test_a_layer_that_reads_another_tensor_may_differ(tmp_path):
    assert saved_config(unfamiliar(overrides="block.last=none"), tmp_path / "out")["ignore"] == ["block.last"]


def test_a_model_that_does_not_run_without_values_is_said_to_be_unclear(tmp_path):
    model = unfamiliar(WithoutExample, pixel_values=torch.ones(1, 8, HIDDEN, dtype=torch.bfloat16))
    with pytest.warns(
        UserWarning, match=r"block: vLLM may run .* WithoutExample does not run without values \(.*pixel_v"
    ):
        mxcompile.save(model, tmp_path / "out", format=FORMAT)


def test_no_model_is_run_where_no_layers_of_a_module_differ():
    """A module of the caller's own is none of vLLM's either."""
    formats = {f"block.{leaf}": "mxfp4" for leaf in ("red", "green", "blue", "last")}
    assert not list(different_by_data_flow(Block(), formats | {"block.red": "float"}))
    model = WithoutExample(LlamaConfig(hidden_size=HIDDEN, vocab_size=VOCABULARY))
    assert not list(different_by_data_flow(model, formats))


@pytest.mark.parametrize(("overrides", "own"), [("", "Linear"), ("*.down_proj=mxfp8_e4m3", f"{ATTENTION}.k_proj")])
def test_a_quantized_head_is_a_target_by_its_path(overrides, own, tmp_path):
    """vLLM's class of it, ParallelLMHead, does not contain "Linear"."""
    model, _ = traced("llama", torch.bfloat16)
    recipe = f"lower-mx{{weight=mxfp4,activation=none,overrides=[{overrides}]}}"
    inputs = {"input_ids": torch.arange(8)[None]}
    head = mxcompile.quantize_and_compile(model, inputs, recipe=recipe, compile=False, include=["lm_head"])
    config = saved_config(head, tmp_path / "out")
    (targets,) = (group["targets"] for group in config["config_groups"].values() if "lm_head" in group["targets"])
    assert own in targets
    assert config["ignore"] == []
    assert_same_values(mxcompile.load(tmp_path / "out"), head)
    theirs = type(model).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(theirs(**inputs).logits, head(**inputs).logits)


def test_a_float_head_is_no_target(tmp_path):
    config = saved_config(lowered("lower-mx{weight=mxfp4,activation=none}"), tmp_path / "out")
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


MXFP6 = "vLLM has no scheme for mxfp6_e2m3 in compressed-tensors folders; transformers reads them"
INPUTS = (
    "vLLM ignores on Hopper that inputs are rounded to {}: there it runs the weights with bfloat16 inputs; mxcompile's "
    "own format serves both as measured"
)


@pytest.mark.parametrize(
    ("pairs", "notes"),
    [
        ([("mxfp4", None)], []),
        ([("mxfp4", "mxfp8_e4m3"), ("mxfp8_e4m3", None)], [INPUTS.format("mxfp8_e4m3")]),
        ([("mxfp6_e2m3", None)], [MXFP6]),
        ([("mxfp6_e2m3", "mxfp8_e4m3")], [MXFP6]),
        ([("mxfp6_e2m3", None), ("mxfp4", "mxfp4")], [MXFP6, INPUTS.format("mxfp4")]),
    ],
)
def test_what_is_said_of_formats(pairs, notes):
    assert list(vllm_notes(pairs)) == notes


def test_saving_says_it_and_writes(tmp_path):
    with pytest.warns(UserWarning, match=f"^{INPUTS.format('mxfp8_e4m3')}$"):
        mxcompile.save(lowered("lower-mx{weight=mxfp4,activation=mxfp8_e4m3}"), tmp_path / "out", format=FORMAT)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_explain_says_it_of_float_and_quantized_models():
    """Of layers that are joined, whatever their format; of formats, if they can be written."""
    model, _ = traced("llama", torch.bfloat16)
    example = {"input_ids": torch.arange(8)[None]}
    of_format = f"saved as compressed-tensors: {INPUTS.format('mxfp8_e4m3')}"
    joined = f"{ATTENTION}: q_proj, k_proj, v_proj: vLLM runs these layers as one and needs one format for them"
    recipe = "lower-mx{{weight={},activation={}}}"
    plain = mxcompile.explain(model, example, recipe=recipe.format("mxfp4", "mxfp8_e4m3"))
    assert plain.vllm == (of_format,)
    assert of_format in plain.record()["conclusions"]
    assert mxcompile.explain(lowered(recipe.format("mxfp4", "mxfp8_e4m3"))).vllm == (of_format,)
    assert mxcompile.explain(lowered(recipe.format("mxint4", "mxint8"))).vllm == ()
    mixed = mxcompile.explain(
        model, example, recipe=recipe.format("mxint4", "mxint8"), overrides={f"{ATTENTION}.k_proj": None}
    )
    assert [line.partition(", not")[0] for line in mixed.vllm] == [joined]


def test_a_refused_save_writes_nothing(tmp_path):
    model = lowered("lower-mx{weight=mxfp4,activation=none,overrides=[*.k_proj=none]}")
    with pytest.raises(CheckpointError, match="q_proj, k_proj, v_proj: vLLM runs these layers as one"):
        mxcompile.save(model, tmp_path / "out", format=FORMAT)
    assert not (tmp_path / "out").exists()
