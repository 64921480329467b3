"""Which experts of a model were chosen, and experts whose values would show if they were decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mxcompile.tensor.weight import MXWeight

Choices = dict[str, set[int]]
"""The numbers of the experts that were chosen, by the name of the module that has them."""


@contextmanager
def recorded_choices(model: nn.Module) -> Iterator[Choices]:
    """What the experts of a transformers model are called with while the context is open."""
    chosen: Choices = {}
    handles = []
    for name, module in model.named_modules():
        if experts := _experts(module):
            numbers = chosen.setdefault(name, set())
            handles.append(module.register_forward_pre_hook(_recorder(numbers, len(experts[0]))))
    assert chosen, "the model has no packed experts"
    yield chosen
    for handle in handles:
        handle.remove()


def poison(model: nn.Module, chosen: Choices) -> None:
    """Make the largest scale, a NaN, that of all values of all experts but those."""
    _overwrite(model, {name: (numbers, True) for name, numbers in chosen.items()})


def poison_chosen(model: nn.Module, chosen: Choices) -> None:
    """The same of the experts that were chosen."""
    _overwrite(model, {name: (numbers, False) for name, numbers in chosen.items()})


def _overwrite(model: nn.Module, experts: dict[str, tuple[set[int], bool]]) -> None:
    for name, (numbers, kept) in experts.items():
        for weight in _experts(model.get_submodule(name)):
            poisoned = [number for number in range(len(weight)) if (number in numbers) != kept]
            assert poisoned, f"every expert of {name} was chosen"
            weight.scales[poisoned] = 255


def _experts(module: nn.Module) -> list[MXWeight]:
    own = module.parameters(recurse=False)
    return [weight for weight in own if isinstance(weight, MXWeight) and weight.dim() == 3]


def _recorder(numbers: set[int], count: int) -> Any:
    """Of modules that are called with x and the chosen experts, or, as Llama-4's, with x `[experts * tokens, hidden]`,
    in which a token is zero for an expert that it did not choose."""

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        if len(args) == 1:
            numbers.update(args[0].unflatten(0, (count, -1)).flatten(1).any(1).nonzero().flatten().tolist())
        else:
            numbers.update(torch.unique(args[1]).tolist())

    return record
