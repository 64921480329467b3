"""The memory that this process uses now, on the host and on GPUs, and at most during a block."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import torch
from rich.filesize import decimal

_STATM: Final = Path("/proc/self/statm")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET = "5"  # of the peak, in clear_refs


def memory_in_use() -> str:
    """`1.2 GB`, or `1.2 GB, GPU 3.4 GB` once a GPU is in use; nothing about the host where it is not Linux."""
    host = host_bytes()
    parts = [] if host is None else [decimal(host)]
    if torch.cuda.is_initialized():
        parts.append(f"GPU {decimal(sum(map(torch.cuda.memory_reserved, range(torch.cuda.device_count()))))}")
    return ", ".join(parts)


def host_bytes() -> int | None:
    """Resident bytes of this process alone: without pages of mapped files, which the system can drop. Linux only."""
    if not _STATM.exists():
        return None
    resident, shared = map(int, _STATM.read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_bytes() -> Generator[Callable[[], int | None]]:
    """Yields a function that returns the peak during the block, of GPUs if one is in use, else resident on the host.

    None where the system does not tell.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    resettable = False
    with suppress(OSError):
        _CLEAR.write_text(_RESET)
        resettable = True
    peak: list[int | None] = []
    yield lambda: peak[0]
    if gpus:
        peak.append(sum(map(torch.cuda.max_memory_allocated, gpus)))
    else:
        peak.append(_resident_peak() if resettable else None)


def _resident_peak() -> int | None:
    lines = (line.split() for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return next((int(kilobytes) * 1024 for _, kilobytes, _ in lines), None)
