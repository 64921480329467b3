"""Support for tests of checkpoints: quantized models, each made once, and a comparison of two."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from models import build, inputs
from torch import nn

import mxcompile
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXWeight

OWN = ("mlp", "cnn")
"""Models that are not in transformers."""


@cache
def deployed(name: str, recipe: str = "w4a8-mxint-quick", include: tuple[str, ...] = ()) -> nn.Module:
    """The quantized model of that name. It is cached: do not change it."""
    model = build(name)
    program = mxcompile.recipes()[recipe].run(mxcompile.trace(model, inputs(name), include=include))
    return mxcompile.deploy(program, model)


def skeleton(name: str) -> nn.Module:
    with torch.device("meta"):
        return type(build(name))()


def load(path: Path, name: str) -> nn.Module:
    return mxcompile.load(path, model=skeleton(name) if name in OWN else None)


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    mine, theirs = named_tensors(actual), named_tensors(expected)
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


def assert_runs(program: str, *arguments: object) -> str:
    """Run a program in a new process; returns what it prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
