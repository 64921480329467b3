"""torch.compile with MX fusion: the only file that imports torch._inductor (checked with torch 2.11, 2.13 and 2.14).

`FuseMX` runs the fusion rules on every graph that Inductor compiles, right before its own post-grad passes. It is
handed over in the options of one `torch.compile` call; no global setting is changed.
"""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.source import AttrSource
from torch._inductor import aoti_compile_and_package, cpp_builder, exc
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule
from torch.utils._triton import has_triton

from mxcompile import ops
from mxcompile.errors import CompileError
from mxcompile.graph import dataflow, rules
from mxcompile.graph.records import PassResult
from mxcompile.inductor import unwrap_weights
from mxcompile.inductor.rewrites import decompose_attention, decompose_rounding, fuse_attention, join_linears
from mxcompile.inductor.rewrites import fuse as fusion
from mxcompile.kernels.layout import e4m3_products

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
        join_linears.join_linears(graph)
        decompose_attention.open_attention(graph)
        fuse_attention.call_attend(graph)
        decompose_rounding.open_rounding(graph)
        self.results.append(result)
        logger.info("fused %d MX operations, %d misses", result.rewrites, len(result.misses))
        for miss in result.misses:
            logger.info("not fused: %s", miss)

    def uuid(self) -> Any:
        """Changes with the code of the rules, so that graphs compiled with older ones are not taken from the cache."""
        modules = (
            decompose_attention,
            fuse_attention,
            fusion,
            join_linears,
            decompose_rounding,
            rules,
            dataflow,
            ops,
            e4m3_products,
        )
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


class _Inductor(torch._TorchCompileInductorWrapper):  # pyright: ignore[reportPrivateUsage]
    """`torch.compile`'s Inductor, for graphs that take MX weights in parts (`unwrap_weights.py`)."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(None, {**options, "unsafe_marked_cacheable_functions": unwrap_weights.CACHEABLE}, None)
        self._read: list[torch.Tensor] | None = None

    def __call__(self, model_: GraphModule, inputs_: list[Any], **options: Any) -> Callable[..., Any]:
        module, parts = unwrap_weights.unwrap_weights(model_, inputs_, AttrSource)
        compiled: Any = super().__call__(module, parts, **options)

        def run(*args: Any) -> Any:
            given = unwrap_weights.unwrapped(args)
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
