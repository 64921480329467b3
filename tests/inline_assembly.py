"""Inline PTX in Triton's interpreter, which has none: integer_planes.py, whose tensors are values of threads."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ptx import executed


@contextmanager
def emulated() -> Iterator[None]:
    """The interpreter runs the PTX of kernels whose tensors are `[threads]`, as many as their programs have."""
    from triton.runtime import interpreter

    def create(self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Any:
        del self, constraints, is_pure, pack
        results = _run(text, [value.data for value in values], len(types))
        made = [
            interpreter.TensorHandle(np.ascontiguousarray(result), kind.scalar)
            for result, kind in zip(results, types, strict=True)
        ]
        return SimpleNamespace(get_result=made.__getitem__)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create)
        yield


def _run(text: str, values: Sequence[Any], count: int) -> Sequence[Any]:
    """The first `count` registers. Loads and products of matrices are the one instruction of their text that counts."""
    if "ld.global" in text:
        size, kind = (2, np.uint16) if ".u16" in text else (16, np.int32)
        rows = np.array([np.frombuffer(ctypes.string_at(int(address), size), kind) for address in values[0]])
        return list(rows.T.astype(np.int32))
    if "mma" in text:
        assert "m16n8k32.row.col.s32.s8.s8.s32" in text
        return _multiply(values)
    registers = {
        f"${count + number}": torch.from_numpy(value.view(np.int32).astype(np.int64)) & 0xFFFFFFFF
        for number, value in enumerate(values)
    }
    results = executed(text, registers)
    return [results[f"${number}"].numpy().astype(np.uint32).view(np.int32) for number in range(count)]


def _multiply(values: Sequence[Any]) -> Sequence[Any]:
    """mma.m16n8k32: thread 4 g + t has rows g and g + 8 of a, columns 4 t + i and 16 + 4 t + i; of b column g, the same
    rows; of the sums rows g and g + 8, columns 2 t and 2 t + 1."""
    elements = [value.view(np.int8).reshape(-1, 8, 4, 4) for value in values[:6]]  # warp, g, t, i
    left = np.zeros((len(elements[0]), 16, 32), np.int64)
    right = np.zeros((len(elements[0]), 32, 8), np.int64)
    for register, part in enumerate(elements[:4]):
        rows, columns = 8 * (register % 2), 16 * (register // 2)
        left[:, rows : rows + 8, columns : columns + 16] = part.reshape(-1, 8, 16)
    for register, part in enumerate(elements[4:]):
        right[:, 16 * register : 16 * register + 16] = part.reshape(-1, 8, 16).swapaxes(1, 2)
    product = (left @ right).reshape(-1, 2, 8, 4, 2)
    added = [product[:, row, :, :, column].reshape(-1) for row in range(2) for column in range(2)]
    return [(value + sums).astype(np.int32) for value, sums in zip(values[6:], added, strict=True)]
