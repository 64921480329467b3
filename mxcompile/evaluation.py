"""How good a language model is, alone and against another: perplexity, KL divergence, top-1 agreement."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxcompile.errors import InputError
from mxcompile.measure import kl_divergence, top1_agreement

_ROWS = 512


@dataclass(frozen=True)
class Evaluation:
    """Over `tokens` predicted tokens: mean negative log-likelihood in nats; against the reference model, if one was
    given, mean KL(reference || model) in nats and the share of positions with the same most likely token.
    """

    tokens: int
    nll: float
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


def evaluate(model: nn.Module, windows: Iterable[Tensor], reference: nn.Module | None = None) -> Evaluation:
    """Score a causal language model on windows of token ids, each `[1, length]`.

    Every token of a window but the first is predicted from those before it in the window. `reference` is run on the
    same windows. Raises InputError if the windows hold nothing to predict.
    """
    nll = kl = top1 = 0.0
    tokens = 0
    for window in windows:
        if window.dim() != 2 or window.shape[0] != 1:
            raise InputError(f"a window is [1, length], not {list(window.shape)}: give rows one by one")
        if window.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = _logits(model, window)
            other = None if reference is None else _logits(reference, window)
        targets = window[0, 1:]
        for rows in torch.arange(len(targets)).split(_ROWS):
            nll += torch.nn.functional.cross_entropy(logits[rows].float(), targets[rows], reduction="sum").item()
            if other is not None:
                kl += kl_divergence(other[rows], logits[rows]) * len(rows)
                top1 += top1_agreement(other[rows], logits[rows]) * len(rows)
        tokens += len(targets)
    if tokens == 0:
        raise InputError("nothing to evaluate: the windows hold fewer than two tokens each")
    if reference is None:
        return Evaluation(tokens, nll / tokens)
    return Evaluation(tokens, nll / tokens, kl / tokens, top1 / tokens)


def token_windows(tokens: Tensor, length: int, count: int | None = None) -> Iterator[Tensor]:
    """Cut `[tokens]` into consecutive windows `[1, length]`; a shorter rest is dropped."""
    available = tokens.numel() // length
    for index in range(available if count is None else min(count, available)):
        yield tokens[index * length : (index + 1) * length].unsqueeze(0)


def _logits(model: nn.Module, window: Tensor) -> Tensor:
    """`[length - 1, vocabulary]`: predictions of every token but the first."""
    output: Any = model(input_ids=window, use_cache=False)
    return output.logits[0, :-1]
