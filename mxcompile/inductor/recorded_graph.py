"""A compiled graph of few tokens on the CPU: its kernel calls are recorded once and replayed without Python.

A decode step of a small model calls some hundred kernels, and between two of them Inductor's Python takes as long as a
kernel. Like a CUDA graph, a recording has fixed shapes and buffers of its own: it is made for the sizes of one call and
serves calls with the same sizes, whose inputs may lie anywhere. Outputs are new tensors at each call. A graph that does
anything but call kernels, `mx::cpu_linears` and matmuls of float weights runs as before, and so does a call with other
sizes.
"""

import ctypes
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any, Final

import torch
from torch import Tensor

from mxcompile.inductor.private_api import CompiledFxGraph, TorchDispatchMode
from mxcompile.kernels.cpu import linears, recording
from mxcompile.kernels.cpu.linears import MAX_TOKENS
from mxcompile.kernels.cpu.recording import KernelCall, LinearsCall, OperatorCall, Recording, Slot
from mxcompile.ops import CPU_LINEARS
from mxcompile.ops.library import format_of, rounding_of

_MOST_RECORDINGS: Final = 4
_BYTES_WORTH_THREADS: Final = 1 << 19
_MATMULS: Final = {torch.ops.aten.mm.out, torch.ops.aten.addmm.out}
_runs = threading.local()
logger = logging.getLogger(__name__)


