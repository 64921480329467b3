"""Every private name of Dynamo, Inductor and functorch that mxcompile uses: checked with torch 2.11, 2.13 and 2.14.

The rest of this room imports them from here, so that a torch without one of them fails in one place, which
`mxcompile.inductor.supported` turns into a sentence.
"""

import importlib
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import eval_frame, mark_static_address, maybe_mark_dynamic, optimize
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.side_effects import side_effects_log
from torch._dynamo.source import AttrSource
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import TracingContext
from torch._inductor import aoti_compile_and_package
from torch._inductor import config as inductor_config
from torch._inductor.codecache import CacheBase, torch_key
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.output_code import CompiledFxGraph
from torch.fx._lazy_graph_module import _make_graph_module  # pyright: ignore[reportPrivateUsage]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._triton import has_triton

InductorBackend = torch._TorchCompileInductorWrapper  # pyright: ignore[reportPrivateUsage]
cache_entries = eval_frame._debug_get_cache_entry_list  # pyright: ignore
innermost_function = eval_frame.innermost_fn

__all__ = [
    "AttrSource",
    "CacheBase",
    "CompiledFxGraph",
    "CustomGraphPass",
    "InductorBackend",
    "InvalidCxxCompiler",
    "TorchDispatchMode",
    "TracingContext",
    "aot_autograd",
    "aoti_compile_and_package",
    "cache_entries",
    "dynamo_config",
    "get_cpp_compiler",
    "get_hash_for_files",
    "has_triton",
    "in_front_of",
    "inductor_config",
    "innermost_function",
    "lazy_graph_module",
    "load_inductor",
    "make_boxed_func",
    "mark_static_address",
    "maybe_mark_dynamic",
    "optimize",
    "own_symbol",
    "pick_vec_isa",
    "select_decomp_table",
    "side_effects_log",
    "torch_key",
]

lazy_graph_module: Any = _make_graph_module


def load_inductor() -> None:
    """Import what Inductor compiles with: 175 modules, which the first call of a compiled model would else import."""
    importlib.import_module("torch._inductor.compile_fx")


def own_symbol(number: torch.SymInt) -> Any:
    """The symbol of a dynamic size itself, also where another one is known to be equal and stands for it."""
    return number.node._expr  # pyright: ignore[reportPrivateUsage]


def in_front_of(backend: Any, wrapper: Any) -> Any:
    """Tell Dynamo which backend a wrapper calls: it treats Inductor's in a way of its own, and forgets, when one has
    returned, which tensors it saw (`swap_tensors`, as in `module.to`, refuses tensors that something refers to)."""
    wrapper._torchdynamo_orig_backend = backend
    return wrapper
