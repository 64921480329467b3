"""Example inputs and calibration batches, normalized to positional and keyword arguments of `forward`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from mxcompile.errors import InputError


@dataclass(frozen=True)
class Inputs:
    """Arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, nested ones included."""
        return [leaf for _, leaf in named_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def check_ranks(self, other: "Inputs") -> None:
        """Raise InputError if a tensor of the other call has another number of dimensions than the one it replaces."""
        mine = dict(named_leaves((self.args, self.kwargs)))
        for path, value in named_leaves((other.args, other.kwargs)):
            traced = mine.get(path)
            if isinstance(value, Tensor) and isinstance(traced, Tensor) and value.dim() != traced.dim():
                raise InputError(
                    f"these inputs do not fit the traced graph (input {path.partition('.')[2]} has {value.dim()} "
                    f"dimensions, it was traced with {traced.dim()}); trace again with inputs of this kind"
                )

    def cloned(self) -> "Inputs":
        """The same call with a copy of every tensor, for a forward that may write to its inputs."""
        args, kwargs = map_leaves(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Inputs(args, kwargs)

    def with_doubled_batch(self) -> "Inputs | None":
        """The same call with a batch of one repeated, or None unless every tensor has a first dimension of one."""
        tensors = self.tensors()
        if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
            return None

        def double(leaf: object) -> object:
            return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf

        args, kwargs = map_leaves(double, (self.args, self.kwargs))
        return Inputs(args, kwargs)


def as_inputs(example: object) -> Inputs:
    """Normalize a keyword mapping (also a tokenizer's output), a tuple or list of arguments, or a single tensor."""
    if isinstance(example, Inputs):
        return example
    if isinstance(example, Tensor):
        return Inputs((example,))
    if isinstance(example, Mapping):
        return Inputs((), {str(name): value for name, value in cast(Mapping[Any, Any], example).items()})
    if isinstance(example, tuple | list):
        return Inputs(tuple(cast(Iterable[Any], example)))
    raise InputError(
        f"example inputs are a {type(example).__name__}; pass a dict of keyword arguments, a tuple of positional "
        "arguments, or a single tensor"
    )


def as_batches(calibration: object) -> Iterator[Inputs]:
    """Calibration data: one batch, or an iterable of batches (a list, a DataLoader), each as `as_inputs` takes it.

    A tuple is one batch of positional arguments, a list is a list of batches.
    """
    if isinstance(calibration, Inputs | Tensor | Mapping | tuple):
        yield as_inputs(cast(object, calibration))
        return
    if not isinstance(calibration, Iterable):
        raise InputError(f"calibration is a {type(calibration).__name__}; pass a batch or an iterable of batches")
    count = 0
    for batch in cast(Iterable[object], calibration):
        count += 1
        yield as_inputs(batch)
    if count == 0:
        raise InputError("calibration data is empty (an exhausted iterator?); pass a list of batches")


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to everything that is not a tuple, list or mapping, keeping the structure."""
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {key: map_leaves(function, item) for key, item in items}
    if isinstance(value, tuple | list):
        mapped = [map_leaves(function, item) for item in cast(Iterable[Any], value)]
        return mapped if isinstance(value, list) else tuple(mapped)
    return function(value)


def named_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tuples, lists and mappings, in order, each with its path (`logits`, `0.1`)."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = cast(Mapping[Any, Any], value).items()
    elif isinstance(value, tuple | list):
        items = enumerate(cast(Iterable[Any], value))
    else:
        yield path, value
        return
    for key, item in items:
        yield from named_leaves(item, f"{path}.{key}" if path else str(key))
