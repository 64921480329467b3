"""llama.cpp's names for the ways in which a byte-level BPE tokenizer splits text before it merges.

    [Split(\\p{N}{1,3} ...), ByteLevel] and ignore_merges   <->   tokenizer.ggml.pre = "llama-bpe"

A GGUF file holds a name, not the patterns: llama.cpp has those compiled in (`llm_tokenizer_bpe` of src/llama-vocab.cpp,
version 0.5.0). A tokenizer whose patterns are not in the table has no name, and none is guessed: with the wrong one
llama.cpp splits the same text into other tokens. Which other names stand for the same patterns comes from there too.
"""

from dataclasses import dataclass
from typing import Any, Final, cast

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT: Final = r"\p{N}"
_THREE_DIGITS: Final = r"\p{N}{1,3}"
_ENGLISH: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2: Final = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35: Final = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS: Final = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN: Final = rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}|{_SIGNS}|{_SPACES}"
_GPT4O: Final = rf"{_WORDS[0]}{_ENGLISH}?|{_WORDS[1]}{_ENGLISH}?|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_CJK: Final = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3: Final = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_MARKS: Final = "llama.cpp splits words at combining marks (as of Hindi), which the tokenizer does not"


@dataclass(frozen=True)
class PreTokenizer:
    """names: llama.cpp's, the one to write first. patterns: text is split at the matches of each in turn.

    ignore_merges: a piece that is a token as a whole is not split and merged. adds_bos: whether llama.cpp puts a
    beginning-of-text token in front if the file does not say. note: where llama.cpp's patterns differ from these.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The pre-tokenizer as `tokenizers` serializes it."""
        splits = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [*splits, to_bytes]}


PRE_TOKENIZERS: Final = (
    PreTokenizer(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"), (_GPT2,)),
    PreTokenizer(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (_DIGIT, _GPT2)),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), (_LLAMA3,), ignore_merges=True, adds_bos=True
    ),
    PreTokenizer(("dbrx", "smaug-bpe"), (_LLAMA3,)),
    PreTokenizer(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), (_QWEN2,)),
    PreTokenizer(("qwen35",), (_QWEN35,)),
    PreTokenizer(("tekken",), (_TEKKEN,), ignore_merges=True, adds_bos=True, note=_MARKS),
    PreTokenizer(("gpt-4o", "llama4"), (_GPT4O,), note=_MARKS),
    PreTokenizer(("deepseek-v3", "hunyuan-dense"), (_THREE_DIGITS, _CJK, _DEEPSEEK3)),
)


def by_name(name: str) -> PreTokenizer | None:
    """The pre-tokenizer that llama.cpp has under a name; None if it is not in the table."""
    return next((known for known in PRE_TOKENIZERS if name in known.names), None)


def by_json(pre_tokenizer: Any, ignore_merges: bool) -> PreTokenizer | None:
    """The pre-tokenizer that does what one of `tokenizers` does, from its serialized form; None if there is none."""
    patterns = _patterns(pre_tokenizer)
    return next((k for k in PRE_TOKENIZERS if (k.patterns, k.ignore_merges) == (patterns, ignore_merges)), None)


def flat(stage: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a serialized stage, those of its sequences one by one. key: under which a sequence has its steps."""
    if not isinstance(stage, dict):
        return []
    step = cast(dict[str, Any], stage)
    return [step] if step.get("type") != "Sequence" else [s for part in step.get(key, []) for s in flat(part, key)]


def _patterns(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The patterns of a pre-tokenizer that ends in ByteLevel; None for any other."""
    steps = flat(pre_tokenizer, "pretokenizers")
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    patterns = [_pattern(step) for step in steps[:-1]]
    if steps[-1].get("use_regex", True):
        patterns.append(_GPT2)
    return None if None in patterns else tuple(cast(list[str], patterns))


def _pattern(step: dict[str, Any]) -> str | None:
    """The pattern at whose matches a step splits text, keeping them; None if it does something else."""
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return _DIGIT
    if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    regex = step.get("pattern", {}).get("Regex")
    return regex.replace("\r", r"\r").replace("\n", r"\n") if isinstance(regex, str) else None
