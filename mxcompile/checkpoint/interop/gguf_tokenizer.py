"""A transformers tokenizer -> the `tokenizer.ggml.*` entries of a GGUF file, from which llama.cpp tokenizes alike.

    byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) -> model "gpt2": tokens, merges, and the pre-tokenizer's name
    BPE with byte fallback (Llama 2, Mistral)     -> model "llama", as SentencePiece has it: tokens and scores

    any other -> model "no_vocab", with which llama.cpp runs on token ids, and the tokenizer.json as a whole

What a tokenizer does is read from its serialized pipeline, not from its class or the model's name, and a pipeline that
llama.cpp does not have gets no similar name. llama.cpp does not normalize text to NFC, as Qwen's tokenizers do.
Source of the entries: ggml's docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from mxcompile.checkpoint.interop import gguf_pretokenizers
from mxcompile.errors import CheckpointError

SPACE: Final = "▁"
"""What stands for a space in the tokens of SentencePiece."""
NO_VOCABULARY: Final = "no_vocab"
"""The `tokenizer.ggml.model` of a file that llama.cpp runs on token ids alone."""
WHOLE: Final = "tokenizer.huggingface.json"
"""The entry that ggml's docs/gguf.md has for a tokenizer.json as a whole; llama.cpp does not read it."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # gguf.TokenType
_BYTE_TOKEN: Final = re.compile("<0x[0-9A-F]{2}>")
_ID_KINDS: Final = ("bos", "eos", "unk", "sep", "pad", "mask")
_EXTRA_ENDS: Final = ("eot", "eom")
_SHORTENED: Final = 200


@dataclass(frozen=True)
class _Pieces:
    """How text becomes pieces. pre: llama.cpp's name of the pre-tokenizer. scores: of the tokens, for SentencePiece.

    space_prefix: whether text begins with a space that is not there.
    """

    model: str
    pre: str
    scores: Mapping[str, float] | None = None
    space_prefix: bool | None = None


