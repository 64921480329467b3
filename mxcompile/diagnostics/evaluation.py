"""How good a language model is, alone and against another: perplexity, KL divergence, top-1 agreement."""

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from mxcompile.errors import InputError, UnknownNameError
from mxcompile.numerics.metrics import kl_divergence, top1_agreement

_ROWS = 512
_LARGEST_EXPONENT = 709.0


class Metric(StrEnum):
    """What recovery is measured by: the share of equal predictions; the reference's perplexity over the model's;
    exp(-KL).
    """

    TOP1 = "top1"
    PERPLEXITY = "perplexity"
    KL = "kl"


@dataclass(frozen=True)
class Evaluation:
    """Over `tokens` predicted tokens: mean negative log-likelihood in nats; against the reference model, if one was
    given, mean KL(reference || model) in nats, the share of positions with the same most likely token, and the
    reference's own negative log-likelihood.
    """

    tokens: int
    nll: float
    kl: float | None = None
    top1: float | None = None
    reference_nll: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return _exp(self.nll)

    @property
    def reference_perplexity(self) -> float | None:
        """exp(reference_nll)."""
        return None if self.reference_nll is None else _exp(self.reference_nll)

    def recovery(self, metric: Metric | str = Metric.TOP1) -> float:
        """How much of the reference model is left, 1 if nothing is lost; raises InputError without a reference."""
        if self.top1 is None or self.kl is None or self.reference_nll is None:
            raise InputError("there is no recovery without a reference: evaluate(model, windows, reference)")
        if metric not in set(Metric):
            raise UnknownNameError("metric", metric, Metric)
        ratio = _exp(self.reference_nll - self.nll)
        return {Metric.TOP1: self.top1, Metric.PERPLEXITY: ratio, Metric.KL: math.exp(-self.kl)}[Metric(metric)]


def evaluate(model: nn.Module, windows: Tensor | Iterable[Tensor], reference: nn.Module | None = None) -> Evaluation:
    """Score a causal language model on windows of token ids, each `[batch, length]` (see `token_windows`).

    model, reference: called as Hugging Face's are, `model(input_ids=..., use_cache=False).logits`, in eval mode, on the
        device they are on. They are trusted to be causal, see `check_causal`.
    windows: one after the other, so that memory holds the logits of one; a single tensor goes row by row.

    Every token of a window but the first is predicted from those before it in the window. Raises InputError if the
    windows hold nothing to predict, or if a model fails on them, gives no such logits, or NaN, or if the models have
    different vocabularies.
    """
    models = [model] if reference is None else [model, reference]
    sums = [0.0] * 4
    tokens = 0
    with torch.no_grad(), ExitStack() as modes:
        for each in models:
            modes.enter_context(_eval_mode(each))
        for window in windows.split(1) if isinstance(windows, Tensor) else windows:
            if window.dim() != 2:
                raise InputError(f"a window is [batch, length], not {list(window.shape)}")
            if window.shape[1] < 2:
                continue
            scores = _scores(models, window)
            sums = [total + score for total, score in zip(sums, scores, strict=True)]
            tokens += window[:, 1:].numel()
    if tokens == 0:
        raise InputError("nothing to evaluate: the windows hold fewer than two tokens each")
    nll, kl, top1, reference_nll = (total / tokens for total in sums)
    return Evaluation(tokens, nll) if reference is None else Evaluation(tokens, nll, kl, top1, reference_nll)


def token_windows(tokens: Tensor, length: int, count: int | None = None) -> Iterator[Tensor]:
    """Cut `[tokens]` into consecutive windows `[1, length]`; a shorter rest is dropped."""
    available = tokens.numel() // length
    for index in range(available if count is None else min(count, available)):
        yield tokens[index * length : (index + 1) * length].unsqueeze(0)


def check_causal(model: nn.Module, window: Tensor) -> None:
    """Raise InputError if what a model predicts depends on tokens that come later, as BERT's predictions do.

    Seen by changing the last token of the window `[1, length]`.
    """
    with torch.no_grad(), _eval_mode(model):
        before = _logits(model, window).float()
        changed = window.clone()
        changed[:, -1] = (changed[:, -1] + 1) % before.shape[-1]
        after = _logits(model, changed)
    rounding = torch.finfo(after.dtype).eps ** 0.5
    if (after.float() - before).abs().max() > rounding * before.abs().max():
        raise InputError(
            f"{type(model).__name__} is not a causal language model: what it predicts changes with later tokens"
        )


def _scores(models: list[nn.Module], window: Tensor) -> list[float]:
    """Sums over the predicted tokens of a window: nll, KL, agreement, nll of the reference."""
    targets = window[:, 1:].flatten()
    logits, *others = [_logits(model, window) for model in models]
    for other in others:
        if other.shape != logits.shape:
            sizes = f"{logits.shape[-1]} and {other.shape[-1]}"
            raise InputError(f"the models cannot be compared: their vocabularies have {sizes} tokens")
    sums = [0.0] * 4
    for rows in torch.arange(len(targets)).split(_ROWS):
        sums[0] += _nll(models[0], logits[rows], targets[rows])
        for other in others:
            theirs = other[rows].to(logits.device)
            sums[1] += kl_divergence(theirs, logits[rows]) * len(rows)
            sums[2] += top1_agreement(theirs, logits[rows]) * len(rows)
            sums[3] += _nll(models[1], theirs, targets[rows])
    return sums


def _nll(model: nn.Module, logits: Tensor, targets: Tensor) -> float:
    nll = nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum").item()
    if math.isnan(nll):
        raise InputError(f"{type(model).__name__} gives NaN or infinite logits: there is nothing to compare")
    return nll


def _logits(model: nn.Module, window: Tensor) -> Tensor:
    """`[batch * (length - 1), vocabulary]`: predictions of every token but the first."""
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
            f"{name} is not a causal language model: it gives no logits [batch, length, vocabulary] for token ids"
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


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < _LARGEST_EXPONENT else math.inf
