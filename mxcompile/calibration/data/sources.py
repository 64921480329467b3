"""Documents to calibrate on: of a text file, a .jsonl or .parquet file, or a data set of Hugging Face `datasets`.

    FILE_OR_NAME[:split][:windows]    c4.jsonl, chats.parquet:64, owner/name:train:128, owner/name/config

A row is a document by the first of these columns that it has:

    input_ids                    token ids, as they are
    messages, conversations      a chat, for the tokenizer's chat template
    text, prompt                 a text, or a chat

A text file is one document. `datasets` reads folders and names of the hub; .parquet files need pyarrow.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final, cast

from torch import Tensor

from mxcompile.calibration.data import datasets_reader
from mxcompile.calibration.data.chats import is_chat
from mxcompile.errors import InputError

COLUMNS: Final = ("input_ids", "messages", "conversations", "text", "prompt")
_NOT_TEXT: Final = frozenset({".json", ".csv", ".tsv", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz", ".safetensors"})
Document = str | Sequence[int] | Sequence[Mapping[str, Any]] | Tensor


@dataclass(frozen=True)
class SourceName:
    """A source as it is written: `FILE_OR_NAME[:split][:windows]`. windows: how many to take; None: not said."""

    name: str
    split: str | None = None
    windows: int | None = None

    @classmethod
    def parse(cls, text: str) -> "SourceName":
        """The longest part before a colon that is a file or folder is the name, else the part before the first."""
        parts = text.split(":")
        names = (":".join(parts[:count]) for count in range(len(parts), 0, -1))
        name = next((name for name in names if name and Path(name).exists()), parts[0])
        rest = parts[name.count(":") + 1 :]
        windows = int(rest.pop()) if rest and rest[-1].isdecimal() else None
        if not name or windows == 0 or "" in rest:
            raise InputError(f"{text!r} is no calibration source: write FILE_OR_NAME[:split][:windows]")
        return cls(name, ":".join(rest) or None, windows)

    @property
    def label(self) -> str:
        """The source in messages and records: a file without its folder."""
        name = Path(self.name).name if Path(self.name).exists() else self.name
        return name if self.split is None else f"{name}:{self.split}"


@dataclass(frozen=True)
class Documents:
    """Documents, read as they are asked for, and what their source is called in messages."""

    label: str
    items: Iterable[Document]


def read_documents(source: SourceName) -> Documents:
    """The documents of a source. The first is read at once, so that what is wrong with the source is said at once.

    Raises InputError if the source does not exist, cannot be read, is not UTF-8, is empty, or has none of the columns.
    """
    return documents_of(_documents(source), source.label)


def documents_of(items: Iterable[object], label: str) -> Documents:
    """Documents from Python: each a text, token ids, the messages of a chat, or a row with one of the columns.

    Raises InputError if there is none, or one is something else.
    """
    documents = (document_of(item, f"{label}, document {number}") for number, item in enumerate(items, start=1))
    first = next(documents, None)
    if first is None:
        raise InputError(f"{label} is empty: there is nothing to calibrate on")
    return Documents(label, chain([first], documents))


def shuffled(documents: Documents, seed: int) -> Documents:
    """The documents in another order; the paragraphs of a single text. All are read."""
    items = list(documents.items)
    if len(items) == 1 and isinstance(items[0], str):
        items = [part for part in items[0].split("\n\n") if part.strip()]
    random.Random(seed).shuffle(items)
    return Documents(f"{documents.label}, seed {seed}", items)


def document_of(item: object, place: str) -> Document:
    """A row's document, or the item itself if it is one; raises InputError, which names the place, if it is none."""
    if isinstance(item, Mapping):
        row = cast(Mapping[str, Any], item)
        column = next((name for name in COLUMNS if row.get(name) is not None), None)
        if column is None:
            raise InputError(f"{place} {_without(row)}")
        item, place = row[column], f"{place}, {column}"
        if column == "input_ids" and isinstance(row.get("text"), str):
            return TokenizedText(row["text"], cast(Sequence[int], item))
    if isinstance(item, str | TokenizedText) or _are_ids(item) or is_chat(item):
        return cast(Document, item)
    raise InputError(f"{place}: a document is a text, token ids or the messages of a chat, not {_described(item)}")


class TokenizedText(str):
    """A text and the token ids that it was made from, which are used where they are the tokenizer's for that text."""

    ids: Sequence[int]

    def __new__(cls, text: str, ids: Sequence[int]) -> "TokenizedText":
        """text: of the tokens. ids: as a tokenizer decodes them to the text."""
        made = super().__new__(cls, text)
        made.ids = list(ids)
        return made

    def __getnewargs__(self) -> tuple[str, Sequence[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """For pickle, with which processes exchange it."""
        return str(self), self.ids


def read_text(path: Path) -> str:
    """A UTF-8 file as text; raises InputError if it cannot be read as such."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error


def read_lines(path: Path) -> Iterator[Document]:
    """The documents of a .jsonl file, one a line; raises InputError, which names the line, if it holds none."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield document_of(_object(line, f"{path}, line {number}"), f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error


def _documents(source: SourceName) -> Iterator[object]:
    path = Path(source.name)
    if not path.is_file():
        yield from datasets_reader.rows(source.name, source.split)
        return
    if source.split is not None:
        raise InputError(f"{path} is one file, which has no splits: leave out :{source.split}")
    if path.suffix in _NOT_TEXT:
        raise InputError(f"{path}: calibration reads .txt, .jsonl and .parquet files, not {path.suffix}")
    if path.suffix == ".jsonl":
        yield from read_lines(path)
    elif path.suffix == ".parquet":
        yield from datasets_reader.parquet_rows(path, COLUMNS)
    elif (text := read_text(path)).strip():
        yield text


def _object(line: str, place: str) -> Mapping[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not a JSON object ({error})") from error
    if not isinstance(content, Mapping):
        raise InputError(f'{place}: not a JSON object with a "text" or "messages"')
    return cast(Mapping[str, Any], content)


def _without(row: Mapping[str, Any]) -> str:
    return f"has no column {', '.join(COLUMNS[1:-1])} or {COLUMNS[-1]}: it has {', '.join(map(str, row)) or 'none'}"


def _are_ids(item: object) -> bool:
    if isinstance(item, Tensor):
        return item.dim() == 1 and not item.is_floating_point() and not item.is_complex()
    return isinstance(item, Sequence) and all(type(value) is int for value in cast(Sequence[object], item))


def _described(item: object) -> str:
    if isinstance(item, Tensor):
        return f"{str(item.dtype).removeprefix('torch.')} {list(item.shape)}"
    return f"a {type(item).__name__}"
