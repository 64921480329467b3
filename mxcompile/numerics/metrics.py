"""Numbers that compare a tensor with what became of it."""

import math

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.numerics import reference

_VALUES = 1 << 18  # in float64 at a time


def sqnr_db(signal: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio, 10 log10(sum x^2 / sum (x - y)^2), in dB; inf if they are
    equal, NaN if one of them holds NaN. Both have the same shape."""
    noise = power = 0.0
    parts = (tensor.flatten().split(_VALUES) for tensor in (signal, approximation))
    for wanted, given in zip(*parts, strict=True):
        exact = wanted.double()
        noise += (exact - given.double()).square().sum().item()
        power += exact.square().sum().item()
    if noise == 0.0:
        return math.inf
    ratio = power / noise
    return math.nan if math.isnan(ratio) else 10 * math.log10(ratio) if ratio > 0.0 else -math.inf


def rounding_db(weight: Tensor, fmt: MXFormat, importance: Tensor | None = None) -> float:
    """SQNR in dB of a weight `[..., out, in]` rounded to nearest (scales of least squared error).

    importance: the mean square of each input channel `[in]`; with it, about the SQNR of the matmul's output.
    """
    counts = torch.ones(weight.shape[-1]) if importance is None else importance.sqrt()
    counts = counts.to(weight.device)
    return sqnr_db(weight * counts, reference.quantize_dequantize(weight, fmt, ScaleRule.MSE) * counts)


def top1_agreement(reference: Tensor, other: Tensor) -> float:
    """Share of positions where both logits `[..., vocabulary]` have the same largest entry."""
    return (reference.argmax(-1) == other.argmax(-1)).float().mean().item()


def kl_divergence(reference: Tensor, other: Tensor) -> float:
    """Mean over positions of KL(softmax(reference) || softmax(other)), in nats; logits `[..., vocabulary]`."""
    log_p = torch.log_softmax(reference.float(), -1)
    log_q = torch.log_softmax(other.float(), -1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean().item()
