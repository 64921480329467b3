"""Measured times of one matmul in microseconds, by format, shape and number of tokens: `times/*.jsonl`.

The first line of a file names the GPU. Times of shapes that were not measured follow the line a + b n k through the
measured ones: a launch, and the bytes (one token) or products (many) of the weight. Inputs are in bf16; what rounding
them takes does not depend on the weight's format.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import torch

from mxcompile.errors import InputError
from mxcompile.formats import MXFormat

FLOAT = "float"
"""The name of float weights in a table (bf16, cuBLAS)."""


@dataclass(frozen=True)
class TimesTable:
    """device: the GPU that was measured. lines: (format's name, tokens) -> (a, b)."""

    device: str
    lines: dict[tuple[str, int], tuple[float, float]]

    def microseconds(self, fmt: MXFormat | None, outputs: int, inputs: int, tokens: int) -> float:
        """The time of one matmul; raises InputError for a format or number of tokens that was not measured."""
        name = FLOAT if fmt is None else fmt.name
        if (name, tokens) not in self.lines:
            known = sorted({name for name, count in self.lines if count == tokens})
            raise InputError(f"no times of {name} were measured for {tokens} tokens on {self.device}, only of {known}")
        a, b = self.lines[name, tokens]
        return a + b * outputs * inputs


def table_names() -> list[str]:
    """The compute capabilities with a table: `sm90`."""
    folder = files("mxcompile.kernels").joinpath("times")
    return sorted(file.name.removesuffix(".jsonl") for file in folder.iterdir() if file.name.endswith(".jsonl"))


def times_on(device: torch.device) -> TimesTable:
    """The table of a GPU; raises InputError if nothing was measured on its kind."""
    if device.type != "cuda":
        listed = ", ".join(table_names())
        raise InputError(f"no times were measured on {device.type}: name the GPU that the model is for ({listed})")
    return times_of("sm{}{}".format(*torch.cuda.get_device_capability(device)))


@cache
def times_of(name: str) -> TimesTable:
    """The table of a compute capability; raises InputError if there is none."""
    if name not in table_names():
        raise InputError(f"no times were measured for {name!r}: there are tables for {', '.join(table_names())}")
    text = files("mxcompile.kernels").joinpath("times", f"{name}.jsonl").read_text()
    first, *measured = map(json.loads, text.splitlines())
    points: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for line in measured:
        points.setdefault((line["weight"], line["m"]), []).append((line["n"] * line["k"], line["us"]))
    return TimesTable(first["device"], {key: _fitted(each) for key, each in points.items()})


def _fitted(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of the line through points (size, us) with the least squared relative error, a not below zero."""
    sizes, times = np.array(points, dtype=np.float64).T
    columns = np.stack([1 / times, sizes / times], 1)
    a, b = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)[0]
    if a < 0:
        a, b = 0.0, float((sizes / times).sum() / (sizes / times).dot(sizes / times))
    return float(a), float(b)
