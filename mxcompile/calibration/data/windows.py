"""Windows of token ids: consecutive parts of a text, each beginning as the tokenizer begins a text."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mxcompile.arguments import checked
from mxcompile.errors import InputError

_TEXT = "a text"


@checked
def token_windows(tokens: Tensor, length: int, count: int | None = None, *, tokenizer: Any = None) -> Iterator[Tensor]:
    """Split token ids `[tokens]` into consecutive windows `[1, length]`, at most `count`; a shorter rest is dropped.

    tokenizer: every window begins with the tokens that it puts before a text (BOS of Gemma and Llama, nothing for GPT-2
        and SmolLM2), and then takes so many fewer from `tokens`; if `tokens` begin with them, too, they are taken once.
        Models that were trained with BOS predict badly without it. None: windows hold `tokens` alone.

    Raises InputError if the ids are not whole numbers `[tokens]`, or no token of the text fits into a window.
    """
    start = () if tokenizer is None else start_tokens(tokenizer)
    if count is not None and count < 0:
        raise InputError(f"count is the number of windows, not {count}")
    text = _text(tokens, start)
    check_length(length, start)
    whole = len(text) // (length - len(start))
    return _windows(text, start, [length] * (whole if count is None else min(count, whole)))


def varied_windows(tokens: Tensor, lengths: Sequence[int], start: tuple[int, ...] = ()) -> list[Tensor]:
    """Consecutive windows `[1, length]` of token ids `[tokens]`, one for each of the lengths.

    start: what every window begins with, as in `token_windows`. There must be enough tokens.
    """
    return list(_windows(_text(tokens, start), start, lengths))


def check_length(length: int, start: tuple[int, ...] = ()) -> None:
    """Raise InputError if no token of a text fits into a window of that length."""
    if length <= len(start):
        holds = f", of which {len(start)} are what the tokenizer puts before a text" if start else ""
        raise InputError(f"windows have at least {len(start) + 1} tokens{holds}, not {length}")


def without_start(tokens: Tensor, start: tuple[int, ...]) -> Tensor:
    """Token ids `[tokens]` without those that the tokenizer puts before a text, if they begin with them."""
    return tokens[len(start) :] if start and tokens[: len(start)].tolist() == list(start) else tokens


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The token ids that a tokenizer puts before a text, `()` if none; those that it puts behind it do not count."""
    plain: list[int] = list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    whole: list[int] = list(tokenizer(_TEXT)["input_ids"])
    places = range(len(whole) - len(plain) + 1)
    place = next((start for start in places if whole[start : start + len(plain)] == plain), 0)
    return tuple(whole[:place])


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """`[tokens]`, without special tokens."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


def _text(tokens: Tensor, start: tuple[int, ...]) -> Tensor:
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.is_complex():
        dtype = str(tokens.dtype).removeprefix("torch.")
        raise InputError(f"token ids are whole numbers [tokens], not {dtype} {list(tokens.shape)}: pass one text's ids")
    return without_start(tokens, start)


def _windows(text: Tensor, start: tuple[int, ...], lengths: Sequence[int]) -> Iterator[Tensor]:
    first, position = text.new_tensor(start), 0
    for length in lengths:
        end = position + length - len(start)
        part = text[position:end]
        yield (torch.cat([first, part]) if start else part).unsqueeze(0)
        position = end
