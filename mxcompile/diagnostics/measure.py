"""Measure: an instrument that runs a probe through the program after every pass and compares it with the float model.

Each layer is measured twice: on its input in the float model (its own error) and on its input in the current program
(the accumulated error). A pass that preserves the function may still change what a layer computes: a fold divides its
input and multiplies its weight. The float model therefore follows such passes: the folded program becomes the new float
model, or, if an earlier pass or the pass itself was lossy, the same folds are applied to the float model.

Cost: one forward of the probe at the start and one after each pass (two after a fold that follows a lossy pass), with
every layer's matmul repeated on a sample of rows. Only evenly spaced rows are kept: 256 of every layer's input and
output, 512 of the logits. A layer's histograms before and after each pass come from those rows and rows of its weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.layers import InputRounding, Layer, find_layers
from mxcompile.analysis.row_order import values_with_selected_rows
from mxcompile.calibration.runs.not_finite import check_inputs
from mxcompile.calibration.runs.run import Runner, visible_batches, visible_outputs
from mxcompile.graph.agreement import agreement_db
from mxcompile.graph.inputs import Inputs, as_inputs
from mxcompile.graph.program import Program, Stage
from mxcompile.graph.records import LayerMeasurements, ModelMeasurements, PassResult
from mxcompile.numerics.histogram import Histogram, HistogramChange, LayerHistograms
from mxcompile.numerics.metrics import kl_divergence, sqnr_db, top1_agreement
from mxcompile.pipeline.interfaces import Instrument, Pass, PipelineStep

_ROWS = 256
_OUTPUT_ROWS = 512
_LOGITS = "logits"
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class _LayerSample:
    """Computed operands (the input before rounding) and output of a layer; sampled rows if rows are independent.

    visible_input, visible_output: the rows that no mask hides, bool `[rows]`, where rows are not sampled; others are
    zero. None: all are visible.
    """

    operands: tuple[Tensor, ...]
    output: Tensor
    visible_input: Tensor | None = None
    visible_output: Tensor | None = None


@dataclass(frozen=True)
class _FloatRun:
    """The float model with the folds so far, and its layers and outputs on the probe.

    unpaired: layers whose input rows the model selects, so that they may be other tokens after a pass.
    """

    program: Program
    layers: dict[str, Layer]
    unpaired: frozenset[str]
    samples: dict[str, _LayerSample]
    outputs: Outputs


class Measure(Instrument):
    """Adds measurements to the ledger: `pipeline.run(program, instruments=[Measure()]).ledger[0].measured`.

    probe: inputs of one call, as `trace` takes them; the example inputs if None. The reference is the program that the
    pipeline starts from.
    """

    def __init__(self, probe: object = None) -> None:
        self._probe_inputs = None if probe is None else as_inputs(probe)
        self._float: _FloatRun | None = None
        self._lossless = True
        self._histograms: dict[str, LayerHistograms] = {}

    def start(self, program: Program, passes: tuple[Pass, ...]) -> None:
        """Run the probe through the float model; raises InputError if NaN among its inputs reaches a layer."""
        visible_batches(program, [self._probe(program)], "probe")
        self._lossless = True
        check_inputs(program, [self._probe(program)], "the probe")
        self._float = self._capture(program.copy())
        self._histograms = _all_histograms(self._float)

    def measure(self, program: Program, step: PipelineStep, result: PassResult) -> ModelMeasurements:
        """Run the probe through the program after the pass."""
        before = self._histograms
        measured, self._histograms = self._measure(program, step, result)
        changes = {
            name: HistogramChange(before[name], after) for name, after in self._histograms.items() if name in before
        }
        return replace(measured, distributions=changes)

    def _measure(
        self, program: Program, step: PipelineStep, result: PassResult
    ) -> tuple[ModelMeasurements, dict[str, LayerHistograms]]:
        assert self._float is not None
        is_fold = step.current.preserves_function and program.stage is Stage.FLOAT and result.rewrites > 0
        if is_fold and self._lossless:
            now = self._capture(program.copy())
            if agreement_db(self._float.outputs, now.outputs)[0] >= step.current.required_db(program):
                measured = _measure_fold(self._float, now)
                self._float = replace(now, outputs=self._float.outputs)
                return measured, _all_histograms(now)
        elif program.stage is Stage.FLOAT and result.folds:
            folded_float = self._float.program.copy()
            for fold in result.folds:
                fold.apply(folded_float)
            self._float = replace(self._capture(folded_float), outputs=self._float.outputs)
        self._lossless = self._lossless and result.rewrites == 0
        return self._compare(program, self._float)

    def finish(self, program: Program) -> None:
        """Release the float model."""
        self._float, self._histograms = None, {}

    def _probe(self, program: Program) -> Inputs:
        return self._probe_inputs or program.example

    def _capture(self, program: Program) -> _FloatRun:
        layers = find_layers(program)
        samples: dict[str, _LayerSample] = {}

        def keep(layer: Layer, runner: _LayerRunner, output: Tensor) -> None:
            masks = runner.visible(layer.activation), runner.visible(layer.node)
            operands = tuple(
                _sample(runner.env[layer.float_input], layer, masks[0])
                if node is layer.activation
                else runner.env[node]
                for node in layer.operands
            )
            kept = (None, None) if layer.is_rowwise else masks
            samples[layer.name] = _LayerSample(operands, _sample(output, layer, masks[1]), *kept)

        outputs = _run(program, self._probe(program), layers, keep)
        selected = values_with_selected_rows(program)
        unpaired = frozenset(name for name, layer in layers.items() if layer.activation in selected)
        return _FloatRun(program, layers, unpaired, samples, outputs)

    def _compare(self, program: Program, float_run: _FloatRun) -> tuple[ModelMeasurements, dict[str, LayerHistograms]]:
        layers = find_layers(program)
        numbers: dict[str, LayerMeasurements] = {}
        histograms: dict[str, LayerHistograms] = {}
        prepared = _PreparedInputs()

        def compare(layer: Layer, runner: _LayerRunner, output: Tensor) -> None:
            reference = float_run.samples.get(layer.name)
            if reference is None or len(reference.operands) != len(layer.operands):
                return
            pairs = zip(layer.operands, reference.operands, strict=True)
            local = runner.recompute(layer, [prepared(layer, x) if n is layer.activation else x for n, x in pairs])
            local = _zeroed(local, reference.visible_output)
            paired = layer.operands == (layer.activation,) and layer.name not in float_run.unpaired
            accumulated_output = _sample(output, layer, runner.visible(layer.node)) if paired else None
            weight, float_weight = layer.rows(program), float_run.layers[layer.name].rows(float_run.program)
            numbers[layer.name] = _layer_numbers(
                layer, _db(float_weight, weight), reference.output, local, accumulated_output
            )
            histograms[layer.name] = _layer_histograms(layer, weight, reference, prepared)

        outputs = _run(program, self._probe(program), layers, compare)
        return _measured(float_run.outputs, outputs, numbers), histograms


class _LayerRunner(Runner):
    """Runs a program and calls `on_layer` with each layer, itself and the output, once the layer is computed."""

    def __init__(
        self, program: Program, layers: dict[str, Layer], on_layer: "Callable[[Layer, _LayerRunner, Tensor], None]"
    ) -> None:
        super().__init__(program)
        self.layers = {layer.node: layer for layer in layers.values()}
        self.on_layer = on_layer

    def run_node(self, n: Node) -> Any:
        """Compute a node."""
        result = super().run_node(n)
        if n in self.layers:
            self.env[n] = result
            self.visibility.record(n, self.env)
            self.on_layer(self.layers[n], self, result)
        return result

    def visible(self, node: Node) -> Tensor | None:
        """The rows of a computed value that no mask hides, bool `[rows]`; None if it hides none."""
        return self.visibility.mask(node, self.env[node])

    def recompute(self, layer: Layer, operands: list[Tensor]) -> Tensor:
        """The output of a layer for other computed operands."""
        original = dict(self.env)
        self.env.update(zip(layer.operands, operands, strict=True))
        for step in layer.steps:
            self.env[step] = super().run_node(step)
        result = self.env[layer.node]
        self.env.clear()
        self.env.update(original)
        return result


class _PreparedInputs:
    """Prepares the input of a layer; the next layers with the same input and rounding (q, k, v) reuse it."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, InputRounding | None, Tensor] | None = None

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x or self._last[1] != layer.input_rounding:
            self._last = x, layer.input_rounding, layer.prepare(x)
        return self._last[2]


