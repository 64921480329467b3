"""`quantize_files`: plan what is done to each tensor of a checkpoint, then do it, file by file."""

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from mxcompile.arguments import checked
from mxcompile.calibration.ranks.process_group import check_alone
from mxcompile.checkpoint.copied_files import tokenizer_files
from mxcompile.checkpoint.save import SHARD_SIZE, check_destination
from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.checkpoint.streamed_save import StreamedSave
from mxcompile.errors import InputError, MXCompileError, PipelineError, TraceError
from mxcompile.formats import MXFormat
from mxcompile.graph.callers_modes import without_callers_modes
from mxcompile.graph.name_patterns import Selection
from mxcompile.model_free.guessed_plan import plan_by_shapes
from mxcompile.model_free.plan import FilesPlan
from mxcompile.model_free.rounding import LookAhead, TensorRounding
from mxcompile.model_free.traced_plan import example_inputs as inputs_of
from mxcompile.model_free.traced_plan import plan_by_tracing
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.recipes import QUICK, as_pipeline
from mxcompile.passes.round_weights import RoundWeights
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.devices import find_device

_NO_INPUTS: Final = "give example_inputs, the arguments of one forward call: none could be made for its kind"


@without_callers_modes()
@checked
def quantize_files(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Pipeline = QUICK,
    device: str | torch.device | None = None,
    workers: int = 1,
    format: str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, MXFormat | str | None] | None = None,
    allow_partial: bool = False,
    example_inputs: object = None,
    max_shard_size: int | str = SHARD_SIZE,
    dry_run: bool = False,
    planned: Callable[[FilesPlan], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FilesPlan:
    """Quantize a model from files to files, tensor by tensor; it is never in memory as a whole.

    The result is, byte for byte, what `quantize_and_compile` with the same recipe and `save` make of the model.

    source: a folder with a model, or a hub id. FP8 (DeepSeek, Qwen), MXFP4 (gpt-oss) and compressed-tensors are
        decoded; a weight that is in the wanted format already keeps its bytes.
    out: as for `save`: a new folder, or one with a checkpoint to replace, which happens at once at the end.
    recipe: one that needs no calibration: a `-quick` one, or a pipeline of round-weights and lower-mx.
    device: where weights are rounded; None: the CPU. workers: tensors in work at the same time. Peak memory is about
        three times the largest tensor for each worker.
    format: of the result: "mxcompile" (the default) or "compressed-tensors".
    include, exclude, overrides, allow_partial: as for `quantize_and_compile`.
    example_inputs: arguments of one forward call, with which the model is traced without values. None: made from its
        configuration. A model that cannot be traced is quantized by the shapes and names of its tensors.
    dry_run: return the plan, and write nothing. planned: called with the plan before the work. progress: called with
        how many of how many tensors are written.

    A run that is interrupted or killed goes on, when it is started again, after the last finished weight file.
    Of several processes, one can call it, within `with mxcompile.alone():`.
    Returns what was done to each tensor. Raises a subclass of MXCompileError that says what to do.
    """
    pipeline = as_pipeline(recipe)
    pipeline = pipeline.with_overrides(overrides) if overrides else pipeline
    check_recipe(pipeline)
    target = torch.device("cpu") if device is None else find_device(device)
    if workers < 1:
        raise InputError(f"workers is {workers}: give the number of tensors in work at the same time, at least 1")
    if not dry_run:
        check_alone("quantize_files")
        check_destination(out, format)
    files = SourceFiles(source)
    selection = Selection(_patterns(include), _patterns(exclude), allow_partial)
    plan = _plan(files, pipeline, selection, example_inputs)
    if planned is not None:
        planned(plan)
    if not dry_run:
        key = json.dumps([_state(files), str(pipeline), str(selection), str(max_shard_size), format, plan.guessed])
        with (
            StreamedSave(out, key, max_shard_size=max_shard_size, format=format) as saving,
            LookAhead(TensorRounding(plan, target).make, workers) as values,
        ):
            tokenizer, others = tokenizer_files(files.folder, everything=files.model is None)
            saving.commit(plan.module, tokenizer=tokenizer, processor=others, values=values, progress=progress)
    return plan


def check_recipe(pipeline: Pipeline) -> None:
    """Raise PipelineError for a pipeline that needs more than one weight at a time."""
    names = [
        current.name
        for current in pipeline.passes
        if not isinstance(current, RoundWeights | LowerMX) or current.reads_calibration
    ]
    if names or not any(isinstance(current, LowerMX) for current in pipeline.passes):
        verb = "needs" if len(names) == 1 else "need"
        what = f"{', '.join(names)} {verb} the whole model" if names else "the recipe has no lower-mx"
        raise PipelineError(
            f"{what}, and model-free quantization has one tensor at a time: take a recipe that rounds to nearest, such "
            f"as {QUICK}; for a recipe that calibrates a model larger than memory: mxcompile quantize MODEL "
            "--low-memory"
        )


def _plan(files: SourceFiles, pipeline: Pipeline, selection: Selection, example: object) -> FilesPlan:
    if files.model is None:
        names: Any = files.config.get("architectures") or ["no class"]
        return plan_by_shapes(files, pipeline, selection, f"{names[0]} is not one of transformers")
    own = selection.include, selection.exclude, selection.allow_partial
    if example is not None:
        return plan_by_tracing(files, pipeline, example, *own)
    example = inputs_of(files.model)
    if example is None:
        return plan_by_shapes(files, pipeline, selection, _NO_INPUTS)
    try:
        return plan_by_tracing(files, pipeline, example, *own)
    except (TraceError, InputError) as error:
        return plan_by_shapes(files, pipeline, selection, _first_line(error))


def _first_line(error: MXCompileError) -> str:
    return str(error).splitlines()[0]


def _state(files: SourceFiles) -> dict[str, Any]:
    """What tells the source from any other: its files, and the versions that read and round them."""
    paths = sorted({tensor.file for tensor in files.stored.values()})
    sizes = {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
    return {"files": sizes, "config": files.config, "mxcompile": version("mxcompile")}


def _patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
