"""Plan by tracing: the recipe's passes run on the model without values, and choose what they would choose with them.

The module that comes out is the one that `deploy` would return, its tensors on the meta device.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from mxcompile.analysis.choice import choose, exclude_shared_weights, override_formats
from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.deploy import placed
from mxcompile.formats import ScaleRule
from mxcompile.graph.program import Program
from mxcompile.graph.records import PassRecord
from mxcompile.graph.trace_without_values import trace_without_values
from mxcompile.model_free.plan import FilesPlan
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.round_weights import RoundWeights
from mxcompile.pipeline.pipeline import Pipeline

T = TypeVar("T")


def plan_by_tracing(
    source: SourceFiles,
    pipeline: Pipeline,
    example: object,
    include: Iterable[str],
    exclude: Iterable[str],
    allow_partial: bool,
) -> FilesPlan:
    """The plan of a pipeline of `round-weights` and `lower-mx` alone.

    example: arguments of one forward call. Raises what `trace`, the passes and `deploy` raise.
    """
    model = source.model
    assert model is not None
    program = trace_without_values(model, example, include=include, exclude=exclude, allow_partial=allow_partial)
    rules: dict[str, ScaleRule] = {}
    reasons: dict[str, str] = {}
    rule = ScaleRule.MSE
    for current in pipeline.passes:
        rounded = set(program.rounded)
        if isinstance(current, LowerMX):
            reasons, rule = _reasons(program, current), current.weight_rule
        result = current.run(program)
        if isinstance(current, RoundWeights):
            rules |= dict.fromkeys(program.rounded.keys() - rounded, current.rule)
        program.stage = current.gives if current.gives is not None else program.stage
        record = (current.name, str(current), result.rewrites, result.misses, 0.0, result.numbers, None, 0, None)
        program.ledger.append(PassRecord(*record))
    module = placed(program, model)
    return FilesPlan(source, str(pipeline), module, rule, _all_names(program, rules), _all_names(program, reasons))


def example_inputs(model: Any) -> dict[str, Tensor] | None:
    """Arguments of a forward call of a transformers model, found in its configuration; None for an unknown kind."""
    config, main = model.config, getattr(model, "main_input_name", None)
    text = config.get_text_config()
    ids = torch.arange(3, 35).view(2, 16) % max(1, int(getattr(text, "vocab_size", None) or 1))
    inputs = {"input_ids": ids} if main == "input_ids" else _media(model, str(main))
    if inputs is not None and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[: len(next(iter(inputs.values()))), :12]
    return inputs


def _media(model: Any, main: str) -> dict[str, Tensor] | None:
    """An image or the features of a sound."""
    config = getattr(model.config, "vision_config", model.config)
    size, bins = getattr(config, "image_size", None), getattr(config, "num_mel_bins", None)
    if main == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        channels = int(getattr(config, "num_channels", 3))
        return {main: torch.zeros(2, channels, height, width, dtype=model.dtype)}
    frames = getattr(config, "max_source_positions", None)
    if main == "input_features" and bins is not None and frames is not None:
        return {main: torch.zeros(2, bins, 2 * frames, dtype=model.dtype)}
    return None


def _reasons(program: Program, lowering: LowerMX) -> dict[str, str]:
    """Why weights stay float, by their names."""
    choice, _ = override_formats(program, choose(program), lowering.weight, lowering.overrides)
    choice = exclude_shared_weights(program, choice)
    staying = (*choice.others, *choice.skipped, *choice.unsupported)
    return {name: each.reason for each in staying for name in each.weights}


def _all_names(program: Program, values: Mapping[str, T]) -> dict[str, T]:
    """The values under all names of each parameter."""
    return {alias: value for name, value in values.items() for alias in program.aliases.get(name, (name,))}
