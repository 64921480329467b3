"""What `generate`'s logits processors do to the scores of the next token, in a form that a CUDA graph can record.

Most processors are functions of the scores alone and are called as they are. Those that look at the tokens so far get
them in a tensor of fixed size, or are replaced by a comparison with the number of tokens, which is on the device.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

_OF_SCORES_ALONE: Final = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
)
_OF_TOKENS: Final = "RepetitionPenaltyLogitsProcessor"
_MINIMA: Final = ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor")


@cache
def _classes(*names: str) -> tuple[type, ...]:
    from transformers.generation import logits_process  # only for transformers models

    return tuple(getattr(logits_process, name) for name in names)


@dataclass(frozen=True)
class Scores:
    """The logits processors of one call of `generate`, in order.

    called: each is called with tokens and scores; None stands where a minimum length applies. minimum: the length from
    which on a sequence may end. ends: ids of the tokens that are impossible before, [n]; None without a minimum.
    """

    called: tuple[Any, ...]
    minimum: int
    ends: Tensor | None

    @staticmethod
    def of(processors: Iterable[Any], device: torch.device) -> "Scores | str":
        """The scores, or the name of a processor that cannot be recorded."""
        called, minima = list[Any](), list[tuple[int, Tensor]]()
        for processor in processors:
            if type(processor) in _classes(*_MINIMA):
                minima.append((_minimum(processor), processor.eos_token_id.to(device)))
                called.append(None)
            elif _is_recordable(processor):
                called.append(processor)
            else:
                return type(processor).__name__
        if not all(torch.equal(minima[0][1], ends) for _, ends in minima[1:]):
            return "minimum lengths with different end tokens"
        return Scores(tuple(called), max((length for length, _ in minima), default=0), minima[0][1] if minima else None)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for scores that one recording serves. The minimum and its end tokens may differ."""
        return tuple(one and (type(one).__name__, *sorted(vars(one).items())) for one in self.called)

    def __call__(self, logits: Tensor, tokens: Tensor, length: Tensor, is_end: Tensor, minimum: Tensor) -> Tensor:
        """Scores of the next token, float32 [batch, vocabulary], or the logits where nothing changes them.

        logits: [batch, vocabulary]. tokens: those so far, [batch, n]; a place without one repeats another of its row.
        length: how many they are, [1]. is_end: the tokens of `ends`, [vocabulary]. minimum: [1].
        """
        if not self.called:
            return logits
        scores = logits.to(torch.float32)
        is_too_soon = is_end & (length < minimum)
        for one in self.called:
            scores = torch.where(is_too_soon, -math.inf, scores) if one is None else one(tokens, scores)
        return scores


def _minimum(processor: Any) -> int:
    """The number of tokens, prompt included, that a sequence has at least before its end token."""
    if hasattr(processor, "min_new_tokens"):
        return processor.prompt_length_to_skip + processor.min_new_tokens
    return processor.min_length


def _is_recordable(processor: Any) -> bool:
    if any(isinstance(value, Tensor) for value in vars(processor).values()):
        return False
    if type(processor) in _classes(_OF_TOKENS):
        return getattr(processor, "prompt_ignore_length", None) is None
    return type(processor) in _classes(*_OF_SCORES_ALONE)
