"""What the inline PTX of integer_planes.py does, in numpy, for Triton's interpreter, which has none.

Written from PTX's documentation, by the name of the instruction that decides; threads `[threads]` are warps of 32.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

Values = Sequence[Any]


@contextmanager
def emulated(module: ModuleType) -> Iterator[None]:
    """The interpreter runs the PTX of a copy of integer_planes.py."""
    from triton.runtime import interpreter

    functions: dict[str, Callable[[Values], Values]] = {
        module._LOAD.value: lambda values: _load(values[0], 16).view(np.int32).T,
        module._LOAD_ONCE.value: lambda values: _load(values[0], 16).view(np.int32).T,
        module._LOAD_HALF.value: lambda values: [_load(values[0], 2).view(np.uint16)[:, 0].astype(np.int32)],
        module._UNPACK.value: _unpack,
        module._LARGEST_EXPONENT.value: _largest_exponent,
        module._ROUND_4.value: _round_4,
        module._MULTIPLY.value: _multiply,
        module._FROM_LANE.value: lambda values: [_warps(values[0])[_own_warp(values[0]), values[1] % 32]],
    }

    def create(self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Any:
        del self, constraints, is_pure, pack
        results = functions[text]([value.data for value in values])
        made = [
            interpreter.TensorHandle(np.ascontiguousarray(result), kind.scalar)
            for result, kind in zip(results, types, strict=True)
        ]
        return SimpleNamespace(get_result=made.__getitem__)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create)
        yield


def _load(addresses: Any, size: int) -> Any:
    return np.array([np.frombuffer(ctypes.string_at(int(address), size), np.uint8) for address in addresses])


def _own_warp(values: Any) -> Any:
    return np.arange(len(values)) // 32


def _warps(values: Any) -> Any:
    return values.reshape(-1, 32)


def _unpack(words: Values) -> Values:
    """Words of 16 bits, eight of a thread, with a nibble of 8 + n for each of four planes: bytes of 16 n."""
    halves = np.stack([word.view(np.uint16).reshape(-1, 2) for word in words], 1).reshape(len(words[0]), 8)
    planes = [((halves >> (4 * plane)) & 15).astype(np.int32) - 8 for plane in range(4)]
    as_bytes = [(16 * plane).astype(np.int8).view(np.int32) for plane in planes]
    return [plane[:, half] for plane in as_bytes for half in range(2)]


def _floats(words: Values) -> Any:
    """bfloat16 values `[threads, 2 * words]` of words that hold two each."""
    bits = np.stack([word.view(np.uint16).reshape(-1, 2) for word in words], 1).reshape(len(words[0]), -1)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _largest_exponent(words: Values) -> Values:
    bits = (_floats(words).view(np.uint32) & 0x7FFFFFFF) >> 23
    of_blocks = bits.max(1).reshape(-1, 4).max(1)
    return [np.repeat(of_blocks, 4).astype(np.int32)]


def _round_4(values: Values) -> Values:
    first, second, limit = values[2], values[3], np.abs(_floats([values[4]])[:, :1])
    x = np.clip(_floats(values[:2]), -limit, limit)
    with np.errstate(all="ignore"):
        scaled = x * first[:, None] * second[:, None]
    rounded = torch.from_numpy(np.nan_to_num(scaled)).round().numpy()
    return [np.ascontiguousarray(rounded.astype(np.int64).astype(np.int8)).view(np.int32)[:, 0]]


def _multiply(values: Values) -> Values:
    """mma.m16n8k32: thread 4 g + t has rows g and g + 8 of a, columns 4 t + i and 16 + 4 t + i; of b column g, the same
    rows; of the sums rows g and g + 8, columns 2 t and 2 t + 1."""
    a = [_warps(value.view(np.int8).reshape(-1, 4)[:, i]).reshape(-1, 8, 4) for value in values[:4] for i in range(4)]
    b = [_warps(value.view(np.int8).reshape(-1, 4)[:, i]).reshape(-1, 8, 4) for value in values[4:6] for i in range(4)]
    left = np.zeros((len(a[0]), 16, 32), np.int64)
    right = np.zeros((len(a[0]), 32, 8), np.int64)
    for t in range(4):
        for i in range(4):
            for register in range(4):
                rows = slice(8 * (register % 2), 8 * (register % 2) + 8)
                left[:, rows, 16 * (register // 2) + 4 * t + i] = a[4 * register + i][:, :, t]
            for register in range(2):
                right[:, 16 * register + 4 * t + i, :] = b[4 * register + i][:, :, t]
    product = (left @ right).reshape(-1, 2, 8, 4, 2)
    added = [product[:, row, :, :, column].reshape(-1) for row in range(2) for column in range(2)]
    return [(value + sums).astype(np.int32) for value, sums in zip(values[6:], added, strict=True)]
