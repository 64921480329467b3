"""y = x @ dequantize(w).T + bias for a planar weight (planes.py) and many tokens. Gluon, Hopper (sm_90) only.

The same as triton/planes_linear.py with a warp-specialized kernel (gluon/planes_kernel.py). It is faster from about 64
tokens on; kernels/tuned_configs.py chooses.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Host code is fully typed; strict checking has no types for Gluon.

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat
from mxcompile.kernels.gluon.hopper import GLUON_UNAVAILABLE, TensorDescriptor, contiguous, gl
from mxcompile.kernels.gluon.planes_kernel import _planes_kernel
from mxcompile.kernels.layout.planes import LANES, TILE, PlanarWeight, plane_layout
from mxcompile.kernels.triton.decode_planes import layout_constants
from mxcompile.kernels.triton.elements import capability, multiprocessors, unsupported_device
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.planes_linear import MAX_WEIGHTS


@dataclass(frozen=True)
class Config:
    """Tile config: `rows` tokens x `out` outputs (64, 128 or 256) per program; K is divided into `split` parts.

    stages: number of 128-column loads in flight. group: number of token tiles scheduled together for the same outputs
    (L2 reuse). persistent: launch as many programs as the GPU runs concurrently; each processes tile after tile.
    """

    rows: int = 256
    out: int = 128
    stages: int = 3
    group: int = 8
    persistent: bool = True
    split: int = 1

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 1 if self.out == 64 else 2


def supports(x: Tensor) -> str | None:
    """None if `linear` supports x, else the reason."""
    if x.dtype != torch.bfloat16:
        return f"planes are decoded to bfloat16, the activation is {str(x.dtype).removeprefix('torch.')}"
    if reason := unsupported_device(x) or GLUON_UNAVAILABLE:
        return reason
    if (available := capability(x.device)) != (9, 0):
        return f"the Gluon kernel needs compute capability 9.0, this GPU has {available[0]}.{available[1]}"
    if x.shape[-1] % 8 or any(stride % 8 for stride in x.stride()[:-1]) or x.data_ptr() % 16:
        return "the Gluon kernel needs an activation whose rows are aligned to 16 bytes"
    return None


def linear(
    x: Tensor, planes: PlanarWeight, bias: Tensor | None, config: Config, counters: Tensor | None = None
) -> Tensor:
    """`x @ dequantize(w).T + bias`, accumulated in float32, rounded once: x `[..., in]`, y `[..., out]`.

    Only for calls that `supports` accepts. counters: as for `linear` in triton/planes_linear.py.
    """
    return linears(x, planes, [planes.out], bias, config, counters)[0]


def linears(
    x: Tensor,
    planes: PlanarWeight,
    outs: Sequence[int],
    bias: Tensor | None,
    config: Config,
    counters: Tensor | None = None,
) -> list[Tensor]:
    """`linear` in one launch for up to three weights, stored one after the other in `planes`, with `outs` rows each.

    With several weights, `outs` are multiples of `config.out`. bias: concatenated, `[planes.out]`. See `linear`.
    """
    _check(x, planes, outs, bias, config)
    plan = _plan(planes.fmt, planes.size, tuple(outs), math.prod(x.shape[:-1]), planes.lift, bias is not None, config)
    device, rows = x.device, plan.rows
    ys = [torch.empty((rows, pitch), dtype=x.dtype, device=device) for pitch in plan.pitches]
    if rows:
        flat = x if x.dim() == 2 else x.reshape(rows, planes.size)
        flat = flat if flat.stride(1) == 1 and flat.stride(0) >= planes.size else flat.contiguous()
        partial = ys[0]
        if plan.partial_sums:
            partial = torch.empty(plan.partial_sums, dtype=torch.float32, device=device)
            if counters is None:
                counters = torch.zeros(plan.counters, dtype=torch.int32, device=device)
        programs = min(plan.units, multiprocessors(device) * plan.persistent) if plan.persistent else plan.units
        launch(
            _planes_kernel,
            programs,
            TensorDescriptor(flat, flat.shape, flat.stride(), *block("x", config)),
            TensorDescriptor(planes.words, *plan.words),
            TensorDescriptor(planes.scales, *plan.scales),
            *[TensorDescriptor(y, *described) for y, described in zip(ys, plan.outputs, strict=True)],
            *[None] * (MAX_WEIGHTS - len(ys)),
            ys[0] if bias is None else bias.contiguous(),
            partial,
            ys[0] if counters is None else counters,
            None,
            None,
            None,
            *plan.scalars,
            **plan.constants,
        )
    if x.dim() == 2 and plan.pitches == tuple(outs):
        return ys
    return [y[:, :out].contiguous().view(*x.shape[:-1], out) for y, out in zip(ys, outs, strict=True)]


class _Plan(NamedTuple):
    """What a launch needs besides tensors. units: tiles times parts of K. pitches: of the rows of the outputs.

    persistent: programs per multiprocessor, or 0 for one per unit. words, scales, outputs: arguments of descriptors.
    """

    rows: int
    units: int
    persistent: int
    pitches: tuple[int, ...]
    partial_sums: int
    counters: int
    words: tuple[Any, ...]
    scales: tuple[Any, ...]
    outputs: tuple[tuple[Any, ...], ...]
    scalars: tuple[Any, ...]
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    fmt: MXFormat, size: int, outs: tuple[int, ...], rows: int, lift: int, has_bias: bool, config: Config
) -> _Plan:
    """Computed once per shape: in Python it takes longer than the launch."""
    layout, out = plane_layout(fmt), sum(outs)
    tiles, k_steps = -(-out // TILE), -(-size // layout.columns)
    config = replace(config, split=min(config.split, k_steps))
    output_tiles = -(-rows // config.rows) * -(-out // config.out)
    units = output_tiles * config.split
    pitches = tuple(-(-each // 8) * 8 for each in outs)  # TMA needs row strides that are multiples of 16 bytes
    return _Plan(
        rows,
        units,
        3 - config.consumers if config.persistent else 0,
        pitches,
        units * config.rows * config.out if config.split > 1 else 0,
        output_tiles * config.consumers,
        (*contiguous(tiles, k_steps * layout.words, TILE, LANES), *block("words", config)),
        (*contiguous(tiles, k_steps * layout.planes // 4, TILE), *block("scales", config)),
        tuple(([rows, each], [pitch, 1], *block("y", config)) for each, pitch in zip(outs, pitches, strict=True)),
        (2.0**lift, rows, out, k_steps, *(sum(outs[:i]) for i in range(1, MAX_WEIGHTS))),
        {
            **constants(fmt, config, has_bias),
            "GATE": None,
            "INTERLEAVED": False,
            "ROUNDING": None,
            **options(config),
        },
    )


def _check(x: Tensor, planes: PlanarWeight, outs: Sequence[int], bias: Tensor | None, config: Config) -> None:
    """Shapes that disagree would make the kernel write out of bounds."""
    mismatch = x.shape[-1] != planes.size or (bias is not None and bias.shape != (planes.out,))
    if mismatch or sum(outs) != planes.out:
        raise MXCompileError(f"a linear of {planes.size} inputs and {planes.out} outputs cannot take {tuple(x.shape)}")
    if len(outs) > MAX_WEIGHTS or (len(outs) > 1 and any(out % config.out for out in outs)):
        raise MXCompileError(f"weights of {list(outs)} outputs are not divisible into tiles of {config.out}")


def counters_needed(rows: int, planes: PlanarWeight, config: Config) -> int:
    """Number of output tiles times consumers; with split-K each needs a counter."""
    return -(-rows // config.rows) * -(-planes.out // config.out) * config.consumers


@cache
def block(name: str, config: Config) -> tuple[list[int], Any]:
    """TMA block shape of a tensor argument, and its layout in shared memory."""
    part = config.out // config.consumers
    shape, dtype = {
        "x": ([config.rows, 128], gl.bfloat16),
        "words": ([part // 64, 1, 64, 32], gl.int16),
        "scales": ([part // 64, 1, 64], gl.int32),
        "y": ([config.rows, part], gl.bfloat16),
        "paired_words": ([2, 1, 1, 64, 32], gl.int16),
        "paired_scales": ([2, 1, 1, 64], gl.int32),
        "gated": ([config.rows, 64], gl.bfloat16),
    }[name]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, dtype)


@cache
def constants(fmt: MXFormat, config: Config, has_bias: bool) -> dict[str, Any]:
    """The constexpr arguments of the kernel."""
    layout = layout_constants(fmt)
    kernel_config = (config.rows, config.out, config.consumers, config.stages, config.group, has_bias, config.split)
    return {"SHAPE": layout["SHAPE"], "ASSEMBLY": layout["ASSEMBLY"], "CONFIG": kernel_config}


def options(config: Config) -> dict[str, Any]:
    """Compiler options: three warpgroups (one is the producer) share all registers, two share half of them."""
    return {"num_warps": 4, "maxnreg": 168 if config.consumers == 2 else 128, "enable_fp_fusion": True}
