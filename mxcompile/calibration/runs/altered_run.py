"""Run a Program with some matmul inputs transformed and some tensors replaced, without rewriting its graph."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul
from mxcompile.calibration.runs.run import Runner
from mxcompile.graph.program import Program
from mxcompile.ops import DEQUANTIZE, QUANTIZE, QUANTIZE_DEQUANTIZE

Prepare = Callable[[Tensor], Tensor]


class AlteredRun(Runner):
    """prepare: the function that a matmul applies to its input, for some matmuls. tensors: replacements, by name.

    Both may be changed between two runs.
    """

    def __init__(
        self, program: Program, prepare: Mapping[Matmul, Prepare], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(program)
        self.change(prepare, tensors or {})
        self._last: tuple[Any, Any, Tensor] | None = None
        self._quantized: dict[Node, Tensor] = {}

    def change(self, prepare: Mapping[Matmul, Prepare], tensors: Mapping[str, Tensor]) -> None:
        """Transform other inputs and replace other tensors from now on."""
        self.prepare = {matmul.node: (matmul.activation, function) for matmul, function in prepare.items()}
        self.tensors = dict(tensors)

    def run_node(self, n: Node) -> Any:
        """Compute a node; a matmul reads its prepared input.

        Gradients pass straight through values that the graph quantizes and dequantizes (those of a cache).
        """
        if self.gradients and n.target is QUANTIZE:
            self._quantized[n] = self.env[n.all_input_nodes[0]]
        source = _quantized_by(n) if self.gradients and n.target is DEQUANTIZE else None
        if source is not None and source in self._quantized:
            return QUANTIZE_DEQUANTIZE(self._quantized[source], *source.args[1:])
        if n not in self.prepare:
            return super().run_node(n)
        activation, function = self.prepare[n]
        plain = self.env[activation]
        self.env[activation] = self._prepared(plain, function)
        result = super().run_node(n)
        self.env[activation] = plain
        return result

    def parameter(self, node: Node) -> Tensor:
        """The tensor that a `get_attr` node reads, or its replacement."""
        replacement = self.tensors.get(str(node.target))
        return super().parameter(node) if replacement is None else replacement

    def _end_run(self) -> None:
        super()._end_run()
        self._last = None
        self._quantized = {}

    def _prepared(self, value: Tensor, function: Prepare) -> Tensor:
        """prepare(value), computed once for matmuls that share value and function (q, k, v)."""
        if self._last is None or self._last[0] is not value or self._last[1] is not function:
            self._last = (value, function, function(value))
        return self._last[2]


def _quantized_by(node: Node) -> Node | None:
    """The `mx::quantize` whose elements a `mx::dequantize` reads, None if a tensor of the program."""
    elements = node.args[0]
    quantized = elements.args[0] if isinstance(elements, Node) and elements.args else None
    return quantized if isinstance(quantized, Node) and quantized.target is QUANTIZE else None
