"""Check the arguments of a public call against its annotations, so that a wrong one is named before anything runs.

`@checked` raises ArgumentError for a value of another type. It looks at the items of a container and at the keys of a
mapping, but not into iterators, which it would use up.
"""

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from mxcompile.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")
_CONTAINERS = (Iterable, Sequence, Mapping)
_ANYTHING = (Any, object, inspect.Parameter.empty)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises ArgumentError for arguments that are not of the annotated types."""
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        return get_type_hints(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            hint = hints().get(name, object)
            if (reason := why_not(value, hint)) is not None:
                title = function.__qualname__.removesuffix(".__init__")
                raise ArgumentError(f"{title}: {name} {reason}; give {_described(hint)}")
        return function(*args, **kwargs)

    return call


def why_not(value: object, hint: Any) -> str | None:
    """Why a value is not of a type, as the end of a sentence about it; None if it is."""
    hint = (hint.__bound__ or object) if isinstance(hint, TypeVar) else hint
    if hint in _ANYTHING:
        return None
    choices = tuple(_choices(hint))
    if len(choices) > 1:
        if isinstance(value, str) and Path in choices and "\0" in value:
            return "holds a null character"
        reasons = [why_not(value, choice) for choice in choices]
        return None if None in reasons else min(cast(list[str], reasons), key=len)
    kind = get_origin(hint) or hint
    if not _is_a(value, kind):
        return _what(value, kind)
    return _why_not_inside(value, get_args(hint)[0]) if kind in _CONTAINERS and get_args(hint) else None


def _why_not_inside(value: object, item: Any) -> str | None:
    """Why the items of a container, or the keys of a mapping, are not of a type."""
    if isinstance(value, str):
        return None if item is str else "is a str"
    if isinstance(value, Tensor):
        return why_not(value, item)
    if not isinstance(value, Collection):
        return None
    reasons = (why_not(each, item) for each in cast(Collection[object], value))
    return next((f"holds something that {reason}" for reason in reasons if reason is not None), None)


def _what(value: object, kind: Any) -> str:
    """What a value is that is not of a kind: an object of another class, or a class itself."""
    if not isinstance(value, type):
        return f"is {_article(type(value).__name__)}"
    is_uncalled = isinstance(kind, type) and issubclass(value, kind)
    return f"is the class {value.__name__}" + (f", not called: write {value.__name__}(...)" if is_uncalled else "")


def _is_a(value: object, kind: Any) -> bool:
    if kind is Path:
        return isinstance(value, os.PathLike)
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if isinstance(value, bytes) and kind not in (bytes, object):
        return False
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol, which says nothing at run time
        return True


def _choices(hint: Any) -> Iterator[Any]:
    yield from get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _described(hint: Any) -> str:
    hint = (hint.__bound__ or object) if isinstance(hint, TypeVar) else hint
    return " or ".join(_name(choice) for choice in _choices(hint))


def _name(kind: Any) -> str:
    return "None" if kind is NoneType else _article(_short(kind))


def _short(kind: Any) -> str:
    """A type as it is written: `Iterable[str | None]`, without the modules of our own types."""
    if kind is NoneType:
        return "None"
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_short, get_args(kind)))
    if items := get_args(kind):
        return f"{getattr(get_origin(kind), '__name__', kind)}[{', '.join(map(_short, items))}]"
    return "torch.nn.Module" if kind is nn.Module else getattr(kind, "__name__", str(kind))


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"
