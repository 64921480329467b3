"""`mxcompile explain`: select the kernel of each layer on a device, without quantizing the model.

A float model is traced, and its matmuls are lowered as `lower-mx` would lower them, with packed weights that are
allocated but never filled. The fusion rules then say which of them become `mx::linear`, and the dispatcher which kernel
runs those. In a model that is already quantized, the `MXWeight`s answer both questions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from mxcompile.analysis.choice import choose, exclude_shared_weights, name_in_module, override_formats
from mxcompile.analysis.matmuls import Matmul, UnquantizedNode, find_matmuls
from mxcompile.arguments import checked
from mxcompile.diagnostics.explain_quantized import (
    explain_quantized,
    layer_name,
    notes_for_vllm,
    select_kernel,
    with_sizes,
)
from mxcompile.diagnostics.explanation import FLOAT, LOOKUP, Explanation, SelectedKernel, group_similar
from mxcompile.errors import InputError, PipelineError
from mxcompile.formats import MXFormat, activation_rule
from mxcompile.graph.program import Program, module_path, where
from mxcompile.graph.trace import trace
from mxcompile.inductor import notes_for_generate, why_no_inductor
from mxcompile.inductor.rewrites.fuse import fuse
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.recipes import QUICK, as_pipeline
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.devices import find_device
from mxcompile.tensor.modules import device_of, stored_bytes
from mxcompile.tensor.weight import MXWeight


@checked
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
    """Find the kernel that runs each layer, its bytes, and what stays float. The model is not changed.

    model: a float model with example inputs as `quantize_and_compile` takes them, or a quantized one (deployed or
        loaded), which needs none.
    recipe: as in `quantize_and_compile`; only its formats matter, since nothing is calibrated.
    device: where the model will run, the model's own if None. The model need not be there.
    include, exclude, overrides: as in `quantize_and_compile`.

    Raises InputError if the device does not exist or the example inputs are missing, PipelineError if the recipe has no
    `lower-mx`.
    """
    target = _target_device(model, device)
    if any(isinstance(parameter, MXWeight) for parameter in model.parameters()):
        return explain_quantized(model, target)
    if example_inputs is None:
        raise InputError("explain traces a float model: pass example_inputs, as to quantize_and_compile")
    pipeline = as_pipeline(recipe)
    pipeline = pipeline.with_overrides(overrides) if overrides else pipeline
    program = trace(model, example_inputs, include=include, exclude=exclude, allow_partial=True)
    layers = tuple(_select_kernels(program, _empty_lowering(pipeline), target))
    before = stored_bytes(model)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in layers if layer.weight is not None)
    uncompiled, notes = why_no_inductor(target), (notes_for_vllm(layers), notes_for_generate(model))
    return Explanation(str(target), str(recipe), group_similar(layers), before, before - saved, uncompiled, *notes)


class _EmptyLowerMX(LowerMX):
    """`lower-mx` whose packed weights have the right sizes and uninitialized values."""

    def _quantize(
        self, program: Program, name: str, read: Callable[[], Tensor], fmt: MXFormat
    ) -> tuple[Tensor, Tensor]:
        del program, name
        rows = read()
        shape, blocks = rows.shape[:-1], fmt.blocks(rows.shape[-1])
        elements = rows.new_empty((*shape, blocks * fmt.block_bytes), dtype=torch.uint8)
        return elements, rows.new_empty((*shape, blocks), dtype=torch.uint8)


def _empty_lowering(pipeline: Pipeline) -> _EmptyLowerMX:
    for current in pipeline.passes:
        if isinstance(current, LowerMX):
            return _EmptyLowerMX(**{field.name: getattr(current, field.name) for field in fields(current)})
    raise PipelineError(f"{pipeline} has no lower-mx, so it quantizes nothing: end the pipeline with lower-mx")


def _select_kernels(program: Program, lowering: LowerMX, device: torch.device) -> Iterator[SelectedKernel]:
    """One entry for each matmul with a weight, in graph order, then one for each embedding that is included."""
    choice, formats = override_formats(program, choose(program), lowering.weight, lowering.overrides)
    choice = exclude_shared_weights(program, choice)
    lowered = program.copy()
    lowering.run(lowered)
    unfused = {miss.where: miss.reason for miss in fuse(lowered.graph).misses}
    matmuls = {matmul.node: matmul for matmul in find_matmuls(program)[0]}
    unquantized = {each.node: each for each in (*choice.unsupported, *choice.skipped)}
    rule = lowering.activation_rule or (None if lowering.activation is None else activation_rule(lowering.activation))
    rounding = None if lowering.activation is None or rule is None else (str(lowering.activation), str(rule))
    seen: set[str] = set()
    for node in program.graph.nodes:
        if node in unquantized:
            yield _float_layer(program, unquantized[node], matmuls.get(node))
        elif node in matmuls and matmuls[node].parameter not in seen:
            matmul = matmuls[node]
            seen.add(matmul.parameter)
            x = torch.empty((1, matmul.in_features), dtype=matmul.activation.meta["val"].dtype, device=device)
            shape = program.tensor(matmul.parameter).shape
            of_shape = (shape[-2:].numel() // matmul.in_features, len(shape) == 3)
            reason = unfused.get(where(node))
            selected = select_kernel(_name(program, matmul), x, of_shape, formats[node], rounding, reason)
            yield with_sizes(
                selected,
                program.tensor(matmul.parameter),
                matmul.in_features,
                replaces_float=choice.replaces_weight(matmul),
            )
    for node in choice.embeddings:
        name = str(cast(Node, node.args[0]).target)
        table = program.tensor(name)
        selected = SelectedKernel(layer_name(name), 1, (), str(formats[node]), None, LOOKUP, LOOKUP, (), 0, 0)
        yield with_sizes(selected, table, table.shape[-1], replaces_float=name not in seen)


def _float_layer(program: Program, unquantized: UnquantizedNode, matmul: Matmul | None) -> SelectedKernel:
    node, size = unquantized.node, unquantized.bytes
    name = module_path(node) or node.name if matmul is None else _name(program, matmul)
    shape = () if matmul is None else tuple(program.tensor(matmul.parameter).shape)
    return SelectedKernel(name, 1, shape, None, None, FLOAT, FLOAT, (unquantized.reason,), size, size)


def _name(program: Program, matmul: Matmul) -> str:
    return layer_name(name_in_module(program, matmul.parameter, matmul.node) or matmul.parameter)


def _target_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        return device_of(model)
    return find_device(device)
