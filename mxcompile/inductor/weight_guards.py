"""What a compiled call checks of its MXWeights each time: their layouts, at the places where they were found.

Dynamo's own guards look into every weight, in Python: with 210 weights that takes a millisecond a token, this a
thirtieth of one. They still hold for the weights as tensors (class, shape, dtype, device) and for everything else.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mxcompile.tensor.weight import MXLayout, MXWeight


class Layouts:
    """The layouts of all MXWeights of a module, in the order of its parts, and where they were found.

    What lies in a weight of a given shape follows from its layout. Weights are not held here: one that is replaced is
    freed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._children: list[tuple[dict[str, Any], str, nn.Module | None]] = []
        self._weights: list[tuple[dict[str, Any], str, MXLayout]] = []
        for part in module.modules():
            inside, held = vars(part)["_modules"], vars(part)["_parameters"]
            self._children += [(inside, name, child) for name, child in inside.items()]
            self._weights += [(held, name, w.layout_) for name, w in held.items() if type(w) is MXWeight]

    @property
    def layouts(self) -> list[MXLayout]:
        """Of each weight, its layout."""
        return [layout for _, _, layout in self._weights]

    def hold(self) -> bool:
        """Whether the same modules have weights of these layouts. More of either change nothing that was traced."""
        for inside, name, child in self._children:
            if inside.get(name) is not child:
                return False
        return all(getattr(held.get(name), "layout_", None) is layout for held, name, layout in self._weights)


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