class TokenizerEntries:
    """The entries of a tokenizer, None for no tokenizer, for a model with an embedding of `rows` rows.

    reasons: why llama.cpp cannot use the tokenizer, empty if it can. notes: what it will do otherwise.
    """

    def __init__(self, tokenizer: Any, rows: int) -> None:
        self.tokenizer, self.rows = tokenizer, rows
        self.reasons: list[str] = []
        self.notes: list[str] = []
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._json: str | None = None if backend is None else backend.to_str()
        if self._json is None:
            self.reasons.append(
                "it holds no tokenizer: save with tokenizer="
                if tokenizer is None
                else f"a {type(tokenizer).__name__} has no pipeline of the tokenizers package: pass a fast tokenizer"
            )
            return
        self._pipeline: dict[str, Any] = json.loads(self._json)
        self._added = {token["id"]: token for token in self._pipeline["added_tokens"]}
        vocabulary = cast(dict[str, int], tokenizer.get_vocab())
        self._texts = {number: text for text, number in vocabulary.items()}
        self._check_tokens()
        self._pieces = self._find_pieces()
        self._added_ends = self._find_added_ends()

    def sentences(self) -> list[str]:
        """What to tell about a file with these entries."""
        if not self.reasons:
            return self.notes
        return [f"llama.cpp takes and returns token ids only, no text ({'; '.join(self.reasons)})"]

    def add_to(self, writer: Any, model_ids: Mapping[str, Any]) -> None:
        """Add the entries to a GGUFWriter. model_ids: special token ids that the model's configuration states."""
        own = {kind: getattr(self.tokenizer, f"{kind}_token_id", None) for kind in _ID_KINDS}
        if self.reasons:
            writer.add_tokenizer_model(NO_VOCABULARY)
            if self._json is not None:
                writer.add_string(WHOLE, self._json)
        else:
            self._add_vocabulary(writer)
        _add_ids(writer, own, model_ids, self.rows)
        template = getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in cast(dict[str, str], template).items()]
        if template:
            writer.add_chat_template(template)

    def _add_vocabulary(self, writer: Any) -> None:
        pieces, added_ends, (tokens, types) = self._pieces, self._added_ends, self._tokens()
        if pieces is None or added_ends is None:
            raise CheckpointError("; ".join(self.reasons))
        writer.add_tokenizer_model(pieces.model)
        writer.add_tokenizer_pre(pieces.pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        if pieces.scores is None:
            writer.add_token_merges([" ".join(pair) for pair in self._merges()])
        else:
            lowest = float(-len(pieces.scores) - 1)
            writer.add_token_scores([pieces.scores.get(token, lowest) for token in tokens])
        if pieces.space_prefix is not None:
            writer.add_add_space_prefix(pieces.space_prefix)
        writer.add_add_bos_token(added_ends[0])
        writer.add_add_eos_token(added_ends[1])

    def _check_tokens(self) -> None:
        if max(self._texts) >= self.rows:
            self.reasons.append(
                f"the tokenizer has token ids up to {max(self._texts)}, the model's embedding has {self.rows} rows"
            )
        tokens = self._tokens()[0]
        if "" in tokens or len(set(tokens)) != len(tokens):
            self.reasons.append("the tokenizer has an empty token, or two that llama.cpp could not tell apart")
        strips = [t["content"] for t in self._added.values() if t["lstrip"] or t["rstrip"] or t["single_word"]]
        if strips:
            self.notes.append(
                f"llama.cpp does not look at what stands around {_shortened(', '.join(strips))} (lstrip, rstrip, "
                "single_word)"
            )

    def _tokens(self) -> tuple[list[str], list[int]]:
        """The text and type of every row of the embedding; rows without a token are unused."""
        tokens: list[str] = []
        types: list[int] = []
        is_byte_fallback = bool(self._pipeline["model"].get("byte_fallback"))
        for number in range(self.rows):
            text, added = self._texts.get(number), self._added.get(number)
            if text is None:
                tokens.append(f"[PAD{number}]")
                types.append(_UNUSED)
            elif added is not None:
                as_typed = is_byte_fallback and added["normalized"] and not added["special"]
                tokens.append(text.replace(SPACE, " ") if as_typed else text)
                types.append(_CONTROL if added["special"] else _USER_DEFINED)
            else:
                tokens.append(text)
                types.append(_BYTE if is_byte_fallback and _BYTE_TOKEN.fullmatch(text) else _NORMAL)
        return tokens, types

    def _find_pieces(self) -> _Pieces | None:
        model = self._pipeline["model"]
        simple = not (model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        if model["type"] != "BPE" or not simple:
            self.reasons.append(
                f"the tokenizer is a {model['type']}{'' if simple else ' with dropout or affixes'}, which mxcompile "
                "cannot describe to llama.cpp; it describes byte-level BPE and SentencePiece's BPE"
            )
            return None
        if any(" " in part for pair in self._merges() for part in pair):
            self.reasons.append("the tokenizer has tokens with spaces, which llama.cpp cannot merge")
            return None
        return self._sentencepiece() if model.get("byte_fallback") else self._byte_level()

    def _byte_level(self) -> _Pieces | None:
        normalizers = gguf_pretokenizers.flat(self._pipeline["normalizer"], "normalizers")
        pre = gguf_pretokenizers.by_json(
            self._pipeline["pre_tokenizer"], bool(self._pipeline["model"].get("ignore_merges"))
        )
        others = [step["type"] for step in normalizers if step["type"] != "NFC"]
        if others:
            self.reasons.append(f"llama.cpp cannot normalize text as the tokenizer does ({', '.join(others)})")
        if pre is None:
            self.reasons.append(
                "llama.cpp has no name for the way in which the tokenizer splits text, and with a wrong one it would "
                f"produce other tokens: {_shortened(json.dumps(self._pipeline['pre_tokenizer'], ensure_ascii=False))}"
                + (" with ignore_merges" if self._pipeline["model"].get("ignore_merges") else "")
            )
        elif pre.note is not None:
            self.notes.append(pre.note)
        return None if others or pre is None else _Pieces("gpt2", pre.names[0])

    def _sentencepiece(self) -> _Pieces | None:
        normalizers = gguf_pretokenizers.flat(self._pipeline["normalizer"], "normalizers")
        prefix = _space_prefix(normalizers, gguf_pretokenizers.flat(self._pipeline["pre_tokenizer"], "pretokenizers"))
        if prefix is None:
            steps = [self._pipeline[key] for key in ("normalizer", "pre_tokenizer")]
            self.reasons.append(
                "llama.cpp cannot prepare text as the tokenizer does: "
                f"{_shortened(json.dumps(steps, ensure_ascii=False))}"
            )
        elif prefix in ("always", "first"):
            after = ", and before text that follows a special token" if prefix == "first" else ""
            self.notes.append(
                f"llama.cpp puts a space before a text even if it begins with one{after}, which the tokenizer does not"
            )
        scores = self._scores()
        if scores is None:
            self.reasons.append(
                "the tokenizer's merges cannot be expressed as scores of its tokens, which is what llama.cpp merges by"
            )
        return None if prefix is None or scores is None else _Pieces("llama", "default", scores, prefix != "never")

    def _scores(self) -> dict[str, float] | None:
        """A score for each token that a merge makes, the first merge's the highest.

        Tokens whose merges take turns had the same score in SentencePiece, and have it again. None if a way to make a
        token of two is missing: llama.cpp would take it all the same.
        """
        merges = self._merges()
        last = {left + right: position for position, (left, right) in enumerate(merges)}
        scores: dict[str, float] = {}
        score, until = 1.0, -1
        for position, (left, right) in enumerate(merges):
            if position > until and left + right not in scores:
                score -= 1.0
            scores.setdefault(left + right, score)
            until = max(until, last[left + right])
        pairs, normal = set(merges), {self._texts[n] for n in self._texts if n not in self._added}
        for token in normal:
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            if any(left in normal and right in normal and (left, right) not in pairs for left, right in splits):
                return None
        return scores

    def _merges(self) -> list[tuple[str, str]]:
        merges = self._pipeline["model"].get("merges", [])
        return [cast(Any, tuple(pair.split(" ", 1) if isinstance(pair, str) else pair)) for pair in merges]

    def _find_added_ends(self) -> tuple[bool, bool] | None:
        """Whether the tokenizer adds a first and a last token to a text."""
        tokenizer = self.tokenizer
        bare = list(tokenizer("a", add_special_tokens=False).input_ids)
        whole = list(tokenizer("a").input_ids)
        for first in range(len(whole) - len(bare) + 1):
            start, end = whole[:first], whole[first + len(bare) :]
            known = start in ([], [tokenizer.bos_token_id]) and end in ([], [tokenizer.eos_token_id])
            if whole[first : first + len(bare)] == bare and known:
                return bool(start), bool(end)
        self.reasons.append(f"llama.cpp cannot put the tokens around a text that the tokenizer puts there: {whole}")
        return None


def _add_ids(writer: Any, own: Mapping[str, Any], model_ids: Mapping[str, Any], rows: int) -> None:
    """Add the ids of special tokens: the tokenizer's own, and where it has none the model's.

    Further tokens at which the model stops are written as llama.cpp's "end of turn" and "end of message".
    """
    stated = {kind: _token_ids(model_ids.get(f"{kind}_token_id"), rows) for kind in _ID_KINDS}
    ids = {kind: (*_token_ids(own[kind], rows), *stated[kind])[:1] for kind in _ID_KINDS}
    ends = [(number,) for number in stated["eos"] if number not in ids["eos"]]
    for kind, numbers in (*ids.items(), *zip(_EXTRA_ENDS, ends, strict=False)):
        for number in numbers:
            getattr(writer, f"add_{kind}_token_id")(number)


def _token_ids(stated: Any, rows: int) -> list[int]:
    """The ids of tokens that a configuration states under a key: one, several or none."""
    numbers = cast(list[Any], stated) if isinstance(stated, list) else [stated]
    return [number for number in numbers if isinstance(number, int) and 0 <= number < rows]


def _space_prefix(normalizers: list[dict[str, Any]], pre_tokenizers: list[dict[str, Any]]) -> str | None:
    """When text gets a space in front: "every" time or "never"; if it has none yet, "always" or the "first" time.

    None if text is changed in another way.
    """
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Prepend", "prepend": SPACE}
    no_effect = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if not normalizers and len(pre_tokenizers) == 1:
        (step,) = pre_tokenizers
        is_whole = step.get("type") == "Metaspace" and step.get("replacement") == SPACE and not step.get("split", True)
        return str(step.get("prepend_scheme", "always")) if is_whole else None
    if any(step != no_effect for step in pre_tokenizers):
        return None
    if normalizers == [replaces]:
        return "never"
    return "every" if normalizers == [prepends, replaces] else None


def _shortened(text: str) -> str:
    return text if len(text) <= _SHORTENED else f"{text[:_SHORTENED]} ..."
