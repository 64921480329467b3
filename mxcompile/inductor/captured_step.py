"""One decode step captured as a CUDA graph: the tensors it reads and writes, and whether they are still in place."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mxcompile.inductor.compiled_forward import CompiledForward, collection_paused
from mxcompile.tensor.weight import MXWeight


class NotCapturableError(Exception):
    """Why a step cannot be captured."""


class CudaGraph:
    """The GPU work of a call, captured."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, call: Callable[[], Any]) -> Any:
        """Capture the call without running it. Returns its result, whose tensors each replay fills."""
        current = torch.cuda.current_stream()
        stream = _capture_stream(current.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), collection_paused():
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                return call()
            finally:
                self._graph.capture_end()
                current.wait_stream(stream)

    def replay(self) -> None:
        """Run the captured work."""
        self._graph.replay()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace per stream."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class StepInputs:
    """The arguments of a decode step: static cache, tensors, and constants (`rest`)."""

    cache: Any
    cache_name: str
    tensors: dict[str, Tensor]
    rest: dict[str, Any]

    @staticmethod
    def of(kwargs: dict[str, Any]) -> "StepInputs | None":
        """None unless there are tokens, one plain static cache, and otherwise only tensors and constants."""
        cache_name, tensors, rest = "", dict[str, Tensor](), dict[str, Any]()
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            elif value is None or isinstance(value, bool | int | float | str):
                rest[name] = value
            elif cache_name or not is_plain_static(value):
                return None
            else:
                cache_name = name
        has_tokens = "input_ids" in tensors and tensors["input_ids"].dim() == 2
        return StepInputs(kwargs[cache_name], cache_name, tensors, rest) if cache_name and has_tokens else None

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments as the model takes them."""
        return {**self.tensors, self.cache_name: self.cache, **self.rest}

    @property
    def cache_tensors(self) -> list[Tensor]:
        """The tensors of the cache that a step reads and writes."""
        return [tensor for layer in self.cache.layers for tensor in _layer_tensors(layer)]

    def roll_back(self, steps: int = 1) -> None:
        """Shorten the cache by the tokens of so many steps; the next step overwrites what was written for them."""
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(steps * self.tensors["input_ids"].shape[1])


def is_plain_static(value: Any, *, initialized: bool = True) -> bool:
    """Whether this is a static cache, of transformers or an MXCache, whose tensors stay where they are.

    initialized: whether they must exist already, as they do after the first call.
    """
    from transformers.cache_utils import StaticCache, StaticLayer  # only for transformers models

    from mxcompile.tensor.cache import MXCache
    from mxcompile.tensor.cache_layers import FixedLayer

    kinds = {StaticCache: StaticLayer, MXCache: FixedLayer}
    return (
        type(value) in kinds
        and not getattr(value, "offloading", False)
        and all(
            type(layer) is kinds[type(value)]
            and (layer.is_initialized or not initialized)
            and isinstance(getattr(layer, "cumulative_length", None), Tensor)
            for layer in value.layers
        )
    )


def _layer_tensors(layer: Any) -> list[Tensor]:
    own = getattr(layer, "tensors", None)  # of an MXCache
    return [layer.keys, layer.values, layer.cumulative_length] if own is None else own


class CapturedStep:
    """A captured step: the addresses of its inputs, results and everything it reads, and the guards of its graph.

    The memory that a replay reads is kept alive as long as the cache of the last step.
    """

    def __init__(self, step: StepInputs, guards: Any, forward: CompiledForward, graph: Any) -> None:
        """Capture a step without running it. Raises NotCapturableError."""
        self.guards, self.forward, self.graph, self.rest = guards, forward, graph, step.rest
        with torch.inference_mode(False):  # they are written to in either mode
            self.inputs = {name: _like(tensor) for name, tensor in step.tensors.items()}
        bound = StepInputs(step.cache, step.cache_name, self.inputs, step.rest)
        if not forward.guards_hold(guards, **bound.kwargs):
            raise NotCapturableError("the guards do not hold for a copy of its inputs")
        inputs: list[Tensor] = []
        attributes = _attributes(forward.module, step.cache)
        try:
            with forward.backend.collecting_inputs(inputs):
                result = graph.capture(lambda: forward(**bound.kwargs))
        except RuntimeError as error:
            raise NotCapturableError(str(error)) from error
        if any(not _is_unchanged(owner, before) for owner, before in attributes):
            raise NotCapturableError("a step changes attributes of the model or of its cache")
        self.followers: dict[Any, Any] = {}
        """What was captured to be replayed after this step, on its inputs and results."""
        leaves, self._form = pytree.tree_flatten(result)
        self._leaves = [_CACHE if leaf is step.cache else leaf for leaf in leaves]
        _check_results(self._leaves, inputs)
        others = {id(tensor) for tensor in (*step.cache_tensors, *self.inputs.values())}
        self._weights = _locations(forward.module, inputs, others)
        self._cache_addresses = [tensor.data_ptr() for tensor in step.cache_tensors]
        self._held: list[Any] = []
        self._cache = self._hold_for(step.cache)

    def fits(self, step: StepInputs) -> bool:
        """Whether a replay takes inputs of this kind, and reads and writes this cache."""
        return (
            [tensor.data_ptr() for tensor in step.cache_tensors] == self._cache_addresses
            and self.rest == step.rest
            and self.inputs.keys() == step.tensors.keys()
            and all(_are_alike(self.inputs[name], tensor) for name, tensor in step.tensors.items())
        )

    def can_start(self, step: StepInputs) -> bool:
        """Whether everything that a replay reads is still in memory."""
        if self._cache() is not step.cache:
            if not self._is_in_place():
                return False
            self._cache = self._hold_for(step.cache)
        return True

    @property
    def result(self) -> Any:
        """What a replay returns, in the tensors that each replay fills; without the cache."""
        return pytree.tree_unflatten([None if leaf is _CACHE else leaf for leaf in self._leaves], self._form)

    def set_inputs(self, step: StepInputs) -> None:
        """Copy the inputs of a step to where a replay reads them."""
        for name, tensor in step.tensors.items():
            _whole(self.inputs[name]).copy_(_whole(tensor))

    def replay(self, step: StepInputs) -> Any:
        """Run the step. Returns its result in tensors of its own."""
        self.set_inputs(step)
        self.graph.replay()
        return pytree.tree_unflatten([self._own(leaf, step) for leaf in self._leaves], self._form)

    def was_right(self, step: StepInputs) -> bool:
        """Whether the replay computed what the model computes: nothing that it depends on has changed since the
        capture."""
        return self.forward.guards_hold(self.guards, **step.kwargs) and self._is_in_place()

    def _is_in_place(self) -> bool:
        return self.forward.is_prepared() and all(location.tensor() is not None for location in self._weights)

    def _hold_for(self, cache: Any) -> Callable[[], Any]:
        held = self._held = [location.tensor().untyped_storage() for location in self._weights]  # pyright: ignore
        return weakref.ref(cache, lambda _: held.clear())

    def _own(self, leaf: Any, step: StepInputs) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return step.cache if leaf is _CACHE else leaf


_CACHE = object()


def _whole(tensor: Tensor) -> Tensor:
    """The base of a view, which Dynamo guards too; the tensor itself if it is no view."""
    return tensor if (base := tensor._base) is None else base  # pyright: ignore[reportPrivateUsage]


def _like(tensor: Tensor) -> Tensor:
    """A copy of a tensor, as a view if it is one. Raises NotCapturableError for an expanded tensor."""
    whole = _whole(tensor)
    if any(stride == 0 and size > 1 for size, stride in zip(whole.shape, whole.stride(), strict=True)):
        raise NotCapturableError("one of its inputs is expanded")
    room = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device=whole.device).copy_(whole)
    if whole is tensor:
        return room
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - whole.storage_offset())


def _are_alike(known: Tensor, tensor: Tensor) -> bool:
    """Whether one can be copied into the other and replace it; of views, also at the same offset in their base."""
    whole, other = _whole(known), _whole(tensor)
    return (
        (whole.shape, whole.dtype, whole.device) == (other.shape, other.dtype, other.device)
        and (known.shape, known.stride()) == (tensor.shape, tensor.stride())
        and known.storage_offset() - whole.storage_offset() == tensor.storage_offset() - other.storage_offset()
    )


def _attributes(module: nn.Module, cache: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The modules of a model, its cache and the cache's layers, each with a copy of its attributes."""
    return [(owner, dict(vars(owner))) for owner in (*module.modules(), cache, *cache.layers)]


