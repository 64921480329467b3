"""torch.compile with MX fusion: the only file that imports torch._inductor (checked with torch 2.11, 2.13 and 2.14).

`FuseMX` runs the fusion rules on every graph that Inductor compiles, right before its own post-grad passes. It is
handed over in the options of one `torch.compile` call; no global setting is changed.
"""

import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import mark_static_address, maybe_mark_dynamic
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.source import AttrSource
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import aoti_compile_and_package, cpp_builder, exc
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule
from torch.utils._triton import has_triton

from mxcompile import attention, decode_attention, fusion, joining, ops, rounding, unwrapping
from mxcompile.decode_step import DecodeStep
from mxcompile.errors import CompileError
from mxcompile.forward import Forward
from mxcompile.graph import dataflow, rules
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.records import PassResult
from mxcompile.kernels.dispatch import prepare
from mxcompile.kernels.layout import e4m3_products
from mxcompile.tensor.arrange import arrange

M = TypeVar("M", bound=nn.Module)
_STEPS: dict[Any, Callable[..., Any]] = {
    ops.QUANTIZE: ops.quantize,
    ops.DEQUANTIZE: ops.dequantize,
    ops.MULTIPLY: ops.multiply,
    ops.ROTATE: ops.rotate,
    ops.ALIGN: ops.align,
}
logger = logging.getLogger(__name__)


class FuseMX(CustomGraphPass):
    """Fuses MX matmuls in the graphs that Inductor compiles; attention of one query gets a form of its own, and the
    rounding of activations is opened on a GPU.

    `results` has one entry per graph compiled in this process; graphs that Inductor takes from its cache were fused
    when they were first compiled and have none.
    """

    def __init__(self) -> None:
        self.results: list[PassResult] = []

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        result = fusion.fuse(graph)
        joining.join_linears(graph)
        attention.open_attention(graph)
        decode_attention.call_attend(graph)
        rounding.open_rounding(graph)
        self.results.append(result)
        logger.info("fused %d MX operations, %d misses", result.rewrites, len(result.misses))
        for miss in result.misses:
            logger.info("not fused: %s", miss)

    def uuid(self) -> Any:
        """Changes with the code of the rules, so that graphs compiled with older ones are not taken from the cache."""
        modules = attention, decode_attention, fusion, joining, rounding, rules, dataflow, ops, e4m3_products
        return get_hash_for_files(tuple(str(module.__file__) for module in modules), __file__)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FuseMX":
        return self


def compile_options(fuse: FuseMX | None = None) -> dict[str, Any]:
    """Options for `torch.compile(..., options=...)` that switch MX fusion on."""
    return {"post_grad_custom_pre_pass": fuse or FuseMX()}


def why_no_inductor(device: torch.device) -> str | None:
    """None if Inductor can compile for the device, else what is missing, in a sentence."""
    if device.type == "cpu":
        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError):
            return "torch.compile needs a C++ compiler (g++ or clang++) for the CPU and there is none"
        return None
    if not has_triton():
        return f"torch.compile needs triton for {device.type} and there is none"
    return None


def compile_ahead(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Write an AOTInductor package in which `mx::` calls are the reference's own steps: it needs no mxcompile.

    Raises CompileError if Inductor cannot compile for the device of its tensors.
    """
    device = next((tensor.device for tensor in exported.state_dict.values()), torch.device("cpu"))
    if missing := why_no_inductor(device):
        raise CompileError(missing)
    plain = exported.run_decompositions(_STEPS)
    with inductor_config.patch({"aot_inductor.metadata": {}}):  # torch writes into it, and it is in all cache keys
        aoti_compile_and_package(plain, package_path=str(path))


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


class _Inductor(torch._TorchCompileInductorWrapper):  # pyright: ignore[reportPrivateUsage]
    """`torch.compile`'s Inductor, for graphs that take MX weights in parts (`unwrapping.py`)."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(None, {**options, "unsafe_marked_cacheable_functions": unwrapping.CACHEABLE}, None)
        self._read: list[torch.Tensor] | None = None

    def __call__(self, model_: GraphModule, inputs_: list[Any], **options: Any) -> Callable[..., Any]:
        module, parts = unwrapping.unwrap_weights(model_, inputs_, AttrSource)
        compiled: Any = super().__call__(module, parts, **options)

        def run(*args: Any) -> Any:
            given = unwrapping.unwrapped(args)
            if self._read is not None:
                self._read += [value for value in given if isinstance(value, torch.Tensor)]
            return compiled(*given)

        return run

    @contextmanager
    def reading(self, read: list[torch.Tensor]) -> Generator[None]:
        """Note the tensors that graphs are called with."""
        self._read = read
        try:
            yield
        finally:
            self._read = None


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
        joining.join_linears(graph_module.graph)
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
