"""Calibration batches: documents -> token ids -> windows -> batches of windows of one length."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from mxcompile.arguments import checked
from mxcompile.calibration.data.lengths import WindowLengths, check_number
from mxcompile.calibration.data.packing import count_tokens, pack
from mxcompile.calibration.data.sources import (
    Documents,
    SourceName,
    documents_of,
    read_documents,
    read_lines,
    read_text,
)
from mxcompile.calibration.data.windows import check_length, start_tokens, varied_windows, without_start
from mxcompile.errors import InputError
from mxcompile.graph.inputs import WeightedBatch
from mxcompile.tensor.devices import find_device

LENGTH: Final = 512
WINDOWS: Final = 32
_BATCH_TOKENS: Final = 2048


@checked
def calibration_batches(
    source: str | Path | Tensor | Documents | Iterable[object],
    tokenizer: Any,
    *,
    length: int | Sequence[int] = LENGTH,
    like: str | Path | Iterable[object] | None = None,
    windows: int | None = None,
    special_tokens: bool = True,
    device: str | torch.device = "cpu",
) -> list[WeightedBatch]:
    """Batches for `quantize_and_compile(calibration=...)`: `{"input_ids": [windows, length]}`, 2048 tokens in each.

    source: `"FILE_OR_NAME[:split][:windows]"`: a .txt, .jsonl or .parquet file, or a data set that Hugging Face
        `datasets` loads (`"owner/name:train:128"`, a folder). Rows have a text (`text`, `prompt`), a chat (`messages`,
        `conversations`) for the tokenizer's chat template, or token ids (`input_ids`). Or a list or any iterable of
        such texts, chats, token ids or rows; or the token ids of one text, `[tokens]`.
    length: tokens of a window. Several: each gets an equal share of the tokens, and every window counts alike, however
        long it is: the batches have weights (`WeightedBatch`).
    like: instead, a file or documents whose lengths the windows get: those at 8 quantiles of the token counts of its
        lines (.txt) or rows. Every window counts alike.
    windows: how many; 32 if neither this nor the source says it, or fewer if the text has fewer.
    special_tokens: every window begins with what the tokenizer puts before a text (see `token_windows`).

    Documents follow each other, texts with an empty line between them, and windows are cut from all of that. No more is
    read than needed. Raises InputError, which names the source, if it cannot be read or has too few tokens.
    """
    documents, asked = _opened(source)
    if windows is not None and asked is not None:
        raise InputError(f"{source} says how many windows, and so does windows={windows}: leave out one of them")
    asked = asked if windows is None else windows
    start = start_tokens(tokenizer) if special_tokens else ()
    lengths = _window_lengths(length, like, tokenizer, start)
    order, ids = _order(documents, tokenizer, lengths, asked, start)
    target = find_device(device)
    return [batch.to(target) for batch in _batches(varied_windows(ids, order, start))]


def planned_windows(
    tokenizer: Any,
    *,
    length: int | Sequence[int] = LENGTH,
    like: str | Path | Iterable[object] | None = None,
    windows: int | None = None,
    special_tokens: bool = True,
) -> list[int]:
    """The lengths of the windows that `calibration_batches` cuts from a text with enough tokens."""
    start = start_tokens(tokenizer) if special_tokens else ()
    lengths = _window_lengths(length, like, tokenizer, start)
    return lengths.order(_wanted(lengths, windows))


def windows_in_words(batches: Iterable[WeightedBatch]) -> str:
    """`32 windows of 512`; of several lengths `24 windows of 128, 6 of 512, 2 of 2048`."""
    counts: Counter[int] = Counter()
    for batch in batches:
        counts[batch["input_ids"].shape[1]] += len(batch["input_ids"])
    parts = [f"{counts[length]} of {length}" for length in sorted(counts)]
    return ", ".join(parts).replace(" of", " windows of", 1)


def _opened(source: object) -> tuple[Documents, int | None]:
    """The documents, and how many windows their name asks for."""
    if isinstance(source, str | Path):
        name = SourceName.parse(str(source))
        return read_documents(name), name.windows
    if isinstance(source, Documents):
        return source, None
    items = [source] if isinstance(source, Tensor | Mapping) else cast(Iterable[object], source)
    return documents_of(items, "the calibration data"), None


def _order(
    documents: Documents, tokenizer: Any, lengths: WindowLengths, asked: int | None, start: tuple[int, ...]
) -> tuple[list[int], Tensor]:
    """The lengths of the windows in order, and the token ids to cut them from."""
    least, wanted = lengths.least, _wanted(lengths, asked)

    def taken(count: int) -> int:
        return sum((length - len(start)) * number for length, number in lengths.counts(count))

    ids = pack(documents, tokenizer, taken(wanted) + len(start))
    available = len(without_start(ids, start))
    count = least - 1 + bisect_right(range(least, wanted + 1), available, key=taken)
    if count < least:
        raise InputError(_too_few(documents.label, available, lengths.order(least)))
    if asked is not None and count < asked:
        enough = f"{count} window{'s' * (count > 1)}, not {asked}"
        raise InputError(f"{documents.label} has {available} tokens: {enough}; ask for {count}, or use more text")
    return lengths.order(count), ids


def _too_few(label: str, tokens: int, order: Sequence[int]) -> str:
    if len(order) == 1:
        return f"{label} has {tokens} tokens, fewer than a window of {order[0]}: use more text"
    return f"{label} has {tokens} tokens, and a window of each length takes {sum(order)}: use more text"


def _wanted(lengths: WindowLengths, asked: int | None) -> int:
    return max(WINDOWS, lengths.least) if asked is None else asked


def _window_lengths(length: int | Sequence[int], like: object, tokenizer: Any, start: tuple[int, ...]) -> WindowLengths:
    lengths = WindowLengths.of(length) if like is None else _lengths_like(like, tokenizer, start)
    for each in lengths.lengths:
        check_length(each, start)
        check_number("length is the tokens of a window", each)
    return lengths


def _lengths_like(like: object, tokenizer: Any, start: tuple[int, ...]) -> WindowLengths:
    """The lengths of a task's own lines, with the start tokens."""
    if isinstance(like, str | Path):
        path = Path(like)
        if path.suffix == ".txt":
            documents = documents_of((line for line in read_text(path).splitlines() if line.strip()), str(path))
        else:
            documents = documents_of(read_lines(path), str(path)) if path.suffix == ".jsonl" else _opened(like)[0]
    else:
        documents = documents_of([like] if isinstance(like, Mapping | Tensor) else cast(Iterable[object], like), "like")
    counts = [count + len(start) for count in count_tokens(documents, tokenizer) if count]
    if not counts:
        raise InputError(f"{documents.label} has no tokens, and so no lengths to take")
    return WindowLengths.like([max(count, len(start) + 1) for count in counts])


def _batches(windows: Iterable[Tensor]) -> list[WeightedBatch]:
    """Windows `[1, length]` of one length together, about 2048 tokens, in the order in which a batch is full.

    weight: the mean length over the batch's: all windows count alike, and a token 1 on average.
    """
    windows = list(windows)
    tokens = sum(window.shape[1] for window in windows)
    piles: dict[int, list[Tensor]] = {}
    full: list[Tensor] = []
    for window in windows:
        pile = piles.setdefault(window.shape[1], [])
        pile.append(window)
        if len(pile) >= max(1, _BATCH_TOKENS // window.shape[1]):
            full.append(torch.cat(piles.pop(window.shape[1])))
    full += [torch.cat(pile) for pile in piles.values()]
    return [WeightedBatch({"input_ids": ids}, tokens / (len(windows) * ids.shape[1])) for ids in full]
