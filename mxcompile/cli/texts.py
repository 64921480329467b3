"""Texts to evaluate and calibrate on: as a string, as token ids, and as windows of token ids."""

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

from mxcompile.diagnostics.evaluation import token_windows
from mxcompile.errors import InputError

HELP_TOPICS = "Python's help topics"
CALIBRATION_LENGTH = 512
_CALIBRATION_BATCH = 4


def help_text() -> str:
    """English text that comes with Python: the help topics of the standard library, about half a megabyte."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def read_text(path: Path) -> str:
    """A text file, or the "text" fields of a .jsonl file, joined by empty lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
    return "\n\n".join(_documents(path, text)) if path.suffix == ".jsonl" else text


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """`[tokens]`, without special tokens."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


def text_windows(name: str, ids: Tensor, length: int, count: int, tokenizer: Any = None) -> list[Tensor]:
    """The first `count` windows `[1, length]` of token ids `[tokens]`, all for 0; raises InputError if there is none.

    name: of the text, for the error. tokenizer: each window begins with what it puts before a text; None: with no more.
    """
    windows = list(token_windows(ids, length, count or None, tokenizer=tokenizer))
    if not windows:
        raise InputError(f"{name} has {ids.numel()} tokens, fewer than a window of {length}: use more text")
    return windows


def calibration_batches(windows: list[Tensor]) -> list[Tensor]:
    """Batches `[4, length]` of windows `[1, length]`, the last one maybe smaller."""
    starts = range(0, len(windows), _CALIBRATION_BATCH)
    return [torch.cat(windows[start : start + _CALIBRATION_BATCH]) for start in starts]


def _documents(path: Path, lines: str) -> Iterator[str]:
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{path}, line {number}: not a JSON object with a "text"') from error
