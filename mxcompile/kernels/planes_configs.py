"""How a product with a weight in planes is cut: looked up in measurements, `configs/*.jsonl`. Nothing is tried out.

A line holds the fastest of many cuts for one format, shape and number of tokens. A GPU whose compute capability has a
file takes that one, any other GPU `sm90.jsonl`. To measure another:

    python benchmarks/gemm.py --sweep --out sweep.jsonl
    python benchmarks/gemm.py --choose sweep.jsonl --cuts mxcompile/kernels/configs/sm80.jsonl

A shape that is not in the table takes the cut of the nearest one, with K split such that about as many programs run; a
number of tokens takes that of the next larger one. All powers of two up to 16 of a measured cut's splits were checked
against float64: a compiler may get one of them wrong. A format or number of tokens that was not measured takes a cut
that the tests on a GPU check in all formats, or is left to cuBLAS.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Final, TypeAlias

import torch

from mxcompile.formats import MXFormat, parse_format
from mxcompile.kernels import gluon_planes, triton_planes
from mxcompile.kernels.planes import plane_layout

Config: TypeAlias = triton_planes.Config | gluon_planes.Config
TRITON, GLUON, DEQUANTIZED = "planes", "gluon", "dequantize+cublas"
_DEFAULT: Final = "sm90"
_LEAST_SLABS: Final = 4
_MOST_PARTS: Final = 16
_MANY_TOKENS: Final = 1024
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
def config_for(fmt: MXFormat, n: int, k: int, m: int, device: torch.device) -> Config | None:
    """The cut for m tokens, n outputs and k inputs; None to dequantize the weight and leave the product to cuBLAS."""
    known = [cut for cut in _cuts(_file_of(device)) if cut.fmt.name == fmt.name]
    slabs = -(-k // plane_layout(fmt).columns)
    rows = min((cut.m for cut in known if cut.m >= m), default=max((cut.m for cut in known), default=0))
    if rows < min(m, _MANY_TOKENS):
        return _unmeasured(m, slabs)
    nearest = min((cut for cut in known if cut.m == rows), key=lambda cut: _distance(cut, n, k))
    if not isinstance(nearest.config, triton_planes.Config) or (nearest.n, nearest.k) == (n, k):
        return nearest.config
    return _split_alike(nearest, nearest.config, n, slabs)


def _unmeasured(m: int, slabs: int) -> Config | None:
    config = next((config for rows, config in _UNMEASURED if m <= rows), None)
    return config if config is not None and config.split <= slabs else None


def _distance(cut: Cut, n: int, k: int) -> float:
    return abs(math.log2(cut.n / n)) + abs(math.log2(cut.k / k))


def _split_alike(cut: Cut, config: triton_planes.Config, n: int, slabs: int) -> Config:
    """K in such a power of two of parts that about as many programs run as in the measurement."""
    wanted = config.split * -(-cut.n // config.out) / -(-n // config.out)
    most = min(_MOST_PARTS, max(1, slabs // _LEAST_SLABS))
    parts = min(round(math.log2(max(1.0, wanted))), math.floor(math.log2(most)))
    return replace(config, split=2**parts)


@cache
def _cuts(name: str) -> tuple[Cut, ...]:
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
