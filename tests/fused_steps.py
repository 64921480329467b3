"""Compile a function for the CPU with the rewrites that are for GPUs: its result, and what the graph then calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from compiled_anew import graphs_compiled_anew

from mxcompile.inductor import backend
from mxcompile.inductor.rewrites import (
    fuse_gate,
    fuse_next_token,
    fuse_norm,
    fuse_packed_next,
    join_counters,
    join_linears,
)


class Recorded(backend.FuseMX):
    """The rewrites, and the targets of the graph that they leave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        super().__call__(graph)
        graph.lint()
        self.calls = [node.target for node in graph.nodes if node.op == "call_function"]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What refuses CPU tensors accepts them: the operators run their reference."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fuse_norm, fuse_gate):
            patch.setattr(module, "why_no_small_kernel", lambda *_: None)
        patch.setattr(fuse_next_token, "why_no_attention", lambda *_: None)
        patch.setattr(fuse_packed_next, "why_no_packed_attention", lambda *_: None)
        patch.setattr(join_counters, "DEVICE", "cpu")
        patch.setattr(join_linears, "_on_cpu", lambda _: False)  # whose call does the rounding itself
        yield


def compiled(function: Callable[..., Any], *args: Any, on_a_gpu: bool = True) -> tuple[Any, list[Any]]:
    """(result, targets of the rewritten graph). Arguments that the function writes to are written to."""
    fuse = Recorded()
    torch._dynamo.reset()
    with graphs_compiled_anew(), as_on_a_gpu() if on_a_gpu else nullcontext(), torch.no_grad():
        result = torch.compile(function, options=backend.compile_options(fuse), fullgraph=True)(*args)
    return result, fuse.calls
