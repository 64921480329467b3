"""Autograd keeps packed experts where it would save decoded ones, with the same gradients."""

import torch
from torch import Tensor

from mxcompile.calibration.runs.saved_weights import SavedWeights
from mxcompile.ops import QUANTIZE
from mxcompile.tensor.weight import MXLayout, MXWeight


def weight() -> MXWeight:
    values = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    return MXWeight(*QUANTIZE(values, "mxfp4", "floor"), MXLayout("mxfp4", 64), torch.float32)


def test_gradients_are_those_of_the_decoded_weight():
    x = torch.randn(3, 5, 64, requires_grad=True)
    plain = (x @ weight().dequantize().transpose(-1, -2)).square().sum()
    (expected,) = torch.autograd.grad(plain, x)
    saved = SavedWeights()
    with saved.hooks():
        loss = (x @ saved.decode(weight()).transpose(-1, -2)).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, expected)


def test_the_decoded_values_are_freed(monkeypatch):
    """What the backward pass reads is decoded a second time; other saved tensors are kept as they are."""
    decoded: list[Tensor] = []
    plain = MXWeight.dequantize

    def counted(self: MXWeight) -> Tensor:
        decoded.append(plain(self))
        return decoded[-1]

    monkeypatch.setattr(MXWeight, "dequantize", counted)
    x, saved = torch.randn(3, 5, 64, requires_grad=True), SavedWeights()
    with saved.hooks():
        values = saved.decode(weight())
        loss = torch.bmm(x, values.transpose(-1, -2)).exp().sum()
    addresses = {value.data_ptr() for value in decoded}
    assert len(decoded) == 1
    loss.backward()
    assert len(decoded) == 2
    assert decoded[1].data_ptr() not in addresses
    assert torch.equal(decoded[1], values)
