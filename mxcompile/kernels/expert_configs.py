"""Configs of the kernels for few choices of experts (triton/expert_slices.py). Nothing is tuned at run time."""

from dataclasses import replace
from typing import Final

import torch

from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.planes import plane_layout
from mxcompile.kernels.triton.elements import capability
from mxcompile.kernels.triton.expert_slices import Config

_SINGLE: Final = Config(choices=1, out=64, slices=8, stages=3)
_SHARED: Final = (
    (64, Config(choices=8, out=64, slices=4, stages=3)),
    (256, Config(choices=16, out=64, slices=4, stages=3)),
)
"""(most choices, config) where programs have the choices of the same expert; the last is for any more."""
_SUM: Final = Config(choices=1, out=16, slices=8, stages=4)


def grouped_config(
    fmt: MXFormat, size: int, choices: int, device: torch.device, *, shared: bool, block: int = 32
) -> Config:
    """The config for `choices` choices and `size` inputs.

    shared: whether a program has several choices of the same expert. block: block size of the rounding after the gate.
    """
    config = _SINGLE
    if shared:
        config = next((config for most, config in _SHARED if choices <= most), _SHARED[-1][1])
    slices = min(config.slices, _power_of_two(-(-size // plane_layout(fmt).columns)))
    return _launched(replace(config, out=max(config.out, 2 * block), slices=slices), device, prefetch=not shared)


def sum_config(fmt: MXFormat, size: int, slots: int, device: torch.device) -> Config:
    """The config for the matmul that is summed over `slots` choices of a token, with `size` inputs."""
    spare = _SUM.slices // max(1, 2 ** (slots - 1).bit_length()) if slots else 1
    parts = min(max(1, spare), _power_of_two(-(-size // plane_layout(fmt).columns)))
    return _launched(replace(_SUM, parts=parts), device)


def _launched(config: Config, device: torch.device, prefetch: bool = False) -> Config:
    """With what helps kernels that follow each other, on GPUs that have it."""
    hopper = device.type == "cuda" and capability(device)[0] >= 9
    return replace(config, dependent=hopper, prefetch=prefetch and hopper)


def _power_of_two(limit: int) -> int:
    """The largest one that is at most `limit`."""
    return 2 ** (limit.bit_length() - 1)
