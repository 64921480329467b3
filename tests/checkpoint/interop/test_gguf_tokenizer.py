"""Tokenizers in GGUF files: what is stated of them, read back to the same tokens; what llama.cpp cannot do is said."""

import json
import re

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vocabularies import TEMPLATE, TEXTS, byte_level, of_transformers, sentencepiece

from mxcompile.checkpoint import read_gguf_tokenizer
from mxcompile.checkpoint.interop.gguf_pretokenizers import PRE_TOKENIZERS, by_name
from mxcompile.checkpoint.interop.gguf_tokenizer import TokenizerEntries
from mxcompile.errors import CheckpointError

gguf = pytest.importorskip("gguf", reason="install the test extra")


def write(path, tokenizer, rows=None, model_ids=None, change=lambda writer: None):
    """A file with a tokenizer and nothing else; returns its entries as sentences and as values."""
    entries = TokenizerEntries(tokenizer, rows or len(tokenizer))
    writer = gguf.GGUFWriter(path, "llama")
    entries.add_to(writer, model_ids or {})
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return entries.sentences(), {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def assert_same_tokens(actual, expected):
    for text in TEXTS:
        assert actual(text).input_ids == expected(text).input_ids, text
        ids = expected(text, add_special_tokens=False).input_ids
        assert actual.decode(ids) == expected.decode(ids)
    assert actual.special_tokens_map == expected.special_tokens_map
    assert actual.chat_template == expected.chat_template


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.names[0])
def test_byte_level(pre, tmp_path):
    tokenizer = byte_level(pre, adds_bos=pre.ignore_merges)
    sentences, fields = write(tmp_path / "x.gguf", tokenizer, rows=len(tokenizer) + 3)
    assert sentences == [note for note in (pre.note,) if note]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", pre.names[0])
    assert fields["tokenizer.ggml.add_bos_token"] == pre.ignore_merges
    assert fields["tokenizer.ggml.add_eos_token"] is False
    start = len(tokenizer)
    assert fields["tokenizer.ggml.tokens"][-6:-3] == ["<|start|>", "<|end|>", "<mark>"]
    assert fields["tokenizer.ggml.tokens"][-3:] == [f"[PAD{n}]" for n in range(start, start + 3)]
    assert fields["tokenizer.ggml.token_type"][-6:] == [3, 3, 4, 5, 5, 5]
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert_same_tokens(read_gguf_tokenizer(tmp_path / "x.gguf"), tokenizer)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_sentencepiece(adds_bos, tmp_path):
    tokenizer = sentencepiece(adds_bos=adds_bos)
    sentences, fields = write(tmp_path / "x.gguf", tokenizer)
    assert not sentences
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert fields["tokenizer.ggml.add_bos_token"] == adds_bos
    assert fields["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 6, 6]
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    made = list(dict.fromkeys("".join(pair) for pair in learned))
    assert sorted(made, key=lambda token: -scores[token]) == made
    assert_same_tokens(read_gguf_tokenizer(tmp_path / "x.gguf"), tokenizer)


def test_ids_that_the_tokenizer_lacks_are_the_models(tmp_path):
    ids = {"bos_token_id": 5, "eos_token_id": [9, 7, 9999], "pad_token_id": -1, "unk_token_id": None}
    tokenizer = byte_level(by_name("qwen2"))
    tokenizer.bos_token = None
    _, fields = write(tmp_path / "x.gguf", tokenizer, model_ids=ids)
    stated = {key.removeprefix("tokenizer.ggml."): v for key, v in fields.items() if key.endswith("_token_id")}
    assert stated == {
        "bos_token_id": 5,
        "eos_token_id": tokenizer.eos_token_id,
        "eot_token_id": 9,
        "eom_token_id": 7,
    }


def test_several_chat_templates(tmp_path):
    tokenizer = byte_level(by_name("smollm"))
    tokenizer.chat_template = {"default": TEMPLATE, "tools": "{{ tools }}"}
    write(tmp_path / "x.gguf", tokenizer)
    assert read_gguf_tokenizer(tmp_path / "x.gguf").chat_template == tokenizer.chat_template


def changed(**stages):
    """The tokenizer of GPT-2's kind with other stages."""
    content = json.loads(byte_level(by_name("gpt-2")).backend_tokenizer.to_str()) | stages
    return of_transformers(Tokenizer.from_str(json.dumps(content)), False, bos_token="<|start|>", eos_token="<|end|>")


def words():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "The": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="a")


