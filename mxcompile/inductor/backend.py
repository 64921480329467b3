"""The backend that `torch.compile` gets: Inductor with the MX rewrites in front of its post-grad passes.

`FuseMX` runs on every graph that Inductor compiles. It is passed in the options of one `torch.compile` call; no global
setting changes.
"""

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch.fx import Graph, GraphModule

from mxcompile.graph.records import PassResult
from mxcompile.inductor import unwrap_weights
from mxcompile.inductor.compiled_forward import call_sites_recorded
from mxcompile.inductor.private_api import (
    AttrSource,
    CacheBase,
    CustomGraphPass,
    InductorBackend,
    InvalidCxxCompiler,
    get_cpp_compiler,
    get_hash_for_files,
    has_triton,
    innermost_function,
    pick_vec_isa,
    torch_key,
)
from mxcompile.inductor.recorded_graph import recorded, recorded_as_one
from mxcompile.inductor.rewrites.decompose_attention import decompose_attention
from mxcompile.inductor.rewrites.decompose_packed_attention import decompose_packed_attention
from mxcompile.inductor.rewrites.decompose_packing import decompose_packing
from mxcompile.inductor.rewrites.decompose_rounding import decompose_rounding
from mxcompile.inductor.rewrites.fuse import fuse
from mxcompile.inductor.rewrites.fuse_attention import fuse_attention
from mxcompile.inductor.rewrites.fuse_gate import fuse_gates
from mxcompile.inductor.rewrites.fuse_next_token import fuse_next_token
from mxcompile.inductor.rewrites.fuse_norm import fuse_norms
from mxcompile.inductor.rewrites.fuse_packed_attention import fuse_packed_attention
from mxcompile.inductor.rewrites.fuse_packed_next import fuse_packed_next
from mxcompile.inductor.rewrites.join_counters import join_counters
from mxcompile.inductor.rewrites.join_linears import join_linears
from mxcompile.inductor.split_graph import compile_in_pieces

_PACKAGE: Final = Path(__file__).parents[1]
_HASHED: Final = ("formats.py", "ops", "numerics", "kernels", "tensor", "graph", "inductor")
_SOURCES: Final = (".py", ".cpp", ".h", ".jsonl")  # code, and the configs that kernels are launched with
logger = logging.getLogger(__name__)


class FuseMX(CustomGraphPass):
    """Fuses MX matmuls in the graphs that Inductor compiles, fuses or decomposes single-token attention, and on a GPU
    decomposes the rounding of activations so that Inductor fuses it with their producers.

    `results` has one entry per graph, or piece of one, compiled in this process; those that Inductor takes from its
    cache were fused when they were first compiled and have none.
    """

    def __init__(self) -> None:
        self.results: list[PassResult] = []

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        result = fuse(graph)
        join_linears(graph)
        fuse_packed_attention(graph)
        fuse_packed_next(graph)
        decompose_packed_attention(graph)
        decompose_packing(graph)
        decompose_attention(graph)
        fuse_attention(graph)
        fuse_next_token(graph)
        join_counters(graph)
        fuse_norms(graph)
        fuse_gates(graph)
        decompose_rounding(graph)
        self.results.append(result)
        logger.info("fused %d MX operations, %d misses", result.rewrites, len(result.misses))
        for miss in result.misses:
            logger.info("not fused: %s", miss)

    def uuid(self) -> Any:
        """Changes with all code that decides what a compiled graph computes, so that no stale graph leaves the
        cache."""
        return get_hash_for_files(_hashed_files())

    def __deepcopy__(self, memo: dict[int, Any]) -> "FuseMX":
        return self


def _hashed_files() -> tuple[str, ...]:
    paths = [_PACKAGE / name for name in _HASHED]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return tuple(str(file) for file in files if file.suffix in _SOURCES)


def compile_options(fuse: FuseMX | None = None) -> dict[str, Any]:
    """Options for `torch.compile(..., options=...)` that switch MX fusion on."""
    return {"post_grad_custom_pre_pass": fuse or FuseMX()}


def why_no_compiler(device: torch.device) -> str | None:
    """None if Inductor can compile for the device, else what is missing, in a sentence."""
    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError):
            return "torch.compile needs a C++ compiler (g++ or clang++) for the CPU and there is none"
        return None
    if not has_triton():
        return f"torch.compile needs triton for {device.type} and there is none"
    return None


def start_probing(device: torch.device) -> threading.Thread:
    """Let Inductor find what its cache's keys hold while Dynamo traces, and remember it: hashes of the files of torch
    and Triton, half a second of reading, and for a CPU the processor's vector instructions, for each kind of which it
    compiles a program, unless its cache has it, and starts a process that loads it, in seconds. Returns the thread that
    does this, or has done it: who needs the answers before it ends waits for it, or all would be sought twice."""
    return _probing(device.type)


@cache
def _probing(device_type: str) -> threading.Thread:
    def probe() -> None:
        with suppress(OSError):  # a file cannot be read, or torch's cache folder was removed: who needs it asks again
            torch_key()
            CacheBase.get_system()
            if device_type == "cpu":
                pick_vec_isa()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    return thread


class MXBackend(InductorBackend):
    """`torch.compile`'s Inductor backend, for graphs that take the component tensors of MX weights as inputs.

    options: those of `torch.compile`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(None, {**options, "unsafe_marked_cacheable_functions": unwrap_weights.CACHEABLE}, None)
        self._inputs_seen: list[torch.Tensor] | None = None
        # torch's CUDA graphs hold fixed addresses of weights, so that one for each layer would be recorded again
        self._may_split = not options.get("triton.cudagraphs")

    def __call__(self, model_: GraphModule, inputs_: list[Any], **options: Any) -> Callable[..., Any]:
        """Compile a Dynamo graph; see `unwrap_weights`, and `split_graph` for equal layers, which are compiled once
        where no gradients are wanted."""
        with call_sites_recorded():
            return self._compiled(model_, inputs_, **options)

    def _compiled(self, model_: GraphModule, inputs_: list[Any], **options: Any) -> Callable[..., Any]:
        module, flat = unwrap_weights.unwrap_weights(model_, inputs_, AttrSource)

        def compile_(piece: GraphModule, inputs: list[Any]) -> Any:
            made: Any = super(MXBackend, self).__call__(piece, inputs, **options)
            return innermost_function(made)  # without the wrapper that Dynamo puts around the whole anyway

        for device_type in {value.device.type for value in flat if isinstance(value, torch.Tensor)}:
            start_probing(torch.device(device_type)).join()
        is_whole = torch.is_grad_enabled() or not self._may_split
        layers = None if is_whole else compile_in_pieces(module, flat, compile_)
        compiled: Any = compile_(module, flat) if layers is None else layers
        if all(value.device.type == "cpu" for value in flat if isinstance(value, torch.Tensor)):
            compiled = recorded(compiled) if layers is None else recorded_as_one(layers)

        def run(*args: Any) -> Any:
            inputs = unwrap_weights.unwrapped(args)
            if self._inputs_seen is not None:
                self._inputs_seen += [value for value in inputs if isinstance(value, torch.Tensor)]
            return compiled(*inputs)

        return run

    @contextmanager
    def collecting_inputs(self, tensors: list[torch.Tensor]) -> Generator[None]:
        """Append to `tensors` every tensor that a compiled graph is called with."""
        self._inputs_seen = tensors
        try:
            yield
        finally:
            self._inputs_seen = None
