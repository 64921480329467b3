"""Text to evaluate and to calibrate on, as a string and as token ids."""

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

from torch import Tensor

from mxcompile.errors import InputError


def help_text() -> str:
    """Real English that every Python carries: the help topics of the standard library, about half a megabyte."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def read_text(path: Path) -> str:
    """A text file, or the "text" of every line of a .jsonl file, with an empty line between them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
    return "\n\n".join(_documents(path, text)) if path.suffix == ".jsonl" else text


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """`[tokens]`, without special tokens."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


def _documents(path: Path, lines: str) -> Iterator[str]:
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{path}, line {number}: not a JSON object with a "text"') from error
