"""One decode step, recorded as a CUDA graph: what it reads and writes, and whether that lies where it lay."""

import gc
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mxcompile.inductor.compiled_forward import Forward
from mxcompile.tensor.weight import MXWeight


class NotRecordedError(Exception):
    """Why a step cannot be recorded."""


class CudaGraph:
    """What a call does on a GPU, recorded."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, call: Callable[[], Any]) -> Any:
        """Record the call without doing it; its result, whose tensors each replay fills."""
        current = torch.cuda.current_stream()
        stream = _recording_stream(current.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), _no_collection():
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                return call()
            finally:
                self._graph.capture_end()
                current.wait_stream(stream)

    def replay(self) -> None:
        """Do again what the call did."""
        self._graph.replay()


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for each stream that it is used on."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_collection() -> Generator[None]:
    """Nothing is collected meanwhile: freeing what belongs to CUDA would end the recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Step:
    """The arguments of a decode step, sorted."""

    cache: Any
    cache_name: str
    tensors: dict[str, Tensor]
    rest: dict[str, Any]

    @staticmethod
    def of(kwargs: dict[str, Any]) -> "Step | None":
        """None if it is none that can be recorded: one with tokens, a plain static cache, and tensors or constants."""
        cache_name, tensors, rest = "", dict[str, Tensor](), dict[str, Any]()
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            elif value is None or isinstance(value, bool | int | float | str):
                rest[name] = value
            elif cache_name or not _is_plain_static(value):
                return None
            else:
                cache_name = name
        has_tokens = "input_ids" in tensors and tensors["input_ids"].dim() == 2
        return Step(kwargs[cache_name], cache_name, tensors, rest) if cache_name and has_tokens else None

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments, as the model takes them."""
        return {**self.tensors, self.cache_name: self.cache, **self.rest}

    @property
    def cache_tensors(self) -> list[Tensor]:
        """All that a step reads and writes of the cache."""
        return [t for layer in self.cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]

    def take_back(self) -> None:
        """Set the cache back by the tokens of the step; what was written for them is written over."""
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(self.tensors["input_ids"].shape[1])


def _is_plain_static(value: Any) -> bool:
    """A cache of transformers whose layers all hold keys, values and a length that stay where they are, on a GPU."""
    from transformers.cache_utils import StaticCache, StaticLayer  # only for models that come from there

    return (
        type(value) is StaticCache
        and not getattr(value, "offloading", False)
        and all(
            type(layer) is StaticLayer
            and layer.is_initialized
            and isinstance(getattr(layer, "cumulative_length", None), Tensor)
            for layer in value.layers
        )
    )


class Recording:
    """A recorded step: where its inputs, its results and all that it reads lie, and under which guards it was compiled.

    Memory that a replay reads is held for as long as the cache lives that the last step was for.
    """

    def __init__(self, step: Step, guards: Any, forward: Forward, graph: Any) -> None:
        """Record a step, which is not done by that. Raises NotRecordedError."""
        self.guards, self.forward, self.graph, self.rest = guards, forward, graph, step.rest
        self.inputs = {name: _like(tensor) for name, tensor in step.tensors.items()}
        bound = Step(step.cache, step.cache_name, self.inputs, step.rest)
        if not forward.do_hold(guards, **bound.kwargs):
            raise NotRecordedError("a copy of its inputs is not what it was compiled for")
        read: list[Tensor] = []
        before = _attributes(forward.module, step.cache)
        try:
            with forward.backend.reading(read):
                result = graph.record(lambda: forward(**bound.kwargs))
        except RuntimeError as error:
            raise NotRecordedError(str(error)) from error
        if any(not _is_unchanged(owner, known) for owner, known in before):
            raise NotRecordedError("a step changes attributes of the model or of its cache")
        leaves, self._form = pytree.tree_flatten(result)
        self._leaves = [_CACHE if leaf is step.cache else leaf for leaf in leaves]
        _check_results(self._leaves, read)
        others = {id(tensor) for tensor in (*step.cache_tensors, *self.inputs.values())}
        self._weights = _places(forward.module, read, others)
        self._cache_addresses = [tensor.data_ptr() for tensor in step.cache_tensors]
        self._held: list[Any] = []
        self._cache = self._hold_for(step.cache)

    def fits(self, step: Step) -> bool:
        """Whether a replay takes such inputs, and reads and writes that cache."""
        return (
            [tensor.data_ptr() for tensor in step.cache_tensors] == self._cache_addresses
            and self.rest == step.rest
            and self.inputs.keys() == step.tensors.keys()
            and all(_are_alike(self.inputs[name], tensor) for name, tensor in step.tensors.items())
        )

    def can_start(self, step: Step) -> bool:
        """Whether all that a replay reads is still there to be read."""
        if self._cache() is not step.cache:
            if not self._is_in_place():
                return False
            self._cache = self._hold_for(step.cache)
        return True

    def replay(self, step: Step) -> Any:
        """Do the step; its result, in tensors of its own."""
        for name, tensor in step.tensors.items():
            _whole(self.inputs[name]).copy_(_whole(tensor))
        self.graph.replay()
        return pytree.tree_unflatten([self._own(leaf, step) for leaf in self._leaves], self._form)

    def was_right(self, step: Step) -> bool:
        """Whether the replay did what the model does: nothing that it depends on is another than when it was made."""
        return self.forward.do_hold(self.guards, **step.kwargs) and self._is_in_place()

    def _is_in_place(self) -> bool:
        return self.forward.is_prepared() and all(place.tensor() is not None for place in self._weights)

    def _hold_for(self, cache: Any) -> Callable[[], Any]:
        held = self._held = [place.tensor().untyped_storage() for place in self._weights]  # pyright: ignore
        return weakref.ref(cache, lambda _: held.clear())

    def _own(self, leaf: Any, step: Step) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return step.cache if leaf is _CACHE else leaf


_CACHE = object()


def _whole(tensor: Tensor) -> Tensor:
    """What a tensor is a view of, which Dynamo looks at; itself if of nothing."""
    return tensor if (base := tensor._base) is None else base  # pyright: ignore[reportPrivateUsage]


def _like(tensor: Tensor) -> Tensor:
    """A copy of a tensor, a view if that is one. Raises NotRecordedError if values of it share their place."""
    whole = _whole(tensor)
    if any(stride == 0 and size > 1 for size, stride in zip(whole.shape, whole.stride(), strict=True)):
        raise NotRecordedError("one of its inputs is expanded")
    room = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device=whole.device).copy_(whole)
    if whole is tensor:
        return room
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - whole.storage_offset())


def _are_alike(known: Tensor, tensor: Tensor) -> bool:
    """Whether one can be copied into the other and stand for it: also the part that a view is of what it views."""
    whole, other = _whole(known), _whole(tensor)
    return (
        (whole.shape, whole.dtype, whole.device) == (other.shape, other.dtype, other.device)
        and (known.shape, known.stride()) == (tensor.shape, tensor.stride())
        and known.storage_offset() - whole.storage_offset() == tensor.storage_offset() - other.storage_offset()
    )


def _attributes(module: nn.Module, cache: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The modules of a model, its cache and the cache's layers, each with its attributes."""
    return [(owner, dict(vars(owner))) for owner in (*module.modules(), cache, *cache.layers)]


