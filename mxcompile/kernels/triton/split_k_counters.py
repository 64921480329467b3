"""Semaphores for split-K: zeroed counters in GPU memory that tell a program that it is the last to arrive at a tile.

The last program resets its counter. Kernels of one stream run one after the other and share the counters of the stream;
a kernel with programmatic dependent launch waits for the previous kernel before it counts.
"""

from functools import cache
from typing import Final

import torch
from torch import Tensor

_COUNTERS: Final = 4096
_STREAMS: Final = 64


@cache
def device_counters(device: torch.device) -> Tensor:
    """The counters of a device, `[streams, counters]`.

    They must exist before a CUDA graph is captured: call this when a model is prepared. Each stream has its own row;
    graphs captured on the same stream must not run concurrently on different streams.
    """
    return torch.zeros(_STREAMS, _COUNTERS, dtype=torch.int32, device=device)


def stream_counters(device: torch.device, count: int) -> Tensor | None:
    """At least `count` counters of the current stream; None if there are not enough."""
    rows, stream = _rows_of_streams(device), torch.cuda.current_stream(device).cuda_stream
    row = rows.setdefault(stream, len(rows))
    return None if row >= _STREAMS or count > _COUNTERS else device_counters(device)[row]


@cache
def _rows_of_streams(device: torch.device) -> dict[int, int]:
    return {}
