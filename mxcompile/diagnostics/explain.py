"""Which kernel will multiply each layer of a quantized model on a device, and why no better one: `mxcompile explain`.

Nothing is rounded and nothing calibrated: a float model is traced, its matmuls chosen as `lower-mx` chooses them, and
lowered with packed weights that hold no values; the fusion rules say which of them become `mx::linear`, the kernels
which of them serves. Of a model that is quantized already, its `MXWeight`s say all of that.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from mxcompile.analysis.choice import choose, override_formats, refuse_inseparable, slot
from mxcompile.analysis.matmuls import Matmul, Refusal, find_matmuls
from mxcompile.diagnostics.explain_quantized import explain_quantized, served_by, short_name, sized
from mxcompile.diagnostics.explanation import FLOAT, LOOKUP, Explanation, Served, grouped
from mxcompile.errors import InputError, PipelineError
from mxcompile.formats import MXFormat, activation_rule
from mxcompile.graph.program import Program, module_path, where
from mxcompile.graph.trace import trace
from mxcompile.inductor.backend import why_no_inductor
from mxcompile.inductor.rewrites.fuse import fuse
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.recipes import QUICK, as_pipeline
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.modules import stored_bytes
from mxcompile.tensor.weight import MXWeight


def explain(
    model: nn.Module,
    example_inputs: object = None,
    *,
    recipe: str | Pipeline = QUICK,
    device: str | torch.device | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, MXFormat | None] | None = None,
) -> Explanation:
    """Which kernel will serve each layer, how many bytes it takes, and what stays float; the model is not changed.

    model: a float model, with example inputs as `quantize_and_compile` takes them, or one that is quantized (deployed,
        or loaded), which needs none.
    recipe: as in `quantize_and_compile`; only the formats that it gives count, nothing is calibrated.
    device: to run on; the model's if None. The model may be elsewhere.
    include, exclude, overrides: as in `quantize_and_compile`.

    Raises InputError if there is no such device or the example inputs are missing, PipelineError if the recipe lowers
    nothing.
    """
    place = _device(model, device)
    if any(isinstance(parameter, MXWeight) for parameter in model.parameters()):
        return explain_quantized(model, place)
    if example_inputs is None:
        raise InputError("explain traces a float model: give example_inputs, as for quantize_and_compile")
    pipeline = as_pipeline(recipe)
    pipeline = pipeline.with_overrides(overrides) if overrides else pipeline
    program = trace(model, example_inputs, include=include, exclude=exclude, allow_partial=True)
    layers = tuple(_of_float(program, _lowering(pipeline), place))
    before = stored_bytes(model)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in layers if layer.weight is not None)
    return Explanation(str(place), str(recipe), grouped(layers), before, before - saved, why_no_inductor(place))


class _Unfilled(LowerMX):
    """`lower-mx` with packed weights of the right sizes that nothing is written to."""

    def _quantize(self, program: Program, name: str, rows: Tensor, fmt: MXFormat) -> tuple[Tensor, Tensor]:
        del program, name
        shape, blocks = rows.shape[:-1], fmt.blocks(rows.shape[-1])
        elements = rows.new_empty((*shape, blocks * fmt.block_bytes), dtype=torch.uint8)
        return elements, rows.new_empty((*shape, blocks), dtype=torch.uint8)


def _lowering(pipeline: Pipeline) -> _Unfilled:
    for current in pipeline.passes:
        if isinstance(current, LowerMX):
            return _Unfilled(**{field.name: getattr(current, field.name) for field in fields(current)})
    raise PipelineError(f"{pipeline} lowers nothing: end the pipeline with lower-mx")


def _of_float(program: Program, lowering: LowerMX, device: torch.device) -> Iterator[Served]:
    """The matmuls by a weight in graph order, then the embeddings that were asked for."""
    choice, formats = override_formats(program, choose(program), lowering.weight, lowering.overrides)
    choice = refuse_inseparable(program, choice)
    lowered = program.copy()
    lowering.run(lowered)
    unfused = {miss.where: miss.reason for miss in fuse(lowered.graph).misses}
    matmuls = {matmul.node: matmul for matmul in find_matmuls(program)[0]}
    refused = {refusal.node: refusal for refusal in (*choice.refusals, *choice.left_float)}
    rule = lowering.activation_rule or (None if lowering.activation is None else activation_rule(lowering.activation))
    rounding = None if lowering.activation is None or rule is None else (str(lowering.activation), str(rule))
    seen: set[str] = set()
    for node in program.graph.nodes:
        if node in refused:
            yield _left_float(program, refused[node], matmuls.get(node))
        elif node in matmuls and matmuls[node].parameter not in seen:
            matmul = matmuls[node]
            seen.add(matmul.parameter)
            x = torch.empty((1, matmul.in_features), dtype=matmul.activation.meta["val"].dtype, device=device)
            out = program.tensor(matmul.parameter).numel() // matmul.in_features
            reason = unfused.get(where(node))
            served = served_by(_name(program, matmul), x, out, formats[node], rounding, reason, lowering.align)
            yield sized(served, program.tensor(matmul.parameter), matmul.in_features, alone=choice.alone(matmul))
    for node in choice.embeddings:
        name = str(cast(Node, node.args[0]).target)
        table = program.tensor(name)
        served = Served(short_name(name), 1, (), str(formats[node]), None, LOOKUP, LOOKUP, (), 0, 0)
        yield sized(served, table, table.shape[-1], alone=name not in seen)


def _left_float(program: Program, refusal: Refusal, matmul: Matmul | None) -> Served:
    name = module_path(refusal.node) or refusal.node.name if matmul is None else _name(program, matmul)
    shape = () if matmul is None else tuple(program.tensor(matmul.parameter).shape)
    return Served(name, 1, shape, None, None, FLOAT, FLOAT, (refusal.reason,), refusal.bytes, refusal.bytes)


def _name(program: Program, matmul: Matmul) -> str:
    return short_name(slot(program, matmul.parameter, matmul.node) or matmul.parameter)


def _device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {str(device)!r} here ({str(error).splitlines()[0]})") from error
