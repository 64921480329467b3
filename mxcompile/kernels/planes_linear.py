"""Products with weights in planes on a GPU: the cut from the table, one launch for weights that lie side by side."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels import counters, fp8, gluon_fp8, gluon_planes, triton_align, triton_dequantize, triton_planes
from mxcompile.kernels.planes import Planes, Scaling, from_bytes
from mxcompile.kernels.planes_configs import Config, config_for

PackedWeight: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Planes as bytes, elements `[out, bytes]` and scales `[out, blocks]`, and a bias `[out]` or None."""
_SMALL: Final = 4096
logger = logging.getLogger(__name__)


def supports(x: Tensor) -> str | None:
    """None if `linears` can serve `x`, or the reason why not."""
    return triton_planes.supports(x)


def linears(x: Tensor, weights: Sequence[PackedWeight], fmt: MXFormat, scaling: Scaling) -> list[Tensor]:
    """`x @ dequantize(w).T + bias` for weights of one format, inner size and scaling: x `[..., in]`, bfloat16."""
    order = sorted(range(len(weights)), key=lambda index: weights[index][0].data_ptr())
    results: list[Tensor] = []
    for group in _side_by_side([weights[index] for index in order]):
        together = _fits_one_launch(_config(x, group, fmt), [len(elements) for elements, _, _ in group])
        for part in [group] if together else [[weight] for weight in group]:
            results += _multiply(x, part, fmt, scaling)
    return _in_order(order, results)


def why_not_fp8(x: Tensor, fmt: MXFormat, scaling: Scaling, rounding: tuple[MXFormat, ScaleRule]) -> str | None:
    """None if `fp8_linears` serves tokens like x, however many, or why not."""
    if reason := fp8.why_not(fmt, rounding[0]) or gluon_fp8.supports(x, fmt):
        return reason
    if not scaling.top:
        return "the weight's scales are too far apart for e4m3 numbers"
    return "scale rule mse searches exponents, which the kernel does not do" if rounding[1] is ScaleRule.MSE else None


def fp8_linears(
    x: Tensor, weights: Sequence[PackedWeight], fmt: MXFormat, scaling: Scaling, rounding: tuple[MXFormat, ScaleRule]
) -> list[Tensor]:
    """`linears` of x, rounded, at the rate of 8 bits; for what `why_not_fp8` has no objection to."""
    order = sorted(range(len(weights)), key=lambda index: weights[index][0].data_ptr())
    aligned, powers = triton_align.align(x, rounding)
    results: list[Tensor] = []
    for group in _side_by_side([weights[index] for index in order]):
        outs = [len(elements) for elements, _, _ in group]
        for part in [group] if min(outs) < _SMALL else [[weight] for weight in group]:
            planes, bias = _planes(part, fmt, x.shape[-1], scaling), _joined([weight[2] for weight in part])
            y = gluon_fp8.linear(aligned, powers, planes, bias).view(*x.shape[:-1], planes.out)
            results += [piece.contiguous() for piece in y.split([len(weight[0]) for weight in part], dim=-1)]
    return _in_order(order, results)


def _in_order(order: Sequence[int], results: Sequence[Tensor]) -> list[Tensor]:
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


def _multiply(x: Tensor, group: Sequence[PackedWeight], fmt: MXFormat, scaling: Scaling) -> list[Tensor]:
    outs, biases = [len(elements) for elements, _, _ in group], [bias for _, _, bias in group]
    planes = _planes(group, fmt, x.shape[-1], scaling)
    config = _config(x, group, fmt)
    if isinstance(config, triton_planes.Config):
        free, config = _free_counters(x, planes.out, config)
        return triton_planes.linears(x, planes, outs, biases, config, free)
    refused = None if config is None else gluon_planes.supports(x, planes)
    if config is not None and refused is None:
        y = gluon_planes.linear(x, planes, _joined(biases), config)
    else:
        if refused is not None:
            _tell(refused)
        y = F.linear(x, triton_dequantize.dequantize(planes, slabs=1), _joined(biases))
    return [part.contiguous() for part in y.split(outs, dim=-1)]


def _planes(group: Sequence[PackedWeight], fmt: MXFormat, size: int, scaling: Scaling) -> Planes:
    elements, scales = _together([weight[0] for weight in group]), _together([weight[1] for weight in group])
    return from_bytes(elements, scales, fmt, size, scaling)


@cache
def _tell(reason: str) -> None:
    """Once: what is fused elsewhere is dequantized and left to cuBLAS here."""
    logger.info("products of many tokens are left to cuBLAS: %s", reason)


def _fits_one_launch(config: Config | None, outs: Sequence[int]) -> bool:
    """One result has to be copied apart where a kernel does not write several: worth it if a part is small."""
    if isinstance(config, triton_planes.Config):
        return not any(out % config.out for out in outs)
    return min(outs) < _SMALL


def _joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    return torch.cat(given) if given else None


def _config(x: Tensor, group: Sequence[PackedWeight], fmt: MXFormat) -> Config | None:
    rows = math.prod(x.shape[:-1])
    return config_for(fmt, sum(len(weight[0]) for weight in group), x.shape[-1], max(1, rows), x.device)


def _free_counters(x: Tensor, out: int, config: triton_planes.Config) -> tuple[Tensor | None, triton_planes.Config]:
    """The stream's counters; without enough of them K stays whole."""
    if config.split == 1:
        return None, config
    tiles = -(-math.prod(x.shape[:-1]) // config.rows) * -(-out // config.out)
    free = counters.of_stream(x.device, tiles)
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
