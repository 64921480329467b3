"""Measure: an instrument that runs a probe through the program after every pass and compares it with the float model.

Each layer is measured twice: on its input in the float model (the error that it makes by itself) and on the way through
the program as it is now (what has accumulated). A pass that keeps the function may change what a layer computes: a fold
divides its input and multiplies its weight. So the float model is carried along: after such a pass the program itself
is the float model from there on, or, if something has been lost before, the float model gets the same folds.

It costs one forward of the probe at the start and one a pass, with every layer's matmul repeated on a sample of rows (a
second one, if a lossy pass came before a fold). Of a probe of many tokens that sample, evenly spaced, is all that is
kept: 256 rows of every layer's input and output, 512 of the logits. From those rows, and from rows of its weight, come
the layer's distributions around each pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.layers import Layer, Rounded, find_layers
from mxcompile.calibration.run import Runner, run_outputs
from mxcompile.graph.agreement import agreement_db, output_tensors
from mxcompile.graph.inputs import Inputs, as_inputs
from mxcompile.graph.program import Program, Stage
from mxcompile.graph.records import LayerNumbers, Measured, PassResult
from mxcompile.numerics.histogram import Distribution, Histogram, Values
from mxcompile.numerics.metrics import kl_divergence, sqnr_db, top1_agreement
from mxcompile.pipeline.interfaces import Instrument, Pass, Step

_ROWS = 256
_OUTPUT_ROWS = 512
_LOGITS = "logits"
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class _Shown:
    """What a layer read (its computed operands, the input before rounding) and gave; a sample of rows if it can be."""

    operands: tuple[Tensor, ...]
    output: Tensor


@dataclass(frozen=True)
class _Float:
    """The float model as it is by now, carried through folds, and what it shows on the probe."""

    program: Program
    layers: dict[str, Layer]
    shown: dict[str, _Shown]
    outputs: Outputs


class Measure(Instrument):
    """Puts numbers into the ledger: `pipeline.run(program, instruments=[Measure()]).ledger[0].measured`.

    probe: inputs of one call, as `trace` takes them; the example inputs if None. Compared is with the program that the
    pipeline was given.
    """

    def __init__(self, probe: object = None) -> None:
        self._given = None if probe is None else as_inputs(probe)
        self._float: _Float | None = None
        self._exact = True
        self._values: dict[str, Values] = {}

    def start(self, program: Program, passes: tuple[Pass, ...]) -> None:
        """Run the probe through the float model."""
        self._exact = True
        self._float = self._show(program.copy())
        self._values = _all_values(self._float)

    def measure(self, program: Program, step: Step, result: PassResult) -> Measured:
        """Run the probe through what the pass has left."""
        before = self._values
        measured, self._values = self._measure(program, step, result)
        both = {name: Distribution(before[name], after) for name, after in self._values.items() if name in before}
        return replace(measured, distributions=both)

    def _measure(self, program: Program, step: Step, result: PassResult) -> tuple[Measured, dict[str, Values]]:
        assert self._float is not None
        folded = step.current.preserves_function and program.stage is Stage.FLOAT and result.rewrites > 0
        if folded and self._exact:
            now = self._show(program.copy())
            if agreement_db(self._float.outputs, now.outputs)[0] >= step.current.least_db(program):
                measured = _of_folds(self._float, now)
                self._float = replace(now, outputs=self._float.outputs)
                return measured, _all_values(now)
        elif folded and result.folds:
            carried = self._float.program.copy()
            for fold in result.folds:
                fold.apply(carried)
            self._float = replace(self._show(carried), outputs=self._float.outputs)
        self._exact = self._exact and result.rewrites == 0
        return self._compare(program, self._float)

    def finish(self, program: Program) -> None:
        """Let go of the float model."""
        self._float, self._values = None, {}

    def _probe(self, program: Program) -> Inputs:
        return self._given or program.example

    def _show(self, program: Program) -> _Float:
        layers = find_layers(program)
        shown: dict[str, _Shown] = {}

        def keep(layer: Layer, runner: _Watching, output: Tensor) -> None:
            operands = (runner.env[layer.value if node is layer.activation else node] for node in layer.operands)
            kept = tuple(_sample(operand, layer) for operand in operands)
            shown[layer.name] = _Shown(kept, _sample(output, layer))

        outputs = _run(program, self._probe(program), layers, keep)
        return _Float(program, layers, shown, outputs)

    def _compare(self, program: Program, exact: _Float) -> tuple[Measured, dict[str, Values]]:
        layers = find_layers(program)
        numbers: dict[str, LayerNumbers] = {}
        values: dict[str, Values] = {}
        prepared = _Prepared()

        def compare(layer: Layer, runner: _Watching, output: Tensor) -> None:
            known = exact.shown.get(layer.name)
            if known is None or len(known.operands) != len(layer.operands):
                return
            pairs = zip(layer.operands, known.operands, strict=True)
            local = runner.again(layer, [prepared(layer, x) if n is layer.activation else x for n, x in pairs])
            along = _sample(output, layer) if layer.operands == (layer.activation,) else None
            weight, wanted = layer.rows(program), exact.layers[layer.name].rows(exact.program)
            numbers[layer.name] = _numbers(layer, _db(wanted, weight), known.output, local, along)
            values[layer.name] = _values(layer, weight, known.operands, prepared)

        outputs = _run(program, self._probe(program), layers, compare)
        return _measured(exact.outputs, outputs, numbers), values


class _Watching(Runner):
    """Runs a program and shows each layer, when it has been computed, together with the runner."""

    def __init__(
        self, program: Program, layers: dict[str, Layer], show: "Callable[[Layer, _Watching, Tensor], None]"
    ) -> None:
        super().__init__(program)
        self.layers = {layer.node: layer for layer in layers.values()}
        self.show = show

    def run_node(self, n: Node) -> Any:
        """Compute a node."""
        result = super().run_node(n)
        if n in self.layers:
            self.show(self.layers[n], self, result)
        return result

    def again(self, layer: Layer, operands: list[Tensor]) -> Tensor:
        """What a layer gives for other computed operands."""
        plain = {node: self.env[node] for node in layer.operands}
        self.env.update(zip(layer.operands, operands, strict=True))
        result = super().run_node(layer.node)
        self.env.update(plain)
        return result


class _Prepared:
    """Layers that share an input and round it alike (q, k, v) round it once."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Rounded | None, Tensor] | None = None

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x or self._last[1] != layer.rounded:
            self._last = x, layer.rounded, layer.prepare(x)
        return self._last[2]


