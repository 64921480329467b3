"""Tile configs for matmuls with planar weights, looked up in `configs/*.jsonl`. Nothing is tuned at run time.

A line holds the fastest of many measured configs for one format, shape and number of tokens. A GPU uses the file of its
compute capability and model, `sm90-h200.jsonl` for any whose name contains H200 (GH200 too, with the same memory), or
else that of its compute capability, or else `sm90.jsonl`, which was measured on an H100. `benchmarks/tuning/README.md`
says how to measure another GPU.

A shape that is not in the table uses the config of the nearest shape, with split-K adjusted so that about as many
programs run; a number of tokens uses that of the next larger one. Where the Gluon kernel is the fastest, the next line
holds the fastest of the others, for GPUs and activations that Gluon does not support. For every config measured on an
H100, split-K by all powers of two up to 16 was checked against float64: a compiler may get one of them wrong. A format
that was not measured uses the configs of the most similar one; the GPU tests check every config of the table in all
formats that use it. Without an entry, few tokens use a default config that these tests check in all formats, and many
use cuBLAS.
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
from mxcompile.kernels.triton import held_planes, integer_planes
from mxcompile.kernels.triton import planes_linear as triton_planes

Config: TypeAlias = triton_planes.Config | held_planes.Config | gluon_planes.Config
TRITON, HELD, INTEGERS, GLUON, DEQUANTIZED = "planes", "held", "integers", "gluon", "dequantize+cublas"
_SplitConfig: TypeAlias = triton_planes.Config | gluon_planes.Config
_KINDS: Final = {TRITON: triton_planes.Config, HELD: held_planes.Config, GLUON: gluon_planes.Config}
_DEFAULT_TABLE: Final = "sm90"
_MIN_K_STEPS: Final = 4
_MAX_SPLIT: Final = 16
_MANY_TOKENS: Final = 1024
_SIMILAR_FORMAT: Final = {"mxint6": "mxfp6_e2m3", "mxfp6_e3m2": "mxfp6_e2m3", "mxfp8_e5m2": "mxfp8_e4m3"}
_DEFAULT_CONFIGS: Final = (
    (8, triton_planes.Config(rows=8, out=64, split=4, warps=2, joined=False)),
    (64, triton_planes.Config(rows=16, out=64, split=2, stages=3)),
)
"""(most tokens, config); both are among the configs of `test_planes` in `tests/kernels/test_triton_gpu.py`."""


@dataclass(frozen=True)
class TunedConfig:
    """A table entry for m tokens and a weight n x k: config of a fused kernel, or None for dequantize and cuBLAS."""

    fmt: MXFormat
    n: int
    k: int
    m: int
    config: Config | None


@lru_cache(maxsize=4096)
def config_for(fmt: MXFormat, n: int, k: int, m: int, device: torch.device, gluon: bool = True) -> Config | None:
    """The config for m tokens, n outputs and k inputs; None to dequantize the weight and multiply with cuBLAS.

    gluon: whether the Gluon kernel, which has conditions of its own, may be chosen.
    """
    entries = [
        entry for entry in configs_for_format(device, fmt) if gluon or not isinstance(entry.config, gluon_planes.Config)
    ]
    k_steps = -(-k // plane_layout(fmt).columns)
    rows = min((entry.m for entry in entries if entry.m >= m), default=max((entry.m for entry in entries), default=0))
    if rows < min(m, _MANY_TOKENS):
        return _default_config(m, k_steps)
    nearest = min((entry for entry in entries if entry.m == rows), key=lambda entry: _distance(entry, n, k))
    if nearest.config is None or (nearest.n, nearest.k) == (n, k) or rows >= _MANY_TOKENS:
        return nearest.config
    if isinstance(nearest.config, held_planes.Config):
        return held_planes.for_k_steps(nearest.config, k_steps)
    return _with_rescaled_split(nearest, nearest.config, n, k_steps)


@lru_cache(maxsize=4096)
def integer_config_for(fmt: MXFormat, n: int, k: int, device: torch.device) -> integer_planes.Config | None:
    """The config for one token whose values are rounded to integers, n outputs and k inputs: that of the nearest shape.

    None where the device's table has none for the format: `config_for` says how it is multiplied there.
    """
    lines = [line for line in _lines(table_name(device)) if line["path"] == INTEGERS and line["weight"] == str(fmt)]
    if not lines:
        return None
    nearest = min(lines, key=lambda line: _log2_distance(line["n"], line["k"], n, k))
    return integer_planes.for_columns(integer_planes.Config(**nearest["config"]), k)


def configs_for_format(device: torch.device, fmt: MXFormat) -> list[TunedConfig]:
    """The table's entries for a format, or for the most similar one."""
    table = _table(table_name(device))
    measured = {entry.fmt.name for entry in table}
    name = fmt.name if fmt.name in measured else _SIMILAR_FORMAT.get(fmt.name, fmt.name)
    return [entry for entry in table if entry.fmt.name == name]


