"""Options of a pass: which values its fields take, in words and as checks.

    alpha: Annotated[float | None, Range(0, 1)] = 0.5        a number from 0 to 1, none

Every pass is checked when it is made. A format, a scale rule or an enum may also be given by its name.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from numbers import Integral, Real
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

from mxcompile.errors import MXCompileError, PipelineError
from mxcompile.formats import MXFormat, ScaleRule, parse_format, parse_scale_rule
from mxcompile.graph.name_patterns import Overrides


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes, as metadata of its type. above: the lowest number itself is not one of them."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f" {'above' if self.above else 'from'} {self.low:g} {'up to' if self.above else 'to'} {self.high:g}"
        return "" if self.low == -math.inf else f" above {self.low:g}" if self.above else f", {self.low:g} or more"


def option_fields(value: Any) -> "tuple[Field[Any], ...]":
    """The options of a pass or a pass class; without options it need not be a dataclass."""
    return fields(value) if is_dataclass(value) else ()


def is_required(field: "Field[Any]") -> bool:
    """True if an option has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def in_words(hint: Any, before_none: str = ", ") -> str:
    """The values of a type, in words: `a number from 0 to 1, none`."""
    kind, limits, optional = _parts(hint)
    words = f"{_kind_in_words(kind)}{'' if limits is None else limits}"
    return f"{words}{before_none}none" if optional else words


def check_options(name: str, value: Any) -> None:
    """Check every option of a pass, and replace names of formats, rules and enum members by the values they name.

    Raises PipelineError, which names the option, its value and what it may be, and UnknownNameError for a format.
    """
    hints = get_type_hints(type(value), include_extras=True) if is_dataclass(value) else {}
    for field in option_fields(value):
        given = getattr(value, field.name)
        try:
            accepted = _accepted(given, hints[field.name])
        except MXCompileError:
            raise
        except (TypeError, ValueError) as error:
            wanted = in_words(hints[field.name], " or ")
            raise PipelineError(
                f"{name}{{{field.name}={given}}}: {field.name} must be {wanted}, not {given!r}"
            ) from error
        if accepted is not given:
            object.__setattr__(value, field.name, accepted)


def check_required(name: str, kind: type, given: Mapping[str, Any]) -> None:
    """Raise PipelineError, which lists them, if required options are missing."""
    hints = get_type_hints(kind, include_extras=True) if is_dataclass(kind) else {}
    missing = [field.name for field in option_fields(kind) if is_required(field) and field.name not in given]
    if missing:
        listed = " and ".join(f"{option} ({in_words(hints[option])})" for option in missing)
        example = ",".join(f"{option}=..." for option in missing)
        raise PipelineError(f"{name} needs the option {listed}: write {name}{{{example}}}")


def _accepted(value: Any, hint: Any) -> Any:
    """The value, or what its name stands for. Raises ValueError or TypeError if the type does not take it."""
    kind, limits, optional = _parts(hint)
    if value is None and optional:
        return None
    if kind is MXFormat or kind is ScaleRule or (isinstance(kind, type) and issubclass(kind, Enum)):
        return _named(value, kind)
    if get_origin(kind) is Mapping:
        return value if isinstance(value, Overrides) else Overrides(value)
    if get_origin(kind) is tuple:
        _require(isinstance(value, tuple | list))
        items = tuple(_accepted(item, get_args(kind)[0]) for item in cast(Iterable[Any], value))
        return value if items == value else items
    if kind in (bool, str):
        _require(isinstance(value, kind))
    elif kind in (int, float):
        _require(not isinstance(value, bool) and isinstance(value, Integral if kind is int else Real))
        number = float(cast(Any, value))
        _require(not math.isnan(number) and (limits is None or (math.isfinite(number) and number in limits)))
    return value


def _named(value: Any, kind: type) -> Any:
    if isinstance(value, str):
        if kind is MXFormat:
            return parse_format(value)
        return parse_scale_rule(value) if kind is ScaleRule else kind(value)
    _require(isinstance(value, kind))
    return value


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _parts(hint: Any) -> tuple[Any, Range | None, bool]:
    """The type of a value, its limits, and whether it may be None."""
    limits = None
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        limits = next((extra for extra in extras if isinstance(extra, Range)), None)
    choices = get_args(hint)
    if type(None) in choices:
        inner, inner_limits, _ = _parts(next(choice for choice in choices if choice is not type(None)))
        return inner, limits or inner_limits, True
    return hint, limits, False


def _kind_in_words(kind: Any) -> str:
    if get_origin(kind) is Mapping:
        return "[pattern=format,...]"
    if get_origin(kind) is tuple:
        return f"[{in_words(get_args(kind)[0], ' or ')},...]"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(str(choice.value) for choice in kind)
    words = {MXFormat: "a format", bool: "true, false", int: "an integer", float: "a number", str: "a word"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))
