"""A module's device is that of its first tensor, whatever kind of tensor it has."""

import torch
from torch import nn

import mxcompile
from mxcompile.tensor.modules import device_of


def test_device_of_parameters_buffers_and_nothing():
    counter = nn.Module()
    counter.register_buffer("calls", torch.zeros(1, device="meta"))
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(counter) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_a_dump_of_a_model_without_parameters(tmp_path):
    options = {"recipe": "w8a8-mxint-quick", "allow_partial": True, "dump": tmp_path / "out", "compile": False}
    mxcompile.quantize_and_compile(nn.ReLU(), torch.randn(4, 64), **options)
    assert (tmp_path / "out/kernels.txt").exists()
