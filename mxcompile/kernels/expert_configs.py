"""Configs of the kernels for few choices of experts (triton/expert_slices.py). Nothing is tuned at run time."""

from dataclasses import replace
from typing import Final

import torch

from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.planes import plane_layout
from mxcompile.kernels.triton.elements import capability
from mxcompile.kernels.triton.expert_slices import Config

_SINGLE: Final = (
    (16, Config(choices=1, out=32, slices=4, stages=3)),
    (32, Config(choices=1, out=64, slices=4, stages=3)),
)
"""(most K-steps, config) where every choice has programs of its own; the last is for any more, here and below."""
_SHARED: Final = (
    (8, Config(choices=8, out=64, slices=1, stages=4)),
    (16, Config(choices=8, out=64, slices=2, stages=3)),
    (32, Config(choices=8, out=64, slices=4, stages=3)),
)
"""(most K-steps, config) where programs have the choices of the same expert."""
_MANY_OF_AN_EXPERT: Final = Config(choices=16, out=64, slices=4, stages=3)
_SUM: Final = (
    (8, Config(choices=1, out=16, slices=8, stages=4)),
    (32, Config(choices=1, out=16, slices=4, stages=5)),
)
"""(most K-steps, config) of the matmul that is summed over the choices of a token."""


_ONE_TOKEN: Final = (
    (
        range(1, 17),
        range(1, 9),
        Config(out=16, slices=4, held=4, registers=80, early=True),
        Config(out=8, slices=8, held=3, decoded=True, early=True),
    ),
    (
        range(1, 17),
        range(1, 9),
        Config(out=32, slices=4, held=4, registers=160, early=True),
        Config(out=16, slices=16, held=3, early=True),
    ),
    (
        range(17, 25),
        range(17, 25),
        Config(out=64, slices=4, stages=3, early=True),
        Config(out=8, slices=4, held=8, registers=160, early=True),
    ),
)
"""(K-steps of the first matmul, of the second, their configs) for one token and weights of 4 bits, which stay in
registers. The second matmul loads its own while the first runs; it needs a slice for each choice."""


def one_token_configs(
    fmts: tuple[MXFormat, MXFormat], sizes: tuple[int, int], slots: int, device: torch.device
) -> tuple[Config, Config] | None:
    """The configs of both matmuls for the choices of one token, without rounding after the gate.

    fmts, sizes: of the two weights, and their numbers of inputs. None where `grouped_config` and `sum_config` are to be
    used.
    """
    four_bits = all((plane_layout(fmt).words, plane_layout(fmt).planes) == (1, 4) for fmt in fmts)
    if not four_bits or (device.type == "cuda" and capability(device)[0] < 9):
        return None
    first, second = (_k_steps(fmt, size) for fmt, size in zip(fmts, sizes, strict=True))
    for of_first, of_second, up, down in _ONE_TOKEN:
        if first in of_first and second in of_second and slots <= down.slices:
            parts = min(down.slices // _power_of_two_from(slots), _power_of_two(second))
            decoded = down.decoded and down.held * parts * down.halves >= second
            slices = min(up.slices, _power_of_two(first))
            configs = replace(up, slices=slices), replace(down, parts=parts, decoded=decoded)
            return _launched(configs[0], device), _launched(configs[1], device)
    return None


def grouped_config(
    fmt: MXFormat, size: int, of_an_expert: float, device: torch.device, *, shared: bool, block: int = 1
) -> Config:
    """The config for `size` inputs.

    shared: whether a program has several choices of the same expert. of_an_expert: how many there are of each on
    average. block: block size of the rounding after the gate.
    """
    k_steps = _k_steps(fmt, size)
    config = _for_at_most(_SHARED if shared else _SINGLE, k_steps)
    if shared and of_an_expert > config.choices:
        config = _MANY_OF_AN_EXPERT
    out = config.out // 2 if config.choices > 8 and plane_layout(fmt).planes > 4 else config.out  # else it spills
    slices = min(config.slices, _power_of_two(k_steps))
    return _launched(replace(config, out=max(out, 2 * block), slices=slices), device)


def sum_config(fmt: MXFormat, size: int, slots: int, device: torch.device) -> Config:
    """The config for the matmul that is summed over `slots` choices of a token, with `size` inputs."""
    k_steps = _k_steps(fmt, size)
    config = _for_at_most(_SUM, k_steps)
    spare = config.slices // _power_of_two_from(slots)
    return _launched(replace(config, parts=min(max(1, spare), _power_of_two(k_steps))), device)


def _for_at_most(configs: tuple[tuple[int, Config], ...], number: int) -> Config:
    return next((config for most, config in configs if number <= most), configs[-1][1])


def _launched(config: Config, device: torch.device) -> Config:
    """With launches that overlap, on GPUs that have them."""
    return replace(config, dependent=device.type == "cuda" and capability(device)[0] >= 9)


def _k_steps(fmt: MXFormat, size: int) -> int:
    return -(-size // plane_layout(fmt).columns)


def _power_of_two(limit: int) -> int:
    """The largest one that is at most `limit`."""
    return 2 ** (limit.bit_length() - 1)


def _power_of_two_from(number: int) -> int:
    """The smallest one that is at least `number`."""
    return 2 ** max(0, number - 1).bit_length()
