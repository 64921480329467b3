"""All that happens inside `torch.compile`: fusion of `mx::` operators, guards, and decode steps of `generate`.

The functions here are the room's door. Dynamo and Inductor are imported when the first of them is called, so that
`import mxcompile` does not pay for them.
"""

import io
from functools import cache
from typing import TypeVar

import torch
from torch import nn

from mxcompile.arguments import checked
from mxcompile.errors import CompileError, warn

M = TypeVar("M", bound=nn.Module)


@cache
def supported() -> str | None:
    """None if torch has the private API that this room needs, else what is missing, in a sentence. Asked once."""
    try:
        from mxcompile.inductor import private_api as private_api
    except (ImportError, AttributeError) as error:
        return f"torch {torch.__version__} lacks what mxcompile's fusion needs ({error})"
    return None


def why_no_inductor(device: torch.device) -> str | None:
    """None if Inductor can compile fused graphs for the device, else what is missing, in a sentence."""
    if (reason := supported()) is not None:
        return reason
    from mxcompile.inductor.backend import why_no_compiler

    return why_no_compiler(device)


def start_preparing(device: torch.device) -> None:
    """Let torch find in a thread what compiling for the device needs to know of it: seconds, which then pass while the
    model is quantized."""
    if why_no_inductor(device) is None:
        from mxcompile.inductor.backend import start_probing

        start_probing(device)


def notes_for_generate(module: nn.Module) -> tuple[str, ...]:
    """Which loop decodes in the `generate` of a compiled model, in a sentence; none for a module without `generate`."""
    if not hasattr(module, "generation_config") or supported() is not None:
        return ()
    from mxcompile.inductor.generation.hook import SERVED, why_not_this_model

    reason = why_not_this_model(module)
    return (SERVED if reason is None else f"generate decodes in transformers' own loop: {reason}",)


@checked
def compile_module(module: M) -> M:
    """Compile a deployed module in place, with MX fusion. Returns it.

    Where a compiler for its device is missing, the module runs fused but uncompiled. With a torch that lacks the
    private API that fusion needs, plain `torch.compile` compiles it unfused. A warning says so in one line.
    """
    if (reason := supported()) is None:
        from mxcompile.inductor.compile import compile_fused

        compile_fused(module)
    else:
        warn(f"{reason}: plain torch.compile runs the model, without fused MX kernels")
        module.compile()
    return module


def compile_ahead(exported: torch.export.ExportedProgram, archive: io.IOBase) -> None:
    """Write an AOTInductor package in which `mx::` operators are decomposed into plain torch: it needs no mxcompile.

    Raises CompileError if Inductor cannot compile for the device of the program's tensors.
    """
    if (reason := supported()) is not None:
        raise CompileError(reason)
    from mxcompile.inductor.aot_package import write_package

    write_package(exported, archive)
