"""Texts to evaluate on: as a string, and as windows of token ids."""

from pathlib import Path
from pydoc_data import topics
from typing import Any

from torch import Tensor

from mxcompile.calibration.data import sources
from mxcompile.calibration.data.windows import token_windows
from mxcompile.errors import InputError

HELP_TOPICS = "Python's help topics"


def help_text() -> str:
    """English text that comes with Python: the help topics of the standard library, about half a megabyte."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def read_text(path: Path) -> str:
    """A text file, or the texts of a .jsonl file, joined by empty lines."""
    if path.suffix != ".jsonl":
        return sources.read_text(path)
    documents = list(sources.read_lines(path))
    if any(not isinstance(document, str) for document in documents):
        raise InputError(f'{path}: a text to evaluate on is a .txt file or a .jsonl file of {{"text": ...}}, no chats')
    return "\n\n".join(map(str, documents))


def text_windows(name: str, ids: Tensor, length: int, count: int, tokenizer: Any = None) -> list[Tensor]:
    """The first `count` windows `[1, length]` of token ids `[tokens]`, all for 0; raises InputError if there is none.

    name: of the text, for the error. tokenizer: each window begins with what it puts before a text; None: with no more.
    """
    windows = list(token_windows(ids, length, count or None, tokenizer=tokenizer))
    if not windows:
        raise InputError(f"{name} has {ids.numel()} tokens, fewer than a window of {length}: use more text")
    return windows
