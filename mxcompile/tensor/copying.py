"""Copy a module with all that its forward can read: also functions on its instances, and what they close over.

`copy.deepcopy` shares functions. A forward, hook or other function that has been set on an instance would go on reading
the original's tensors, so it gets new closure cells, defaults and globals here.
"""

import copy
import random
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import BuiltinFunctionType, CellType, FunctionType
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from mxcompile.errors import InputError
from mxcompile.tensor.reachable import function_parts, globals_read, reachable, storage_names, storages

M = TypeVar("M", bound=nn.Module)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_REFUSAL = "this {} cannot be copied, and mxcompile works on copies"


def copy_module(
    model: M,
    shared: Iterable[Tensor] = (),
    replaced: Mapping[int, Tensor] | None = None,
    *,
    own_collections: bool = False,
) -> M:
    """A copy of the module tree with its attributes, hooks and functions, on copies of its tensors.

    shared: tensors that the copy has in common with the model. replaced: id of a tensor -> what the copy has instead.
    own_collections: a hook that collects values, in a list or variable of its closure, has its own in the copy.
    Raises InputError, which names the module and the attribute, if something cannot be copied, or if the copy still
    reaches a module or another tensor of the model.
    """
    shared = list(shared)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    memo |= replaced or {}
    try:
        copied = _copied(model, memo, own_collections)
    except Exception as error:
        raise InputError(f"{_REFUSAL.format(type(model).__name__)}: {_culprit(model, error)}") from error
    names = storage_names(reachable(model))
    for tensor in shared:
        for address in storages(tensor):
            names.pop(address, None)
    if found := shared_with(copied, names, [module for _, module in reachable(model) if isinstance(module, nn.Module)]):
        raise InputError(
            f"{_REFUSAL.format(type(model).__name__)}: its {found[0]!r} would go on reading {found[1]} of the "
            "original. Remove it, or hold what it reads as an attribute of the module that reads it"
        )
    return copied


def shared_with(root: object, names: Mapping[int, str], modules: Iterable[nn.Module] = ()) -> tuple[str, str] | None:
    """(path, name) of the first thing that `root` reaches and should not, None if there is none.

    names: address of the memory of each forbidden tensor -> its name. modules: forbidden modules.
    """
    forbidden = {id(module): f"a {type(module).__name__}" for module in modules}
    for path, value in reachable(root):
        if id(value) in forbidden:
            return path, forbidden[id(value)]
        if isinstance(value, Tensor):
            for address in storages(value):
                if address in names:
                    return path, names[address]
    return None


def _copied(model: M, memo: dict[int, Any], own_collections: bool) -> M:
    functions = _prepare(model, memo, own_collections)
    copied = copy.deepcopy(model, memo)
    for original, function in functions:
        _fill(original, function, memo)
    return copied


def _prepare(model: nn.Module, memo: dict[int, Any], own_collections: bool) -> list[tuple[FunctionType, FunctionType]]:
    """Put into the memo what deepcopy shares or refuses: functions, methods of tensors, tensors with a gradient graph.

    Returns (original, empty copy) of each function.
    """
    everything = list(reachable(model))
    own = {id(value) for _, value in everything if isinstance(value, nn.Module | Tensor)}
    cells: dict[int, CellType] = {}
    functions: list[tuple[FunctionType, FunctionType]] = []
    for _, value in everything:
        if isinstance(value, FunctionType) and (
            _holds_tensors(value, own) or (own_collections and _may_collect(value))
        ):
            function = _without_contents(value, cells)
            memo[id(value)] = function
            functions.append((value, function))
        elif isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
            memo[id(value)] = value.detach().clone()  # as the old weight_norm keeps one, and computes it anew each time
    for _, value in everything:
        if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, Tensor):
            memo[id(value)] = getattr(copy.deepcopy(value.__self__, memo), value.__name__)
    return functions


def _holds_tensors(function: FunctionType, own: set[int]) -> bool:
    """Whether a function reads a module or tensor of the model, or any that only its closure or defaults hold."""
    global_values = {id(value) for value in globals_read(function).values()}
    for label, part in function_parts(function):
        is_global = id(part) in global_values
        for _, value in reachable(part, label):
            if isinstance(value, nn.Module | Tensor) and (not is_global or id(value) in own):
                return True
    return False


def _may_collect(function: FunctionType) -> bool:
    """Whether a function closes over something that it may change or assign, and everything there can be copied.

    A generator of random numbers is not meant: a copy would draw in the trace what the model draws next, and would
    hide that the model is not deterministic.
    """
    contents: list[Any] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not yet assigned
            contents.append(cell.cell_contents)
    try:
        copies = copy.deepcopy(contents)
    except Exception:  # whatever a class of the user raises
        return False
    changeable = (value for value, made in zip(contents, copies, strict=True) if value is None or made is not value)
    return not all(isinstance(value, _GENERATORS) for value in changeable)


def _without_contents(function: FunctionType, cells: dict[int, CellType]) -> FunctionType:
    """The same code on empty closure cells and globals of its own; cells that functions share stay shared.

    The new globals have no `__name__`: by it, Dynamo would find the original ones.
    """
    closure = tuple(cells.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
    scope = {"__builtins__": function.__builtins__}
    copied = FunctionType(function.__code__, scope, function.__name__, None, closure)
    copied.__qualname__, copied.__module__, copied.__doc__ = (
        function.__qualname__,
        function.__module__,
        function.__doc__,
    )
    return copied


def _fill(original: FunctionType, copied: FunctionType, memo: dict[int, Any]) -> None:
    for old, new in zip(original.__closure__ or (), copied.__closure__ or (), strict=True):
        try:
            contents = old.cell_contents
        except ValueError:  # not yet assigned
            continue
        new.cell_contents = copy.deepcopy(contents, memo)
    copied.__defaults__ = copy.deepcopy(original.__defaults__, memo)
    copied.__kwdefaults__ = copy.deepcopy(original.__kwdefaults__, memo)
    vars(copied).update(copy.deepcopy(vars(original), memo))
    held = {id(part) for _, part in function_parts(original)}
    for name, value in globals_read(original).items():
        copied.__globals__[name] = copy.deepcopy(value, memo) if id(value) in held else value


def _culprit(model: nn.Module, error: Exception) -> str:
    """The attribute of the deepest module that cannot be copied alone, and what to do."""
    for path, module in model.named_modules():
        children = {id(child) for child in module.children()}
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers") or id(value) in children:
                continue
            memo: dict[int, Any] = {id(other): other for other in model.modules()}
            memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            try:
                copy.deepcopy(value, memo)
            except Exception as reason:
                place = f"{path}.{name}".removeprefix(".")
                return (
                    f"its attribute {place!r} (a {type(value).__name__} of {type(module).__name__}) fails with "
                    f"{type(reason).__name__}: {reason}. Delete the attribute before, create it on first use, or give "
                    f"{type(module).__name__} a __getstate__ that leaves it out"
                )
    return f"{type(error).__name__}: {error}"
