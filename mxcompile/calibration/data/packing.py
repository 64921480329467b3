"""Documents one after the other as token ids, of which windows are cut: texts with an empty line between them.

text, text   -> tokens of "text\\n\\ntext"          chat -> tokens of the chat template's text          ids -> ids
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mxcompile.calibration.data.chats import chat_text, is_chat
from mxcompile.calibration.data.sources import Document, Documents, TokenizedText
from mxcompile.calibration.data.windows import token_ids
from mxcompile.errors import InputError

_CHARACTERS, _SLACK = (
    16,
    64,
)  # a token has about four characters; tokens at the end of a text may depend on what follows


def pack(documents: Documents, tokenizer: Any, needed: int | None = None) -> Tensor:
    """`[tokens]`: of as many documents as `needed` tokens take, which the caller cuts off; of all for None.

    Raises InputError for a chat without a chat template, and for token ids that the tokenizer does not have.
    """
    pieces = _pieces(documents, tokenizer)
    taken: list[str | Tensor] = []
    characters, limit = 0, None if needed is None else _CHARACTERS * (needed + _SLACK)
    for piece in pieces:
        taken.append(piece)
        characters += len(piece) * (1 if isinstance(piece, str) else _CHARACTERS)
        while needed is not None and limit is not None and characters >= limit:
            ids = _joined(_cut(taken, limit), tokenizer)
            if len(ids) >= needed + _SLACK:
                return ids
            limit *= 2
    return _joined(taken, tokenizer)


def _cut(pieces: Sequence[str | Tensor], limit: int) -> list[str | Tensor]:
    """The first pieces, up to so many characters; a tensor counts as the text of its tokens, and stays whole."""
    cut: list[str | Tensor] = []
    for piece in pieces:
        cut.append(piece[: max(0, limit)] if isinstance(piece, str) else piece)
        limit -= len(piece) * (1 if isinstance(piece, str) else _CHARACTERS)
    return cut


def count_tokens(documents: Documents, tokenizer: Any) -> list[int]:
    """The number of tokens of every document alone."""
    texts = _pieces(documents, tokenizer)
    return [len(_joined([piece], tokenizer)) for piece in texts]


def _pieces(documents: Documents, tokenizer: Any) -> Iterator[str | Tensor]:
    """Texts and token ids `[tokens]`; one behind a text begins with an empty line."""
    behind_text = False
    for number, document in enumerate(documents.items, start=1):
        place = f"{documents.label}, document {number}"
        is_text = isinstance(document, str)
        if isinstance(document, TokenizedText) and tokenizer.decode(document.ids) == document:
            yield torch.tensor(document.ids)
            is_text = False
        elif isinstance(document, str):
            yield "\n\n" * behind_text + document
        elif is_chat(document):
            yield "\n\n" * behind_text + chat_text(cast(Any, document), tokenizer, place)
        else:
            yield _checked_ids(document, tokenizer, place)
        behind_text = is_text


def _checked_ids(document: Document, tokenizer: Any, place: str) -> Tensor:
    ids = torch.as_tensor(cast(Sequence[int], document), dtype=torch.int64)
    size = len(tokenizer)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise InputError(
            f"{place} has token ids from {int(ids.min())} to {int(ids.max())}, and the tokenizer has {size} tokens: "
            "they were made by another tokenizer"
        )
    return ids


def _joined(pieces: Sequence[str | Tensor], tokenizer: Any) -> Tensor:
    """All token ids; texts that follow each other are split into tokens as one text."""
    parts: list[Tensor] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        parts += [token_ids(tokenizer, text)] if text else []
        parts.append(piece)
        text = ""
    parts += [token_ids(tokenizer, text)] if text or not parts else []
    return torch.cat([part.to(torch.int64).cpu() for part in parts])
