"""Example inputs and calibration batches, normalized to positional and keyword arguments of `forward`."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import torch
from torch import Tensor

from mxcompile.arguments import checked
from mxcompile.errors import InputError

_ADVICE: Final = {
    "list": ': a tokenizer returns tensors with return_tensors="pt"; make others with torch.tensor',
    "str": ': pass the tokenizer\'s output, with return_tensors="pt"',
    "ndarray": ": convert it with torch.from_numpy",
}


class WeightedBatch(dict[str, Tensor]):
    """Keyword arguments of one `forward` call, as calibration data: each of its tokens counts `weight` times.

    Where batches hold sequences of several lengths, a weight of 1 / length lets every sequence count alike.
    """

    @checked
    def __init__(self, arguments: Mapping[str, Tensor], weight: float = 1.0) -> None:
        super().__init__(arguments)
        if not 0 < weight < math.inf:
            raise InputError(f"the weight of a batch is a positive number, not {weight}")
        self.weight = weight

    def to(self, device: str | torch.device) -> "WeightedBatch":
        """The same batch on a device."""
        return WeightedBatch({name: tensor.to(device) for name, tensor in self.items()}, self.weight)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one forward call. weight: how much each of its tokens counts among calibration data."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    weight: float = 1.0

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, nested ones included."""
        return [leaf for _, leaf in named_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def check_fits(self, other: "Inputs") -> None:
        """Raise InputError, which names the input, if another call has something else where this one has a tensor.

        Compared are the kind of each value, and of tensors the number of dimensions, the dtype (integers are alike) and
        the device. Sizes may differ.
        """
        _check_fits("", dict(enumerate(self.args)) | self.kwargs, dict(enumerate(other.args)) | other.kwargs)

    def check_call(self, other: "Inputs", name: str | None = None) -> None:
        """`check_fits`, and the same arguments in the same structure. name: the message calls the other call so."""
        if len(other.args) != len(self.args) or set(other.kwargs) != set(self.kwargs):
            raise InputError(
                f"{name or 'a calibration batch'} has {len(other.args)} positional arguments and keywords "
                f"{sorted(other.kwargs)}; "
                f"the model was traced with {len(self.args)} and {sorted(self.kwargs)}"
            )
        try:
            self.check_fits(other)
        except InputError as error:
            if name is None:
                raise
            raise InputError(f"{name}: {error}") from error

    def leaves_of(self, other: "Inputs") -> Iterator[Any]:
        """The leaves of another call, in the order of this one: what a graph traced with this one takes."""
        kwargs = {name: other.kwargs[name] for name in self.kwargs}
        return _leaves_like((self.args, self.kwargs), (other.args, kwargs))

    def cloned(self) -> "Inputs":
        """The same call with a contiguous copy of every tensor: for a forward that may write to its inputs, and for
        a trace, which would have guards on the strides.
        """

        def clone(leaf: object) -> object:
            return leaf.clone(memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf

        args, kwargs = map_leaves(clone, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def to(self, device: torch.device) -> "Inputs":
        """The same call with every tensor on a device; raises InputError for one without values."""
        args, kwargs = map_leaves(lambda leaf: _on(leaf, device), (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def with_doubled_batch(self) -> "Inputs | None":
        """The same call with a batch of one repeated, or None unless every tensor has a first dimension of one."""
        tensors = self.tensors()
        if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
            return None

        def double(leaf: object) -> object:
            return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf

        args, kwargs = map_leaves(double, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


def _check_fits(name: str, traced: Any, value: Any) -> None:
    if isinstance(traced, Tensor):
        _check_tensor(name, traced, value)
    elif isinstance(traced, Mapping) and isinstance(value, Mapping):
        for key, item in cast(Mapping[Any, Any], traced).items():
            if key in value:
                _check_fits(f"{name}.{key}".lstrip("."), item, value[key])
    elif isinstance(traced, tuple | list) and isinstance(value, tuple | list):
        one, other = cast(list[Any], traced), cast(list[Any], value)
        if len(one) != len(other):
            raise InputError(_misfit(name, f"has {len(other)} items", f"{len(one)}"))
        for index, pair in enumerate(zip(one, other, strict=True)):
            _check_fits(f"{name}.{index}", *pair)
    elif isinstance(value, Tensor):
        raise InputError(_misfit(name, "is a tensor", f"{traced!r}"))


def _check_tensor(name: str, traced: Tensor, value: Any) -> None:
    if not isinstance(value, Tensor):
        advice = _ADVICE.get(type(value).__name__, "")
        raise InputError(f"input {name} is a {type(value).__name__}, and the model was traced with a tensor{advice}")
    if value.dim() != traced.dim():
        raise InputError(_misfit(name, f"has {value.dim()} dimensions", f"{traced.dim()}"))
    is_float = value.is_floating_point() or traced.is_floating_point()
    if is_float and value.dtype != traced.dtype:
        raise InputError(_misfit(name, f"is {value.dtype}", f"{traced.dtype}"))
    if value.device != traced.device:
        raise InputError(_misfit(name, f"is on {value.device}", f"{traced.device}") + ", or move them there")


def _misfit(name: str, is_now: str, was: str) -> str:
    return (
        f"these inputs do not fit the traced graph (input {name} {is_now}, it was traced with {was}); trace again with "
        "inputs of this kind"
    )


def as_inputs(example: object, what: str = "example inputs are") -> Inputs:
    """Normalize a keyword mapping (also a tokenizer's output), a tuple or list of arguments, or a single tensor."""
    if isinstance(example, Inputs):
        return example
    if isinstance(example, Tensor):
        return Inputs((example,))
    if isinstance(example, Mapping):
        arguments = {str(name): value for name, value in cast(Mapping[Any, Any], example).items()}
        return Inputs((), arguments, example.weight if isinstance(example, WeightedBatch) else 1.0)
    if isinstance(example, tuple | list):
        return Inputs(tuple(cast(Iterable[Any], example)))
    raise InputError(
        f"{what} a {type(example).__name__}; pass a dict of keyword arguments, a tuple of positional "
        "arguments, or a single tensor"
    )


def as_batches(calibration: object) -> Iterator[Inputs]:
    """Calibration data: one batch, or an iterable of batches (a list, a DataLoader), each as `as_inputs` takes it.

    A tuple is one batch of positional arguments, a list is a list of batches.
    """
    if isinstance(calibration, Inputs | Tensor | Mapping | tuple):
        yield as_inputs(cast(object, calibration))
        return
    if not isinstance(calibration, Iterable) or isinstance(calibration, str) or hasattr(calibration, "__array__"):
        raise InputError(f"calibration is a {type(calibration).__name__}; pass a batch or an iterable of batches")
    count = 0
    for batch in cast(Iterable[object], calibration):
        yield as_inputs(batch, f"calibration[{count}] is")
        count += 1
    if count == 0:
        raise InputError("calibration data is empty (an exhausted iterator?); pass a list of batches")


def check_batches(example: Inputs, batches: Iterable[Inputs]) -> None:
    """Raise InputError, which names the batch and the input, if a batch is not a call like the example."""
    for index, batch in enumerate(batches):
        example.check_call(batch, f"calibration[{index}]")


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


def check_has_values(tensor: Tensor) -> None:
    """Raise InputError for an input on the meta device."""
    if tensor.is_meta:
        raise InputError(f"an input of shape {list(tensor.shape)} is on the meta device: give tensors with values")


def _on(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if device.type != "meta":
        check_has_values(leaf)
    return leaf.to(device)


def _leaves_like(example: Any, value: Any) -> Iterator[Any]:
    """The leaves of a value, in the order of the traced example."""
    if isinstance(example, Mapping):
        pairs = [(item, value[key]) for key, item in example.items()]
    elif isinstance(example, tuple | list):
        pairs = list(zip(example, value, strict=True))
    else:
        yield value
        return
    for one, other in pairs:
        yield from _leaves_like(one, other)