def _is_unchanged(owner: Any, known: dict[str, Any]) -> bool:
    return vars(owner).keys() == known.keys() and all(vars(owner)[name] is value for name, value in known.items())


def _check_results(leaves: list[Any], read: list[Tensor]) -> None:
    """Raise NotRecordedError if a result cannot be given away as a copy."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in read}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in storages:
            raise NotRecordedError("one of its results lies in its inputs")
        if not (leaf is _CACHE or leaf is None or isinstance(leaf, Tensor | bool | int | float | str)):
            raise NotRecordedError(f"one of its results is a {type(leaf).__name__}")


@dataclass(frozen=True)
class Place:
    """Where a module holds a tensor, and where that lay: an attribute, or the part of one that is an MXWeight."""

    attributes: dict[str, Any]
    name: str
    part: str | None
    address: int

    def tensor(self) -> Tensor | None:
        """The tensor; None if it lies elsewhere now."""
        held = self.attributes.get(self.name)
        tensor = held if self.part is None else getattr(held, self.part, None)
        return tensor if isinstance(tensor, Tensor) and tensor.data_ptr() == self.address else None


def _places(module: nn.Module, read: list[Tensor], others: set[int]) -> list[Place]:
    """Where the model holds each tensor that a step reads; others: ids of tensors that are looked after elsewhere.

    Raises NotRecordedError if a tensor is not the model's.
    """
    known = dict(_held(module))
    wanted = {id(tensor): tensor for tensor in read if id(tensor) not in others}
    for key, tensor in wanted.items():
        if key not in known:
            raise NotRecordedError(f"it reads a tensor that no module holds, of shape {list(tensor.shape)}")
    return [known[key] for key in wanted]


def _held(module: nn.Module) -> Iterator[tuple[int, Place]]:
    """All tensors of a module and of its parts, by id."""
    for owner in module.modules():
        own = vars(owner)
        for held in (own["_parameters"], own["_buffers"], own):
            for name, value in held.items():
                if type(value) is MXWeight:
                    for part, tensor in zip(value.__tensor_flatten__()[0], value.parts, strict=True):
                        yield id(tensor), Place(held, name, part, tensor.data_ptr())
                elif isinstance(value, Tensor):
                    yield id(value), Place(held, name, None, value.data_ptr())
