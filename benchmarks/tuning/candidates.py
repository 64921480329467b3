"""The tile configs that are worth timing, for each number of tokens: of the Triton kernels, and of the Gluon kernel.

The lists come from reading SASS: a config that spills registers or cannot fit into shared memory on Hopper is left out.
One that does not fit on the GPU that is measured fails to launch, and is recorded as failed.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Final

from mxcompile.formats import MXFormat
from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.layout.planes import plane_layout
from mxcompile.kernels.triton import held_planes
from mxcompile.kernels.triton import planes_linear as triton_planes

Config = triton_planes.Config | held_planes.Config | gluon_planes.Config

# (out, warps, joined): mma.sync with one or two warps or 32 rows a program, wgmma with four or more.
_MMA_8: Final = [(64, 2, False), (32, 1, False), (32, 2, False), (64, 4, False), (128, 4, False), (64, 1, False)]
_MMA_16: Final = [(64, 2, False)]
_WGMMA: Final = [(64, 4, True), (128, 4, True)]
# More outputs a program, or more K-steps ahead, take too many registers; more tokens read x too often.
_HELD: Final = [(4, 2), (4, 3), (4, 4), (8, 2), (8, 4), (16, 2)]
_MOST_HELD_TOKENS: Final = 4

_GLUON_ROWS: Final = {16: (16,), 32: (32,), 64: (64,), 128: (64, 128), 256: (64, 128, 256), 512: (128, 256)}
_FEWEST_GLUON_TOKENS: Final = min(_GLUON_ROWS)
_SHARED_BYTES: Final = 232448
_SHARED_BYTES_OF_TWO: Final = 115000
"""Shared memory for one program on Hopper, and for each of two on a multiprocessor."""


def candidates(fmt: MXFormat, n: int, m: int, multiprocessors: int, gluon: bool) -> list[Config]:
    """Configs for `m` tokens and `n` outputs. gluon: whether the GPU runs the Gluon kernel."""
    configs: list[Config] = list(_triton(m, n, plane_layout(fmt).columns, multiprocessors))
    if m <= _MOST_HELD_TOKENS:
        configs += [held_planes.Config(1 << (m - 1).bit_length(), 16, warps, held) for warps, held in _HELD]
    if gluon and m >= _FEWEST_GLUON_TOKENS:
        configs += _gluon(fmt, n, m, multiprocessors)
    return configs


def _triton(m: int, n: int, columns: int, multiprocessors: int) -> Iterator[triton_planes.Config]:
    """Tiles with K split into as many parts as give the GPU 1 to 20 programs a multiprocessor."""
    for config in _tiles(m, (3, 4) if columns <= 128 else (2, 3)):
        tiles = -(-m // config.rows) * -(-n // config.out)
        splits = (1,) if m >= 1024 else (1, 2, 4, 8) if m >= 16 else (1, 2, 4, 8, 16)
        for split in splits:
            if split == 1 or multiprocessors <= tiles * split <= 20 * multiprocessors:
                yield replace(config, split=split)


def _tiles(m: int, stages: tuple[int, ...]) -> Iterator[triton_planes.Config]:
    if m <= 8:
        yield from _each(8, _MMA_8, (3, 5))
        yield from _each(8, [(64, 2, True)], (3,))
        yield from _each(16, _WGMMA, stages)
    elif m <= 16:
        yield from _each(16, _MMA_16, (3, 5))
        yield from _each(16, _WGMMA, stages)
    elif m <= 32:
        yield from _each(32, _WGMMA, stages)
    elif m <= 64:
        yield from _each(64, _WGMMA, stages)
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


def _each(rows: int, tiles: list[tuple[int, int, bool]], stages: tuple[int, ...]) -> Iterator[triton_planes.Config]:
    for (out, warps, joined), depth in product(tiles, stages):
        yield triton_planes.Config(rows, out, 1, warps, depth, joined)


def _gluon(fmt: MXFormat, n: int, m: int, multiprocessors: int) -> Iterator[gluon_planes.Config]:
    """Tiles that fit into shared memory, with K split such that the programs fill the GPU about once."""
    tiles = [
        (rows, out)
        for rows, out in product(_GLUON_ROWS.get(m, (128, 256)), (256, 128, 64))
        if rows * out <= (128 * 64 if out == 64 else 256 * 128)
    ]
    for (rows, out), group in product(tiles, (8,) if m <= 1024 else (4, 8, 16)):
        count = -(-n // out) * -(-m // rows)
        resident = multiprocessors * (2 if out == 64 else 1)
        for split in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16) if m <= 1024 else (1,):
            if (split == 1 and count > resident // 2) or 0.7 * resident <= count * split <= 1.6 * resident:
                yield gluon_planes.Config(rows, out, _deepest(fmt, rows, out), group, True, split)


def _deepest(fmt: MXFormat, rows: int, out: int) -> int:
    """As many stages as fit into shared memory, up to 8."""
    limit = _SHARED_BYTES if out > 64 else _SHARED_BYTES_OF_TWO
    return min(8, (limit - 256) // (rows * 256 + out * (64 * min(plane_layout(fmt).words, 2) + 4) + 16))
