"""Evaluate a language model alone or against a reference: perplexity, KL divergence, top-1 agreement."""

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from mxcompile.errors import InputError, UnknownNameError
from mxcompile.numerics.metrics import kl_divergence, negative_log_likelihood, perplexity, top1_agreement

_ROWS = 512


class Metric(StrEnum):
    """A measure of recovery: top-1 agreement; the reference's perplexity over the model's; exp(-KL)."""

    TOP1 = "top1"
    PERPLEXITY = "perplexity"
    KL = "kl"


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model over `tokens` predicted tokens; the last three are None without a reference model.

    nll: mean negative log-likelihood in nats. kl: mean KL(reference || model) in nats. top1: fraction of positions with
    the same most likely token. reference_nll: the reference's mean negative log-likelihood.
    """

    tokens: int
    nll: float
    kl: float | None = None
    top1: float | None = None
    reference_nll: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return perplexity(self.nll)

    @property
    def reference_perplexity(self) -> float | None:
        """exp(reference_nll)."""
        return None if self.reference_nll is None else perplexity(self.reference_nll)

    def recovery(self, metric: Metric | str = Metric.TOP1) -> float:
        """Quality relative to the reference, 1 for no loss; raises InputError without a reference."""
        if self.top1 is None or self.kl is None or self.reference_nll is None:
            raise InputError("recovery needs a reference: evaluate(model, windows, reference)")
        if metric not in set(Metric):
            raise UnknownNameError("metric", metric, Metric)
        ratio = perplexity(self.reference_nll - self.nll)
        return {Metric.TOP1: self.top1, Metric.PERPLEXITY: ratio, Metric.KL: math.exp(-self.kl)}[Metric(metric)]


def evaluate(model: nn.Module, windows: Tensor | Iterable[Tensor], reference: nn.Module | None = None) -> Evaluation:
    """Score a causal language model on windows of token ids, each `[batch, length]` (see `token_windows`).

    model, reference: Hugging Face causal LMs, called as `model(input_ids=..., use_cache=False).logits` in eval mode on
        the device that they are on. Causality is assumed; `check_causal` tests it.
    windows: scored one after the other, so that memory holds the logits of one; a single tensor is scored row by row.

    Every token of a window except the first is predicted from those before it. Raises InputError if no window has two
    tokens, if a model fails, returns no such logits or NaN, or if the vocabularies differ.
    """
    models = [model] if reference is None else [model, reference]
    sums = [0.0] * 4
    tokens = 0
    with torch.no_grad(), ExitStack() as modes:
        for each in models:
            modes.enter_context(_eval_mode(each))
        for index, window in enumerate(windows.split(1) if isinstance(windows, Tensor) else windows):
            if window.dim() != 2:
                raise InputError(f"a window is [batch, length], not {list(window.shape)}")
            if window.shape[1] < 2:
                continue
            scores = _scores(models, window, index)
            sums = [total + score for total, score in zip(sums, scores, strict=True)]
            tokens += window[:, 1:].numel()
    if tokens == 0:
        raise InputError("nothing to evaluate: every window has fewer than two tokens")
    nll, kl, top1, reference_nll = (total / tokens for total in sums)
    return Evaluation(tokens, nll) if reference is None else Evaluation(tokens, nll, kl, top1, reference_nll)


def token_windows(tokens: Tensor, length: int, count: int | None = None) -> Iterator[Tensor]:
    """Split `[tokens]` into consecutive windows `[1, length]`, at most `count`; a shorter rest is dropped."""
    available = tokens.numel() // length
    for index in range(available if count is None else min(count, available)):
        yield tokens[index * length : (index + 1) * length].unsqueeze(0)


def check_causal(model: nn.Module, window: Tensor) -> None:
    """Raise InputError if a model's predictions depend on later tokens, as BERT's do.

    The test changes the last token of the window `[1, length]`.
    """
    with torch.no_grad(), _eval_mode(model):
        before = _logits(model, window).float()
        changed = window.clone()
        changed[:, -1] = (changed[:, -1] + 1) % before.shape[-1]
        after = _logits(model, changed)
    rounding = torch.finfo(after.dtype).eps ** 0.5
    if (after.float() - before).abs().max() > rounding * before.abs().max():
        raise InputError(
            f"{type(model).__name__} is not a causal language model: its predictions depend on later tokens"
        )


def _scores(models: list[nn.Module], window: Tensor, index: int) -> list[float]:
    """Sums over the predicted tokens of a window: nll, KL, top-1 agreement, nll of the reference."""
    targets = window[:, 1:].flatten()
    logits, *others = [_logits(model, window) for model in models]
    for other in others:
        if other.shape != logits.shape:
            sizes = f"{logits.shape[-1]} and {other.shape[-1]}"
            raise InputError(f"the models cannot be compared: their vocabularies have {sizes} tokens")
    sums = [0.0] * 4
    for rows in torch.arange(len(targets)).split(_ROWS):
        sums[0] += _nll(models[0], logits[rows], targets[rows], index)
        for other in others:
            reference = other[rows].to(logits.device)
            sums[1] += kl_divergence(reference, logits[rows]) * len(rows)
            sums[2] += top1_agreement(reference, logits[rows]) * len(rows)
            sums[3] += _nll(models[1], reference, targets[rows], index)
    return sums


def _nll(model: nn.Module, logits: Tensor, targets: Tensor, window: int) -> float:
    nll = negative_log_likelihood(logits, targets)
    if math.isnan(nll):
        raise InputError(
            f"{type(model).__name__} returns NaN or infinite logits for windows[{window}], which cannot be scored: "
            "leave it out, or evaluate the model that this one was made from"
        )
    return nll


def _logits(model: nn.Module, window: Tensor) -> Tensor:
    """`[batch * (length - 1), vocabulary]`: the logits that predict every token except the first."""
    name = type(model).__name__
    device = next((tensor.device for tensor in model.parameters()), window.device)
    try:
        output: Any = model(input_ids=window.to(device), use_cache=False)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{name} fails on token ids {list(window.shape)}: {reason}") from error
    logits: object = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != window.shape:
        raise InputError(
            f"{name} is not a causal language model: it returns no logits [batch, length, vocabulary] for token ids"
        )
    return logits[:, :-1].flatten(0, 1)


@contextmanager
def _eval_mode(model: nn.Module) -> Generator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
