"""Recorded kernel calls, replayed in C++ (mx_cpu_recording.cpp): no Python between the kernels of a graph.

Between them operators of torch may be called, such as the matmul of an output head that stays in float.

A recording has slots, which are tensors that differ between replays: their addresses are written into the calls before
a replay. All other tensors of the calls are kept alive, at their addresses, by the recording.
"""

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any, Final

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.cpu import linears
from mxcompile.kernels.cpu.build import BuildError, recording_library

_COUNTS: Final = (8, 16, 32, 64, 128, 256)
MAX_ARGUMENTS: Final = _COUNTS[-1]


@dataclass(frozen=True)
class KernelCall:
    """A call of a C function that takes addresses and integers alone, at most MAX_ARGUMENTS, and returns nothing.

    is_parallel: whether to let it start a parallel region of OpenMP; otherwise it runs on one core.
    """

    address: int
    arguments: tuple[Tensor | int, ...]
    is_parallel: bool


@dataclass(frozen=True)
class LinearsCall:
    """`linears.linears` of contiguous float32 or bfloat16 tensors, x `[..., in]` with 1 to 4 rows, into `outputs`."""

    x: Tensor
    weights: tuple[linears.PackedWeight, ...]
    outputs: tuple[Tensor, ...]
    fmt: MXFormat
    rounding: tuple[MXFormat, ScaleRule] | None


@dataclass(frozen=True)
class OperatorCall:
    """A call of an operator of torch that writes its result into `out`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out: Tensor


@dataclass(frozen=True)
class _Placed:
    """A tensor within a slot: a view of the slot's tensor. offset: elements after the slot's first one."""

    slot: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The view of this replay's tensor."""
        base = tensors[self.slot]
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)


@dataclass(frozen=True)
class Slot:
    """A tensor whose address differs between replays: the bytes [begin, end) when it was recorded."""

    begin: int
    end: int
    dtype: torch.dtype | None = field(default=None, compare=False)

    @classmethod
    def of(cls, tensor: Tensor) -> "Slot":
        """The bytes from the tensor's first element to its last."""
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        end = begin + (last + 1) * tensor.element_size() if tensor.numel() else begin
        return cls(begin, end, tensor.dtype)


def why_not() -> str | None:
    """None if recordings can be replayed, else the reason."""
    try:
        recording_library()
    except BuildError as error:
        return str(error)
    return None


