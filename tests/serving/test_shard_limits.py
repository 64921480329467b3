"""Which shares of a layer are refused, with its name and what to do."""

from dataclasses import replace

import pytest
import torch

from mxcompile.errors import CheckpointError
from mxcompile.serving.shard_limits import check_dtype, check_layer, why_not_divided
from mxcompile.tensor.layout import MXLayout


def layout(activation: str | None = "mxint8", rotation: int | None = None, fmt: str = "mxint4", size: int = 256):
    return MXLayout(fmt, size, False, activation, None if activation is None else "floor", None, rotation)


@pytest.mark.parametrize(
    ("given", "shard", "reason"),
    [
        (layout(), 64, None),
        (layout(None, fmt="mxint4:64"), 64, None),
        (layout(None), 32, None),
        (layout(), 48, "its share of 256 inputs, 48, cuts a block of 32 values"),
        (layout(None, fmt="mxint4:128"), 64, "its share of 256 inputs, 64, cuts a block of 128 values"),
        (layout("mxint8:64"), 32, "its share of 256 inputs, 32, cuts a block of 64 values of its input"),
        (layout(rotation=64), 128, None),
        (layout(rotation=128), 64, "its share of 256 inputs, 64, cuts a rotation of 128 values"),
        (replace(layout(), multiplier="128:0a"), 64, "its share of 256 inputs, 64, cuts a rotation of 128 values"),
        (replace(layout(), multiplier="32:0a"), 64, None),
        (
            layout("mxfp8_e4m3+aligned"),
            128,
            "mxfp8_e4m3+aligned aligns a token to its largest value, and each process has only a part of the token",
        ),
    ],
)
def test_a_share_of_a_row_parallel_layer(given, shard, reason):
    assert why_not_divided(given, 256, shard) == reason


def test_the_refusal_names_the_layer_and_what_to_do():
    with pytest.raises(CheckpointError) as caught:
        check_layer("model.layers.3.mlp.down_proj", layout(rotation=128), 256, 64)
    assert str(caught.value) == (
        "model.layers.3.mlp.down_proj cannot be divided over 4 processes: its share of 256 inputs, 64, cuts a rotation "
        "of 128 values. Serve with a smaller --tensor-parallel-size"
    )


def test_a_whole_row_needs_no_whole_blocks():
    check_layer("head", layout("mxfp8_e4m3+aligned", size=100), 100, 100)


def test_sizes_that_disagree_and_transposed_weights_are_refused():
    with pytest.raises(CheckpointError, match="up_proj has 256 inputs in the checkpoint, the engine's has 128"):
        check_layer("up_proj", layout(), 128, 128)
    with pytest.raises(CheckpointError, match="c_attn is stored transposed"):
        check_layer("c_attn", MXLayout("mxint4", 256, True), 256, 256)


def test_float16_is_refused_on_a_gpu_only():
    check_dtype("q_proj", torch.float16, "cpu")
    check_dtype("q_proj", torch.bfloat16, "cuda")
    with pytest.raises(CheckpointError, match=r"q_proj cannot be served in float16.*add --dtype bfloat16"):
        check_dtype("q_proj", torch.float16, "cuda")
