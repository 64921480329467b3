"""Linear layers with planar weights on a GPU: look up the tile config, one launch for weights adjacent in memory."""

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
from mxcompile.kernels.layout import fp8_eligibility
from mxcompile.kernels.layout.planes import PlanarScaling, PlanarWeight, from_bytes
from mxcompile.kernels.triton import align, dequantize, held_planes, integer_planes, split_k_counters
from mxcompile.kernels.triton import planes_linear as triton_planes
from mxcompile.kernels.triton.elements import starts_early
from mxcompile.kernels.tuned_configs import Config, config_for, integer_config_for, most_held_tokens

PackedWeight: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""A planar weight as bytes, elements `[out, bytes]` and scales `[out, blocks]`, and a bias `[out]` or None."""
_SMALL_OUT: Final = 4096
_ConfigT = TypeVar("_ConfigT", triton_planes.Config, gluon_planes.Config)
logger = logging.getLogger(__name__)


def supports(x: Tensor) -> str | None:
    """None if `linears` supports x, else the reason."""
    return triton_planes.supports(x)


def start_early(x: Tensor) -> bool:
    """Whether the matmuls of these tokens are launched early, which pays if the kernels between them are, too."""
    return starts_early(x) and math.prod(x.shape[:-1]) <= most_held_tokens(x.device)


def linears(x: Tensor, weights: Sequence[PackedWeight], fmt: MXFormat, scaling: PlanarScaling) -> list[Tensor]:
    """`x @ dequantize(w).T + bias` for weights of one format, inner size and scaling: x `[..., in]`, bfloat16."""

    def multiply(group: Sequence[PackedWeight]) -> list[Tensor]:
        return _multiply(x, group, fmt, scaling)

    def fits(group: Sequence[PackedWeight]) -> bool:
        return _fits_one_launch(_config(x, group, fmt), _out_sizes(group))

    return _run_in_groups(weights, fits, multiply)


def why_not_integers(x: Tensor, fmt: MXFormat, rounding: tuple[MXFormat, ScaleRule]) -> str | None:
    """None if `integer_linears` supports x, else the reason."""
    if reason := supports(x) or integer_planes.supports(x, fmt, rounding):
        return reason
    measured = integer_config_for(fmt, x.shape[-1], x.shape[-1], x.device)
    return None if measured else f"the integer kernel has no configs for {fmt} on this GPU"


def integer_linears(
    x: Tensor,
    weights: Sequence[PackedWeight],
    fmt: MXFormat,
    scaling: PlanarScaling,
    rounding: tuple[MXFormat, ScaleRule],
) -> list[Tensor]:
    """`linears` of one token, which each program quantizes as `rounding` says, in integers; only for calls that
    `why_not_integers` accepts."""

    def config(group: Sequence[PackedWeight]) -> integer_planes.Config:
        found = integer_config_for(fmt, sum(_out_sizes(group)), x.shape[-1], x.device)
        assert found is not None  # why_not_integers
        return replace(found, dependent=True)

    def multiply(group: Sequence[PackedWeight]) -> list[Tensor]:
        outs, biases = _out_sizes(group), [bias for _, _, bias in group]
        planes = _planes(group, fmt, x.shape[-1], scaling)
        return integer_planes.linears(x, planes, outs, biases, rounding[0].bits, config(group))

    def fits(group: Sequence[PackedWeight]) -> bool:
        return not any(out % config(group).out for out in _out_sizes(group))

    return _run_in_groups(weights, fits, multiply)


def why_not_fp8(x: Tensor, fmt: MXFormat, scaling: PlanarScaling, rounding: tuple[MXFormat, ScaleRule]) -> str | None:
    """None if `fp8_linears` supports x, whatever the number of tokens, else the reason."""
    reason = fp8_eligibility.why_not(fmt, rounding[0], fits=scaling.top > 0)
    return reason or fp8_linear.supports(x, fmt) or align.supports(x, rounding)


def fp8_linears(
    x: Tensor,
    weights: Sequence[PackedWeight],
    fmt: MXFormat,
    scaling: PlanarScaling,
    rounding: tuple[MXFormat, ScaleRule],
) -> list[Tensor]:
    """`linears` of x, quantized as `rounding` says, on FP8 tensor cores; only for calls that `why_not_fp8` accepts."""
    aligned, powers = align.align(x, rounding)

    def multiply(group: Sequence[PackedWeight]) -> list[Tensor]:
        planes, bias = _planes(group, fmt, x.shape[-1], scaling), _concatenated([weight[2] for weight in group])
        y = fp8_linear.linear(aligned, powers, planes, bias, rounding[0])
        y = y if x.dim() == 2 else y.view(*x.shape[:-1], planes.out)
        return _split(y, _out_sizes(group))

    return _run_in_groups(weights, lambda group: min(_out_sizes(group)) < _SMALL_OUT, multiply)


def _run_in_groups(
    weights: Sequence[PackedWeight],
    fits: Callable[[Sequence[PackedWeight]], bool],
    multiply: Callable[[Sequence[PackedWeight]], list[Tensor]],
) -> list[Tensor]:
    """One result per weight, in order: weights adjacent in memory together where that `fits`, else one by one."""
    if len(weights) == 1:
        return multiply(weights)
    order = sorted(range(len(weights)), key=lambda index: weights[index][0].data_ptr())
    results: list[Tensor] = []
    for group in _adjacent_groups([weights[index] for index in order]):
        for part in [group] if fits(group) else [[weight] for weight in group]:
            results += multiply(part)
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


def _out_sizes(group: Sequence[PackedWeight]) -> list[int]:
    return [elements.shape[0] for elements, _, _ in group]


def _multiply(x: Tensor, group: Sequence[PackedWeight], fmt: MXFormat, scaling: PlanarScaling) -> list[Tensor]:
    outs, biases = _out_sizes(group), [bias for _, _, bias in group]
    planes = _planes(group, fmt, x.shape[-1], scaling)
    config = _config(x, group, fmt)
    if isinstance(config, held_planes.Config):
        return held_planes.linears(x, planes, outs, biases, replace(config, dependent=starts_early(x)))
    if isinstance(config, triton_planes.Config):
        counters, config = _take_counters(x, planes, config)
        return triton_planes.linears(x, planes, outs, biases, config, counters)
    if config is None:
        y = F.linear(x, dequantize.dequantize(planes, k_steps=1), _concatenated(biases))
        return _split(y, outs)
    counters, config = _take_counters(x, planes, config)
    if _writes_separate_outputs(config, outs):
        return gluon_planes.linears(x, planes, outs, _concatenated(biases), config, counters)
    y = gluon_planes.linear(x, planes, _concatenated(biases), config, counters)
    return _split(y, outs)


def _split(y: Tensor, outs: Sequence[int]) -> list[Tensor]:
    """The outputs of the weights that `y` `[..., sum(outs)]` was computed with."""
    return [y] if len(outs) == 1 else [part.contiguous() for part in y.split(outs, dim=-1)]


def _planes(group: Sequence[PackedWeight], fmt: MXFormat, size: int, scaling: PlanarScaling) -> PlanarWeight:
    elements, scales = _view_as_one([weight[0] for weight in group]), _view_as_one([weight[1] for weight in group])
    return from_bytes(elements, scales, fmt, size, scaling)


def _fits_one_launch(config: Config | None, outs: Sequence[int]) -> bool:
    """Whether one launch is best. A kernel that writes one joint output needs copies to split it, which pay off if an
    output is small."""
    separate = isinstance(config, triton_planes.Config | held_planes.Config)
    small = not separate and min(outs) < _SMALL_OUT
    return small or _writes_separate_outputs(config, outs)


def _writes_separate_outputs(config: Config | None, outs: Sequence[int]) -> bool:
    """Whether a kernel with this config writes the output of each weight to a separate tensor."""
    return config is not None and not any(out % config.out for out in outs)


def _concatenated(biases: Sequence[Tensor | None]) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    if len(present) == 1:
        return present[0]
    return torch.cat(present) if present else None


def _config(x: Tensor, group: Sequence[PackedWeight], fmt: MXFormat) -> Config | None:
    shape = (sum(_out_sizes(group)), x.shape[-1], max(1, math.prod(x.shape[:-1])))
    config = config_for(fmt, *shape, x.device)
    if isinstance(config, gluon_planes.Config) and (reason := gluon_planes.supports(x)):
        _log_fallback_once(reason)
        config = config_for(fmt, *shape, x.device, gluon=False)
    return config


@cache
def _log_fallback_once(reason: str) -> None:
    """Log once why the fastest kernel is not used."""
    logger.info("the Gluon kernel is not used: %s", reason)


def _take_counters(x: Tensor, planes: PlanarWeight, config: _ConfigT) -> tuple[Tensor | None, _ConfigT]:
    """The split-K counters of the stream; if there are not enough, the config without split-K."""
    if config.split == 1:
        return None, config
    rows = math.prod(x.shape[:-1])
    if isinstance(config, triton_planes.Config):
        count = triton_planes.counters_needed(rows, planes, config)
    else:
        count = gluon_planes.counters_needed(rows, planes, config)
    counters = split_k_counters.stream_counters(x.device, count)
    return counters, config if counters is not None else replace(config, split=1)


def _adjacent_groups(weights: Sequence[PackedWeight]) -> Iterator[list[PackedWeight]]:
    """Groups of up to three weights with contiguous bytes, all with a bias or all without."""
    group: list[PackedWeight] = []
    for weight in weights:
        if group and not (len(group) < triton_planes.MAX_WEIGHTS and _is_adjacent(group[-1], weight)):
            yield group
            group = []
        group.append(weight)
    if group:
        yield group


def _is_adjacent(first: PackedWeight, second: PackedWeight) -> bool:
    def adjoin(first_part: Tensor, second_part: Tensor) -> bool:
        same = first_part.untyped_storage().data_ptr() == second_part.untyped_storage().data_ptr()
        whole = first_part.is_contiguous() and second_part.is_contiguous()
        return same and whole and first_part.data_ptr() + first_part.numel() == second_part.data_ptr()

    alike = (first[2] is None) == (second[2] is None)
    return alike and adjoin(first[0], second[0]) and adjoin(first[1], second[1])


def _view_as_one(parts: Sequence[Tensor]) -> Tensor:
    """One view of tensors that are contiguous in memory."""
    if len(parts) == 1:
        return parts[0].contiguous()
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())