def _run(
    program: Program, probe: Inputs, layers: dict[str, Layer], on_layer: Callable[[Layer, _LayerRunner, Tensor], None]
) -> Outputs:
    """The float outputs of a program, at most 512 visible rows of each; calls `on_layer` for every layer on the way."""
    outputs = visible_outputs(_LayerRunner(program, layers, on_layer), program, probe)
    return {name: _spaced(value, _OUTPUT_ROWS) for name, value in outputs.items()}


def _sample(value: Tensor, layer: Layer, visible: Tensor | None) -> Tensor:
    if not layer.is_rowwise:
        return _zeroed(value, visible)
    return _spaced(_kept(value, visible), _ROWS)


def _kept(value: Tensor, visible: Tensor | None) -> Tensor:
    return value if visible is None else value.reshape(len(visible), -1)[visible]


def _zeroed(value: Tensor, visible: Tensor | None) -> Tensor:
    return value if visible is None else value.masked_fill(~visible.reshape(*value.shape[:-1], 1), 0)


def _spaced(value: Tensor, count: int) -> Tensor:
    """At most `count` evenly spaced rows of a value `[..., size]`."""
    rows = value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, dtype=torch.float32, device=rows.device).long()]


def _layer_numbers(
    layer: Layer, weight_db: float | None, expected: Tensor, local: Tensor | None, accumulated_output: Tensor | None
) -> LayerMeasurements:
    accumulated = None if accumulated_output is None else _db(expected, accumulated_output)
    error = None if accumulated is None else 10 ** (-accumulated / 20)
    activation = None if layer.input_rounding is None else str(layer.input_rounding)
    local_db = None if local is None else _db(expected, local)
    return LayerMeasurements(layer.format, activation, weight_db, local_db, accumulated, error)


