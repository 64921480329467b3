"""What a compiled call checks of its MXWeights each time: their layouts, by one walk through the module.

Dynamo's own guards look into every weight, in Python: with 210 weights that takes a millisecond a token, which a walk
does in a tenth. They still hold for the weights as tensors (class, shape, dtype, device) and for everything else.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mxcompile.weight import MXLayout, MXWeight


def layouts(module: nn.Module) -> list[MXLayout]:
    """The layouts of all MXWeights of a module. What lies in a weight of a given shape follows from its layout."""
    found: list[MXLayout] = []
    waiting: list[nn.Module | None] = [module]
    while waiting:
        here = waiting.pop()
        if here is not None:
            waiting.extend(here._modules.values())  # pyright: ignore[reportPrivateUsage] - `modules()` takes 3 times as long
            found += [weight.layout_ for weight in here._parameters.values() if type(weight) is MXWeight]  # pyright: ignore
    return found


def outside_weights(module: nn.Module) -> Callable[[Sequence[Any]], list[bool]]:
    """A `guard_filter_fn` for `torch.compile` that keeps all guards but those on what lies in a module's MXWeights."""
    held = {id(weight) for weight in module.parameters() if isinstance(weight, MXWeight)}

    def keep(guards: Sequence[Any]) -> list[bool]:
        weights = {guard.name for guard in guards if id(guard.value) in held}
        return [
            guard.name.rpartition(".")[0] not in weights
            and (guard.guard_type != "TENSOR_SUBCLASS_METADATA_MATCH" or guard.name not in weights)
            for guard in guards
        ]

    return keep