class RecordedGraph:
    """The callable of one compiled graph: takes a list of inputs, which it clears, and returns the outputs.

    call: Inductor's. refusal: why the graph is not recorded, once that is known.
    """

    def __init__(self, call: Callable[[list[Any]], Any]) -> None:
        self.call = call
        self.refusal: str | None = recording.why_not()
        self._replays: list[_Replay] = []  # the most recently used first
        self._last_sizes: tuple[Any, ...] | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: list[Any]) -> Any:
        """Run the graph."""
        if self.refusal is not None or not self._lock.acquire(blocking=False):
            _note_run(self, None, inputs, [])
            return self.call(inputs)
        try:
            return self._run(inputs)
        finally:
            self._lock.release()

    def repeat(self, replay: "_Replay", inputs: list[Any]) -> list[Any] | None:
        """Outputs of a replay; None if it is not possible, or another thread is at it."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return replay.run(inputs)
        finally:
            self._lock.release()

    def _run(self, inputs: list[Any]) -> Any:
        for index, replay in enumerate(self._replays):
            if (outputs := replay.run(inputs)) is not None:
                self._replays.insert(0, self._replays.pop(index))
                _note_run(self, replay, inputs, outputs)
                inputs.clear()
                return outputs
        _note_run(self, None, inputs, [])
        sizes = tuple(value for value in inputs if not isinstance(value, Tensor))
        is_second, self._last_sizes = sizes == self._last_sizes, sizes
        if not is_second:  # the first call may initialize something
            return self.call(inputs)
        recorder = _Recorder(inputs)
        outputs = recorder.run(self.call, inputs)
        if recorder.refusal is None:
            try:
                self._replays = [_Replay(recorder, outputs), *self._replays[: _MOST_RECORDINGS - 1]]
                return [_copied(output, recorder.inputs) for output in outputs]
            except ValueError as error:
                recorder.refusal = str(error)
        self.refusal = recorder.refusal
        logger.info("a compiled graph is not recorded: %s", self.refusal)
        return outputs


@dataclass(frozen=True)
class GraphRun:
    """A run of a graph with these inputs. replay: None if it ran without a recording; then there are no outputs."""

    graph: RecordedGraph
    replay: "_Replay | None"
    inputs: list[Any]
    outputs: list[Any]

    @property
    def is_replay(self) -> bool:
        """Whether the graph ran from a recording."""
        return self.replay is not None

    def repeat(self) -> list[Any] | None:
        """The outputs of another replay, with the values that the inputs have now; None if it is not possible now."""
        return None if self.replay is None else self.graph.repeat(self.replay, self.inputs)


@contextmanager
def noting_runs() -> Generator[list[GraphRun]]:
    """The runs of graphs by this thread, in order."""
    outer, _runs.noted = getattr(_runs, "noted", None), list[GraphRun]()
    try:
        yield _runs.noted
    finally:
        _runs.noted = outer


def _note_run(graph: RecordedGraph, replay: "_Replay | None", inputs: list[Any], outputs: list[Any]) -> None:
    if (noted := getattr(_runs, "noted", None)) is not None:
        noted.append(GraphRun(graph, replay, list(inputs), outputs))


class _Recorder(TorchDispatchMode):
    """Runs a graph and notes its calls. refusal: the first thing that a recording cannot do, or None."""

    def __init__(self, inputs: list[Any]) -> None:
        super().__init__()
        self.inputs = list(inputs)
        self.calls: list[KernelCall | LinearsCall | OperatorCall] = []
        self.refusal: str | None = None
        if any(isinstance(value, float) for value in inputs):
            self.refusal = "it takes a float"

    def run(self, call: Callable[[list[Any]], Any], inputs: list[Any]) -> Any:
        """The graph's outputs."""
        with self, self._noting_kernels(_names(call)), _graphs_called(self._noting_graph):
            return call(inputs)

    def _noting_graph(self, graph: CompiledFxGraph, run: Callable[[], Any]) -> Any:
        """Run one of the graphs that the recorded one consists of."""
        with self._noting_kernels(_names(graph.current_callable)):
            return run()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator, and note it."""
        results = func(*args, **(kwargs or {}))
        if func in _MATMULS and set(kwargs or {}) == {"out"}:
            self.calls.append(OperatorCall(func, args, results))
        elif func is not CPU_LINEARS:
            self._refuse(f"it calls {func}")
        elif not 0 < args[0].numel() <= MAX_TOKENS * args[0].shape[-1]:
            self._refuse(f"it has more than {MAX_TOKENS} tokens")
        else:
            self._note_linears(results, *args)
        return results

    def _note_linears(
        self,
        results: list[Tensor],
        x: Tensor,
        elements: Any,
        scales: Any,
        biases: Any,
        fmt: str,
        activation: Any,
        rule: Any,
    ) -> None:
        weights = tuple(zip(elements, scales, biases, strict=True))
        rounding, weight_format = rounding_of(activation, rule), format_of(fmt)
        if not linears.is_native(x, weights, weight_format, rounding):
            self._refuse("its matmuls are not native calls")
        self.calls.append(LinearsCall(x, weights, tuple(results), weight_format, rounding))

    @contextmanager
    def _noting_kernels(self, names: dict[str, Any]) -> Generator[None]:
        """Replace Inductor's kernels, which a generated module calls by its global names, by functions that note."""
        kernels = {name: value for name, value in names.items() if _is_kernel(value)}
        thread = threading.get_ident()

        def noting(kernel: Any) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                if threading.get_ident() == thread:
                    self._note_kernel(kernel, args)
                return kernel(*args)

            return run

        names.update({name: noting(kernel) for name, kernel in kernels.items()})
        try:
            yield
        finally:
            names.update(kernels)

    def _note_kernel(self, kernel: Any, args: tuple[Any, ...]) -> None:
        if kernel.__self__ is torch._C:  # pyright: ignore[reportPrivateUsage]
            self._refuse(f"it calls {kernel.__name__}, as a graph of a GPU does")  # also one without inputs on the GPU
        elif len(args) > recording.MAX_ARGUMENTS:
            self._refuse(f"a kernel has {len(args)} arguments")
        elif not all(isinstance(arg, Tensor | int) for arg in args):
            self._refuse("a kernel takes a float")
        else:
            self.calls.append(KernelCall(_address(kernel), args, _is_worth_threads(kernel, args)))

    def _refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason


class _Replay:
    """A recording, and how the inputs and outputs of the graph are given to it.

    Raises ValueError, saying why, if an output is neither an input nor a buffer of its own.
    """

    def __init__(self, recorder: _Recorder, outputs: Sequence[Any]) -> None:
        inputs = recorder.inputs
        tensors = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]
        others = [index for index, value in enumerate(inputs) if not isinstance(value, Tensor)]
        self._tensors, self._others = _getter(tensors), _getter(others)
        self._sizes = self._others(inputs)
        self._strides = [tensor.stride() for tensor in self._tensors(inputs)]
        self._outputs = [_Output.of(output, inputs) for output in outputs]
        made = [output.like for output in self._outputs if output.like is not None]
        slots = [Slot.of(tensor) for tensor in (*self._tensors(inputs), *made)]
        self._recording = Recording(recorder.calls, slots)

    def run(self, inputs: list[Any]) -> list[Any] | None:
        """The outputs; None if these inputs have other sizes, or if a kernel failed: then nothing is known of them."""
        if self._others(inputs) != self._sizes:
            return None
        tensors = self._tensors(inputs)
        outputs = [output.new(inputs) for output in self._outputs]
        made = [value for value, output in zip(outputs, self._outputs, strict=True) if output.like is not None]
        addresses = [tensor.data_ptr() for tensor in (*tensors, *made)]
        moved = self._recording.moved(addresses)
        if moved is None or any(tensors[i].stride() != self._strides[i] for i in moved if i < len(tensors)):
            return None
        return outputs if self._recording.replay(addresses, moved, (*tensors, *made)) else None


