"""Compile the GPU kernels of a layer before the first request.

A kernel is compiled once for each tile config, which depends on the layer's shape and on the number of tokens. Engines
warm up the batch sizes that they capture in CUDA graphs; a prompt of another length would wait for a compiler.
"""

from collections.abc import Callable, Hashable
from typing import Final

import torch
from torch import Tensor

from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.fp8_eligibility import MIN_TOKENS
from mxcompile.kernels.tuned_configs import token_counts

_warm: Final[set[Hashable]] = set()


def warm_up(
    run: Callable[[Tensor], Tensor], key: Hashable, fmt: MXFormat, size: int, device: torch.device, most: int
) -> int:
    """Run a layer with all numbers of tokens that need kernels of their own; returns how many were run.

    run: the layer, on bfloat16 `[tokens, size]`. key: equal for layers with the same kernels, of which one is run.
    most: the largest number of tokens that the engine will pass.
    """
    if (key, device) in _warm:
        return 0
    _warm.add((key, device))
    counts = sorted({count for count in (1, *token_counts(device, fmt), MIN_TOKENS) if count < most} | {most})
    with torch.no_grad():
        for count in counts:
            run(torch.zeros(count, size, dtype=torch.bfloat16, device=device))
    return len(counts)
