"""Windows of token ids: consecutive, whole, of one length or several, each beginning as the tokenizer begins a text."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.calibration.data.lengths import WindowLengths
from mxcompile.calibration.data.windows import start_tokens, token_windows, varied_windows
from mxcompile.errors import InputError

examples = settings(derandomize=True, deadline=None, database=None, max_examples=50)


@examples
@given(st.integers(0, 100), st.integers(1, 30), st.none() | st.integers(0, 10))
def test_windows_are_consecutive_and_whole(total, length, count):
    tokens = torch.arange(total)
    cut = list(token_windows(tokens, length, count))
    assert all(window.shape == (1, length) for window in cut)
    assert len(cut) == min(total // length, total if count is None else count)
    joined = torch.cat([window[0] for window in cut]) if cut else tokens[:0]
    assert torch.equal(joined, tokens[: len(cut) * length])


def words(start: tuple[int, ...] = (), end: tuple[int, ...] = ()) -> Callable[..., dict[str, list[int]]]:
    """A tokenizer that puts tokens before and behind a text, and makes one of each letter."""

    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [*start, *ids, *end] if add_special_tokens else ids}

    return tokenizer


@pytest.mark.parametrize("start", [(), (2,), (250, 3)])
@pytest.mark.parametrize("given", [True, False], ids=["tokens with them", "without"])
def test_windows_begin_as_the_tokenizer_begins_a_text(start, given):
    tokenizer, text = words(start, end=(1,)), torch.arange(10, 30)
    assert start_tokens(tokenizer) == start
    tokens = torch.cat([torch.tensor(start, dtype=torch.int64), text]) if given else text
    cut = list(token_windows(tokens, 6, tokenizer=tokenizer))
    size = 6 - len(start)
    assert [window.tolist() for window in cut] == [
        [[*start, *text[i : i + size].tolist()]] for i in range(0, 20 // size * size, size)
    ]
    plain = list(token_windows(text, 6, 2))
    assert torch.equal(torch.cat(plain, 1)[0], text[:12])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.arange(9), 0), "windows have at least 1 tokens, not 0"),
        ((torch.arange(9), -3), "windows have at least 1 tokens, not -3"),
        ((torch.arange(9), 1, None, (2,)), "at least 2 tokens, of which 1 are what the tokenizer puts before a text"),
        ((torch.arange(9), 3, -1), "count is the number of windows, not -1"),
        (
            (torch.ones(2, 9, dtype=torch.int64), 3),
            r"whole numbers \[tokens\], not int64 \[2, 9\]: pass one text's ids",
        ),
        ((torch.ones(9), 3), r"whole numbers \[tokens\], not float32 \[9\]"),
    ],
)
def test_windows_that_cannot_be_cut(arguments, message):
    """Found when they are asked for, not when they are used."""
    tokens, length, count, start = (*arguments, None, None)[:4]
    with pytest.raises(InputError, match=message):
        token_windows(tokens, length, count, tokenizer=None if start is None else words(start))


@examples
@given(st.lists(st.integers(3, 30), max_size=8), st.sampled_from([(), (2,), (250, 3)]))
def test_windows_of_several_lengths(lengths, start):
    text = torch.arange(300, 300 + sum(length - len(start) for length in lengths))
    cut = varied_windows(text, lengths, start) if lengths else []
    assert [window.shape[1] for window in cut] == lengths
    assert all(window[0, : len(start)].tolist() == list(start) for window in cut)
    assert [token for window in cut for token in window[0, len(start) :].tolist()] == text.tolist()


# How many of each length


@examples
@given(st.lists(st.integers(1, 4096), min_size=1, max_size=5, unique=True), st.integers(0, 200))
def test_equal_shares_of_the_tokens(lengths, more):
    """As many windows as asked for, of every length at least one, else within one window of its share."""
    windows = len(lengths) + more
    order = WindowLengths.of(lengths).order(windows)
    assert len(order) == windows
    shares = {length: windows / length / sum(1 / each for each in lengths) for length in lengths}
    if min(shares.values()) >= 1:
        assert all(abs(order.count(length) - share) < 1 for length, share in shares.items())
    assert set(order) == set(lengths)


def test_windows_of_several_lengths_alternate():
    order = WindowLengths.of([2048, 128, 512]).order(32)
    assert {length: order.count(length) for length in (128, 512, 2048)} == {128: 24, 512: 6, 2048: 2}
    assert order.index(2048) == 8
    assert order[:16].count(128) == 12
    assert WindowLengths.of([512, 512]).order(3) == WindowLengths.of(512).order(3) == [512] * 3


def test_lengths_like_those_of_a_task():
    """Eight quantiles, equally many windows of each; fewer quantiles for fewer windows."""
    lengths = WindowLengths.like(range(1, 801))
    assert sorted(set(lengths.order(64))) == [51, 151, 251, 351, 451, 551, 651, 751]
    assert {lengths.order(64).count(length) for length in lengths.lengths} == {8}
    assert sorted(lengths.order(2)) == [251, 651]
    assert WindowLengths.like([7]).order(20) == [7] * 20


def test_fewer_windows_than_lengths():
    with pytest.raises(InputError, match="2 windows cannot have 3 lengths: ask for more windows"):
        WindowLengths.of([1, 2, 3]).order(2)
    with pytest.raises(InputError, match="give at least one"):
        WindowLengths.of([])
