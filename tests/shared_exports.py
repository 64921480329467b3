"""Models of one structure are exported once in a process: torch.export takes a second and is most of many tests.

The exported graph depends on the classes of a model's modules, on their settings and on the shapes of tensors and
inputs, not on the values of tensors. So every model gets the graph of the first of its structure, with its own tensors.
What holds anything but plain settings is exported itself: hooks, a forward of its own, tensors that are no buffers.
"""

import copy
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mxcompile.graph.inputs import Inputs

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device, type, FunctionType, BuiltinFunctionType)
_TENSORS_AND_MODULES = ("_parameters", "_buffers", "_modules")


class _UnknownError(Exception):
    """A value that may be anything."""


class SharedExports:
    """`export(model, inputs)`, once for models of one structure while `active`."""

    def __init__(self, export: Callable[[nn.Module, Inputs], ExportedProgram]) -> None:
        self.export, self.active = export, True
        self._programs: dict[Hashable, ExportedProgram] = {}

    def __call__(self, model: nn.Module, inputs: Inputs) -> ExportedProgram:
        try:
            key = _structure(model, inputs) if self.active else None
        except _UnknownError:
            key = None
        if key is None:
            return self.export(model, inputs)
        if key not in self._programs:
            self._programs[key] = _without_tensors(self.export(model, inputs), model)
        return _with_tensors(self._programs[key], model)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _without_tensors(program: ExportedProgram, model: nn.Module) -> ExportedProgram:
    """So that no model stays in memory."""
    own = _tensors(model)
    program._state_dict = dict.fromkeys(program.state_dict)
    program._constants = {name: None if name in own else value for name, value in program.constants.items()}
    return program


def _with_tensors(program: ExportedProgram, model: nn.Module) -> ExportedProgram:
    tensors = _tensors(model)
    program = copy.copy(program)
    program._state_dict = {name: tensors[name] for name in program.state_dict}
    program._constants = {name: tensors.get(name, value) for name, value in program.constants.items()}
    return program


def _structure(model: nn.Module, inputs: Inputs) -> Hashable:
    modules = [(name, type(part), type(part).forward, _settings(part)) for name, part in model.named_modules()]
    names: dict[int, str] = {}
    tensors: list[Hashable] = []
    for source in (model.named_parameters, model.named_buffers):
        for name, value in source(remove_duplicate=False):
            first = names.setdefault(id(value), name)
            tensors.append((name, first, type(value), _shape(value), value.requires_grad))
    return tuple(modules), tuple(tensors), _plain((inputs.args, inputs.kwargs), inputs=True), torch.get_default_dtype()


def _shape(value: Tensor) -> Hashable:
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _settings(module: nn.Module) -> Hashable:
    settings = {name: value for name, value in vars(module).items() if name not in _TENSORS_AND_MODULES}
    if "forward" in settings or any("hooks" in name and value for name, value in settings.items()):
        raise _UnknownError
    return _plain(settings)


def _plain(value: Any, inputs: bool = False) -> Hashable:
    """A value that can be compared, of one that consists of plain ones and, among inputs, of tensors."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, partial):
        value = (partial, value.func, value.args, value.keywords)
    elif callable(getattr(value, "to_diff_dict", None)):
        value = (type(value), vars(value))  # a configuration of transformers
    if isinstance(value, tuple | list):
        return type(value), tuple(_plain(item, inputs) for item in value)
    if isinstance(value, Mapping):
        return type(value), tuple((name, _plain(item, inputs)) for name, item in value.items())
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_plain(item, inputs) for item in value)
    if inputs and type(value) is Tensor:
        return _shape(value)
    raise _UnknownError(f"{type(value)}")
