"""Which cuts of a product (`triton_planes.Config`) are worth timing, for each number of tokens.

The lists come from reading SASS (benchmarks/results/notes.md says what was read): what spills, or cannot fit, is not
here; what does not fit after all is skipped when it fails to launch.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from mxcompile.kernels.triton.planes_linear import Config

SMS = 132
# (out, warps, joined): mma.sync with one or two warps or 32 rows a program, wgmma with four or more.
_MMA_8 = [(64, 2, False), (32, 1, False), (32, 2, False), (64, 4, False), (128, 4, False), (64, 1, False)]
_MMA_16 = [(64, 2, False), (32, 2, False), (32, 1, False)]
_WGMMA_16 = [(64, 4, True), (128, 4, True), (128, 8, True), (64, 4, False)]


def candidates(m: int, n: int, columns: int) -> Iterator[Config]:
    """Configurations for `m` tokens, `n` outputs and slabs of `columns`, without dependent launch."""
    for config in _shapes(m, (3, 4) if columns <= 128 else (2, 3)):
        tiles = -(-m // config.rows) * -(-n // config.out)
        splits = (1,) if m >= 1024 else (1, 2, 4, 8, 16)
        for split in splits:
            if split == 1 or SMS <= tiles * split <= 20 * SMS:
                yield replace(config, split=split)


def dependents(config: Config) -> Iterator[Config]:
    """The same cut, started before the kernel before it has ended."""
    for prefetch in (0, 2, 8):
        yield replace(config, dependent=True, prefetch=prefetch)


def _shapes(m: int, stages: tuple[int, ...]) -> Iterator[Config]:
    if m <= 8:
        yield from _each(8, _MMA_8, (3, 5))
        yield from _each(8, [(64, 2, True)], (3,))
        yield from _each(16, [(64, 4, True), (128, 4, True)], stages)
    elif m <= 16:
        yield from _each(16, _MMA_16, (3, 5))
        yield from _each(16, _WGMMA_16, stages)
    elif m <= 32:
        yield from _each(32, [(64, 4, True), (128, 8, True), (128, 4, True), (64, 2, False)], stages)
    elif m <= 64:
        yield from _each(64, [(64, 4, True), (64, 4, False), (128, 8, True), (128, 4, True), (256, 8, True)], stages)
    elif m < 1024:
        yield from _each(64, [(128, 8, True), (256, 8, True)], stages)
        yield from _each(128, [(128, 8, True), (128, 8, False), (256, 8, True), (256, 16, True)], stages)
        yield from _each(256, [(128, 8, True), (64, 4, True)], stages[:1])
    else:
        for group in (4, 8, 16):
            for config in _each(128, [(128, 8, True), (128, 8, False), (256, 8, True), (256, 16, True)], stages):
                yield replace(config, group=group)
            for config in _each(256, [(128, 8, True)], stages[:1]):
                yield replace(config, group=group)


def _each(rows: int, cuts: list[tuple[int, int, bool]], stages: tuple[int, ...]) -> Iterator[Config]:
    for (out, warps, joined), depth in product(cuts, stages):
        yield Config(rows, out, 1, warps, depth, joined)