@dataclass(frozen=True)
class _Output:
    """An output of a graph: the input of a number, a constant, or else a new tensor like `like`."""

    number: int | None = None
    constant: Any = None
    like: Tensor | None = None

    @classmethod
    def of(cls, output: Any, inputs: list[Any]) -> "_Output":
        if not isinstance(output, Tensor):
            return cls(constant=output)
        for number, value in enumerate(inputs):
            if value is output:
                return cls(number)
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
                raise ValueError("an output is part of an input")
        slot, storage = Slot.of(output), output.untyped_storage()
        if slot.end - slot.begin != storage.nbytes():
            raise ValueError("an output is part of a buffer")
        return cls(like=output)

    def new(self, inputs: list[Any]) -> Any:
        """The output of a replay."""
        if self.number is not None:
            return inputs[self.number]
        return self.constant if self.like is None else _empty_like(self.like)


def _copied(output: Any, inputs: list[Any]) -> Any:
    """An output of the recorded call that no replay writes to."""
    if not isinstance(output, Tensor) or any(value is output for value in inputs):
        return output
    return _empty_like(output).copy_(output)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _getter(indices: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """`itemgetter`, for any number of items."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: tuple(values[index] for index in indices)


def _is_kernel(value: Any) -> bool:
    """Whether a global of a generated module is a C++ kernel: a function of an extension module built for it alone."""
    return isinstance(value, BuiltinFunctionType) and str(getattr(value.__self__, "__file__", "")).endswith(".so")


def _address(kernel: Any) -> int:
    function = getattr(ctypes.CDLL(kernel.__self__.__file__), kernel.__name__)
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _is_worth_threads(kernel: Any, args: tuple[Any, ...]) -> bool:
    """Whether a kernel's own parallel region, if it has one, is worth its start: not for a short cache of keys."""
    size = sum(arg.numel() * arg.element_size() for arg in args if isinstance(arg, Tensor))
    return size > _BYTES_WORTH_THREADS and _is_parallel(kernel.__self__.__file__)


@cache
def _is_parallel(path: str) -> bool:
    """Whether the source beside the library of a kernel has a parallel region; True if it is not there."""
    source = Path(path).with_suffix(".cpp")
    return not source.exists() or "#pragma omp parallel" in source.read_text()


def recorded(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What Inductor compiled, with its graphs as `RecordedGraph`s from their first call on."""
    is_first = True

    def run(*inputs: Any) -> Any:
        nonlocal is_first
        if not is_first:
            return compiled(*inputs)
        is_first = False
        with _graphs_replaced():
            return compiled(*inputs)

    return run


def recorded_as_one(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What runs several of Inductor's graphs in turn, as one `RecordedGraph`."""

    def call(inputs: list[Any]) -> Any:
        values = list(inputs)
        inputs.clear()
        return compiled(*values)

    graph = RecordedGraph(call)
    return lambda *inputs: graph(list(inputs))


def _graphs_replaced() -> AbstractContextManager[None]:
    """Give each graph that this thread runs a callable that records it."""

    def replaced(graph: CompiledFxGraph, run: Callable[[], Any]) -> Any:
        made = graph.current_callable
        if made is not None and not isinstance(made, RecordedGraph):
            graph.current_callable = RecordedGraph(made)
        return run()

    return _graphs_called(replaced)


@contextmanager
def _graphs_called(how: Callable[[CompiledFxGraph, Callable[[], Any]], Any]) -> Generator[None]:
    """Each graph that this thread runs is run by `how(graph, what runs it)`."""
    original, thread = CompiledFxGraph.__call__, threading.get_ident()

    def call(self: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
        return how(self, lambda: original(self, inputs)) if threading.get_ident() == thread else original(self, inputs)

    CompiledFxGraph.__call__ = call
    try:
        yield
    finally:
        CompiledFxGraph.__call__ = original


def _names(call: Any) -> dict[str, Any]:
    """The global names of the module that a function comes from."""
    return getattr(call, "__func__", call).__globals__
