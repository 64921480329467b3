"""The entry points, and the place to start reading: quantize_and_compile (trace, run, deploy, compile) and load.

quantize_checkpoint does the same for a model that is larger than memory, from files to files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from mxcompile import checkpoint
from mxcompile.analysis.choice import head_paths
from mxcompile.arguments import checked
from mxcompile.calibration.ranks.process_group import is_first, joined
from mxcompile.checkpoint.mapped_model import mapped_model, module_of
from mxcompile.checkpoint.save import SHARD_SIZE
from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.deploy import deploy, deploy_in_files
from mxcompile.diagnostics.dump import Dump, write_kernels
from mxcompile.diagnostics.explain_quantized import explain_quantized
from mxcompile.diagnostics.measure import Measure
from mxcompile.errors import InputError, warn
from mxcompile.formats import MXFormat
from mxcompile.graph.callers_modes import without_callers_modes
from mxcompile.graph.inputs import as_batches, as_inputs
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.graph.trace_without_values import give_values, trace_without_values
from mxcompile.inductor import compile_module, start_preparing
from mxcompile.passes.recipes import DEFAULT, QUICK, as_pipeline
from mxcompile.pipeline.interfaces import Instrument
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.pipeline.resume import check_folder
from mxcompile.pipeline.unfinished import Unfinished, work_kept
from mxcompile.tensor.devices import find_device
from mxcompile.tensor.mapped_tensors import IN_USE, STATES, MappedTensors
from mxcompile.tensor.modules import device_of

M = TypeVar("M", bound=nn.Module)
_QUANTIZED = (
    "The work of the recipe is not lost: error.unfinished.program is the quantized program. Once the cause is mended, "
    "mxcompile.deploy(error.unfinished.program, model) makes the module."
)
_DEPLOYED = (
    "The work of the recipe is not lost: error.unfinished.model is the quantized module, not compiled; it runs and can "
    "be saved (mxcompile.save) as it is."
)


@without_callers_modes()
@checked
def quantize_and_compile(
    model: M,
    example_inputs: object,
    *,
    recipe: str | Pipeline | None = None,
    calibration: object = None,
    dump: str | Path | None = None,
    probe: object = None,
    compile: bool = True,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, MXFormat | str | None] | None = None,
    head: MXFormat | str | None = None,
    allow_partial: bool = False,
    instruments: Sequence[Instrument] = (),
    resume: str | Path | None = None,
) -> M:
    """Quantize a model to an MX format and compile it.

    model: any `nn.Module` that `torch.export` can trace; it is not changed.
    example_inputs: the arguments of one `forward` call: a dict of keyword arguments (or a tokenizer's output), a tuple
        of positional ones, or a single tensor. Batch size and length may differ later.
    recipe: a name (`mxcompile.recipes()`), a Pipeline, or its text form. None: "w4a8-mxint", which learns from
        calibration data, or, without calibration data, "w4a8-mxint-quick" and a warning.
    calibration: batches in the same form as the example inputs; for language models about 128 windows of 512 tokens in
        a few batches; tokens that an `attention_mask` hides count nothing. None: passes that learn use the example
        inputs only.
    dump: a folder for the graph after every pass, diffs, what each pass did with measurements of each layer, a report
        page (`index.html`), and the selected kernel of each layer with the reason against a faster one (`kernels.txt`).
    probe: inputs for these measurements, in the form of the example inputs. None: the example inputs; False: measure
        nothing. Needs `dump`.
    compile: False returns the deployed module without `torch.compile`.
    include, exclude: name patterns; see `Selection`. The output head and routers stay float unless included.
    overrides: other formats for some weights, `{"*.down_proj": "mxfp8_e4m3"}`; None keeps a layer in float.
    head: the format of the output head, "mxint8" for example: more tokens a second. None: it stays float.
    allow_partial: accept that less than half of the matmul weight bytes is quantized.
    instruments: observers of the pipeline run; see `Instrument`.
    resume: a folder in which slow passes save finished parts, so that an interrupted call can continue.

    In an initialized process group of torch.distributed, every process makes this call with the same arguments: they
    share the work and return the same module, and the first one alone writes and calls instruments.

    Returns a module of the same class, in eval mode, with `MXWeight` parameters; nothing is shared with `model`.
    Raises a subclass of `MXCompileError` that says what to do. What had been done before it is not lost:
    `error.unfinished` has the program after the last finished pass and the passes that are left, or, if deploying or
    compiling failed, the quantized program or module. A KeyboardInterrupt has it too.
    """
    _check_options(dump, probe, resume)
    pipeline = _pipeline(recipe, calibration, overrides)
    watchers = _watchers(instruments, dump, probe)
    if compile:
        start_preparing(device_of(model))
    program = trace(model, example_inputs, include=include, exclude=exclude, allow_partial=allow_partial)
    pipeline = pipeline if head is None else _with_head(program, pipeline, head)
    program = pipeline.run(program, calibration, watchers, resume=resume)
    with work_kept(lambda: Unfinished(lambda: program), lambda: _QUANTIZED):
        deployed = deploy(program, model)
    with work_kept(lambda: Unfinished(lambda: program, model=deployed), lambda: _DEPLOYED):
        compiled = compile_module(deployed) if compile else deployed
        if dump is not None and is_first():
            write_kernels(dump, explain_quantized(compiled, device_of(deployed)))
    return compiled


@without_callers_modes()
@checked
def quantize_checkpoint(
    source: str | Path,
    example_inputs: object,
    out: str | Path,
    *,
    recipe: str | Pipeline | None = None,
    calibration: object = None,
    device: str | torch.device = "cpu",
    weights_in_memory: int = IN_USE,
    states_in_memory: int = STATES,
    scratch: str | Path | None = None,
    dump: str | Path | None = None,
    probe: object = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, MXFormat | str | None] | None = None,
    head: MXFormat | str | None = None,
    allow_partial: bool = False,
    instruments: Sequence[Instrument] = (),
    resume: str | Path | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> None:
    """Quantize a model that may be larger than memory: from the files of one folder to those of another.

    What is written has the same bytes as `save` of what `quantize_and_compile(compile=False)` returns. Weights are read
    from the source's files when they are used, and what passes make of them is kept in files.

    source: a folder with a transformers model in safetensors, or its id on the Hugging Face hub.
    out: where to write the quantized model, see `save`; tokenizer, processor, max_shard_size: as there.
    device: where the model runs while it is quantized. example_inputs and calibration are moved there batch by batch.
    weights_in_memory: bytes of weights that may stay in memory, or on the device, after their use; on a GPU at least
        those of one block of the model, or they are copied there again for each batch.
    states_in_memory: bytes of hidden states of the calibration data that may stay in memory; the others are written to
        files. Passes that compare with the float model hold two such sets.
    scratch: the folder for these files, which have no names and vanish with the process. None: that of `out`. It needs
        room for the float weights that passes change, and for the quantized ones.
    resume: a folder in which passes save what they finish. The same call, started again, goes on from there.
    All other arguments: as for `quantize_and_compile`.

    `tune-vectors` trains the whole model at once: it also needs the memory of one batch's activations in all layers.
    In an initialized process group of torch.distributed, every process makes this call with the same arguments. All map
    the same source files; each keeps what passes change, and its share of the hidden states, in files of its own. The
    first one writes `out`, and all return once that is done.
    Raises a subclass of `MXCompileError` that says what to do; `out` then is as it was before.
    """
    checkpoint.check_destination(out)
    _check_options(dump, probe, resume)
    target = find_device(device)
    pipeline = _pipeline(recipe, calibration, overrides)
    watchers = _watchers(instruments, dump, probe)
    folder = Path(out).parent if scratch is None else Path(scratch)
    mapped = MappedTensors(folder, target, in_use=weights_in_memory, states=states_in_memory)
    example = as_inputs(example_inputs).to(target)
    batches = None if calibration is None else [batch.to(target) for batch in as_batches(calibration)]
    with joined(target) as ranks:
        files = SourceFiles(source)
        program = trace_without_values(
            module_of(files), example, include=include, exclude=exclude, allow_partial=allow_partial, device=target
        )
        pipeline = pipeline if head is None else _with_head(program, pipeline, head)
        model = mapped_model(files, mapped)
        give_values(program, model)
        program.keep_in_files(mapped)
        ranks.check_same({"source": tuple(files.names)}, "once the files of the model are open")
        program = pipeline.run(program, batches, watchers, resume=resume)
        if ranks.first:
            deployed = deploy_in_files(program, model)
            checkpoint.save(deployed, out, tokenizer=tokenizer, processor=processor, max_shard_size=max_shard_size)


@overload
def load(
    path: str | Path, *, model: M, device: str | torch.device | None = None, compile: bool = False, verify: bool = True
) -> M: ...
@overload
def load(
    path: str | Path,
    *,
    model: None = None,
    device: str | torch.device | None = None,
    compile: bool = False,
    verify: bool = True,
) -> Any: ...
@checked
def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    compile: bool = False,
    verify: bool = True,
) -> Any:
    """Load a quantized model that `save` wrote, an MX checkpoint of llm-compressor or gpt-oss, or a GGUF file.

    path: a folder or file, or the id of a model on the Hugging Face hub (`owner/name`), which is downloaded or cached.
    model: a module of the saved model's class to load into, for example on the meta device, where it takes no memory.
        Not needed for models of transformers.
    device: where to put the model. None: the CPU, with memory-mapped weights that are read when used. While the model
        is in use, replace these files (as `save` does), do not write into them.
    compile: compile as `quantize_and_compile` does; graphs that an earlier process compiled come from torch's cache.
    verify: False skips checksums, which read every weight; for files that were changed on purpose.

    Returns the module, in eval mode. Raises InputError if the device does not exist, CheckpointError if the files
    are not an intact saved model or do not fit `model`; a model is never half loaded.
    """
    target = None if device is None else find_device(device)
    loaded = checkpoint.load(path, model=model, verify=verify)
    if target is not None:
        loaded.to(target)
    return compile_module(loaded) if compile else loaded


def _check_options(dump: str | Path | None, probe: object, resume: str | Path | None) -> None:
    if dump is None and probe is not None and probe is not False:
        raise InputError("probe is what a dump measures each pass on: give dump=... too, or leave probe out")
    if resume is not None:
        check_folder(resume)


def _pipeline(
    recipe: str | Pipeline | None, calibration: object, overrides: Mapping[str, MXFormat | str | None] | None
) -> Pipeline:
    pipeline = as_pipeline(_default_recipe(calibration) if recipe is None else recipe)
    return pipeline.with_overrides(overrides) if overrides else pipeline


def _with_head(program: Program, pipeline: Pipeline, head: MXFormat | str) -> Pipeline:
    """Include the program's output head; the pipeline that gives it a format."""
    paths = head_paths(program)
    if not paths:
        raise InputError("the model has no output head (a matmul by lm_head or by the embedding): leave head out")
    program.selection = replace(program.selection, include=(*program.selection.include, *paths))
    return pipeline.with_overrides(dict.fromkeys(paths, head))


def _watchers(instruments: Sequence[Instrument], dump: str | Path | None, probe: object) -> list[Instrument]:
    """The caller's instruments, and those that write a dump."""
    if dump is None:
        return [*instruments]
    return [*instruments, Dump(dump), *([] if probe is False else [Measure(probe)])]


def _default_recipe(calibration: object) -> str:
    if calibration is not None:
        return DEFAULT
    warn(f"no calibration data: using the recipe {QUICK}; {DEFAULT} with calibration data is much more accurate")
    return QUICK