class Recording:
    """Calls to be replayed. slots: where a tensor of a call lies within one, its address follows that slot's.

    Raises ValueError for slots that overlap in part, and for operators that read or write one in another dtype.
    """

    def __init__(self, calls: Sequence[KernelCall | LinearsCall | OperatorCall], slots: Sequence[Slot]) -> None:
        self._slots = sorted(range(len(slots)), key=lambda index: slots[index].begin)
        self._ends = [slots[index].end for index in self._slots]
        self._begins = [slots[index].begin for index in self._slots]
        self._pairs = list(_equal_neighbors([slots[index] for index in self._slots], self._slots))
        self._addresses = [slot.begin for slot in slots]
        self._uses: list[list[tuple[ctypes.Array[ctypes.c_int64], int, int]]] = [[] for _ in slots]
        self._kept: list[object] = [calls]
        self._dtypes = [slot.dtype for slot in slots]
        self._parts = [self._part(group) for group in _divided(calls)]
        matmuls = [call for call in calls if isinstance(call, LinearsCall)]
        self._values = sum(weight[0].shape[0] * call.x.shape[-1] for call in matmuls for weight in call.weights)
        self._replay = recording_library().mx_replay
        self._replay.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)

    def moved(self, addresses: list[int]) -> list[int] | None:
        """Which slots have other addresses than in the last replay; None if two that were one are now apart."""
        if addresses == self._addresses:
            return []
        if any(addresses[first] != addresses[second] for first, second in self._pairs):
            return None
        return [i for i, (now, before) in enumerate(zip(addresses, self._addresses, strict=True)) if now != before]

    def replay(self, addresses: list[int], moved: list[int], tensors: Sequence[Tensor] = ()) -> bool:
        """Run the calls, with the slots at these addresses. False if a kernel threw an exception. tensors: those of the
        slots, for operators."""
        for index in moved:
            for words, position, offset in self._uses[index]:
                words[position] = addresses[index] + offset
        self._addresses = addresses
        for part in self._parts:
            if isinstance(part, OperatorCall):
                with torch.no_grad():
                    arguments = [value.of(tensors) if isinstance(value, _Placed) else value for value in part.arguments]
                    part.function(*arguments[:-1], out=arguments[-1])
            elif not self._replay(part, len(part), self._values, torch.get_num_threads()):
                return False
        return True

    def _part(self, calls: Sequence[KernelCall | LinearsCall | OperatorCall]) -> "ctypes.Array[_Step] | OperatorCall":
        """Steps of C++, or an operator, whose last argument is `out`."""
        first = calls[0]
        if isinstance(first, OperatorCall):
            values = (*first.arguments, first.out)
            return replace(first, arguments=tuple(self._placed(value) for value in values))
        steps = [self._step(call) for call in calls if not isinstance(call, OperatorCall)]
        return (_Step * len(steps))(*steps)

    def _placed(self, value: Any) -> Any:
        """An operator's argument; where it lies, if that is within a slot."""
        if not isinstance(value, Tensor) or (slot := self._slot_of(value.data_ptr())) is None:
            return value
        if value.dtype != self._dtypes[slot]:
            raise ValueError(f"an operator takes {self._dtypes[slot]} as {value.dtype}")
        bytes_before = value.data_ptr() - self._addresses[slot]
        return _Placed(slot, value.dtype, value.shape, value.stride(), bytes_before // value.element_size())

    def _step(self, call: KernelCall | LinearsCall) -> "_Step":
        if isinstance(call, LinearsCall):
            return _Step(None, 0, None, False, ctypes.addressof(self._linears(call)))
        count = next(count for count in _COUNTS if count >= len(call.arguments))
        words = self._words(call.arguments, count)
        return _Step(call.address, count, ctypes.addressof(words), call.is_parallel, None)

    def _words(self, values: Sequence[Tensor | int | None], count: int) -> ctypes.Array[ctypes.c_int64]:
        """The values as 64-bit words: addresses of tensors, which follow their slots, 0 for None."""
        words = (ctypes.c_int64 * count)()
        for position, value in enumerate(values):
            if isinstance(value, Tensor):
                words[position] = value.data_ptr()
                self._follow(words, position, value.data_ptr())
            else:
                words[position] = value or 0
        self._kept.append(words)
        return words

    def _follow(self, words: ctypes.Array[ctypes.c_int64], position: int, address: int) -> None:
        if (slot := self._slot_of(address)) is not None:
            self._uses[slot].append((words, position, address - self._addresses[slot]))

    def _slot_of(self, address: int) -> int | None:
        """The number of the slot in which an address lies."""
        index = bisect_right(self._begins, address) - 1
        return self._slots[index] if index >= 0 and address < self._ends[index] else None

    def _linears(self, call: LinearsCall) -> ctypes.Array[ctypes.c_int64]:
        """`Linears` of mx_cpu_linears.h, as words."""
        wide = call.x.dtype == torch.float32
        weights = self._weights(call, wide)
        rounding = None
        if call.rounding is not None:
            rounding = linears.c_rounding(*call.rounding, call.x.dtype)
            self._kept.append(rounding)
        size = call.x.shape[-1]
        return self._words(
            (
                linears.kernels(call.fmt),
                ctypes.addressof(weights),
                len(call.weights),
                call.x,
                wide,
                call.x.numel() // size,
                size,
                rounding and ctypes.addressof(rounding),
            ),
            8,
        )

    def _weights(self, call: LinearsCall, wide: bool) -> ctypes.Array[ctypes.c_int64]:
        """An array of `Weight` of mx_cpu.h, as words."""
        words: list[Tensor | int | None] = []
        for (elements, scales, bias), y in zip(call.weights, call.outputs, strict=True):
            words += [elements, scales, bias, y, elements.shape[0], wide]
        return self._words(words, len(words))


def _divided(calls: Sequence[KernelCall | LinearsCall | OperatorCall]) -> Iterator[list[Any]]:
    """Calls in a row that C++ makes; each operator alone."""
    for is_operator, group in groupby(calls, lambda call: isinstance(call, OperatorCall)):
        together = list(group)
        yield from ([call] for call in together) if is_operator else [together]


def _equal_neighbors(slots: Sequence[Slot], numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The numbers of slots with the same bytes. slots: by `begin`."""
    for (first, second), pair in zip(pairwise(slots), pairwise(numbers), strict=True):
        if first == second:
            yield pair
        elif second.begin < first.end:
            raise ValueError("two of its tensors overlap")


class _Step(ctypes.Structure):
    """`Step` of mx_cpu_recording.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("arguments", ctypes.c_void_p),
        ("is_parallel", ctypes.c_int64),
        ("linears", ctypes.c_void_p),
    )
