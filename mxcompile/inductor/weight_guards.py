"""Guards of a compiled call on its MX weights: the layout objects of all weights are compared by identity.

Dynamo's own guards inspect every weight in Python: with 210 weights that takes 1 ms a token, these 0.03 ms. Dynamo
still guards the weights as tensors (class, shape, dtype, device) and everything else.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mxcompile.tensor.weight import MXLayout, MXWeight


class WeightLayouts:
    """The layouts of all MXWeights of a module in module order, and the dicts that hold the weights.

    A weight's shape and layout determine the shapes of its component tensors. The weights themselves are not
    referenced: a weight that is replaced is freed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._children: list[tuple[dict[str, Any], str, nn.Module | None]] = []
        self._weights: list[tuple[dict[str, Any], str, MXLayout]] = []
        for submodule in module.modules():
            children, parameters = vars(submodule)["_modules"], vars(submodule)["_parameters"]
            self._children += [(children, name, child) for name, child in children.items()]
            self._weights += [(parameters, name, w.layout_) for name, w in parameters.items() if type(w) is MXWeight]

    @property
    def layouts(self) -> list[MXLayout]:
        """The layout of each weight."""
        return [layout for _, _, layout in self._weights]

    def hold(self) -> bool:
        """Whether the same modules still have weights of these layouts; added ones do not affect what was traced."""
        for children, name, child in self._children:
            if children.get(name) is not child:
                return False
        return all(getattr(held.get(name), "layout_", None) is layout for held, name, layout in self._weights)


def outside_weights(module: nn.Module) -> Callable[[Sequence[Any]], list[bool]]:
    """A `guard_filter_fn` for `torch.compile` that drops the guards on the inside of a module's MXWeights."""
    ours = {id(weight) for weight in module.parameters() if isinstance(weight, MXWeight)}

    def keep(guards: Sequence[Any]) -> list[bool]:
        weights = {guard.name for guard in guards if id(guard.value) in ours}
        return [
            guard.name.rpartition(".")[0] not in weights
            and (guard.guard_type != "TENSOR_SUBCLASS_METADATA_MATCH" or guard.name not in weights)
            for guard in guards
        ]

    return keep
