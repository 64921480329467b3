"""Each process of an engine reads its share of fused experts from the file, and what all of them compute adds up."""

import re
from dataclasses import replace

import pytest
import torch
from interop_mixtures import EXPERTS, SIZES, quantized_mixture
from torch import nn

import mxcompile
from mxcompile.checkpoint.hf.experts import use_mx_experts
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.errors import CheckpointError
from mxcompile.serving import packed_experts
from mxcompile.serving.stored_experts import DOWN, UP, ExpertsShare, find_experts, tensors_of
from mxcompile.tensor.weight import MXWeight

INNER = 96
HIDDEN = SIZES["hidden_size"]
LAYER = "model.layers.0.mlp.experts"
SIZE = {"mixtral": "intermediate_size", "gpt-oss": "intermediate_size", "qwen3": "moe_intermediate_size"}
ALL = ExpertsShare(range(EXPERTS))


@pytest.fixture
def inputs():
    x = torch.randn(7, HIDDEN)
    numbers = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(7)])
    return x, numbers, torch.rand(7, 2)


def model_of(name, change=lambda weight: weight, **options):
    model = quantized_mixture(name, dtype=torch.float32, **{SIZE[name]: INNER}, **options)
    use_mx_experts(model)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(change(experts.down_proj), requires_grad=False)
    return model, experts


def stored_in(folder, model, layer=LAYER):
    mxcompile.save(model, folder / "model")
    return find_experts(Checkpoint(folder / "model"), layer)


def rotated(weight):
    return MXWeight(weight.elements, weight.scales, replace(weight.layout_, rotation=32), weight.dtype)


def multiplied(weight):
    layout = replace(weight.layout_, multiplier="a digest")
    return MXWeight(weight.elements, weight.scales, layout, weight.dtype, torch.rand(INNER) + 0.5)


def rounded(weight):
    layout = replace(weight.layout_, activation="mxint8", rule="floor")
    return MXWeight(weight.elements, weight.scales, layout, weight.dtype)


def aligned(weight):
    layout = replace(weight.layout_, activation="mxfp8_e4m3+aligned", rule="rceil")
    return MXWeight(weight.elements, weight.scales, layout, weight.dtype)


def run(stored, inputs, share, gate):
    up, down = stored.packed(share, interleaved="interleaved" in gate)
    x, numbers, weights = inputs
    local = torch.full((EXPERTS,), -1)
    local[share.experts.start : share.experts.stop] = torch.arange(len(share.experts))
    return packed_experts.experts(x, local[numbers], weights, up, down, gate)


@pytest.mark.parametrize("change", [rounded, rotated, multiplied])
@pytest.mark.parametrize("name", SIZE)
def test_shares_of_inner_channels_and_of_experts_add_up_to_the_layer(name, change, inputs, tmp_path):
    model, experts = model_of(name, change)
    stored = stored_in(tmp_path, model)
    stored.check(EXPERTS, HIDDEN, INNER)
    expected = experts(*inputs)
    divisions = [[ALL], [ExpertsShare(range(1)), ExpertsShare(range(1, EXPERTS))]]
    divisions += [[replace(ALL, rank=rank, of=of) for rank in range(of)] for of in (2, 3)]
    for shares in divisions:
        actual = sum(run(stored, inputs, share, experts.mx_gate) for share in shares)
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_a_share_has_whole_blocks_though_the_channels_do_not_divide_evenly(tmp_path):
    model, _ = model_of("gpt-oss")
    stored = stored_in(tmp_path, model)
    sizes = []
    for rank in range(2):
        up, down = stored.packed(replace(ALL, rank=rank, of=2), interleaved=True)
        sizes.append(down.layout.size)
        assert up.elements.shape[1] == up.bias.shape[1] == 2 * down.layout.size
        assert down.bias.any() == (rank == 0)
    assert sizes == [64, 32]


@pytest.mark.parametrize("change", [rounded, multiplied])
@pytest.mark.parametrize("name", SIZE)
def test_invented_experts_are_like_those_that_are_read(name, change, tmp_path):
    stored = stored_in(tmp_path, model_of(name, change)[0])
    share = ExpertsShare(range(1, 3), 1, 2)
    read = stored.packed(share, interleaved=False)
    for actual, expected in zip(stored.invented(share, dtype=torch.float32), read, strict=True):
        assert actual.layout == expected.layout
        assert actual.tensors.keys() == expected.tensors.keys()
        for part, values in expected.tensors.items():
            assert (actual.tensors[part].shape, actual.tensors[part].dtype) == (values.shape, values.dtype)


def test_what_cannot_be_divided_is_refused_with_its_name_and_what_to_do(tmp_path):
    stored = stored_in(tmp_path, model_of("qwen3", aligned)[0])
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.down_proj .* aligns a token .* --enable-expert-parallel"):
        stored.packed(replace(ALL, of=2), interleaved=False)
    with pytest.raises(CheckpointError, match="3 experts of 64 and 96 inputs, the engine's have 4 of 64 and 96"):
        stored.check(EXPERTS + 1, HIDDEN, INNER)
    stored = stored_in(tmp_path / "other", model_of("qwen3")[0])
    with pytest.raises(CheckpointError, match=r"its 96 inputs are 3 parts of 32, .* smaller --tensor-parallel-size"):
        stored.packed(replace(ALL, of=4), interleaved=False)


@pytest.mark.parametrize("name", SIZE)
def test_experts_that_stayed_float_are_read_as_they_are(name, tmp_path):
    model, experts = model_of(name, exclude=("lm_head*", "*.experts"))
    stored = stored_in(tmp_path, model)
    assert stored.packings is None
    stored.check(EXPERTS, HIDDEN, INNER)
    up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    up, down = (up.mT, down.mT) if experts.is_transposed else (up, down)
    interleaved = name == "gpt-oss"
    shares = [stored.floats(replace(ALL, rank=rank, of=2), INNER, interleaved=interleaved) for rank in range(2)]
    assert torch.equal(torch.cat([share.down for share in shares], 2), down)
    gates = [share.up[:, ::2] if interleaved else share.up[:, : INNER // 2] for share in shares]
    assert torch.equal(torch.cat(gates, 1), up[:, ::2] if interleaved else up[:, :INNER])
    assert (shares[0].up_bias is not None) == stored.has_bias == experts.has_bias


def test_one_quantized_weight_of_two_is_refused(tmp_path):
    model, _ = model_of("qwen3", lambda weight: weight.dequantize())
    stored = stored_in(tmp_path, model)
    with pytest.raises(CheckpointError, match=rf"{LAYER} .* gate_up_proj is quantized and down_proj is not"):
        _ = stored.packings


def test_a_layer_is_found_by_its_numbers_where_an_engine_names_it_otherwise(tmp_path):
    model, _ = model_of("mixtral")
    stored = stored_in(tmp_path, model, "transformer.blocks.0.block_sparse_moe.experts")
    assert stored.path == LAYER
    checkpoint = stored.checkpoint
    with pytest.raises(CheckpointError, match=re.escape(f"belong to model.layers.1.mlp.experts: it has {LAYER}.")):
        find_experts(checkpoint, "model.layers.1.mlp.experts")
    ends = (UP, f"{UP}.scales", DOWN, f"{DOWN}.scales")
    assert tensors_of(checkpoint.names) == {f"{LAYER}.{end}" for end in ends}
