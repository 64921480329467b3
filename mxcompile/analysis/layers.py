"""Layers: the matmuls to quantize, identified across passes, whatever op computes them at each stage.

A layer has the name of its weight, which no pass changes: `up.weight` is packed into `up.weight_elements` and read by
`mx::dequantize`, `mx::linear` or `mx::grouped_linear`, and its layer is still called `up.weight`. A second matmul by
the same weight is another layer, `up.weight (2)`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.analysis.matmuls import Matmul
from mxcompile.graph.edit import parameter_name
from mxcompile.graph.program import Program, Rounding, module_path
from mxcompile.ops import DEQUANTIZE, GROUPED_LINEAR, LINEAR, QUANTIZE, QUANTIZE_DEQUANTIZE

aten = torch.ops.aten

_FUSED: Final[dict[Any, tuple[int, int]]] = {LINEAR: (1, 4), GROUPED_LINEAR: (2, 5)}
"""Fused matmul -> positions of its elements, which the scales follow, and of their format."""


@dataclass(frozen=True)
class InputRounding:
    """How a layer rounds its input: an MXFormat and a ScaleRule, as text."""

    format: str
    rule: str

    def __str__(self) -> str:
        return self.format


@dataclass(frozen=True)
class Layer:
    """A matmul by a weight.

    node: the node that multiplies. matmul: None for a fused one. format: of its weight's elements, None for float.
    operands: its computed operands, in order of position (its input; the offsets of experts). constants: the others
    (weight, bias). steps: the nodes from the operands to the result, `node` last.
    activation: the operand that is its input, as it is multiplied. float_input: its input before rounding.
    input_rounding: how it is rounded, None if it is not.
    """

    name: str
    node: Node
    matmul: Matmul | None
    format: str | None
    operands: tuple[Node, ...]
    constants: tuple[Node, ...]
    steps: tuple[Node, ...]
    activation: Node
    float_input: Node
    input_rounding: InputRounding | None

    @property
    def module_path(self) -> str:
        """Path of the module that multiplies."""
        return module_path(self.node)

    @property
    def is_rowwise(self) -> bool:
        """True if each output row depends on the same row of the input alone, so that rows can be sampled."""
        return self.operands == (self.activation,) and (self.matmul is None or self.matmul.root.meta["val"].dim() == 2)

    def prepare(self, x: Tensor) -> Tensor:
        """An input, rounded as the layer does before it multiplies."""
        if self.input_rounding is None:
            return x
        return QUANTIZE_DEQUANTIZE(x, self.input_rounding.format, self.input_rounding.rule)

    def rows(self, program: Program) -> Tensor:
        """Its weight `[..., out, in]`, dequantized."""
        if self.matmul is not None and not self.matmul.is_lowered:
            return self.matmul.rows(program.tensor(self.matmul.parameter).detach())
        first = 0 if self.matmul is not None else _FUSED[self.node.target][0]
        packed = (self.node if self.matmul is None else self.matmul.root).args[first : first + 2]
        elements, scales = (program.tensor(str(cast(Node, part).target)) for part in packed)
        if self.matmul is None:
            x: Tensor = self.activation.meta["val"]
            return DEQUANTIZE(elements, scales, self.format, int(x.shape[-1]), x.dtype)
        return DEQUANTIZE(elements, scales, *self.matmul.root.args[2:])


def find_layers(program: Program) -> dict[str, Layer]:
    """The layers of a Program by name, in graph order."""
    computed = _computed(program)
    matmuls = {matmul.node: matmul for matmul in choose(program).matmuls}
    layers: dict[str, Layer] = {}
    count: dict[str, int] = {}
    for node in program.graph.nodes:
        if node not in matmuls and node.target not in _FUSED:
            continue
        parameter = _parameter(node, matmuls.get(node))
        count[parameter] = count.get(parameter, 0) + 1
        name = parameter if count[parameter] == 1 else f"{parameter} ({count[parameter]})"
        layers[name] = _layer(program, name, parameter, node, matmuls.get(node), computed)
    return layers


def _layer(
    program: Program, name: str, parameter: str, node: Node, matmul: Matmul | None, computed: set[Node]
) -> Layer:
    steps = _steps(node)
    inputs = dict.fromkeys(operand for step in steps for operand in _operands(step) if operand not in steps)
    operands = tuple(operand for operand in inputs if operand in computed)
    constants = tuple(operand for operand in inputs if operand not in computed)
    activation = cast(Node, node.args[0]) if matmul is None else matmul.activation
    if matmul is None or matmul.is_lowered:
        fmt = str(node.args[_FUSED[node.target][1]] if matmul is None else matmul.root.args[2])
    else:
        rounding: Rounding | None = program.rounded.get(parameter)
        fmt = None if rounding is None else str(rounding.format)
    return Layer(name, node, matmul, fmt, operands, constants, steps, activation, *split_rounding(activation))


def _steps(node: Node) -> tuple[Node, ...]:
    """The node, and what finds the experts of its rows from their offsets where a grouped matmul was fused."""
    chosen = node.args[1] if node.target is GROUPED_LINEAR else None
    found = chosen.args[0] if isinstance(chosen, Node) and chosen.target is aten.unsqueeze.default else None
    if not isinstance(chosen, Node) or not isinstance(found, Node) or found.target is not aten.searchsorted.Tensor:
        return (node,)
    numbers = cast(Node, found.args[1])  # 0, 1, 2 ... as many as the input has rows
    return *numbers.all_input_nodes, numbers, found, chosen, node


def split_rounding(activation: Node) -> tuple[Node, InputRounding | None]:
    """A matmul's input before rounding, and how it is rounded (None: it is not)."""
    if activation.target is QUANTIZE_DEQUANTIZE:
        x, fmt, rule = cast(tuple[Any, ...], activation.args)
        return x, InputRounding(str(fmt), str(rule))
    if activation.target is DEQUANTIZE:
        elements = cast(Node, activation.args[0])
        quantize = elements.args[0] if elements.args else None
        if isinstance(quantize, Node) and quantize.target is QUANTIZE:
            x, fmt, rule = cast(tuple[Any, ...], quantize.args)
            return x, InputRounding(str(fmt), str(rule))
    return activation, None


def _parameter(node: Node, matmul: Matmul | None) -> str:
    return matmul.name if matmul is not None else parameter_name(cast(Node, node.args[_FUSED[node.target][0]]))


def _operands(node: Node) -> Iterator[Node]:
    for value in (*node.args, *node.kwargs.values()):
        if isinstance(value, Node):
            yield value


def _computed(program: Program) -> set[Node]:
    """The nodes whose values depend on the inputs."""
    computed: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or any(source in computed for source in node.all_input_nodes):
            computed.add(node)
    return computed
