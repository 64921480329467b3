"""How a product with a weight in planes is cut: looked up in measurements, `configs/*.jsonl`. Nothing is tried out.

A line holds the fastest of many cuts for one format, shape and number of tokens. A GPU whose compute capability has a
file takes that one, any other GPU `sm90.jsonl`. To measure another:

    python benchmarks/gemm.py --sweep --out sweep.jsonl
    python benchmarks/gluon_trial.py --rows 16,64,256,2048 --out sweep.jsonl      (on Hopper)
    python benchmarks/gemm.py --choose sweep.jsonl --cuts mxcompile/kernels/configs/sm80.jsonl

A shape that is not in the table takes the cut of the nearest one, with K split such that about as many programs run; a
number of tokens takes that of the next larger one. Where the kernel in Gluon is the fastest, the line behind it holds
the fastest of the others, for GPUs and activations that it does not serve. All powers of two up to 16 of a measured
cut's splits were checked against float64: a compiler may get one of them wrong. A format that was not measured takes
the cuts of the one that is most like it; the tests on a GPU check all cuts of the table in all formats that take them.
Where a table has neither, few tokens take a cut that these tests check in all formats, and many are left to cuBLAS.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Final, TypeAlias

import torch

from mxcompile.formats import MXFormat, parse_format
from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.layout.planes import plane_layout
from mxcompile.kernels.triton import planes_linear as triton_planes

Config: TypeAlias = triton_planes.Config | gluon_planes.Config
TRITON, GLUON, DEQUANTIZED = "planes", "gluon", "dequantize+cublas"
_DEFAULT: Final = "sm90"
_LEAST_SLABS: Final = 4
_MOST_PARTS: Final = 16
_MANY_TOKENS: Final = 1024
_LIKE: Final = {"mxint6": "mxfp6_e2m3", "mxfp6_e3m2": "mxfp6_e2m3", "mxfp8_e5m2": "mxfp8_e4m3"}
_UNMEASURED: Final = (
    (8, triton_planes.Config(rows=8, out=64, split=4, warps=2, joined=False)),
    (64, triton_planes.Config(rows=16, out=64, split=2, stages=3)),
)
"""Up to so many tokens; both are among the cuts of `test_planes` in `tests/kernels/test_triton_gpu.py`."""


@dataclass(frozen=True)
class Cut:
    """How m tokens are multiplied by n x k: `config` of a fused kernel, None to dequantize and leave it to cuBLAS."""

    fmt: MXFormat
    n: int
    k: int
    m: int
    config: Config | None


@lru_cache(maxsize=4096)
def config_for(fmt: MXFormat, n: int, k: int, m: int, device: torch.device, gluon: bool = True) -> Config | None:
    """The cut for m tokens, n outputs and k inputs; None to dequantize the weight and leave the product to cuBLAS.

    gluon: whether the kernel in Gluon, which has conditions of its own, may be it.
    """
    known = [cut for cut in cuts(device, fmt) if gluon or not isinstance(cut.config, gluon_planes.Config)]
    slabs = -(-k // plane_layout(fmt).columns)
    rows = min((cut.m for cut in known if cut.m >= m), default=max((cut.m for cut in known), default=0))
    if rows < min(m, _MANY_TOKENS):
        return _unmeasured(m, slabs)
    nearest = min((cut for cut in known if cut.m == rows), key=lambda cut: _distance(cut, n, k))
    if nearest.config is None or (nearest.n, nearest.k) == (n, k) or rows >= _MANY_TOKENS:
        return nearest.config
    return _split_alike(nearest, nearest.config, n, slabs)


def cuts(device: torch.device, fmt: MXFormat) -> list[Cut]:
    """The table's cuts for a format, or for the one that is most like it."""
    table = _table(_file_of(device))
    measured = {cut.fmt.name for cut in table}
    name = fmt.name if fmt.name in measured else _LIKE.get(fmt.name, fmt.name)
    return [cut for cut in table if cut.fmt.name == name]


def _unmeasured(m: int, slabs: int) -> Config | None:
    config = next((config for rows, config in _UNMEASURED if m <= rows), None)
    return config if config is not None and config.split <= slabs else None


def _distance(cut: Cut, n: int, k: int) -> float:
    return abs(math.log2(cut.n / n)) + abs(math.log2(cut.k / k))


def _split_alike(cut: Cut, config: Config, n: int, slabs: int) -> Config:
    """K in such a power of two of parts that about as many programs run as in the measurement."""
    wanted = config.split * -(-cut.n // config.out) / -(-n // config.out)
    most = min(_MOST_PARTS, max(1, slabs // _LEAST_SLABS))
    parts = min(round(math.log2(max(1.0, wanted))), math.floor(math.log2(most)))
    return replace(config, split=2**parts)


@cache
def _table(name: str) -> tuple[Cut, ...]:
    text = files("mxcompile.kernels").joinpath("configs", f"{name}.jsonl").read_text()
    return tuple(_cut(line) for line in map(json.loads, text.splitlines()) if "weight" in line)


def _cut(line: dict[str, Any]) -> Cut:
    kinds = {TRITON: triton_planes.Config, GLUON: gluon_planes.Config}
    config = None if line["path"] == DEQUANTIZED else kinds[line["path"]](**line["config"])
    return Cut(parse_format(line["weight"]), line["n"], line["k"], line["m"], config)


@cache
def _file_of(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm{major}{minor}"
    return name if files("mxcompile.kernels").joinpath("configs", f"{name}.jsonl").is_file() else _DEFAULT
