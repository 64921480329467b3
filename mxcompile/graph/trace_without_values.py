"""Trace a module whose parameters have no values, to learn what would be done with it: a Program on the meta device.

`torch.export` traces with fake tensors anyway, so the graph is the one of the module with values. Passes that only
round to nearest run on such a Program, and give shapes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.tensor.copying import copy_module
from mxcompile.tensor.modules import named_tensors, set_tensors

_CPU = torch.device("cpu")


def trace_without_values(
    model: nn.Module,
    example_inputs: object,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    allow_partial: bool = False,
    device: torch.device = _CPU,
) -> Program:
    """`trace` of a module with tensors on the meta device, which stand for tensors on `device`, where the inputs are.

    Those of the Program are on the meta device too (`give_values` replaces them); others are copied to `device`, if
    they are elsewhere. A graph may depend on its device, and states it. Raises what `trace` raises.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # imports sympy, as tracing does

    own = named_tensors(model)
    empty = {id(value): value for value in own.values() if value.is_meta}
    shadow = copy_module(model, own.values())
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        fake = {
            key: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            for key, value in empty.items()
        }
    placed = {id(value): value.detach().to(device) for value in own.values() if id(value) not in fake}
    set_tensors(shadow, [(name, (fake | placed)[id(value)]) for name, value in own.items() if _is_new(value, device)])
    program = trace(shadow, example_inputs, include=include, exclude=exclude, allow_partial=allow_partial)
    for name in list(program.parameter_names()):
        value = program.stored(name)
        if isinstance(value, FakeTensor) or isinstance(value.data, FakeTensor):
            program.set_tensor(name, own[name])
    return program


def give_values(program: Program, model: nn.Module) -> None:
    """Replace the program's tensors on the meta device by those that the module has now under their names."""
    own = named_tensors(model)
    for name in list(program.parameter_names()):
        if program.stored(name).is_meta:
            program.set_tensor(name, own[name])


def _is_new(value: Tensor, device: torch.device) -> bool:
    """Whether the traced copy has another tensor in its place."""
    return value.is_meta or value.device != device
