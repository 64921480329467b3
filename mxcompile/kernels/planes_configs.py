"""How a product with a weight in planes is cut: looked up in measurements, `configs/*.jsonl`. Nothing is tried out.

A line holds the fastest of many cuts for one format, shape and number of tokens. A GPU whose compute capability has a
file takes that one, any other GPU `sm90.jsonl`. To measure another:

    python benchmarks/gemm.py --sweep --out sweep.jsonl
    python benchmarks/gemm.py --choose sweep.jsonl --cuts mxcompile/kernels/configs/sm80.jsonl

A shape that is not in the table takes the cut of the nearest one, with K split such that about as many programs run; a
number of tokens takes that of the next larger one.
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
_MANY_TOKENS: Final = 1024


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
    cuts = _cuts(_file_of(device))
    known = [cut for cut in cuts if cut.fmt.name == fmt.name] or [cut for cut in cuts if cut.fmt.bits == fmt.bits]
    known = known or list(cuts)
    rows = min((cut.m for cut in known if cut.m >= m), default=max(cut.m for cut in known))
    nearest = min((cut for cut in known if cut.m == rows), key=lambda cut: _distance(cut, n, k))
    if not isinstance(nearest.config, triton_planes.Config) or (nearest.n, nearest.k) == (n, k):
        return nearest.config
    return _split_alike(nearest, nearest.config, n, -(-k // plane_layout(fmt).columns))


def _distance(cut: Cut, n: int, k: int) -> float:
    return abs(math.log2(cut.n / n)) + abs(math.log2(cut.k / k))


def _split_alike(cut: Cut, config: triton_planes.Config, n: int, slabs: int) -> Config:
    """K in such a power of two of parts that about as many programs run as in the measurement."""
    if cut.m >= _MANY_TOKENS:
        return config
    wanted = config.split * -(-cut.n // config.out) / -(-n // config.out)
    parts = 2 ** round(math.log2(max(1.0, wanted)))
    return replace(config, split=max(1, min(parts, slabs // _LEAST_SLABS, 16)))


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
