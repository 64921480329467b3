"""The tokens of one call of `generate`, on the device, and what changes from one decode step to the next."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mxcompile.inductor.generation.scores import Scores
from mxcompile.kernels.dispatch import append_token

_MOST_PARTS: Final = 512


@dataclass(frozen=True)
class Ends:
    """What ends a sequence, and what follows its end.

    tokens: ids, [n]; None if no token ends a sequence, and nothing is padded. pad: the id that follows, a scalar tensor
    or None.
    """

    tokens: Tensor | None
    pad: Tensor | None

    @property
    def key(self) -> int | None:
        """Equal for ends that one recording serves."""
        return None if self.tokens is None else len(self.tokens)


class Sequences:
    """Sequences that grow by a token a step; all tensors stay in place, so that a recording can advance them.

    tokens: [batch, room] int64; a place without a token holds the row's first one. length: tokens of a row, [1] int64.
    report: [3, batch] int64: the last token, whether the sequence goes on after it, whether its probabilities were
    numbers.
    """

    def __init__(self, batch: int, room: int, vocabulary: int, ends: Ends, device: torch.device) -> None:
        self.tokens = torch.zeros(batch, room, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.report = torch.zeros(3, batch, dtype=torch.int64, device=device)
        self.minimum = torch.zeros(1, dtype=torch.int64, device=device)
        self.is_end = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.ends = None if ends.tokens is None else torch.zeros_like(ends.tokens, device=device)
        self.pad = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, tokens: Tensor, is_valid: Tensor | bool, ends: Ends, scores: Scores) -> None:
        """Start over with a prompt and the first token after it, [batch, n]. is_valid: see `choose`."""
        self.tokens.copy_(tokens[:, :1].expand_as(self.tokens))
        self.tokens[:, : tokens.shape[1]] = tokens
        self.length.fill_(tokens.shape[1])
        self.minimum.fill_(scores.minimum)
        if scores.ends is not None:
            self.is_end.zero_().index_fill_(0, scores.ends, True)
        if self.ends is not None and ends.tokens is not None and ends.pad is not None:
            self.ends.copy_(ends.tokens)
            self.pad.copy_(ends.pad)
        self.report[0] = tokens[:, -1]
        self.report[1] = 1
        self.report[2] = is_valid
        self._look_for_ends()

    def append(self, token: Tensor, is_valid: Tensor | bool) -> None:
        """Add a token to each row, [batch]; rows that have ended get the padding."""
        last, goes_on, valid = self.report
        last.copy_(token if self.ends is None else torch.where(goes_on.bool(), token, self.pad))
        valid &= is_valid
        self.tokens.index_copy_(1, self.length, last[:, None])
        self.length += 1
        self._look_for_ends()

    def end(self, goes_on: Tensor) -> None:
        """End rows for which a stopping criterion said so. goes_on: [batch] int64, on the host."""
        self.report[1] &= goes_on.to(self.report.device, non_blocking=True)

    def _look_for_ends(self) -> None:
        if self.ends is not None:
            self.report[1] &= (self.report[0, :, None] != self.ends).all(1)


def choose(scores: Tensor, is_sampled: bool) -> tuple[Tensor, Tensor | bool]:
    """The next token of each row, [batch] int64, and whether the probabilities that it was drawn from were numbers.

    scores: [batch, vocabulary]. Sampling is what `torch.multinomial` does with probabilities, without its check, for
    which the host waits; the random numbers are the same. Probabilities have any common factor: it changes no choice.
    """
    if not is_sampled:
        return argmax(scores), True
    weights = scores.to(torch.float32)
    weights = (weights - _parted(weights).amax(-1).amax(-1, keepdim=True)).exp()
    token = argmax(weights / torch.empty_like(weights).exponential_(1))
    return token, weights.gather(1, token[:, None])[:, 0] >= 0


def argmax(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)`, [batch] of [batch, vocabulary], the first of equal ones."""
    parts = _parted(scores)
    return argmax_of_parts(parts) if parts.shape[1] > 1 else scores.argmax(-1)


def argmax_of_parts(scores: Tensor) -> Tensor:
    """The same of [batch, parts, n]: the largest of each part, then of all."""
    largest, places = scores.max(-1)
    part = largest.argmax(-1, keepdim=True)
    return places.gather(-1, part).add(part, alpha=scores.shape[-1])[..., 0]


def _parted(scores: Tensor) -> Tensor:
    """[batch, vocabulary] as [batch, parts, n], since torch has one program for a row on a GPU: as many as the largest
    power of two that divides the vocabulary, up to a limit."""
    size = scores.shape[-1]
    parts = min(size & -size, _MOST_PARTS) if scores.is_cuda else 1
    return scores.unflatten(-1, (parts, size // parts))


def append_and_advance(
    sequences: Sequences, inputs: dict[str, Any], token: Tensor, is_valid: Tensor | bool, cache_length: Tensor | None
) -> None:
    """Append the tokens of a step, [batch], and make the inputs of the step those of the next one; see `advance`."""
    kernel = append_token(token)
    ids, positions, mask = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    if kernel is None or cache_length is None or kernel.supports(sequences.ends, ids, positions, mask) is not None:
        sequences.append(token, is_valid)
        advance(inputs, sequences.report[0], cache_length)
        return
    state = sequences
    valid = is_valid if isinstance(is_valid, Tensor) else None
    into = (state.report, state.tokens, state.length, state.ends, state.pad)
    kernel.append(token, valid, *into, ids, positions, mask, cache_length)


def advance(inputs: dict[str, Any], token: Tensor, cache_length: Tensor | None) -> None:
    """Make the inputs of a decode step those of the next one.

    inputs: input_ids [batch, 1]; position_ids [..., 1]; attention_mask, either [batch, 1, 1, cache], boolean or added
    to the scores, or [batch, n] with a column for each token. token: [batch]. cache_length: how many tokens a static
    cache holds, a scalar tensor. All but the second kind of mask is changed in place.
    """
    inputs["input_ids"].copy_(token[:, None])
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] += 1
    mask = inputs.get("attention_mask")
    if mask is None:
        return
    if cache_length is None:
        inputs["attention_mask"] = torch.cat([mask, mask.new_ones((len(mask), 1))], -1)
        return
    place = cache_length.clamp(max=mask.shape[-1] - 1).view(1)  # the last token of a cache has none after it
    mask.index_copy_(-1, place, mask.index_select(-1, place - 1))
