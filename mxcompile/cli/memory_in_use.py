"""The memory that this process uses now, on the host and on GPUs."""

import os
from pathlib import Path
from typing import Final

import torch
from rich.filesize import decimal

_STATM: Final = Path("/proc/self/statm")


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
