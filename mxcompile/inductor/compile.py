"""Compile a deployed module in place: its call, and the decode step of `generate`."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import mark_static_address, maybe_mark_dynamic
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule

from mxcompile.graph.inputs import Inputs
from mxcompile.inductor.backend import M, _Inductor, compile_options, logger, why_no_inductor
from mxcompile.inductor.compiled_forward import Forward
from mxcompile.inductor.decode_step import DecodeStep
from mxcompile.inductor.rewrites import fuse as fusion
from mxcompile.inductor.rewrites import join_linears
from mxcompile.kernels.dispatch import prepare
from mxcompile.tensor.arrange import arrange


def compile_module(module: M) -> M:
    """Compile a deployed module in place, with MX fusion; where Inductor cannot run, only fuse, and say so."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    missing = why_no_inductor(device)
    if device.type == "cuda":
        prepare(device)
        for name, reason in arrange(module).items():
            logger.info("%s stays in rows: %s", name, reason)
    if missing is None:
        _compile_call(module, _Inductor({**compile_options(), **_without_bad_checks(device)}))
        _compile_generate(module, device)
    else:
        warnings.warn(f"{missing}: the model runs with fused MX operations, but uncompiled", stacklevel=3)
        _compile_call(module, _fused_eager())
    return module


def _without_bad_checks(device: torch.device) -> dict[str, bool]:
    """torch 2.11 checks the indices of an embedding in vectors, on some processors, by a name that it does not declare,
    and g++ refuses the code. Left out there, at the price that an index out of bounds is not noticed.
    """
    is_bad = device.type == "cpu" and torch.__version__.startswith("2.11.")
    return {"assert_indirect_indexing": False} if is_bad else {}


def _compile_call(module: nn.Module, backend: Callable[..., Any]) -> None:
    """`module.compile()` with sizes of inputs dynamic from the start.

    Marking the inputs makes one graph for all lengths, not one for the first length and another for the rest;
    `dynamic=True` would do so too, but makes floats dynamic as well, which doubles the time to compile.
    """
    forward = Forward(module, backend)
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
    """Tell Dynamo that the tensors of a static cache stay where they are, or nothing that writes to them can be a CUDA
    graph. transformers says so itself when it makes them, but not where that is compiled, as our prefill is.
    """
    for layer in getattr(cache, "layers", ()) if getattr(cache, "is_compileable", False) else ():
        for tensor in vars(layer).values():
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                mark_static_address(tensor)


def _fused_eager() -> Callable[..., Any]:
    """A torch.compile backend that applies the fusion rules and then runs the graph as it is."""

    def run(graph_module: GraphModule, _inputs: Any) -> Any:
        fusion.fuse(graph_module.graph)
        join_linears.join_linears(graph_module.graph)
        graph_module.recompile()
        return make_boxed_func(graph_module.forward)

    return aot_autograd(fw_compiler=run)


def _compile_generate(module: nn.Module, device: torch.device) -> None:
    """Hugging Face's `generate` compiles the decode step itself on an accelerator: give it one with the same options,
    and with guards on weights as they are elsewhere.
    """
    config = getattr(module, "generation_config", None)
    if config is None or device.type == "cpu":
        return
    from transformers import CompileConfig  # only for models that come from there

    options = compile_options()
    graphed = {"triton.cudagraphs": True, **options}
    config.compile_config = CompileConfig(mode=None, options=graphed)  # pyright: ignore[reportArgumentType]
    # What `get_compiled_call` of transformers 5.17 to 5.24 keeps, and gives to `generate`.
    kept: Any = module
    kept._compiled_call = DecodeStep(Forward(module, _Inductor(options)), Forward(module, _Inductor(graphed)))
    kept._last_compile_config = config.compile_config
