"""Calibration text that the model writes itself, where no text like its training data is at hand.

The recipe of LLM-QAT (Liu et al., arXiv 2305.17888): a first token from the vocabulary, the next three greedy, so that
the beginning makes sense, the rest sampled at temperature 1. A text ends where the model ends it, and the next begins.

First tokens are drawn without bytes and special tokens, each with a weight of 1 / (256 + its place in the vocabulary):
tokenizers learn pieces by frequency, the most frequent first, and by Zipf's law the frequency falls with the place. A
uniform draw would begin nearly all texts with rare pieces.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from mxcompile.arguments import checked
from mxcompile.atomic_files import atomic_file
from mxcompile.calibration.data.batches import LENGTH, calibration_batches
from mxcompile.calibration.data.lengths import check_number
from mxcompile.calibration.data.sources import Documents
from mxcompile.calibration.data.windows import start_tokens
from mxcompile.errors import InputError
from mxcompile.graph.inputs import WeightedBatch
from mxcompile.tensor.modules import device_of, eval_mode

_TEXTS_AT_ONCE: Final = 16
_GREEDY: Final = 3
_FLAT: Final = 256  # single characters and bytes: the first places of a vocabulary, which are not ordered by frequency
_PLAIN: Final = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}  # not the model's defaults
_GREEDILY: Final = {"do_sample": False, **_PLAIN}
_SAMPLED: Final = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **_PLAIN}


@checked
def generate_calibration(
    model: nn.Module,
    tokenizer: Any,
    windows: int = 128,
    length: int = LENGTH,
    seed: int = 0,
    *,
    out: str | Path | None = None,
) -> list[WeightedBatch]:
    """Calibration batches (as `calibration_batches` gives them) of texts that the model writes itself.

    model: a Hugging Face causal LM with `generate`, on any device. length: tokens of a window, and at most of a text.
    out: a .jsonl file for the texts, `{"text", "input_ids"}` a line; `calibration_batches(out, tokenizer)` makes the
        same batches of it.

    The same seed gives the same texts on the same kind of device; torch's own generators stay as they are. Raises
    InputError if the model cannot write, or if `out` exists.
    """
    check_number("windows is how many to write", windows)
    check_number("length is the tokens of a window", length)
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed is a whole number from 0 to 2^63 - 1, not {seed}")
    if out is not None:
        check_new(out)
    documents = generate_documents(model, tokenizer, windows * length, length, seed)
    if out is not None:
        save_documents(documents, tokenizer, out)
    own = Documents("the model's own text", documents)
    return calibration_batches(own, tokenizer, length=length, windows=windows, device=device_of(model))


def generate_documents(model: nn.Module, tokenizer: Any, tokens: int, length: int, seed: int) -> list[list[int]]:
    """Texts of at most `length` tokens that hold so many together, without what the tokenizer puts before a text.

    Raises InputError if the model has no `generate`.
    """
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"{type(model).__name__} cannot write calibration text: it has no generate method")
    start = start_tokens(tokenizer)
    length = max(length, len(start) + _GREEDY + 2)
    documents: list[list[int]] = []
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        texts = _texts(model, tokenizer, length, start)
        while sum(map(len, documents)) < tokens:
            documents.append(next(texts))
    return documents


def save_documents(documents: list[list[int]], tokenizer: Any, path: str | Path) -> None:
    """Write texts to a .jsonl file; raises InputError if it exists, has another suffix, or cannot be written."""
    check_new(path)
    lines = (json.dumps({"text": tokenizer.decode(ids), "input_ids": ids}, ensure_ascii=False) for ids in documents)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(path)) as staged:
            staged.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def check_new(path: str | Path) -> None:
    """Raise InputError if a .jsonl file with that name cannot be made."""
    if Path(path).suffix != ".jsonl":
        raise InputError(f"{path}: the model's own text is saved in a .jsonl file")
    if Path(path).exists():
        raise InputError(f"{path} exists already: calibrate on it as on any other file, or name a new one")


def _texts(model: Any, tokenizer: Any, length: int, start: tuple[int, ...]) -> Iterator[list[int]]:
    """Token ids of one text after the other, without end."""
    weights, device = _first_token_weights(tokenizer, model), device_of(model)
    ends = _end_tokens(model, tokenizer)
    unknown = range(len(tokenizer), _vocabulary(model))  # rows of the embedding that are no tokens
    suppressed = [*(getattr(model.generation_config, "suppress_tokens", None) or ()), *unknown]
    options = {"pad_token_id": min(ends, default=0), "suppress_tokens": suppressed or None}
    while True:
        first = torch.multinomial(weights, _TEXTS_AT_ONCE, replacement=True).unsqueeze(1)
        ids = torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(first), -1), first], 1).to(device)
        begun: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_GREEDY,
            min_new_tokens=_GREEDY,
            **_GREEDILY,
            **options,
        )
        mask, rest = torch.ones_like(begun), length - begun.shape[1]
        texts: Tensor = model.generate(begun, attention_mask=mask, max_new_tokens=rest, **_SAMPLED, **options)
        for text in texts.tolist():
            yield _ended(text, begun.shape[1], ends)[len(start) :]


def _ended(ids: list[int], begun: int, ends: frozenset[int]) -> list[int]:
    """Token ids up to the first that ends a text, which is one of them; the first `begun` ones are there anyway."""
    end = next((place for place, token in enumerate(ids) if place >= begun and token in ends), len(ids))
    return ids[: end + 1]


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def _first_token_weights(tokenizer: Any, model: Any) -> Tensor:
    """A weight for every token of the vocabulary, float32; 0 for special tokens and for parts of characters."""
    size = min(len(tokenizer), _vocabulary(model))
    texts: list[str] = tokenizer.batch_decode([[token] for token in range(size)])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    usable = [bool(text.strip()) and "\ufffd" not in text for text in texts]
    places = torch.arange(size, dtype=torch.float32)
    kept = torch.tensor([is_text and token not in special for token, is_text in enumerate(usable)])
    if not kept.any():
        raise InputError("the tokenizer has no token that a text could begin with")
    return torch.where(kept, 1 / (_FLAT + places), 0.0)