def _run(
    program: Program, probe: Inputs, layers: dict[str, Layer], show: Callable[[Layer, _Watching, Tensor], None]
) -> Outputs:
    """The float outputs of a program, at most 512 rows of each; every layer is shown on the way."""
    outputs = output_tensors(run_outputs(_Watching(program, layers, show), program, probe))
    return {name: _spaced(value, _OUTPUT_ROWS) for name, value in outputs.items()}


def _sample(value: Tensor, layer: Layer) -> Tensor:
    return _spaced(value, _ROWS) if layer.samples else value


def _spaced(value: Tensor, count: int) -> Tensor:
    """At most that many of the rows `[..., size]` of a value, evenly spaced."""
    rows = value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]


def _numbers(
    layer: Layer, weight_db: float | None, wanted: Tensor, local: Tensor | None, along: Tensor | None
) -> LayerNumbers:
    accumulated = None if along is None else _db(wanted, along)
    error = None if accumulated is None else 10 ** (-accumulated / 20)
    activation = None if layer.rounded is None else str(layer.rounded)
    local_db = None if local is None else _db(wanted, local)
    return LayerNumbers(layer.format, activation, weight_db, local_db, accumulated, error)


def _all_values(exact: _Float) -> dict[str, Values]:
    prepared = _Prepared()
    found = ((layer, exact.shown[name].operands) for name, layer in exact.layers.items())
    return {layer.name: _values(layer, layer.rows(exact.program), operands, prepared) for layer, operands in found}


def _values(layer: Layer, weight: Tensor, operands: tuple[Tensor, ...], prepared: _Prepared) -> Values:
    pairs = zip(layer.operands, operands, strict=True)
    given = next((operand for node, operand in pairs if node is layer.activation), None)
    if given is None:
        return Values(Histogram.of(weight), None, None)
    rounded = None if layer.rounded is None else Histogram.of(prepared(layer, given))
    return Values(Histogram.of(weight), Histogram.of(given), rounded)


def _of_folds(before: _Float, after: _Float) -> Measured:
    """After a pass that has kept the function: a layer's input and weight carry factors, its output may."""
    numbers: dict[str, LayerNumbers] = {}
    for name, known in before.shown.items():
        now = after.shown.get(name)
        if now is not None and now.output.shape == known.output.shape:
            wanted = _up_to_factors(known.output, now.output)
            along = None if len(now.operands) > 1 else now.output
            numbers[name] = _numbers(after.layers[name], None, wanted, now.output, along)
    return _measured(before.outputs, after.outputs, numbers)


def _up_to_factors(wanted: Tensor, given: Tensor) -> Tensor:
    """The wanted values times the factor for each channel that brings them closest to the given ones."""
    w, g = (tensor.reshape(-1, tensor.shape[-1]).double() for tensor in (wanted, given))
    power = w.square().sum(0)
    factors = torch.where(power > 0, (w * g).sum(0) / power, 1.0)
    return wanted.double() * factors


def _measured(wanted: Outputs, given: Outputs, layers: dict[str, LayerNumbers]) -> Measured:
    output_db = agreement_db(wanted, given)[0]
    names = [name for name in wanted if name == _LOGITS and given[name].shape == wanted[name].shape]
    if not names:
        return Measured(output_db, None, None, layers)
    before, after = wanted[names[0]], given[names[0]]
    return Measured(output_db, kl_divergence(before, after), top1_agreement(before, after), layers)


def _db(wanted: Tensor, given: Tensor) -> float | None:
    """SQNR; None if the shapes differ or something is not finite."""
    if wanted.shape != given.shape:
        return None
    found = sqnr_db(wanted, given)
    return None if math.isnan(found) else found
