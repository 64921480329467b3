"""The tensors that a module holds: how many bytes they take, and others put in their places."""

import sys
from collections.abc import Iterable

from torch import Tensor, nn

from mxcompile.tensor.weight import MXWeight


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each tensor once; MX weights at their packed size."""
    total = 0
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        parts = tensor.parts if isinstance(tensor, MXWeight) else (tensor,)
        for part in parts:
            if part.data_ptr() not in seen:
                seen.add(part.data_ptr())
                total += part.numel() * part.element_size()
    return total


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, under all their names; MX weights in rows, whatever kernels they are arranged for."""
    named = dict(module.named_parameters(remove_duplicate=False))
    rows = {id(value): value.in_rows() for value in named.values() if isinstance(value, MXWeight)}
    parameters: dict[str, Tensor] = {name: rows.get(id(value), value) for name, value in named.items()}
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def place_all(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put tensors, by name, in the places of parameters and buffers; names with one object get one parameter.

    One after the other, so that what was there before is let go of while the next one is made.
    """
    parameters: dict[int, nn.Parameter] = {}
    for name, value in tensors:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(getattr(owner, leaf), nn.Parameter):
            parameter = parameters.setdefault(id(value), nn.Parameter(value, requires_grad=False))
            owner.register_parameter(leaf, parameter)
        else:
            setattr(owner, leaf, value)


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, without importing that."""
    models = sys.modules.get("transformers.modeling_utils")
    return models is not None and isinstance(module, models.PreTrainedModel)