def _all_histograms(float_run: _FloatRun) -> dict[str, LayerHistograms]:
    prepared = _PreparedInputs()
    samples = ((layer, float_run.samples[name]) for name, layer in float_run.layers.items())
    return {
        layer.name: _layer_histograms(layer, layer.rows(float_run.program), sample, prepared)
        for layer, sample in samples
    }


def _layer_histograms(layer: Layer, weight: Tensor, sample: _LayerSample, prepared: _PreparedInputs) -> LayerHistograms:
    pairs = zip(layer.operands, sample.operands, strict=True)
    x = next((operand for node, operand in pairs if node is layer.activation), None)
    if x is None:
        return LayerHistograms(Histogram.of(weight), None, None)
    visible = sample.visible_input
    rounded = None if layer.input_rounding is None else Histogram.of(_kept(prepared(layer, x), visible))
    return LayerHistograms(Histogram.of(weight), Histogram.of(_kept(x, visible)), rounded)


def _measure_fold(before: _FloatRun, after: _FloatRun) -> ModelMeasurements:
    """Measure a pass that preserved the function: it may have scaled a layer's input, weight and output channels."""
    numbers: dict[str, LayerMeasurements] = {}
    for name, sample in before.samples.items():
        now = after.samples.get(name)
        if now is not None and now.output.shape == sample.output.shape:
            expected = _rescaled(sample.output, now.output)
            accumulated_output = None if len(now.operands) > 1 else now.output
            numbers[name] = _layer_numbers(after.layers[name], None, expected, now.output, accumulated_output)
    return _measured(before.outputs, after.outputs, numbers)


def _rescaled(expected: Tensor, actual: Tensor) -> Tensor:
    """The expected values, each channel scaled by the factor that fits the actual values best."""
    e, a = (tensor.reshape(-1, tensor.shape[-1]).double() for tensor in (expected, actual))
    power = e.square().sum(0)
    factors = torch.where(power > 0, (e * a).sum(0) / power, 1.0)
    return expected.double() * factors


def _measured(expected: Outputs, actual: Outputs, layers: dict[str, LayerMeasurements]) -> ModelMeasurements:
    output_db = agreement_db(expected, actual)[0]
    names = [name for name in expected if name == _LOGITS and actual[name].shape == expected[name].shape]
    if not names:
        return ModelMeasurements(output_db, None, None, layers)
    before, after = expected[names[0]], actual[names[0]]
    return ModelMeasurements(output_db, kl_divergence(before, after), top1_agreement(before, after), layers)


def _db(expected: Tensor, actual: Tensor) -> float | None:
    """SQNR in dB; None if there are no values, the shapes differ or a value is NaN."""
    if expected.shape != actual.shape or not expected.numel():
        return None
    sqnr = sqnr_db(expected, actual)
    return None if math.isnan(sqnr) else sqnr
