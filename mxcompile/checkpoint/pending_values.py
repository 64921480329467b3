"""The tensors of a checkpoint as the writer of its files takes them: made when they are written, each value once.

The elements and the scales of an MX weight are written one after the other: the weight is kept for both.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from mxcompile.checkpoint import shards
from mxcompile.checkpoint.shards import PendingTensor
from mxcompile.checkpoint.stored_tensors import TensorNames, flatten_tensor
from mxcompile.errors import CheckpointError

Stored = TypeVar("Stored", bound=Tensor | PendingTensor)
Values = Callable[[Sequence[str]], Callable[[str], Tensor]]
"""Of the names of a file's tensors, in the order in which they are written: what returns each of them."""


class PendingValues:
    """Values by the names of a module's tensors. progress: called with how many of `total` stored ones are written."""

    def __init__(self, values: Values, progress: Callable[[int, int], None] | None = None) -> None:
        self.total = 0
        self._values, self._progress, self._done = values, progress, 0
        self._value: Callable[[str], Tensor] | None = None
        self._last: tuple[str, Tensor] | None = None

    @contextmanager
    def of(self, group: Mapping[str, Stored]) -> Generator[dict[str, Stored]]:
        """The tensors of a file, in the order in which they are written within the block."""
        ordered = shards.in_order(group)
        pending = [each for each in ordered.values() if isinstance(each, PendingTensor) and each.owner]
        self._value, self._last = self._values(list(dict.fromkeys(each.owner for each in pending))), None
        yield ordered
        self._value, self._last = None, None
        self.skip(len(group) - len(pending))

    def read(self, name: str) -> Tensor:
        """The values of one of the module's tensors: a plain one or an MX weight. Called once for each stored part."""
        if self._last is None or self._last[0] != name:
            assert self._value is not None, "values are read while a file is written"
            self._last = None  # the one before is freed first
            self._last = name, self._value(name)
        self.skip(1)
        return self._last[1]

    def skip(self, count: int) -> None:
        """So many stored tensors are written, or were there already."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self.total)

    def pending(
        self, names: TensorNames, tensors: Mapping[str, Tensor | PendingTensor]
    ) -> dict[str, Tensor | PendingTensor]:
        """The stored tensors of a module (see `flatten_module`), those on the meta device made of the values."""
        owners = {part: name for name, packing in names.weights.items() for part in packing.parts(name)}
        return {name: self._pending(name, owners.get(name, name), own) for name, own in tensors.items()}

    def _pending(self, name: str, owner: str, tensor: Tensor | PendingTensor) -> Tensor | PendingTensor:
        if isinstance(tensor, PendingTensor) or not tensor.is_meta:
            return tensor

        def make() -> Tensor:
            part = flatten_tensor(owner, self.read(owner))[name]
            made = part.make() if isinstance(part, PendingTensor) else part
            if made.dtype != tensor.dtype or made.shape != tensor.shape:
                raise CheckpointError(
                    f"{name} should be {list(tensor.shape)} ({tensor.dtype}), but is {list(made.shape)} ({made.dtype})"
                )
            return made

        return PendingTensor(tensor.dtype, tensor.shape, make, owner)