def token_counts(device: torch.device, fmt: MXFormat) -> list[int]:
    """The largest number of tokens that each config is used for, ascending: with these, every kernel is compiled."""
    measured = {entry.m for entry in configs_for_format(device, fmt)}
    return sorted(measured | {rows for rows, _ in _DEFAULT_CONFIGS})


@cache
def most_held_tokens(device: torch.device) -> int:
    """The most tokens for which the device's table has matmuls with weights in registers; 0 if it has none."""
    rows = [entry.m for entry in _table(table_name(device)) if isinstance(entry.config, held_planes.Config)]
    return max(rows, default=0)


def path_name(config: Config) -> str:
    """The name of a config's kernel in the table."""
    return next(name for name, kind in _KINDS.items() if type(config) is kind)


def _default_config(m: int, k_steps: int) -> Config | None:
    config = next((config for rows, config in _DEFAULT_CONFIGS if m <= rows), None)
    return config if config is not None and config.split <= k_steps else None


def _distance(entry: TunedConfig, n: int, k: int) -> float:
    return _log2_distance(entry.n, entry.k, n, k)


def _log2_distance(n: int, k: int, other_n: int, other_k: int) -> float:
    return abs(math.log2(n / other_n)) + abs(math.log2(k / other_k))


def _with_rescaled_split(entry: TunedConfig, config: _SplitConfig, n: int, k_steps: int) -> Config:
    """The config with split-K by a power of two such that about as many programs run as in the measurement."""
    target_split = config.split * -(-entry.n // config.out) / -(-n // config.out)
    max_split = min(_MAX_SPLIT, max(1, k_steps // _MIN_K_STEPS))
    log2_split = min(round(math.log2(max(1.0, target_split))), math.floor(math.log2(max_split)))
    return replace(config, split=2**log2_split)


@cache
def _table(name: str) -> tuple[TunedConfig, ...]:
    return tuple(_parse_line(line) for line in _lines(name) if line["path"] != INTEGERS)


@cache
def _lines(name: str) -> tuple[dict[str, Any], ...]:
    text = files("mxcompile.kernels").joinpath("configs", f"{name}.jsonl").read_text()
    return tuple(line for line in map(json.loads, text.splitlines()) if "weight" in line)


def _parse_line(line: dict[str, Any]) -> TunedConfig:
    config = None if line["path"] == DEQUANTIZED else _KINDS[line["path"]](**line["config"])
    return TunedConfig(parse_format(line["weight"]), line["n"], line["k"], line["m"], config)


@cache
def table_name(device: torch.device) -> str:
    """The table of the device's model, or of its compute capability, or the default one."""
    capability = "sm{}{}".format(*torch.cuda.get_device_capability(device))
    model = torch.cuda.get_device_name(device).lower()
    names = [file.name.removesuffix(".jsonl") for file in files("mxcompile.kernels").joinpath("configs").iterdir()]
    of_model = [name for name in names if name.startswith(f"{capability}-") and name.split("-")[1] in model]
    return next((name for name in (*of_model, capability) if name in names), _DEFAULT_TABLE)
