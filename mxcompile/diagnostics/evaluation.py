"""Evaluate a language model alone or against a reference: perplexity, KL divergence, top-1 agreement."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, nn

from mxcompile.arguments import checked
from mxcompile.checkpoint.hf.cached_forward import cache_of, reading_its_cache
from mxcompile.errors import InputError, UnknownNameError
from mxcompile.graph.masks import shown_tokens
from mxcompile.numerics.metrics import kl_divergence, negative_log_likelihood, perplexity, top1_agreement
from mxcompile.tensor.modules import device_of, eval_mode

_ROWS = 512
_IDS, _MASK = "input_ids", "attention_mask"
_IGNORED = ("token_type_ids", "labels")  # a tokenizer's or a collator's: models score without them


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


@dataclass(frozen=True)
class WindowScores:
    """Sums over the scored tokens of one window, in nats: nll, KL, positions predicted alike, nll of the reference."""

    tokens: int
    sums: tuple[float, float, float, float]


@checked
def evaluate(
    model: nn.Module,
    windows: Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]],
    reference: nn.Module | None = None,
) -> Evaluation:
    """Score a causal language model on windows of token ids, each `[batch, length]` (see `token_windows`).

    model, reference: Hugging Face causal LMs, called as `model(input_ids=..., use_cache=False).logits` in eval mode on
        the device that they are on. Causality is assumed; `check_causal` tests it.
    windows: scored one after the other, so that memory holds the logits of one; a single tensor is scored row by row.
        A window may also be a tokenizer's output with `input_ids` and an `attention_mask` `[batch, length]`, which the
        models get, and whose hidden tokens (padding) are not scored.

    A model with a cache in MX formats (`quantize-cache`) reads keys and values as if it had generated every token.

    Every token of a window except the first is predicted from those before it; with a mask, every visible token behind
    a visible one. A window of one token has none. Raises InputError if no window has two tokens, if a model fails,
    returns no such logits or NaN, or if the vocabularies differ.
    """
    return total_scores(score_windows(model, windows, reference), reference is not None)


def total_scores(scores: Iterable[WindowScores], compared: bool) -> Evaluation:
    """The evaluation of all windows together; raises InputError if there is nothing. compared: with a reference."""
    sums = [0.0] * 4
    tokens = 0
    for each in scores:
        sums = [total + score for total, score in zip(sums, each.sums, strict=True)]
        tokens += each.tokens
    if tokens == 0:
        raise InputError("nothing to evaluate: every window has fewer than two tokens")
    nll, kl, top1, reference_nll = (total / tokens for total in sums)
    return Evaluation(tokens, nll, kl, top1, reference_nll) if compared else Evaluation(tokens, nll)


def score_windows(
    model: nn.Module,
    windows: Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]],
    reference: nn.Module | None = None,
) -> list[WindowScores]:
    """The scores of each window that has a token to score, for statistics over windows; arguments as of `evaluate`."""
    return _score_models([model], windows, reference)[0]


def evaluate_several(
    models: Sequence[nn.Module],
    windows: Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]],
    reference: nn.Module | None = None,
) -> list[Evaluation]:
    """Score models on the same windows, as `evaluate` scores one; the reference runs once for all of them."""
    return [total_scores(scores, reference is not None) for scores in _score_models(models, windows, reference)]


def _score_models(
    models: Sequence[nn.Module],
    windows: Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]],
    reference: nn.Module | None,
) -> list[list[WindowScores]]:
    if isinstance(windows, Tensor) and windows.dim() != 2:
        raise InputError(f"a window is [batch, length], not {list(windows.shape)}")
    scores: list[list[WindowScores]] = [[] for _ in models]
    with torch.no_grad(), ExitStack() as modes:
        for each in (*models, *([] if reference is None else [reference])):
            modes.enter_context(eval_mode(each))
        for index, window in enumerate(map(_Window.of, _one_by_one(windows))):
            if not (count := int(window.predicted.sum())):
                continue
            expected = None if reference is None else (reference, _logits(reference, window.arguments))
            for model, own in zip(models, scores, strict=True):
                nll, kl, top1, reference_nll = _scores(model, expected, window, index)
                own.append(WindowScores(count, (nll, kl, top1, reference_nll)))
    return scores


def check_causal(model: nn.Module, window: Tensor) -> None:
    """Raise InputError if a model's predictions depend on later tokens, as BERT's do.

    The test changes the last token of the window `[1, length]`.
    """
    with torch.no_grad(), eval_mode(model):
        before = _logits(model, {_IDS: window}).float()
        changed = window.clone()
        changed[:, -1] = (changed[:, -1] + 1) % before.shape[-1]
        after = _logits(model, {_IDS: changed})
    rounding = torch.finfo(after.dtype).eps ** 0.5
    if (after.float() - before).abs().max() > rounding * before.abs().max():
        raise InputError(
            f"{type(model).__name__} is not a causal language model: its predictions depend on later tokens"
        )


@dataclass(frozen=True)
class _Window:
    """Arguments of the models, `input_ids` among them. predicted: whether each token but the first is scored."""

    arguments: dict[str, Tensor]
    predicted: Tensor

    @classmethod
    def of(cls, window: Tensor | Mapping[str, Tensor]) -> "_Window":
        arguments = dict(window) if isinstance(window, Mapping) else {_IDS: window}
        ids, mask = arguments.get(_IDS), arguments.get(_MASK)
        if ids is None or arguments.keys() - {_IDS, _MASK, *_IGNORED}:
            names = ", ".join(sorted(arguments)) or "nothing"
            raise InputError(f"a window has {_IDS} and maybe an {_MASK}, not {names}")
        if ids.dim() != 2:
            raise InputError(f"a window is [batch, length], not {list(ids.shape)}")
        if ids.is_meta:
            raise InputError("a window is on the meta device and holds no token ids: make it on the model's device")
        if mask is None:
            return cls({_IDS: ids}, torch.ones_like(ids[:, 1:], dtype=torch.bool))
        if mask.shape != ids.shape:
            raise InputError(f"the {_MASK} of a window is {list(mask.shape)}, its {_IDS} are {list(ids.shape)}")
        visible = shown_tokens(mask)
        return cls({_IDS: ids, _MASK: mask}, visible[:, 1:] & visible[:, :-1])


def _one_by_one(
    windows: Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]],
) -> Iterable[Tensor | Mapping[str, Tensor]]:
    if isinstance(windows, Mapping):
        return [cast(Mapping[str, Tensor], windows)]
    return windows.split(1) if isinstance(windows, Tensor) else windows


def _scores(model: nn.Module, reference: tuple[nn.Module, Tensor] | None, window: _Window, index: int) -> list[float]:
    """Sums over the scored tokens of a window: nll, KL, top-1 agreement, nll of the reference.

    reference: with its logits, as `_logits` returns them.
    """
    targets = window.arguments[_IDS][:, 1:][window.predicted]
    logits = _logits(model, window.arguments)
    if reference is not None and reference[1].shape != logits.shape:
        sizes = f"{logits.shape[-1]} and {reference[1].shape[-1]}"
        raise InputError(f"the models cannot be compared: their vocabularies have {sizes} tokens")
    scored = window.predicted.flatten().nonzero().flatten()
    sums = [0.0] * 4
    for rows, each in zip(scored.split(_ROWS), targets.split(_ROWS), strict=True):
        own = logits[rows.to(logits.device)]
        sums[0] += _nll(model, own, each, index)
        if reference is not None:
            expected = reference[1][rows.to(reference[1].device)].to(logits.device)
            sums[1] += kl_divergence(expected, own) * len(rows)
            sums[2] += top1_agreement(expected, own) * len(rows)
            sums[3] += _nll(reference[0], expected, each, index)
    return sums


def _nll(model: nn.Module, logits: Tensor, targets: Tensor, window: int) -> float:
    nll = negative_log_likelihood(logits, targets)
    if math.isnan(nll):
        raise InputError(
            f"{type(model).__name__} returns NaN or infinite logits for windows[{window}], which cannot be scored: "
            "leave it out, or evaluate the model that this one was made from"
        )
    return nll


def _logits(model: nn.Module, arguments: Mapping[str, Tensor]) -> Tensor:
    """`[batch * (length - 1), vocabulary]`: the logits that predict every token except the first."""
    name, window = type(model).__name__, arguments[_IDS]
    device = device_of(model)
    cache, placed = cache_of(model), {name: value.to(device) for name, value in arguments.items()}
    try:
        if cache is None:
            output: Any = model(**placed, use_cache=False)
        else:
            with reading_its_cache(model, cache):
                output = model.forward(**placed, use_cache=False)  # not compiled: its attention is another
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{name} fails on token ids {list(window.shape)}: {reason}") from error
    logits: object = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != window.shape:
        raise InputError(
            f"{name} is not a causal language model: it returns no logits [batch, length, vocabulary] for token ids"
        )
    return logits[:, :-1].flatten(0, 1)
