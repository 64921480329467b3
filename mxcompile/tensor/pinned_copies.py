"""Copies between a GPU and the memory of files, through two buffers that are allocated once.

    copies.to_device(value)     a CPU tensor -> its copy on the device
    copies.pieces(value)        a tensor on the device -> its bytes in host memory, piece by piece, to be written

The driver copies ordinary memory through a small buffer of its own with one thread, and the GPU waits. Ordinary memory
for what comes back is new, and the system clears each of its pages first. The buffers here are pinned: the GPU reads
and writes them directly, one while the CPU fills or empties the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

PIECE: Final = 32 << 20
"""Bytes of each of the two buffers."""


@dataclass(frozen=True)
class _Buffer:
    """copied: when the last copy from it or to it has ended; None where copies wait for their end."""

    bytes: Tensor
    copied: torch.cuda.Event | None
    device: torch.device

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()

    def record(self) -> None:
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(self.device))


class PinnedCopies:
    """device: any but a GPU works alike, with buffers in ordinary memory. piece: bytes of a buffer (PIECE)."""

    def __init__(self, device: torch.device, piece: int | None = None) -> None:
        self._device, self._piece = device, piece or PIECE
        self._buffers: tuple[_Buffer, ...] = ()

    def to_device(self, value: Tensor) -> Tensor:
        """A copy of a contiguous CPU tensor. The value may change, or its memory be given up, once this returns."""
        copy = torch.empty(value.shape, dtype=value.dtype, device=self._device)
        source, target = _bytes(value), _bytes(copy)
        for index, start in enumerate(range(0, len(source), self._piece)):
            part, buffer = source[start : start + self._piece], self._buffer(index)
            buffer.wait()
            buffer.bytes[: len(part)].copy_(part)
            target[start : start + len(part)].copy_(buffer.bytes[: len(part)], non_blocking=True)
            buffer.record()
        return copy

    def pieces(self, value: Tensor) -> Iterator[memoryview]:
        """The bytes of a tensor in row-major order. Each piece is valid until the next is asked for."""
        source = _bytes(value.contiguous())
        parts = source.split(self._piece)
        for index, part in enumerate(parts):
            if index == 0:
                self._fetch(0, part)
            if index + 1 < len(parts):
                self._fetch(index + 1, parts[index + 1])
            buffer = self._buffer(index)
            buffer.wait()
            yield memoryview(buffer.bytes[: len(part)].numpy())  # pyright: ignore - numpy's stubs of 3.11

    def _fetch(self, index: int, part: Tensor) -> None:
        """Begin to copy a piece into its buffer."""
        buffer = self._buffer(index)
        buffer.wait()
        buffer.bytes[: len(part)].copy_(part, non_blocking=True)
        buffer.record()

    def _buffer(self, index: int) -> _Buffer:
        """The buffer of a piece: the two take turns."""
        if not self._buffers:
            on_gpu = self._device.type == "cuda"
            self._buffers = tuple(
                _Buffer(
                    torch.empty(self._piece, dtype=torch.uint8, pin_memory=on_gpu),
                    torch.cuda.Event() if on_gpu else None,
                    self._device,
                )
                for _ in range(2)
            )
        return self._buffers[index % 2]


def _bytes(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).view(torch.uint8)