def _is_unchanged(owner: Any, before: dict[str, Any]) -> bool:
    return vars(owner).keys() == before.keys() and all(vars(owner)[name] is value for name, value in before.items())


def _check_results(leaves: list[Any], inputs: list[Tensor]) -> None:
    """Raise NotCapturableError if a result cannot be returned as a copy."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in storages:
            raise NotCapturableError("one of its results shares memory with an input")
        if not (leaf is _CACHE or leaf is None or isinstance(leaf, Tensor | bool | int | float | str)):
            raise NotCapturableError(f"one of its results is a {type(leaf).__name__}")


@dataclass(frozen=True)
class TensorLocation:
    """The attribute of a module that holds a tensor (or an MXWeight with it as component), and the tensor's address."""

    attributes: dict[str, Any]
    name: str
    part: str | None
    address: int

    def tensor(self) -> Tensor | None:
        """The tensor; None if it has been moved or replaced."""
        held = self.attributes.get(self.name)
        tensor = held if self.part is None else getattr(held, self.part, None)
        return tensor if isinstance(tensor, Tensor) and tensor.data_ptr() == self.address else None


def _locations(module: nn.Module, inputs: list[Tensor], others: set[int]) -> list[TensorLocation]:
    """The locations in the model of all inputs of a step but `others`, ids of tensors that are tracked elsewhere.

    Raises NotCapturableError if the model does not hold one of them.
    """
    locations = dict(_held(module))
    weights = {id(tensor): tensor for tensor in inputs if id(tensor) not in others}
    for key, tensor in weights.items():
        if key not in locations:
            raise NotCapturableError(f"it reads a tensor that no module holds, of shape {list(tensor.shape)}")
    return [locations[key] for key in weights]


def _held(module: nn.Module) -> Iterator[tuple[int, TensorLocation]]:
    """All tensors of a module and its submodules, by id."""
    for owner in module.modules():
        own = vars(owner)
        for held in (own["_parameters"], own["_buffers"], own):
            for name, value in held.items():
                if type(value) is MXWeight:
                    for part, tensor in zip(value.__tensor_flatten__()[0], value.parts, strict=True):
                        yield id(tensor), TensorLocation(held, name, part, tensor.data_ptr())
                elif isinstance(value, Tensor):
                    yield id(value), TensorLocation(held, name, None, value.data_ptr())
