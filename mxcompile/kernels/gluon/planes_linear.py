"""y = x @ dequantize(w).T + bias for a planar weight (planes.py) and many tokens. Gluon, Hopper (sm_90) only.

The same as triton/planes_linear.py with a warp-specialized kernel (gluon/planes_kernel.py). It is faster from about 64
tokens on; kernels/tuned_configs.py chooses.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Host code is fully typed; strict checking has no types for Gluon.

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat
from mxcompile.kernels.gluon.hopper import GLUON_UNAVAILABLE, TensorDescriptor, gl
from mxcompile.kernels.gluon.planes_kernel import _planes_kernel
from mxcompile.kernels.layout.planes import PlanarWeight
from mxcompile.kernels.triton.decode_planes import layout_constants
from mxcompile.kernels.triton.elements import capability, multiprocessors, unsupported_device
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
    rows, k_steps = math.prod(x.shape[:-1]), planes.words.shape[1]
    # TMA needs row strides that are multiples of 16 bytes.
    padded = [torch.empty((rows, -(-out // 8) * 8), dtype=x.dtype, device=x.device) for out in outs]
    ys = [y[:, :out] for y, out in zip(padded, outs, strict=True)]
    if rows:
        flat, config = x.reshape(rows, planes.size), replace(config, split=min(config.split, k_steps))
        tiles = -(-rows // config.rows) * -(-planes.out // config.out)
        units = programs = tiles * config.split
        if config.persistent:
            programs = min(units, multiprocessors(x.device) * (3 - config.consumers))
        partial = padded[0]
        if config.split > 1:
            partial = torch.empty(units * config.rows * config.out, dtype=torch.float32, device=x.device)
            if counters is None:
                counters = torch.zeros(counters_needed(rows, planes, config), dtype=torch.int32, device=x.device)
        tensors = [
            ("x", flat if flat.stride(1) == 1 and flat.stride(0) >= planes.size else flat.contiguous()),
            ("words", planes.words.view(planes.words.shape[0], -1, 64, 32)),
            ("scales", planes.scales.view(planes.words.shape[0], -1, 64)),
            *(("y", y) for y in ys),
        ]
        descriptors = [TensorDescriptor.from_tensor(t, *block(name, config)) for name, t in tensors]
        with torch.cuda.device(x.device):
            cast(Any, _planes_kernel)[(programs,)](
                *descriptors,
                *[None] * (MAX_WEIGHTS - len(outs)),
                padded[0] if bias is None else bias.contiguous(),
                partial,
                padded[0] if counters is None else counters,
                None,
                None,
                None,
                2.0**planes.lift,
                rows,
                planes.out,
                k_steps,
                *(sum(outs[:i]) for i in range(1, MAX_WEIGHTS)),
                **constants(planes.fmt, config, bias is not None),
                GATE=None,
                INTERLEAVED=False,
                ROUNDING=None,
                **options(config),
            )
    return [y.contiguous().view(*x.shape[:-1], y.shape[1]) for y in ys]


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
