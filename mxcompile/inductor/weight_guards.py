"""Guards of a compiled call on its MX weights: the layout objects of all weights are compared by identity.

Dynamo's own guards inspect every weight in Python: with 210 weights that takes 1 ms a token, these 0.03 ms. Dynamo
still guards the weights as tensors (class, shape, dtype, device) and everything else.
"""

from collections.abc import Callable, Container
from typing import Any

from torch import nn
from torch.fx import GraphModule

from mxcompile.inductor.private_api import TracingContext, in_front_of
from mxcompile.tensor.weight import MXLayout, MXWeight

Backend = Callable[..., Callable[..., Any]]


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


def outside_weights(module: nn.Module, backend: Backend) -> Backend:
    """A backend that, before another one, removes Dynamo's guards on the inside of a module's MXWeights.

    Dynamo builds guards when the backend has returned. A `guard_filter_fn` would make it build all of them twice, each
    time for half a second if there are 30 layers.
    """

    def compile_(graph: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        ours = {id(weight) for weight in module.parameters() if isinstance(weight, MXWeight)}
        placeholders = zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True)
        sources = {getattr(node, "_dynamo_source", None) for node, value in placeholders if id(value) in ours}
        if (context := TracingContext.try_get()) is not None:
            leave_out(context.guards_context.dynamo_guards.inner, sources - {None})
        return backend(graph, inputs, **options)

    return in_front_of(backend, compile_)


def leave_out(guards: Any, weights: Container[Any]) -> None:
    """Remove from a set of guards those on what lies in weights, and on their metadata. weights: their sources."""
    for guard in list(guards):
        source = guard.originating_source
        is_metadata = source in weights and guard.create_fn_name() == "TENSOR_SUBCLASS_METADATA_MATCH"
        if is_metadata or getattr(source, "base", None) in weights:
            guards.discard(guard)
