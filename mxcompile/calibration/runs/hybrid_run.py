"""Run a Program as it was before a pass, with a chosen subset of the pass's changes, without rewriting its graph."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from mxcompile.analysis.layers import Layer, find_layers
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.graph.program import Program


@dataclass(frozen=True, eq=False)
class ProgramChange:
    """One change that a pass made: to a layer (its weight, bias, and rounding of its input) or to other tensors.

    before, after: the layer; None for other tensors. tensors: the new tensors by name; empty for a layer.
    """

    name: str
    before: Layer | None = None
    after: Layer | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class HybridRun(AlteredRun):
    """Runs `before` with the applied changes. Not valid across folds: their divided values cannot be mixed."""

    def __init__(self, before: Program, after: Program) -> None:
        super().__init__(before, {})
        self._after = after
        self._changes: dict[Node, ProgramChange] = {}

    def apply(self, changes: Iterable[ProgramChange]) -> None:
        """Run with exactly these changes from now on."""
        changes = list(changes)
        self.tensors = {name: tensor for change in changes for name, tensor in change.tensors.items()}
        self._changes = {change.before.node: change for change in changes if change.before is not None}

    def run_node(self, n: Node) -> Any:
        """Compute a node; a changed layer as it is after the pass."""
        change = self._changes.get(n)
        if change is None or change.before is None or change.after is None:
            return super().run_node(n)
        before, after = change.before, change.after
        twins = zip(before.constants, after.constants, strict=True)
        changed = {node: _constant(self._after, twin) for node, twin in twins}
        if before.input_rounding != after.input_rounding:
            changed[before.activation] = after.prepare(self._value(before))
        plain = {node: self.env[node] for node in changed}
        self.env.update(changed)
        result = super().run_node(n)
        self.env.update(plain)
        return result

    def _value(self, layer: Layer) -> Tensor:
        """A layer's unrounded input; if that is freed already, the input as it was rounded before the pass."""
        return self.env[layer.float_input if layer.float_input in self.env else layer.activation]


def find_changes(before: Program, after: Program) -> list[ProgramChange]:
    """The differences between two programs: first layers, then other tensors that both read."""
    earlier, later = find_layers(before), find_layers(after)
    changes: list[ProgramChange] = []
    covered: set[str] = set()
    for name, layer in earlier.items():
        twin = later.get(name)
        if twin is None or len(layer.constants) != len(twin.constants):
            continue
        covered |= _tensors(layer) | _tensors(twin)
        if layer.input_rounding != twin.input_rounding or not _same_constants(before, layer, after, twin):
            changes.append(ProgramChange(name, layer, twin))
    for name in before.parameter_names():
        if name not in covered and after.has_tensor(name) and not _same(before.tensor(name), after.tensor(name)):
            changes.append(ProgramChange(name, tensors={name: after.tensor(name)}))
    return changes


def _same_constants(before: Program, layer: Layer, after: Program, twin: Layer) -> bool:
    pairs = zip(layer.constants, twin.constants, strict=True)
    return all(_same(_constant(before, node), _constant(after, other)) for node, other in pairs)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _tensors(layer: Layer) -> set[str]:
    """Names of the tensors that a layer's constants are computed from."""
    names: set[str] = set()
    stack = list(layer.constants)
    while stack:
        node = stack.pop()
        if node.op == "get_attr":
            names.add(str(node.target))
        stack += node.all_input_nodes
    return names


def _constant(program: Program, node: Node) -> Any:
    """The value of a node that depends on no graph input."""
    if node.op == "get_attr":
        return program.tensor(str(node.target)).detach()

    def value(source: Node) -> Any:
        return _constant(program, source)

    target: Any = node.target
    return target(*map_arg(node.args, value), **map_arg(node.kwargs, value))
