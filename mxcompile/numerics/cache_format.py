"""The format of a key/value cache as a value: `key=mxint8,value=mxint4,window=32`.

Keys are stored after the rotary embedding, and keys and values in blocks along the head dimension. So a token is
rounded once, when it arrives, and never again. Its packed layout is that of `mx::quantize`: elements uint8
`[batch, kv heads, tokens, blocks * block_bytes]` and E8M0 scales uint8 `[batch, kv heads, tokens, blocks]`.
"""

import re
from dataclasses import dataclass
from typing import Final, Self, get_type_hints

from mxcompile.arguments import why_not
from mxcompile.errors import ArgumentError, MXCompileError, UnknownNameError
from mxcompile.formats import MXINT8, MXFormat, ScaleRule, activation_rule, check_name, parse_format

_NONE: Final = "none"
_ROTATED: Final = "head"
_SHIFTED: Final = "mean"
_NAMES: Final = ("key", "value", "window", "sink", "rotate", "shift")


@dataclass(frozen=True)
class CacheFormat:
    """How a cache holds keys and values. None: in float.

    window: the newest tokens, a query's own one included, whose keys and values are exact. sink: the first tokens of
    the cache, which stay exact. rotate: keys are rounded after a Hadamard rotation of each head
    (`head_rotation`), which a query shares. Values are rotated by folding (`quantize-cache`), never here. shift: the
    mean key of the prompt is subtracted from all keys of a head before they are rounded, and never added again: it
    changes all scores of a query by one number, so that their softmax stays the same.
    Scales follow the format's default rule (`formats.activation_rule`): floor for integers, rceil for MXFP8, 7.25 for
    MXFP4.
    Raises MXCompileError for a negative window or sink, and for a format that cannot be stored; ArgumentError for a
    value of another type.
    """

    key: MXFormat | None = MXINT8
    value: MXFormat | None = MXINT8
    window: int = 0
    sink: int = 0
    rotate: bool = False
    shift: bool = False

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if (reason := why_not(getattr(self, name), kind)) is not None:
                raise ArgumentError(f"CacheFormat: {name} {reason}; write CacheFormat.parse('key=mxint8,value=mxint4')")
        for name, count in (("window", self.window), ("sink", self.sink)):
            if count < 0:
                raise MXCompileError(f"a cache's {name} is a number of tokens, 0 or more, not {count}")
        for fmt in (self.key, self.value):
            if fmt is not None:
                check_name(fmt)
            if fmt is not None and fmt.aligned:
                raise MXCompileError(f"{fmt}: keys and values are not aligned; write {fmt.with_alignment(False)}")

    @property
    def key_rule(self) -> ScaleRule | None:
        """The scale rule of keys; None if they stay float."""
        return None if self.key is None else activation_rule(self.key)

    @property
    def value_rule(self) -> ScaleRule | None:
        """The scale rule of values; None if they stay float."""
        return None if self.value is None else activation_rule(self.value)

    @property
    def has_exact_tokens(self) -> bool:
        """Whether some tokens stay exact, so that attention reads both exact and rounded ones."""
        return self.window > 0 or self.sink > 0

    def bytes_per_token(self, kv_heads: int, key_size: int, value_size: int, float_bytes: int = 2) -> int:
        """Bytes that one layer stores for a token. float_bytes: of a number that stays float."""
        pairs = ((self.key, key_size), (self.value, value_size))
        return sum(_stored_bytes(fmt, kv_heads, size, float_bytes) for fmt, size in pairs)

    def __str__(self) -> str:
        parts = [f"key={self.key or _NONE}", f"value={self.value or _NONE}"]
        parts += [f"{name}={count}" for name, count in (("window", self.window), ("sink", self.sink)) if count]
        parts += [f"rotate={_ROTATED}"] if self.rotate else []
        return ",".join([*parts, *([f"shift={_SHIFTED}"] if self.shift else [])])

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`: `key=mxint8,value=mxint4,window=32,sink=4,rotate=head,shift=mean`, in any order.

        Keys and values that are not named are MXINT8; `none` keeps them float. One format alone, `mxint8`, is of both.
        Raises UnknownNameError for an unknown name, MXCompileError for a part that is no name and value.
        """
        if "=" not in text:
            return cls(_format(text), _format(text))
        given: dict[str, str] = {}
        for part in text.split(","):
            name, equals, content = (piece.strip() for piece in part.partition("="))
            if not equals or name in given:
                raise MXCompileError(f"cache format {text!r}: write every part once, as in key=mxint8,value=mxint4")
            if name not in _NAMES:
                raise UnknownNameError("part of a cache format", name, _NAMES)
            given[name] = content
        key, value = (_format(given.get(name, str(MXINT8))) for name in ("key", "value"))
        window, sink = (_count(text, name, given.get(name, "0")) for name in ("window", "sink"))
        rotate = given.get("rotate", _NONE)
        if rotate not in (_NONE, _ROTATED):
            raise UnknownNameError("rotation of a cache", rotate, (_NONE, _ROTATED))
        shift = given.get("shift", _NONE)
        if shift not in (_NONE, _SHIFTED):
            raise UnknownNameError("shift of a cache", shift, (_NONE, _SHIFTED))
        return cls(key, value, window, sink, rotate == _ROTATED, shift == _SHIFTED)


def head_rotation(head_dim: int) -> int:
    """Channels of a Hadamard rotation of a head: the largest power of two that divides its size, 1 if that is odd."""
    return head_dim & -head_dim


def _format(text: str) -> MXFormat | None:
    return None if text.strip().lower() == _NONE else parse_format(text)


def _count(text: str, name: str, content: str) -> int:
    if not re.fullmatch(r"\d+", content):
        raise MXCompileError(f"cache format {text!r}: {name} is a number of tokens, as in {name}=32, not {content!r}")
    return int(content)


def _stored_bytes(fmt: MXFormat | None, heads: int, size: int, float_bytes: int) -> int:
    return heads * size * float_bytes if fmt is None else fmt.storage_bytes(heads, size)
