"""Compile a deployed module in place: its call, and the decode step of `generate`."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from mxcompile.errors import warn
from mxcompile.graph.inputs import Inputs
from mxcompile.inductor.backend import MXBackend, compile_options, start_probing, why_no_compiler
from mxcompile.inductor.compiled_forward import CompiledForward
from mxcompile.inductor.decode_step import DecodeStep
from mxcompile.inductor.generation.hook import use_our_loop
from mxcompile.inductor.private_api import (
    aot_autograd,
    load_inductor,
    make_boxed_func,
    mark_static_address,
    maybe_mark_dynamic,
)
from mxcompile.inductor.rewrites.fuse import fuse
from mxcompile.inductor.rewrites.join_linears import join_linears
from mxcompile.kernels.dispatch import prepare
from mxcompile.tensor.modules import device_of
from mxcompile.tensor.planar_layout import use_planar_layout
from mxcompile.tensor.weight import MXWeight

logger = logging.getLogger(__name__)


def compile_fused(module: nn.Module) -> None:
    """Compile a deployed module in place; without a compiler for its device, fuse only, with a warning."""
    _do_not_compile_weights()
    device = device_of(module)
    reason = why_no_compiler(device)
    if device.type == "cuda":
        prepare(device)
        for name, why_not in use_planar_layout(module).items():
            logger.info("%s keeps the row-major layout: %s", name, why_not)
    if reason is None:
        start_probing(device)
        load_inductor()
        _compile_call(module, MXBackend({**compile_options(), **_without_bad_checks(device)}))
        _compile_generate(module, device)
    else:
        warn(f"{reason}: the model runs with fused MX operations, but uncompiled")
        _compile_call(module, _fused_eager())


@cache
def _do_not_compile_weights() -> None:
    """Run functions of MXWeight as they are where a graph breaks, as in a loop over the experts that were chosen.

    There Dynamo would compile each by itself, and fail in those that make a weight. In graphs it calls the functions.
    """
    function = vars(MXWeight)["__torch_function__"].__func__
    setattr(MXWeight, "__torch_function__", classmethod(torch.compiler.disable(function)))  # noqa: B010 - for pyright


def _without_bad_checks(device: torch.device) -> dict[str, bool]:
    """Options that switch off vectorized index checks on the CPU with torch 2.11.

    It generates code for them that, on some processors, uses an undeclared name, so that g++ fails. Without the checks
    an embedding index out of bounds goes unnoticed.
    """
    is_bad = device.type == "cpu" and torch.__version__.startswith("2.11.")
    return {"assert_indirect_indexing": False} if is_bad else {}


def _compile_call(module: nn.Module, backend: Callable[..., Any]) -> None:
    """`module.compile()` with input sizes dynamic from the start.

    Marking the inputs gives one graph for all lengths instead of one for the first length and another for the rest;
    `dynamic=True` does that too, but makes floats dynamic as well, which doubles the compile time.
    """
    forward = CompiledForward(module, backend)
    forward.prepare()

    def marked(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for tensor in Inputs(args, kwargs).tensors():
                maybe_mark_dynamic(tensor, list(range(tensor.dim())))
        result = forward(*args, **kwargs)
        if not torch.compiler.is_compiling():
            _fix_addresses(kwargs.get("cache", kwargs.get("past_key_values")))  # its name since transformers 5.24
        return result

    module._compiled_call_impl = marked  # pyright: ignore[reportPrivateUsage]


def _fix_addresses(cache: Any) -> None:
    """Mark the tensors of a static cache as having static addresses: otherwise no graph that writes to them can be
    captured as a CUDA graph. transformers marks them on creation, but not when that is compiled, as our prefill is.
    """
    for layer in getattr(cache, "layers", ()) if getattr(cache, "is_compileable", False) else ():
        for tensor in vars(layer).values():
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                mark_static_address(tensor)


def _fused_eager() -> Callable[..., Any]:
    """A torch.compile backend that applies the fusion rules and runs the graph uncompiled."""

    def run(graph_module: GraphModule, _inputs: Any) -> Any:
        fuse(graph_module.graph)
        join_linears(graph_module.graph)
        graph_module.recompile()
        return make_boxed_func(graph_module.forward)

    return aot_autograd(fw_compiler=run)


def _compile_generate(module: nn.Module, device: torch.device) -> None:
    """Replace the decode loop of Hugging Face's `generate`, and the decode step that it compiles on an accelerator by
    one with the same options and with our guards on weights.
    """
    use_our_loop(module)
    config = getattr(module, "generation_config", None)
    if config is None or device.type == "cpu":
        return
    from transformers import CompileConfig  # only for transformers models

    options = compile_options()
    graphed = {"triton.cudagraphs": True, **options}
    config.compile_config = CompileConfig(mode=None, options=graphed)  # pyright: ignore[reportArgumentType]
    # The attributes in which `get_compiled_call` of transformers 5.17 to 5.24 caches the compiled step for `generate`
    kept: Any = module
    kept._compiled_call = DecodeStep(
        CompiledForward(module, MXBackend(options)), CompiledForward(module, MXBackend(graphed))
    )
    kept._last_compile_config = config.compile_config
