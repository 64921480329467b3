"""What torch allocates while something runs: the bytes of the tensors that its operators return, until they are freed.

What `mx::` operators do in Python counts too. Memory that an operator of torch or a kernel needs inside does not, nor
do storages that are made without an operator.
"""

import gc
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mxcompile.ops import experts, linears
from mxcompile.tensor.weight import MXWeight

_IN_PYTHON: dict[str, Callable[..., Any]] = {
    f"mx::{function.__name__}": function
    for function in (linears.quantize, linears.dequantize, linears.quantize_dequantize, linears.linears, linears.linear)
} | {"mx::grouped_linear": experts.grouped_linear}


@dataclass
class Allocations:
    """peak: the most bytes allocated at a time, beyond those before. kept: those that still are at the end."""

    peak: int = 0
    kept: int = 0

    @property
    def above(self) -> int:
        """How much more than what stays was needed on the way."""
        return self.peak - self.kept


class _Counting(TorchDispatchMode):
    """bytes: allocated now, beyond those before. peak: the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._add(value, is_new=False)
        implementation = _IN_PYTHON.get(func._schema.name)
        if any(issubclass(kind, MXWeight) for kind in types):
            with self:
                results = MXWeight.__torch_dispatch__(func, types, args, kwargs)
        elif implementation is not None and not any(map(is_fake, pytree.tree_leaves(args))):
            with self:
                results = implementation(*args, **(kwargs or {}))
        else:
            results = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(results):
            if isinstance(value, Tensor):
                self._add(value, is_new=True)
        return results

    def _add(self, tensor: Tensor, *, is_new: bool) -> None:
        """Count a tensor's memory until it is freed, unless it has been seen, as that of a view has."""
        if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
            return
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes() if is_new else 0
        if address not in self._seen:
            self._seen.add(address)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.bytes -= size


@contextmanager
def counted_allocations() -> Generator[Allocations]:
    """The allocations of the block on the CPU: the same numbers every time."""
    gc.collect()
    result, counting = Allocations(), _Counting()
    with counting:
        yield result
    gc.collect()
    result.peak, result.kept = counting.peak, counting.bytes
