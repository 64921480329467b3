"""Run a graph node by node, each of its tensors fetched when it is read and freed after its last reader."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter


def run_by_node(graph_module: GraphModule, inputs: Iterable[Any], fetch: Callable[[Tensor], Tensor]) -> Any:
    """What the graph module returns. inputs: values of its placeholders. fetch: called with each tensor it reads."""
    outputs = _FetchingInterpreter(graph_module, fetch).run(*inputs, enable_io_processing=False)
    return graph_module.graph.process_outputs(outputs)


class _FetchingInterpreter(Interpreter):
    def __init__(self, graph_module: GraphModule, fetch: Callable[[Tensor], Tensor]) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self._fetch = fetch

    def fetch_attr(self, target: str) -> Any:
        """A tensor as it is used, or a nested graph."""
        value = super().fetch_attr(target)
        return self._fetch(value) if isinstance(value, Tensor) else value
