"""Agreement of the outputs of two models, in dB of SQNR."""

import math
from typing import Any

import torch
from torch import Tensor

from mxcompile.graph.inputs import named_leaves
from mxcompile.numerics.metrics import sqnr_db


def output_tensors(output: Any) -> dict[str, Tensor]:
    """Float tensors of a model's output by their path in it."""
    return {path: leaf for path, leaf in named_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def agreement_db(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> tuple[float, str]:
    """(lowest SQNR over the outputs, the name of that output); -inf if one is missing or differs in shape or NaNs."""
    each = ((_agreement(value, actual.get(name)), name) for name, value in expected.items())
    worst = min(each, default=(math.inf, ""))
    return worst[0], worst[1] or "0"


def _agreement(value: Tensor, other: Tensor | None) -> float:
    if other is None or value.shape != other.shape:
        return -math.inf
    if torch.isfinite(value).all() and torch.isfinite(other).all():
        return sqnr_db(value, other)
    finite = torch.isfinite(value)
    kinds = (tensor.masked_fill(finite, 0).nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0) for tensor in (value, other))
    if not torch.equal(*kinds) or not torch.isfinite(other[finite]).all():
        return -math.inf
    return sqnr_db(value[finite], other[finite])
