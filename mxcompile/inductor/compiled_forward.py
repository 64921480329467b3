"""A module's forward, compiled: one code object for each module, and guards that a walk through the module replaces."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from types import FunctionType
from typing import Any, Final

import torch
from torch import nn
from torch._dynamo import eval_frame, optimize

from mxcompile.inductor import weight_guards

_NUMBERS: Final = count()


class Forward:
    """A module's forward, compiled under a code object of its own, and again when its weights are laid out otherwise.

    Dynamo counts recompilations per code object and gives up after a few; the frames of a Hugging Face model are shared
    by all models of the process. By the code's name it knows which numbers differ from call to call, as a constant of
    two models may, and makes inputs of them. A copy of the module has a copy of this, which runs the copy.
    """

    def __init__(self, module: nn.Module, backend: Any) -> None:
        self.module, self.backend = module, backend
        self._compiled: Callable[..., Any] | None = None  # a copy is made before the module's copy has its parts
        self._compiled_for: weight_guards.Layouts | None = None
        self._has_fast_path = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result."""
        if self._compiled is None or not torch.compiler.is_compiling():
            self.prepare()
        with _without_fast_path() if self._has_fast_path else nullcontext():
            return self._compiled(*args, **kwargs)  # pyright: ignore[reportOptionalCall]

    def prepare(self) -> None:
        """Have the forward for the weights as they are."""
        if self.is_prepared():
            return
        found, known = weight_guards.Layouts(self.module), self._compiled_for
        if known is None or found.layouts != known.layouts:
            self._has_fast_path = any(isinstance(child, nn.MultiheadAttention) for child in self.module.modules())
            self._compiled = self._compile()
        self._compiled_for = found

    def is_prepared(self) -> bool:
        """Whether all weights are laid out as they were when the forward was compiled."""
        return self._compiled_for is not None and self._compiled_for.hold()

    def find_guards(self, **kwargs: Any) -> Any:
        """What Dynamo checks of the module and of these arguments before it runs what it compiled for them.

        None if nothing was compiled for them, or not in one piece: then there are other guards between the pieces.
        """
        code = eval_frame.innermost_fn(self._compiled).__code__  # pyright: ignore
        for entry in eval_frame._debug_get_cache_entry_list(code):  # pyright: ignore
            if self.do_hold(entry.guard_manager, **kwargs):
                # in pieces, this runs the module as it is, and its parts are compiled each for themselves
                is_whole = any(name.startswith("__compiled_fn") for name in entry.code.co_names)
                return entry.guard_manager if is_whole else None
        return None

    def do_hold(self, found: Any, **kwargs: Any) -> bool:
        """Whether guards hold for the module as it is and for these arguments."""
        return found.check({"args": (), "kwargs": kwargs, "module": self.module})

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forward":
        return Forward(memo[id(self.module)], self.backend)

    def __reduce__(self) -> Any:
        return Forward, (self.module, self.backend)

    def _compile(self) -> Callable[..., Any]:
        module = self.module

        def call(*args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)  # pyright: ignore[reportPrivateUsage]

        code = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
        own = FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
        return optimize(self.backend, guard_filter_fn=_guard_filter(module))(own)  # pyright: ignore


def _guard_filter(module: nn.Module) -> Callable[[Sequence[Any]], list[bool]]:
    """`guards.outside_weights`. Dynamo makes all guards again after it and compares what they hold, though a property
    may give a new object each time (`_PerLayerConfigView` of transformers 5.23): let it forget what it held.
    """
    keep = weight_guards.outside_weights(module)

    def keep_afresh(entries: Sequence[Any]) -> list[bool]:
        for entry in entries:
            entry.orig_guard.obj_weakref = None
        return keep(entries)

    return keep_afresh


@contextmanager
def _without_fast_path() -> Generator[None]:
    """torch's attention layers in their plain form: Dynamo does not see that their fused one takes no MXWeight."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
