"""Text form of a frozen dataclass: `name{option=value,option=value}`.

Only options that differ from their defaults are printed. A value is a number, true/false, none, a word, a format, a
scale rule, a list of them, `[mxfp4,mxfp8]`, or formats by name pattern, `[*.down_proj=mxfp8,model.layers.0.*=none]`;
the field's type says which.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass
from enum import Enum
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from mxcompile.errors import MXCompileError, PipelineError, UnknownNameError
from mxcompile.formats import MXFormat, ScaleRule, check_name, parse_format, parse_scale_rule
from mxcompile.graph.name_patterns import Overrides
from mxcompile.pipeline.options import check_required, in_words, option_fields

T = TypeVar("T")
_CALL = re.compile(r"\s*(?P<name>[a-z0-9-]+)\s*(\{(?P<options>.*)\})?\s*", re.DOTALL)


@dataclass(frozen=True)
class PassOption:
    """An option of a pass. values: the accepted values, in words. default: in text form, None if required."""

    name: str
    values: str
    default: str | None


def options(kind: type) -> list[PassOption]:
    """The options of a pass class, in order."""
    hints = get_type_hints(kind, include_extras=True)
    return [PassOption(f.name, in_words(hints[f.name]), _default(f)) for f in option_fields(kind)]


def print_call(name: str, value: Any) -> str:
    """`name{option=value}` for a dataclass instance; the name alone if every option has its default."""
    options = [f"{f.name}={_print(getattr(value, f.name))}" for f in option_fields(value) if not _is_default(value, f)]
    return f"{name}{{{','.join(options)}}}" if options else name


def parse_call(text: str, kind: str, table: Mapping[str, type[T]]) -> T:
    """The inverse of `print_call`. kind: what the text names, for errors. table: the class of each name."""
    match = _CALL.fullmatch(text)
    if match is None:
        raise PipelineError(f"cannot read {text.strip()!r}: a {kind} is written name{{option=value,option=value}}")
    name = match["name"]
    if name not in table:
        raise UnknownNameError(kind, name, table)
    hints = get_type_hints(table[name])
    types = {f.name: hints[f.name] for f in option_fields(table[name])}
    options: dict[str, Any] = {}
    for part in filter(str.strip, _split(match["options"] or "")):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise PipelineError(f"{name}: cannot read the option {part.strip()!r}; write option=value")
        if option not in types:
            raise UnknownNameError(f"option of {name}", option, types)
        if option in options:
            raise PipelineError(f"{name}: the option {option!r} is given twice")
        options[option] = _parse(value, types[option], f"{name}{{{option}}}")
    check_required(name, table[name], options)
    try:
        return table[name](**options)
    except TypeError as error:
        raise PipelineError(f"{name}: {error}") from error


def check_formats(value: Any) -> None:
    """Raise MXCompileError if a format option has the name of a built-in format but other values, or is aligned and not
    an activation's.
    """
    for name, option in ((field.name, getattr(value, field.name)) for field in option_fields(value)):
        listed = (
            option.values() if isinstance(option, Overrides) else option if isinstance(option, tuple) else (option,)
        )
        for fmt in cast(Iterable[object], listed):
            if isinstance(fmt, MXFormat):
                check_name(fmt)
                if fmt.aligned and name not in ("activation", "activations"):
                    raise MXCompileError(f"{name}={fmt}: only activations can be aligned")


def _default(field: "Field[Any]") -> str | None:
    return None if field.default is MISSING else _print(field.default)


def _is_default(value: Any, field: "Field[Any]") -> bool:
    return field.default is not MISSING and getattr(value, field.name) == field.default


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for mark in text:
        depth += (mark == "[") - (mark == "]")
        if mark == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += mark
    return parts


def _print(value: Any) -> str:
    if isinstance(value, Overrides):
        return f"[{','.join(f'{pattern}={_print(fmt)}' for pattern, fmt in value.items())}]"
    if isinstance(value, tuple):
        return f"[{','.join(map(_print, cast(tuple[Any, ...], value)))}]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value.value) if isinstance(value, Enum) else str(value)


def _parse(text: str, hint: Any, option: str) -> Any:
    if get_origin(hint) is tuple:
        items = _inside_brackets(text, option, "[value,value]")
        return tuple(_parse(item, get_args(hint)[0], option) for item in items)
    choices = get_args(hint) if type(None) in get_args(hint) else ()
    if choices:
        return None if text == "none" else _parse(text, next(c for c in choices if c is not type(None)), option)
    if getattr(hint, "__origin__", None) is Mapping:
        return _parse_overrides(text, option)
    if isinstance(hint, type) and issubclass(hint, Enum) and hint is not ScaleRule:
        try:
            return hint(text)
        except ValueError:
            raise UnknownNameError(f"value of {option}", text, (str(choice.value) for choice in hint)) from None
    readers: dict[Any, Callable[[str], Any]] = {
        MXFormat: parse_format,
        ScaleRule: parse_scale_rule,
        bool: {"true": True, "false": False}.__getitem__,
        int: int,
        float: float,
        str: str,
    }
    try:
        return readers[hint](text)
    except MXCompileError:
        raise
    except (KeyError, ValueError) as error:
        expected = getattr(hint, "__name__", str(hint))
        raise PipelineError(f"{option}: {text!r} is not a value of type {expected}") from error


def _parse_overrides(text: str, option: str) -> Overrides:
    formats: dict[str, MXFormat | None] = {}
    for part in _inside_brackets(text, option, "[pattern=format,pattern=none]"):
        pattern, equals, fmt = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise PipelineError(f"{option}: cannot read {part!r}; write pattern=format or pattern=none")
        formats[pattern] = None if fmt == "none" else parse_format(fmt)
    return Overrides(formats)


def _inside_brackets(text: str, option: str, form: str) -> list[str]:
    """The parts between brackets. form: of such a text, for the error."""
    if not (text.startswith("[") and text.endswith("]")):
        raise PipelineError(f"{option}: {text!r} is not a list {form}")
    return [part.strip() for part in _split(text[1:-1]) if part.strip()]
