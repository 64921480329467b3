"""Walk what an object can reach: attributes, containers, closures, bound methods, partials and weak references.

Classes and imported modules end the walk: they are code, which all instances share. So do a function's globals, except
the modules, tensors, bound methods and functions of the same file that it reads.
"""

import dis
import functools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mxcompile.tensor.weight import MXWeight

_ENDS = (type, ModuleType, str, bytes, int, float, complex, type(None), CodeType, torch.dtype, torch.device)
_TABLES = ("_parameters", "_buffers", "_modules")
_HELD = (nn.Module, Tensor, MethodType, functools.partial)


def reachable(root: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every object that `root` reaches, once, root included, with its path: `layers.0.forward -> plain`."""
    seen: set[int] = set()
    alive: list[object] = []  # what has been made on the way: ids must not be used again
    queue: deque[tuple[str, object]] = deque([(path, root)])
    while queue:
        path, value = queue.popleft()
        if isinstance(value, _ENDS) or id(value) in seen:
            continue
        seen.add(id(value))
        alive.append(value)
        yield path, value
        queue.extend((path + label if path else label.lstrip("."), child) for label, child in _children(value))


def holders(root: object, target: object) -> Iterator[str]:
    """Paths of every place from which `root` reaches an object, in order of their distance from it."""
    for path, value in reachable(root):
        yield from ((path + label).lstrip(".") for label, child in _children(value) if child is target)


def storages(tensor: Tensor) -> Iterator[int]:
    """Addresses of a tensor's memory, of its components if it is an `MXWeight`; none for one without memory."""
    for part in tensor.parts if isinstance(tensor, MXWeight) else (tensor,):
        if part.layout is torch.strided and part.device.type != "meta":
            try:
                storage = part.untyped_storage()
                address = 0 if storage.device.type == "meta" else storage.data_ptr()  # of a fake tensor
            except (NotImplementedError, RuntimeError):  # a wrapper, like a fake tensor
                continue
            if address:
                yield address


def storage_names(values: Iterable[tuple[str, Any]]) -> dict[int, str]:
    """Address of each tensor's memory -> the first path of the tensor."""
    names: dict[int, str] = {}
    for path, value in values:
        if isinstance(value, Tensor):
            for address in storages(value):
                names.setdefault(address, path)
    return names


def globals_read(function: FunctionType) -> dict[str, Any]:
    """The globals that a function's code reads, those of functions inside of it included."""
    names: dict[str, None] = {}
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        loads = (step for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        names.update(dict.fromkeys(str(step.argval) for step in loads))
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def function_parts(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads besides its arguments: variables of its closure, defaults, attributes, and globals."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f" -> {name}", cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    yield " -> defaults", (function.__defaults__, function.__kwdefaults__)
    yield "", vars(function)
    for name, value in globals_read(function).items():
        is_local = isinstance(value, FunctionType) and value.__globals__ is function.__globals__
        if is_local or isinstance(value, _HELD):
            yield f" -> {name}", value


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in list(cast(dict[Any, Any], value).items()))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((f"[{index}]", item) for index, item in enumerate(list(cast(Iterable[Any], value))))
    elif isinstance(value, FunctionType):
        yield from function_parts(value)
        return
    elif isinstance(value, MethodType):
        yield from (("", value.__func__), (" -> self", value.__self__))
        return
    elif isinstance(value, BuiltinFunctionType):
        yield " -> self", value.__self__
    elif isinstance(value, functools.partial):
        yield from (("", value.func), (" -> args", value.args), (" -> keywords", value.keywords))
    elif isinstance(value, weakref.ref):
        yield " -> referent", value()
    yield from _attributes(value)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    try:
        attributes = dict(vars(value))
    except TypeError:
        attributes = {}
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(name, str) and not name.startswith("__") and hasattr(value, name):
                attributes.setdefault(name, getattr(value, name))
    for name, item in attributes.items():
        if isinstance(value, nn.Module) and name in _TABLES:
            yield from ((f".{key}", child) for key, child in item.items())
        else:
            yield f".{name}", item
