"""Products with weights in planes on a GPU: the cut from the table, one launch for weights that lie side by side."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Final, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.gluon import fp8_linear
from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.layout import e4m3_products
from mxcompile.kernels.layout.planes import Planes, Scaling, from_bytes
from mxcompile.kernels.triton import align, dequantize, split_k_counters
from mxcompile.kernels.triton import planes_linear as triton_planes
from mxcompile.kernels.tuned_configs import Config, config_for

PackedWeight: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Planes as bytes, elements `[out, bytes]` and scales `[out, blocks]`, and a bias `[out]` or None."""
_SMALL: Final = 4096
_Cut = TypeVar("_Cut", triton_planes.Config, gluon_planes.Config)
logger = logging.getLogger(__name__)


def supports(x: Tensor) -> str | None:
    """None if `linears` can serve `x`, or the reason why not."""
    return triton_planes.supports(x)


def linears(x: Tensor, weights: Sequence[PackedWeight], fmt: MXFormat, scaling: Scaling) -> list[Tensor]:
    """`x @ dequantize(w).T + bias` for weights of one format, inner size and scaling: x `[..., in]`, bfloat16."""

    def multiply(group: Sequence[PackedWeight]) -> list[Tensor]:
        return _multiply(x, group, fmt, scaling)

    def fits(group: Sequence[PackedWeight]) -> bool:
        return _fits_one_launch(_config(x, group, fmt), _outs(group))

    return _by_groups(weights, fits, multiply)


def why_not_fp8(
    x: Tensor, fmt: MXFormat, scaling: Scaling, rounding: tuple[MXFormat, ScaleRule], aligned: bool = False
) -> str | None:
    """None if `fp8_linears` serves tokens like x, however many, or why not. aligned: they are, by the model."""
    reason = e4m3_products.why_not(fmt, rounding[0], aligned=aligned, fits=scaling.top > 0)
    return reason or fp8_linear.supports(x, fmt) or align.supports(x, rounding)


def fp8_linears(
    x: Tensor, weights: Sequence[PackedWeight], fmt: MXFormat, scaling: Scaling, rounding: tuple[MXFormat, ScaleRule]
) -> list[Tensor]:
    """`linears` of x, rounded, at the rate of 8 bits; for what `why_not_fp8` has no objection to."""
    aligned, powers = align.align(x, rounding)

    def multiply(group: Sequence[PackedWeight]) -> list[Tensor]:
        planes, bias = _planes(group, fmt, x.shape[-1], scaling), _joined([weight[2] for weight in group])
        y = fp8_linear.linear(aligned, powers, planes, bias, rounding[0]).view(*x.shape[:-1], planes.out)
        return [piece.contiguous() for piece in y.split(_outs(group), dim=-1)]

    return _by_groups(weights, lambda group: min(_outs(group)) < _SMALL, multiply)


def _by_groups(
    weights: Sequence[PackedWeight],
    fits: Callable[[Sequence[PackedWeight]], bool],
    multiply: Callable[[Sequence[PackedWeight]], list[Tensor]],
) -> list[Tensor]:
    """A result for each weight, in order: of all that lie side by side at once where that fits, else one by one."""
    order = sorted(range(len(weights)), key=lambda index: weights[index][0].data_ptr())
    results: list[Tensor] = []
    for group in _side_by_side([weights[index] for index in order]):
        for part in [group] if fits(group) else [[weight] for weight in group]:
            results += multiply(part)
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


def _outs(group: Sequence[PackedWeight]) -> list[int]:
    return [len(elements) for elements, _, _ in group]


def _multiply(x: Tensor, group: Sequence[PackedWeight], fmt: MXFormat, scaling: Scaling) -> list[Tensor]:
    outs, biases = _outs(group), [bias for _, _, bias in group]
    planes = _planes(group, fmt, x.shape[-1], scaling)
    config = _config(x, group, fmt)
    if isinstance(config, triton_planes.Config):
        free, config = _free_counters(x, planes, config)
        return triton_planes.linears(x, planes, outs, biases, config, free)
    if config is None:
        y = F.linear(x, dequantize.dequantize(planes, slabs=1), _joined(biases))
        return [part.contiguous() for part in y.split(outs, dim=-1)]
    free, config = _free_counters(x, planes, config)
    if _written_apart(config, outs):
        return gluon_planes.linears(x, planes, outs, _joined(biases), config, free)
    y = gluon_planes.linear(x, planes, _joined(biases), config, free)
    return [part.contiguous() for part in y.split(outs, dim=-1)]


def _planes(group: Sequence[PackedWeight], fmt: MXFormat, size: int, scaling: Scaling) -> Planes:
    elements, scales = _together([weight[0] for weight in group]), _together([weight[1] for weight in group])
    return from_bytes(elements, scales, fmt, size, scaling)


def _fits_one_launch(config: Config | None, outs: Sequence[int]) -> bool:
    """One result has to be copied apart where a kernel does not write several: worth it if a part is small."""
    small = not isinstance(config, triton_planes.Config) and min(outs) < _SMALL
    return small or _written_apart(config, outs)


def _written_apart(config: Config | None, outs: Sequence[int]) -> bool:
    """Whether a kernel with this cut writes each weight's result to a tensor of its own."""
    return config is not None and not any(out % config.out for out in outs)


def _joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    return torch.cat(given) if given else None


def _config(x: Tensor, group: Sequence[PackedWeight], fmt: MXFormat) -> Config | None:
    shape = (sum(_outs(group)), x.shape[-1], max(1, math.prod(x.shape[:-1])))
    config = config_for(fmt, *shape, x.device)
    if isinstance(config, gluon_planes.Config) and (reason := gluon_planes.supports(x)):
        _tell(reason)
        config = config_for(fmt, *shape, x.device, gluon=False)
    return config


@cache
def _tell(reason: str) -> None:
    """Once: what the fastest kernel would be served by another."""
    logger.info("products take another kernel than the one in Gluon: %s", reason)


def _free_counters(x: Tensor, planes: Planes, config: _Cut) -> tuple[Tensor | None, _Cut]:
    """The stream's counters; without enough of them K stays whole."""
    if config.split == 1:
        return None, config
    rows = math.prod(x.shape[:-1])
    if isinstance(config, triton_planes.Config):
        count = triton_planes.counters_needed(rows, planes, config)
    else:
        count = gluon_planes.counters_needed(rows, planes, config)
    free = split_k_counters.of_stream(x.device, count)
    return free, config if free is not None else replace(config, split=1)


def _side_by_side(weights: Sequence[PackedWeight]) -> Iterator[list[PackedWeight]]:
    """Runs of up to three weights whose bytes follow each other in memory, all with a bias or all without."""
    group: list[PackedWeight] = []
    for weight in weights:
        if group and not (len(group) < triton_planes.MOST_WEIGHTS and _follows(group[-1], weight)):
            yield group
            group = []
        group.append(weight)
    if group:
        yield group


def _follows(first: PackedWeight, second: PackedWeight) -> bool:
    def adjoin(one: Tensor, other: Tensor) -> bool:
        same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        whole = one.is_contiguous() and other.is_contiguous()
        return same and whole and one.data_ptr() + one.numel() == other.data_ptr()

    alike = (first[2] is None) == (second[2] is None)
    return alike and adjoin(first[0], second[0]) and adjoin(first[1], second[1])


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Parts that follow each other in memory as one."""
    if len(parts) == 1:
        return parts[0].contiguous()
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())
