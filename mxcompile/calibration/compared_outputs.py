"""The outputs of a float model that a changed one is compared on: logits of the output head, else all float tensors."""

from collections.abc import Container, Sequence
from typing import Any, cast

from torch import SymInt, Tensor
from torch.fx import Node

from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.analysis.row_order import values_with_selected_rows
from mxcompile.graph.agreement import output_leaves
from mxcompile.graph.program import Program


class ComparedOutputs:
    """nodes: the compared outputs of a program, by their paths in the model's output. left_out: why others are not."""

    def __init__(self, program: Program) -> None:
        matmuls = [matmul for matmul in find_matmuls(program)[0] if matmul.parameter in program.output_heads]
        self._heads = {matmul.node.meta["val"].shape[-1] for matmul in matmuls}
        self.left_out: dict[str, str] = {}
        self.nodes = self._comparable(program)

    def is_logits(self, shape: Sequence[int | SymInt]) -> bool:
        """Whether an output of this shape holds logits of the output head."""
        return isinstance(shape[-1], int) and any(shape[-1] == size for size in self._heads)

    def leave_out(self, name: str, reason: str) -> None:
        """Note why an output is not compared for some batch; the first reason is kept."""
        self.left_out.setdefault(name, f"{reason}, for one batch or more")

    def _comparable(self, program: Program) -> dict[str, Node]:
        selected = values_with_selected_rows(program)
        floats: dict[str, Node] = {}
        for name, node in output_nodes(program).items():
            reason = _why_not_compared(node, selected)
            if reason is None:
                floats[name] = node
            else:
                self.left_out[name] = reason
        heads = {name: node for name, node in floats.items() if self.is_logits(node.meta["val"].shape)}
        return heads or floats


def output_nodes(program: Program) -> dict[str, Node]:
    """The nodes that a graph returns, by their paths in the model's output (`logits`, `hidden_states.1`)."""
    leaves = cast(Sequence[Any], program.graph.output_node().args[0])
    nodes = [leaf for leaf in leaves if isinstance(leaf, Node)]
    values = tuple(leaf.meta.get("val") if isinstance(leaf, Node) else leaf for leaf in leaves)
    paths = {id(leaf): path for path, leaf in output_leaves(program.graph.process_outputs(values))}
    return {paths.get(id(node.meta["val"])) or str(index): node for index, node in enumerate(nodes)}


def _why_not_compared(node: Node, selected: Container[Node]) -> str | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return "not a float tensor"
    if value.dim() == 0:
        return "one number, such as a loss"
    if node.op != "call_function":
        return "not computed"
    return "the model selects its rows, which may be others in the quantized model" if node in selected else None
