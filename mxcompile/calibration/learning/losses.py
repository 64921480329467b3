"""How far the values of a model in training are from those of the exact one, as losses with gradients."""

import math

import torch
from torch import Tensor

from mxcompile.numerics.importance import token_weights

_ROWS = 1024


def kl_divergence_sum(expected: Tensor, actual: Tensor) -> Tensor:
    """KL(expected || actual) in nats, summed over the rows of logits `[..., vocabulary]`."""
    rows = zip(expected.flatten(0, -2).split(_ROWS), actual.flatten(0, -2).split(_ROWS), strict=True)
    return torch.stack([_kl_divergence(*pair) for pair in rows]).sum()


def capped_error(expected: Tensor, actual: Tensor, dropped: float = 0.0) -> Tensor:
    """Squared error of values `[..., size]` relative to their energy, of tokens whose energy is capped.

    Without the tokens with the largest errors: dropped is their share. Tokens are capped as second moments are
    (`token_weights`): the first of a sequence would be most of the sum.
    """
    rows, targets = actual.flatten(0, -2).float(), expected.flatten(0, -2).float()
    weights = token_weights(targets)
    errors = (rows - targets).square().sum(-1, keepdim=True) * weights
    kept = len(errors) - math.ceil(dropped * len(errors))
    if kept < len(errors):
        errors = errors.topk(max(kept, 1), dim=0, largest=False, sorted=False).values
    return errors.sum() / (targets.square().sum(-1, keepdim=True) * weights).sum().clamp(min=1e-30)


def _kl_divergence(expected: Tensor, actual: Tensor) -> Tensor:
    log_p, log_q = expected.float().log_softmax(-1), actual.float().log_softmax(-1)
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum()
