"""Zeros in GPU memory by which programs of a kernel find which of them is the last to arrive, and which sets them back.

Kernels of one stream run one after the other, so that all share the stream's counters; a kernel that is launched before
the one ahead of it is done waits for that before it counts.
"""

from functools import cache
from typing import Final

import torch
from torch import Tensor

_COUNTERS: Final = 4096
_STREAMS: Final = 64


@cache
def of_device(device: torch.device) -> Tensor:
    """`[streams, counters]` of a device.

    Made before anything is captured in a CUDA graph: call it when a model is prepared. Each stream has its own; graphs
    that were captured on one stream must not run at the same time on two.
    """
    return torch.zeros(_STREAMS, _COUNTERS, dtype=torch.int32, device=device)


def of_stream(device: torch.device, count: int) -> Tensor | None:
    """At least `count` counters of the stream that is in use on a GPU; None if there are not so many."""
    places, stream = _places(device), torch.cuda.current_stream(device).cuda_stream
    place = places.setdefault(stream, len(places))
    return None if place >= _STREAMS or count > _COUNTERS else of_device(device)[place]


@cache
def _places(device: torch.device) -> dict[int, int]:
    return {}
