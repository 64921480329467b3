"""What the tests of other projects' checkpoints share: models in formats that others have."""

import json
from pathlib import Path
from typing import Any

import torch
from models import build, inputs
from torch import nn

import mxcompile
from mxcompile.storage import own_tensors
from mxcompile.weight import MXWeight

PAIRS = (
    ("mxfp4", "none"),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8_e4m3"),
    ("mxfp6_e2m3", "none"),
    ("mxfp6_e2m3", "mxfp8_e4m3"),
    ("mxfp8_e4m3", "none"),
    ("mxfp8_e4m3", "mxfp8_e4m3"),
)

_MADE: dict[Any, nn.Module] = {}


def quantized(
    weight: str = "mxfp4",
    activation: str = "none",
    name: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    overrides: dict[str, Any] | None = None,
) -> nn.Module:
    """A tiny model, without overrides always the same object: not to be changed."""
    key = (weight, activation, name, dtype)
    if overrides is not None or key not in _MADE:
        model = build(name)
        for parameter in model.parameters():  # not its buffers: transformers loads those of bfloat16 models in float32
            parameter.data = parameter.data.to(dtype)
        example = inputs(name) if name != "mlp" else {"x": inputs(name)["x"].to(dtype)}
        recipe = f"lower-mx{{weight={weight},activation={activation}}}"
        made = mxcompile.quantize_and_compile(model, example, recipe=recipe, compile=False, overrides=overrides)
        if overrides is not None:
            return made
        _MADE[key] = made
    return _MADE[key]


def assert_same_values(given: nn.Module, wanted: nn.Module) -> None:
    """Everything but the scale rule of inputs, which other formats do not state."""
    mine, theirs = own_tensors(given), own_tensors(wanted)
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
