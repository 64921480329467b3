"""Metrics between a tensor and its approximation: SQNR, top-1 agreement, KL divergence."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.row_slices import matrices

_VALUES = 1 << 18  # converted to float64 at a time


def sqnr_db(signal: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - y)^2), in dB, of tensors of one shape.

    inf if they are equal, NaN if either holds NaN, or on the meta device."""
    if signal.is_meta:
        return math.nan
    return _sqnr_db(zip(matrices(signal), matrices(approximation), strict=True))


def rounding_db(weight: Tensor, fmt: MXFormat, importance: Tensor | None = None) -> float:
    """SQNR in dB of a weight `[..., out, in]` rounded to nearest, with the scales of least squared error.

    importance: the mean square of each input channel `[in]`; with it, the result approximates the SQNR of the matmul's
    output.
    """
    counts = torch.ones(weight.shape[-1], dtype=torch.float32) if importance is None else importance.sqrt()
    counts = counts.to(weight.device)
    return _sqnr_db(
        (rows * counts, reference.quantize_dequantize(rows, fmt, ScaleRule.MSE) * counts) for rows in matrices(weight)
    )


def _sqnr_db(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`sqnr_db` of all pairs together."""
    noise = power = 0.0
    for pair in pairs:
        for expected, actual in zip(*(tensor.flatten().split(_VALUES) for tensor in pair), strict=True):
            exact = expected.double()
            noise += (exact - actual.double()).square().sum().item()
            power += exact.square().sum().item()
    if noise == 0.0:
        return math.inf
    ratio = power / noise
    return math.nan if math.isnan(ratio) else 10 * math.log10(ratio) if ratio > 0.0 else -math.inf


def top1_agreement(reference: Tensor, other: Tensor) -> float:
    """Fraction of positions at which both logits `[..., vocabulary]` have the same argmax."""
    return (reference.argmax(-1) == other.argmax(-1)).float().mean().item()


def kl_divergence(reference: Tensor, other: Tensor) -> float:
    """Mean over positions of KL(softmax(reference) || softmax(other)), in nats; logits `[..., vocabulary]`."""
    log_p = torch.log_softmax(reference.float(), -1)
    log_q = torch.log_softmax(other.float(), -1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean().item()


def negative_log_likelihood(logits: Tensor, tokens: Tensor) -> float:
    """Sum of -log softmax(logits)[token] over `logits [tokens, vocabulary]` and `tokens [tokens]`, in nats.

    NaN if a logit is NaN or +Inf.
    """
    return F.cross_entropy(logits.float(), tokens.to(logits.device), reduction="sum").item()


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; inf where a float cannot hold it."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