def incomplete():
    """As SentencePiece's, with a merge left out."""
    tokenizer = sentencepiece()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    del content["model"]["merges"][3]
    return of_transformers(Tokenizer.from_str(json.dumps(content)), False, bos_token="<s>", eos_token="</s>")


def of_stage(stage):
    return json.loads(stage.__getstate__())


SPLIT = {"type": "Split", "pattern": {"Regex": r"\d+"}, "behavior": "Isolated", "invert": False}
BYTES = of_stage(pre_tokenizers.ByteLevel())
UNKNOWN = {
    "words": (words, "the tokenizer is a WordLevel, which mxcompile cannot describe"),
    "another pattern": (
        lambda: changed(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, of_stage(pre_tokenizers.ByteLevel())]}
        ),
        r"llama.cpp has no name for the way in which the tokenizer splits text, .*\\\\d\+",
    ),
    "a space in front": (
        lambda: changed(pre_tokenizer=of_stage(pre_tokenizers.ByteLevel(add_prefix_space=True))),
        "llama.cpp has no name for the way",
    ),
    "normalized": (
        lambda: changed(normalizer=of_stage(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))),
        r"llama.cpp cannot normalize text as the tokenizer does \(NFKC, Lowercase\)",
    ),
    "merges": (incomplete, "merges cannot be expressed as scores"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_llama_cpp_cannot_do_is_said_and_kept_whole(kind, tmp_path):
    make, reason = UNKNOWN[kind]
    tokenizer = make()
    (sentence,), fields = write(tmp_path / "x.gguf", tokenizer)
    assert sentence.startswith("llama.cpp takes and returns token ids only, no text (")
    assert re.search(reason, sentence), sentence
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert "tokenizer.ggml.pre" not in fields
    assert_same_tokens(read_gguf_tokenizer(tmp_path / "x.gguf"), tokenizer)


def test_more_tokens_than_rows(tmp_path):
    tokenizer = byte_level(by_name("gpt-2"))
    (sentence,), _ = write(tmp_path / "x.gguf", tokenizer, rows=400)
    assert f"token ids up to {len(tokenizer) - 1}, the model's embedding has 400 rows" in sentence


def test_a_tokenizer_without_a_pipeline(tmp_path):
    class Slow:
        def get_vocab(self):
            return {"a": 0}

    (sentence,), fields = write(tmp_path / "x.gguf", Slow(), rows=1)
    assert "a Slow has no pipeline of the tokenizers package: pass a fast tokenizer" in sentence
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert read_gguf_tokenizer(tmp_path / "x.gguf") is None


def test_a_name_that_is_not_known_here_is_not_taken_for_another(tmp_path):
    def change(writer):
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "kimi-k2"

    write(tmp_path / "x.gguf", byte_level(by_name("gpt-2")), change=change)
    with pytest.raises(CheckpointError, match="'gpt2' with the pre-tokenizer 'kimi-k2', which mxcompile does not"):
        read_gguf_tokenizer(tmp_path / "x.gguf")


@pytest.mark.parametrize("key", ["tokens", "token_type", "merges"])
def test_damaged_entries(key, tmp_path):
    def change(writer):
        writer.kv_data[0][f"tokenizer.ggml.{key}"].value = ["x", "y z", "x"] if key != "token_type" else [1, 2]

    write(tmp_path / "x.gguf", byte_level(by_name("gpt-2")), change=change)
    with pytest.raises(CheckpointError, match=r"x.gguf has .*token"):
        read_gguf_tokenizer(tmp_path / "x.gguf")
