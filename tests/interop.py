"""Support for tests of other projects' checkpoints: tiny models in formats that those projects have."""

import json
from functools import cache
from pathlib import Path

import torch
from models import build, inputs
from torch import nn

import mxcompile
from mxcompile.graph.program import Program
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXWeight

PAIRS = (
    ("mxfp4", "none"),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8_e4m3"),
    ("mxfp6_e2m3", "none"),
    ("mxfp6_e2m3", "mxfp8_e4m3"),
    ("mxfp8_e4m3", "none"),
    ("mxfp8_e4m3", "mxfp8_e4m3"),
)


@cache
def traced(name: str, dtype: torch.dtype) -> tuple[nn.Module, Program]:
    """A tiny model and its program. They are cached: copy before changing them."""
    model = build(name)
    for parameter in model.parameters():  # not its buffers: transformers loads those of bfloat16 models in float32
        parameter.data = parameter.data.to(dtype)
    example = inputs(name) if name != "mlp" else {"x": inputs(name)["x"].to(dtype)}
    return model, mxcompile.trace(model, example)


@cache
def quantized(
    weight: str = "mxfp4", activation: str = "none", name: str = "llama", dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """A tiny quantized model. It is cached: do not change it."""
    return lowered(f"lower-mx{{weight={weight},activation={activation}}}", name, dtype)


def lowered(recipe: str, name: str = "llama", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A tiny model quantized by a pipeline."""
    model, program = traced(name, dtype)
    return mxcompile.deploy(mxcompile.Pipeline.parse(recipe).run(program.copy()), model, check=False)


def assert_same_values(actual: nn.Module, expected: nn.Module) -> None:
    """Compare everything except the scale rule of inputs, which other formats do not store."""
    mine, theirs = named_tensors(actual), named_tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        other = mine[name]
        assert (type(other), other.dtype, other.shape) == (type(tensor), tensor.dtype, tensor.shape), name
        if isinstance(tensor, MXWeight):
            assert other.layout_.format == tensor.layout_.format, name
            assert torch.equal(other.elements, tensor.elements), name
            assert torch.equal(other.scales, tensor.scales), name
            tensor, other = tensor.dequantize(), other.dequantize()  # noqa: PLW2901
        assert torch.equal(other, tensor), name


def edit_config(folder: Path, change) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
