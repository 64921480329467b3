"""Recorded kernel calls, replayed in C++ (mx_cpu_recording.cpp): no Python between the kernels of a graph.

A recording has slots, which are tensors that differ between replays: their addresses are written into the calls before
a replay. All other tensors of the calls are kept alive, at their addresses, by the recording.
"""

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

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
class Slot:
    """A tensor whose address differs between replays: the bytes [begin, end) when it was recorded."""

    begin: int
    end: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Slot":
        """The bytes from the tensor's first element to its last."""
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        return cls(begin, begin + (last + 1) * tensor.element_size() if tensor.numel() else begin)


def why_not() -> str | None:
    """None if recordings can be replayed, else the reason."""
    try:
        recording_library()
    except BuildError as error:
        return str(error)
    return None


class Recording:
    """Calls to be replayed. slots: where a tensor of a call lies within one, its address follows that slot's.

    Raises ValueError for slots that overlap in part.
    """

    def __init__(self, calls: Sequence[KernelCall | LinearsCall], slots: Sequence[Slot]) -> None:
        self._slots = sorted(range(len(slots)), key=lambda index: slots[index].begin)
        self._ends = [slots[index].end for index in self._slots]
        self._begins = [slots[index].begin for index in self._slots]
        self._pairs = list(_equal_neighbors([slots[index] for index in self._slots], self._slots))
        self._addresses = [slot.begin for slot in slots]
        self._uses: list[list[tuple[ctypes.Array[ctypes.c_int64], int, int]]] = [[] for _ in slots]
        self._kept: list[object] = [calls]
        self._steps = (_Step * len(calls))(*(self._step(call) for call in calls))
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

    def replay(self, addresses: list[int], moved: list[int]) -> bool:
        """Run the calls, with the slots at these addresses. False if one of them threw an exception."""
        for index in moved:
            for words, position, offset in self._uses[index]:
                words[position] = addresses[index] + offset
        self._addresses = addresses
        return bool(self._replay(self._steps, len(self._steps), self._values, torch.get_num_threads()))

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
        index = bisect_right(self._begins, address) - 1
        if index >= 0 and address < self._ends[index]:
            self._uses[self._slots[index]].append((words, position, address - self._begins[index]))

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
