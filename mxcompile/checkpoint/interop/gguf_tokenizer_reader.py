"""The `tokenizer.ggml.*` entries of a GGUF file -> a transformers tokenizer that tokenizes as llama.cpp does.

    model "gpt2", pre "llama-bpe" -> BPE with those merges, behind the patterns that the name stands for
    model "llama"                 -> BPE with byte fallback, its merges in the order of the tokens' scores

transformers reads GGUF files too, but not the name of the pre-tokenizer: numbers and contractions come out differently.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mxcompile.checkpoint.interop.gguf_file import GGUFFile
from mxcompile.checkpoint.interop.gguf_pretokenizers import PreTokenizer, by_name
from mxcompile.checkpoint.interop.gguf_tokenizer import NO_VOCABULARY, SPACE, WHOLE
from mxcompile.errors import CheckpointError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_NONE: Final = (None, NO_VOCABULARY, "none")
_IDS: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
Pair = tuple[str, str]


def load(path: Path) -> Any:
    """The tokenizer of a file, None if it holds none. Raises CheckpointError if it is of a kind not known here."""
    file = GGUFFile(path)
    whole = file.metadata.get(WHOLE)
    if isinstance(whole, str):
        return _of_transformers(file, _backend(path, whole))
    model, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model in _NONE:
        return None
    tokens = file.array("tokenizer.ggml.tokens", str)
    if tokens is None or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path} has a tokenizer without tokens, or with one twice: copy it again")
    types = file.array("tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{path} has {len(tokens)} tokens with {len(types)} types: copy it again")
    known = by_name(str(pre)) if model == "gpt2" else None
    if known is not None:
        pipeline = _byte_level(file, tokens, types, known)
    elif model == "llama":
        pipeline = _sentencepiece(file, tokens, types)
    else:
        raise CheckpointError(
            f"{path} has a tokenizer {model!r} with the pre-tokenizer {pre!r}, which mxcompile does not read: use "
            "one of transformers"
        )
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
    backend = _backend(path, json.dumps(content | pipeline))
    _add_special(backend, tokens, types)
    first, last = (file.metadata.get(f"tokenizer.ggml.add_{kind}_token") for kind in ("bos", "eos"))
    first = (known is None or known.adds_bos) if first is None else first
    special = _special_tokens(file, backend)
    _surround(backend, special.get("bos_token") if first else None, special.get("eos_token") if last else None)
    return _of_transformers(file, backend)


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int], known: PreTokenizer) -> dict[str, Any]:
    merges = [tuple(merge.split(" ", 1)) for merge in file.array("tokenizer.ggml.merges", str) or []]
    own = {text: number for number, text in enumerate(tokens) if types[number] != _UNUSED}
    return {
        "model": {"type": "BPE", "vocab": own, "merges": merges, "ignore_merges": known.ignore_merges},
        "normalizer": None,
        "pre_tokenizer": known.to_json(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = file.array("tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{file.path} has a tokenizer without scores for its tokens: copy it again")
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    own = {text: number for number, text in enumerate(tokens) if types[number] != _UNUSED}
    normal = {text: number for text, number in own.items() if types[number] == _NORMAL}
    to_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "model": {
            "type": "BPE",
            "vocab": own,
            "merges": _merges(normal, scores),
            "fuse_unk": True,
            "byte_fallback": True,
        },
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, to_space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders + strip},
    }


def _merges(tokens: dict[str, int], scores: Sequence[float]) -> list[Pair]:
    """Every way to make a token of two, those of the token with the highest score first."""
    merges: list[Pair] = []
    for token, _ in sorted(tokens.items(), key=lambda item: -scores[item[1]]):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in tokens and pair[1] in tokens]
        merges += sorted(known, key=lambda pair: (tokens[pair[0]], tokens[pair[1]]))
    return merges


def _of_transformers(file: GGUFFile, backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    special = _special_tokens(file, backend)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = _chat_template(file)
    return tokenizer


def _special_tokens(file: GGUFFile, backend: Any) -> dict[str, str]:
    """The special tokens that the file states the ids of, by transformers' names."""
    special: dict[str, str] = {}
    for kind, name in _IDS.items():
        number = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        text = backend.id_to_token(number) if isinstance(number, int) and number >= 0 else None
        if text is not None:
            special[f"{kind}_token"] = text
    return special


def _backend(path: Path, pipeline: str) -> Any:
    """The pipeline of a tokenizer.json as an object of the tokenizers package."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(pipeline)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{path} has a tokenizer that cannot be built: {error}") from error


def _add_special(backend: Any, tokens: list[str], types: list[int]) -> None:
    """Have special tokens found in a text before anything else."""
    from tokenizers import AddedToken

    of_type = {kind: [text for text, own in zip(tokens, types, strict=True) if own == kind] for kind in set(types)}
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in of_type.get(_CONTROL, [])])
    backend.add_tokens([AddedToken(text, normalized=False) for text in of_type.get(_USER_DEFINED, [])])


def _surround(backend: Any, first: str | None, last: str | None) -> None:
    """Put these tokens before and after every text."""
    from tokenizers.processors import TemplateProcessing

    present = [token for token in (first, last) if token is not None]
    if present:
        one, other = (" ".join(filter(None, (first, f"{name}", last))) for name in ("$A", "$B:1"))
        numbers = [(token, backend.token_to_id(token)) for token in dict.fromkeys(present)]
        backend.post_processor = TemplateProcessing(single=one, pair=f"{one} {other}", special_tokens=numbers)


def _chat_template(file: GGUFFile) -> str | dict[str, str] | None:
    default = file.metadata.get("tokenizer.chat_template")
    names = file.array("tokenizer.chat_templates", str)
    if not names:
        return default
    templates = {name: file.metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    return {name: str(text) for name, text in ({"default": default} | templates).items() if text is not None}
