"""Small tokenizers of the kinds that models have, and texts that tell them apart."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mxcompile.checkpoint.interop.gguf_pretokenizers import PreTokenizer

PROSE = "The capital of France is Paris. In 2024 it's 1234567 people, they'LL say; don't WORRY about HTTPServer. "
CODE = "def f(x):\n\treturn x+=1 if x!=None else {'a':[1,2,3]}  # why\r\n\r\n   indent\n\n\n\nend"
OTHER = (
    "¿Qué? naïve Größe 漢字かなカナ 한국어 русский العربية हिन्दी "
    "\U0001f600 a\u0301 \u00a0x  \t\ttabs «q» x² ½ ٣٤ camelCase\n  \n \n"
)
TEXTS = (PROSE, CODE, OTHER, " leading", "trailing ", "\n", "  ", "a<|end|>b <|end|> c<mark>d", "")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_level(pre: PreTokenizer, *, adds_bos: bool = False, size: int = 420) -> Any:
    """A byte-level BPE tokenizer of transformers behind a pre-tokenizer, with two special tokens and an added one."""
    backend = _with(Tokenizer(models.BPE()), pre_tokenizer=pre.to_json())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([PROSE, CODE, OTHER] * 3, trainer)
    model = json.loads(backend.to_str())["model"] | {"ignore_merges": pre.ignore_merges}
    backend = _with(backend, model=model, decoder=json.loads(decoders.ByteLevel().__getstate__()))
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    backend.add_tokens([AddedToken("<mark>", normalized=False)])
    return of_transformers(backend, adds_bos, bos_token="<|start|>", eos_token="<|end|>")


def sentencepiece(*, adds_bos: bool = True) -> Any:
    """A tokenizer as SentencePiece's BPE becomes one of transformers: byte fallback, all ways to merge a piece."""
    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.Metaspace()
    text.train_from_iterator([PROSE * 3], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(text.to_str())["model"]
    letters = [token for token in learned["vocab"] if len(token) == 1]
    made = [*dict.fromkeys("".join(pair) for pair in learned["merges"]), "▁▁", "▁▁▁▁"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made, *letters]
    known = {*made, *letters}
    splits = [[(token[:i], token[i:]) for i in range(1, len(token))] for token in made]
    merges = [pair for token in splits for pair in token if known.issuperset(pair)]
    prepare = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    restore = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = _with(
        Tokenizer(models.BPE()),
        model={"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": True, "fuse_unk": True},
        normalizer={"type": "Sequence", "normalizers": prepare},
        decoder={"type": "Sequence", "decoders": restore},
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return of_transformers(backend, adds_bos, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def of_transformers(backend: Tokenizer, adds_bos: bool, **special: str) -> Any:
    """The tokenizer of transformers on a pipeline, with a chat template."""
    if adds_bos:
        first, number = special["bos_token"], backend.token_to_id(special["bos_token"])
        template = {"type": "TemplateProcessing", "special_tokens": {first: _special(first, number)}}
        parts = [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        other = {"Sequence": {"id": "B", "type_id": 1}}
        backend = _with(backend, post_processor=template | {"single": parts, "pair": [*parts, other]})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _special(token: str, number: int) -> dict[str, Any]:
    return {"id": token, "ids": [number], "tokens": [token]}


def _with(backend: Tokenizer, **stages: Any) -> Tokenizer:
    """The pipeline with other stages, as they are serialized."""
    return Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | stages))
