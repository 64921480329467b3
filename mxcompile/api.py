"""One call: trace, run the pipeline, deploy, compile. A reader starts here. Another: load what was saved, compile."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from mxcompile import checkpoint
from mxcompile.deploy import deploy
from mxcompile.diagnostics.dump import Dump, write_kernels
from mxcompile.diagnostics.explain_quantized import explain_quantized
from mxcompile.diagnostics.measure import Measure
from mxcompile.formats import MXFormat
from mxcompile.graph.trace import trace
from mxcompile.inductor import compile_module
from mxcompile.passes.recipes import DEFAULT, QUICK, as_pipeline
from mxcompile.pipeline.interfaces import Instrument
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.devices import find_device

M = TypeVar("M", bound=nn.Module)


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
    overrides: Mapping[str, MXFormat | None] | None = None,
    allow_partial: bool = False,
    instruments: Sequence[Instrument] = (),
    resume: str | Path | None = None,
) -> M:
    """Quantize a model to an MX format and compile it.

    model: any `nn.Module` that `torch.export` can trace; it is not changed.
    example_inputs: what one call of `forward` takes: a dict of keyword arguments (or a tokenizer's output), a tuple of
        positional ones, or a single tensor. Batch size and length may differ later.
    recipe: a name (`mxcompile.recipes()`), a Pipeline, or its text form. None takes "w4a8-mxint", which learns from
        calibration data, or without any "w4a8-mxint-quick", with a warning.
    calibration: batches as example inputs are given, for language models about 128 windows of 512 tokens in a few
        batches; passes that learn have only the example inputs if None.
    dump: a folder for the graph after every pass, diffs, what each pass did, in numbers for each layer too, and a page
        that shows all of it, `index.html`; and which kernel serves each layer, and why no better one, `kernels.txt`.
    probe: what those numbers are measured on, like the example inputs (which it is if None); False measures nothing.
    compile: False returns the deployed module without `torch.compile`.
    include, exclude: name patterns; see `Selection`. The output head stays float unless included.
    overrides: other formats for some weights, `{"*.down_proj": MXFP8_E4M3}`; None leaves a layer in float.
    allow_partial: accept that less than half of the matmul weight bytes is covered.
    resume: a folder for what slow passes have finished, so that an interrupted call can go on.

    Returns a module of the same class, in eval mode, with `MXWeight` parameters; nothing is shared with `model`.
    Raises a subclass of `MXCompileError` that says what to do.
    """
    pipeline = as_pipeline(_default(calibration) if recipe is None else recipe)
    pipeline = pipeline.with_overrides(overrides) if overrides else pipeline
    watchers = [*instruments, *([] if dump is None else [Dump(dump)])]
    if dump is not None and probe is not False:
        watchers.append(Measure(probe))
    program = trace(model, example_inputs, include=include, exclude=exclude, allow_partial=allow_partial)
    program = pipeline.run(program, calibration, watchers, resume=resume)
    deployed = deploy(program, model)
    compiled = compile_module(deployed) if compile else deployed
    if dump is not None:
        write_kernels(dump, explain_quantized(compiled, next(deployed.parameters()).device))
    return compiled


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
def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    compile: bool = False,
    verify: bool = True,
) -> Any:
    """Read a quantized model that `save` wrote; or an MX checkpoint of llm-compressor, gpt-oss, or a GGUF file.

    model: a module of the saved one's class, to be filled: on the meta device, if you like, so that it takes no memory.
        Not needed for models of transformers.
    device: where to put it; None leaves it on the CPU, where weights are mapped files, read when they are used: while
        the model lives, replace these files (as `save` does), do not write into them.
    compile: as `quantize_and_compile` does; what an earlier process has compiled is taken from torch's cache.
    verify: False skips checksums, and with them the reading of every weight; for a file that was changed on purpose.

    Returns the module, in eval mode. Raises InputError if the device does not exist, CheckpointError if the folder
    does not hold a model as it was saved, or it is another than the one given; nothing is half loaded.
    """
    target = None if device is None else find_device(device)
    loaded = checkpoint.load(path, model=model, verify=verify)
    if target is not None:
        loaded.to(target)
    return compile_module(loaded) if compile else loaded


def _default(calibration: object) -> str:
    if calibration is not None:
        return DEFAULT
    warnings.warn(f"no calibration data: {QUICK} is taken, {DEFAULT} is much more accurate with it", stacklevel=3)
    return QUICK
