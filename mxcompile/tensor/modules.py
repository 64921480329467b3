"""The tensors of a module: their bytes, their names, and their replacement."""

import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mxcompile.tensor.weight import MXWeight


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each tensor once; MX weights at their packed size."""
    total = 0
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        parts = tensor.parts if isinstance(tensor, MXWeight) else (tensor,)
        for part in parts:
            key = id(part) if part.device.type == "meta" else part.data_ptr()  # meta tensors have no address
            if key not in seen:
                seen.add(key)
                total += part.numel() * part.element_size()
    return total


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer, the CPU if it has none."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


@contextmanager
def eval_mode(module: nn.Module) -> Generator[None]:
    """In the block every module is in eval mode; afterwards those that were in training are again."""
    training = [each for each in module.modules() if each.training]
    for each in training:
        each.training = False
    try:
        yield
    finally:
        for each in training:
            each.training = True


def named_tensors(module: nn.Module, *, row_major: bool = True) -> dict[str, Tensor]:
    """Parameters, then buffers, under all their names.

    row_major: MX weights in that layout, whatever theirs is in the module; this needs memory for all planar ones.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    if not row_major:
        return {**named, **dict(module.named_buffers(remove_duplicate=False))}
    rows = {id(value): value.to_row_major() for value in named.values() if isinstance(value, MXWeight)}
    parameters: dict[str, Tensor] = {name: rows.get(id(value), value) for name, value in named.items()}
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def set_tensors(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace parameters and buffers by name; names that share a tensor object share one parameter.

    Works one at a time, so that each old tensor is freed before the iterator makes the next new one.
    """
    parameters: dict[int, nn.Parameter] = {}
    for name, value in tensors:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(getattr(owner, leaf), nn.Parameter):
            made = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            parameter = parameters.setdefault(id(value), made)
            owner.register_parameter(leaf, parameter)
        else:
            setattr(owner, leaf, value)


def float_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A float tensor for each name of an MX weight; names that share a weight share it where they read it alike.

    An embedding gets the rows that it looks up, any other module the weight of a matmul whose input is not prepared.
    """
    made: dict[tuple[int, bool], Tensor] = {}
    tensors: list[tuple[str, Tensor]] = []
    for name, value in module.named_parameters(remove_duplicate=False):
        if isinstance(value, MXWeight):
            rows = isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Embedding) or not value.is_prepared
            if (id(value), rows) not in made:
                made[id(value), rows] = value.dequantize() if rows else value.float_weight()
            tensors.append((name, made[id(value), rows]))
    return tensors


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face `PreTrainedModel`, without importing transformers."""
    models = sys.modules.get("transformers.modeling_utils")
    return models is not None and isinstance(module, models.PreTrainedModel)
