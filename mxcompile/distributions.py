"""Distributions of a layer's weight and input before and after a pass: histograms of magnitudes, kept in a file.

MX scales are powers of two, so values are counted by octave, four bins each. A float32's exponent and the first two
bits of its mantissa are such a bin: counting them is exact, takes any value, and needs no range to be known before.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxcompile.errors import DumpError

SCHEMA = 1
FILE = "distributions.json"
_VALUES = 1 << 17
_SHIFT = 21  # of a float32's bits: 8 of the exponent and 2 of the mantissa are left
_SMALL, _NONFINITE, _BINS = 4, 1020, 1024


@dataclass(frozen=True)
class Histogram:
    """How many of a tensor's values have which magnitude.

    Bin b holds magnitudes from 2^(b // 4 - 127) (1 + b % 4 / 4) up to where bin b + 1 begins; `counts[i]` is that of
    bin `first + i`. zeros: also what is smaller than 2^-126. nonfinite: Inf and NaN.
    """

    zeros: int
    nonfinite: int
    first: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor) -> "Histogram":
        """Count values `[..., size]`: evenly spaced rows of many, about 131072 values."""
        rows = values.detach().reshape(-1, values.shape[-1]) if values.dim() else values.detach().reshape(1, 1)
        rows = rows[:: max(1, rows.numel() // _VALUES)]
        bits = rows.float().contiguous().view(torch.int32) & 0x7FFFFFFF
        counts: list[int] = torch.bincount((bits >> _SHIFT).flatten(), minlength=_BINS).tolist()
        finite = counts[_SMALL:_NONFINITE]
        used = [index for index, count in enumerate(finite) if count]
        first, end = (used[0], used[-1] + 1) if used else (0, 0)
        return cls(sum(counts[:_SMALL]), sum(counts[_NONFINITE:]), _SMALL + first, tuple(finite[first:end]))


@dataclass(frozen=True)
class Values:
    """What a layer multiplies: its weight, its input in the float model, and that input rounded, if the layer does so.

    input is None if it does not depend on the model's inputs.
    """

    weight: Histogram
    input: Histogram | None
    rounded: Histogram | None


@dataclass(frozen=True)
class Distribution:
    """The values of a layer before and after a pass."""

    before: Values
    after: Values


@dataclass(frozen=True)
class Distributions:
    """The layers' distributions around each pass of a run, in order; a pass without measurement has none.

    The file is a JSON object, `{"schema": 1, "passes": [{layer: {"before": VALUES, "after": VALUES}}]}`, VALUES being
    `{"weight": HISTOGRAM, "input": HISTOGRAM or null, "rounded": HISTOGRAM or null}` and a HISTOGRAM having the fields
    of that class. The schema's number changes with every change of names or meanings.
    """

    passes: tuple[dict[str, Distribution], ...] = ()

    @classmethod
    def load(cls, folder: Path) -> "Distributions":
        """Read the file of a dump folder; raises DumpError if it is not one of this schema."""
        file = folder / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            schema = content["schema"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DumpError(f"{file} holds no distributions ({type(error).__name__}: {error})") from error
        if schema != SCHEMA:
            raise DumpError(f"{file} has schema {schema}, this version of mxcompile reads {SCHEMA}: dump it again")
        return cls(tuple({name: _distribution(found) for name, found in each.items()} for each in content["passes"]))

    def to_json(self) -> str:
        """The file's text, a line for each pass."""
        passes = [{name: asdict(found) for name, found in each.items()} for each in self.passes]
        lines = ",\n".join(json.dumps(each, separators=(",", ":")) for each in passes)
        return f'{{"schema": {SCHEMA}, "passes": [\n{lines}\n]}}\n'


def _distribution(content: dict[str, Any]) -> Distribution:
    return Distribution(*(_values(content[when]) for when in ("before", "after")))


def _values(content: dict[str, Any]) -> Values:
    given, rounded = (content[kind] and _histogram(content[kind]) for kind in ("input", "rounded"))
    return Values(_histogram(content["weight"]), given, rounded)


def _histogram(content: dict[str, Any]) -> Histogram:
    return Histogram(content["zeros"], content["nonfinite"], content["first"], tuple(content["counts"]))
