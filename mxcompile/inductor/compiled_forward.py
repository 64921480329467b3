"""A module's forward, compiled under a code object of its own, with cheap guards in place of Dynamo's on MX weights."""

import gc
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from itertools import count
from types import FunctionType
from typing import Any, Final

import torch
from torch import nn
from torch.fx import GraphModule, traceback

from mxcompile.errors import warn
from mxcompile.inductor import weight_guards
from mxcompile.inductor.private_api import (
    cache_entries,
    dynamo_config,
    in_front_of,
    innermost_function,
    optimize,
    side_effects_log,
)

_MOST_GRAPHS: Final = 64
"""Kinds of calls that a forward is compiled for. A kind of cache has those of a prompt and of a step, both for a batch
of one and for larger ones: two caches reach Dynamo's own limit, 8."""
_NUMBERS: Final = count()
_NO_CALL_SITE: Final = "lines of Python are not recorded while a module is traced\n"


class CompiledForward:
    """A module's compiled forward; it recompiles when the layout of a weight changes.

    Dynamo counts recompilations per code object and gives up after a few, and all models of a process share the code
    objects of a Hugging Face class. It also remembers, by the code's name, which numbers differed between calls and
    makes inputs of them, although they are constants of two models. Hence a code object and a name per module. A deep
    copy of the module gets its own `CompiledForward`.
    """

    def __init__(self, module: nn.Module, backend: Any) -> None:
        self.module, self.backend = module, backend
        self._compiled: Callable[..., Any] | None = (
            None  # compiled lazily: a deep copy is made before the copied module is complete
        )
        self._compiled_for: weight_guards.WeightLayouts | None = None
        self._has_fast_path = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        is_traced = torch.compiler.is_compiling()
        if self._compiled is None or not is_traced:
            self.prepare()
        with _without_fast_path() if self._has_fast_path else nullcontext():
            if is_traced:
                return self._compiled(*args, **kwargs)  # pyright: ignore[reportOptionalCall]
            with collection_paused(), call_sites_unrecorded(), side_effects_unrecorded(), more_graphs_allowed():
                return self._compiled(*args, **kwargs)  # pyright: ignore[reportOptionalCall]

    def prepare(self) -> None:
        """Compile for the current layouts of the weights, unless that is done."""
        if self.is_prepared():
            return
        current, previous = weight_guards.WeightLayouts(self.module), self._compiled_for
        if previous is None or current.layouts != previous.layouts:
            self._has_fast_path = any(isinstance(child, nn.MultiheadAttention) for child in self.module.modules())
            self._compiled = self._compile()
        self._compiled_for = current

    def is_prepared(self) -> bool:
        """Whether all weights have the layouts that the forward was compiled for."""
        return self._compiled_for is not None and self._compiled_for.hold()

    def find_guards(self, **kwargs: Any) -> Any:
        """Dynamo's guards of the graph that it compiled for the module and these arguments.

        None if nothing was compiled for them, or if the graph is broken into pieces, each with guards of its own.
        """
        code = innermost_function(self._compiled).__code__  # pyright: ignore
        for entry in cache_entries(code):
            if self.guards_hold(entry.guard_manager, **kwargs):
                # with graph breaks, this code runs the original module, whose pieces are compiled separately
                is_whole = any(name.startswith("__compiled_fn") for name in entry.code.co_names)
                return entry.guard_manager if is_whole else None
        return None

    def guards_hold(self, guards: Any, **kwargs: Any) -> bool:
        """Whether guards hold for the module as it is now and for these arguments."""
        return guards.check({"args": (), "kwargs": kwargs, "module": self.module})

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledForward":
        return CompiledForward(memo[id(self.module)], self.backend)

    def __reduce__(self) -> Any:
        return CompiledForward, (self.module, self.backend)

    def _compile(self) -> Callable[..., Any]:
        module = self.module

        def call(*args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)  # pyright: ignore[reportPrivateUsage]

        code = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
        own = FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
        backend = weight_guards.outside_weights(module, self.backend)

        def compile_(graph: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
            limit = dynamo_config.recompile_limit
            if len(cache_entries(code)) == limit - 1:
                warn(
                    f"this {type(module).__name__} has been compiled for {limit} kinds of calls (caches, batch sizes, "
                    "dtypes, options), as many as are kept: further kinds run uncompiled"
                )
            return backend(graph, inputs, **options)

        return optimize(in_front_of(self.backend, compile_))(own)  # pyright: ignore


@contextmanager
def collection_paused() -> Generator[None]:
    """Do not look for cyclic garbage. While Dynamo traces, millions of objects are made and kept, and each search looks
    at all of them, also the one that Dynamo makes at its end; while a CUDA graph is captured, freed CUDA memory would
    invalidate it."""
    was_enabled, after_compiling = gc.isenabled(), dynamo_config.run_gc_after_compile
    gc.disable()
    dynamo_config.run_gc_after_compile = False
    try:
        yield
    finally:
        dynamo_config.run_gc_after_compile = after_compiling
        if was_enabled:
            gc.enable()


@contextmanager
def call_sites_unrecorded() -> Generator[None]:
    """Let Dynamo leave out, for each call that it traces, the lines of Python through which the call was reached.

    To format them takes a tenth of its time. A call that has them keeps them, so all get a text in advance.
    """
    with traceback.preserve_node_meta():
        traceback.set_stack_trace([_NO_CALL_SITE])
        yield


@contextmanager
def side_effects_unrecorded() -> Generator[None]:
    """Let Dynamo write no texts about where a traced module changes an object, as it does each layer of a cache, unless
    their log is switched on, or the user has set what Dynamo does about such changes."""
    policy = dynamo_config.side_effect_replay_policy
    if policy == "info" and not side_effects_log.isEnabledFor(logging.DEBUG):
        dynamo_config.side_effect_replay_policy = "silent"
    try:
        yield
    finally:
        dynamo_config.side_effect_replay_policy = policy


@contextmanager
def more_graphs_allowed() -> Generator[None]:
    """Let Dynamo compile a function for more kinds of calls than by default; it runs all others uncompiled."""
    limit = dynamo_config.recompile_limit
    dynamo_config.recompile_limit = max(limit, _MOST_GRAPHS)
    try:
        yield
    finally:
        dynamo_config.recompile_limit = limit


@contextmanager
def call_sites_recorded() -> Generator[None]:
    """Undo `call_sites_unrecorded`, for what compiles the traced graph."""
    with traceback.preserve_node_meta():
        traceback.get_current_meta().pop("stack_trace", None)  # torch 2.11 takes an empty list for nothing to set
        with traceback.preserve_node_meta(False):
            yield


@contextmanager
def _without_fast_path() -> Generator[None]:
    """Switch off the fused path of `nn.MultiheadAttention`: it takes no MXWeight, which Dynamo does not see."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
