"""Compiles kernels in parallel processes, into Triton's cache, before the process that times them needs them.

A worker runs each config once on a small weight: what Triton specializes on (alignment, sizes that are multiples of 16)
is the same as for the large ones. A machine without a GPU fills a folder of compiled kernels (carried_cache.py).
"""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxcompile.kernels.layout.planes import PlanarWeight
    from mxcompile.kernels.tuned_configs import Config

_OUT = 512


def compile_all(jobs: "Sequence[tuple[str, Config | None]]", sizes: list[int], kernels: Path | None = None) -> None:
    """Each (format, config), for inputs of `sizes` columns; None is the kernel that dequantizes. kernels: a folder of
    compiled kernels."""
    context = multiprocessing.get_context("spawn")
    workers = min(14, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(kernels,)) as pool:
        for problem in pool.map(_compile, *zip(*jobs, strict=True), repeat(sizes), chunksize=4):
            if problem is not None:
                print(problem, flush=True)


def _prepare(kernels: Path | None) -> None:
    import torch

    if kernels is not None:
        from tuning import carried_cache

        carried_cache.use(kernels)
        if not torch.cuda.is_available():
            carried_cache.compile_only()


def _compile(fmt: str, config: "Config | None", sizes: list[int]) -> str | None:
    import torch

    try:
        for size in sizes:
            _run(_weight(fmt, size, _device()), config)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # a config that does not compile or fit fails again, and is recorded, where it is timed
        return f"{fmt} {config}: {' '.join(str(error).split())[:160]}"
    return None


def _run(planes: "PlanarWeight", config: "Config | None") -> None:
    import torch

    from mxcompile.kernels.gluon import planes_linear as gluon_planes
    from mxcompile.kernels.triton import dequantize, held_planes
    from mxcompile.kernels.triton import planes_linear as triton_planes

    if config is None:
        dequantize.dequantize(planes, k_steps=1)
        return
    x = torch.zeros(config.rows, planes.size, dtype=torch.bfloat16, device=_device())
    if isinstance(config, triton_planes.Config):
        triton_planes.linear(x, planes, None, config)
    elif isinstance(config, held_planes.Config):
        held_planes.linear(x, planes, None, config)
    elif _device() == "cpu" or gluon_planes.supports(x) is None:
        gluon_planes.linear(x, planes, None, config)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def _weight(fmt: str, size: int, device: str) -> "PlanarWeight":
    import torch

    from mxcompile.formats import FORMATS, ScaleRule
    from mxcompile.kernels.layout.planes import to_planes
    from mxcompile.numerics import reference
    from mxcompile.numerics.packing import pack

    codes, scales = reference.quantize(torch.ones(_OUT, size, device=device), FORMATS[fmt], ScaleRule.FLOOR)
    return to_planes(pack(codes, FORMATS[fmt]), scales, FORMATS[fmt], size)
