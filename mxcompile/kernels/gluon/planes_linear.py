"""y = x @ dequantize(w).T + bias for a weight in planes (planes.py), for many tokens: Gluon, Hopper (sm_90) only.

What triton/planes_linear.py does, by a kernel whose warps have roles: gluon/planes_kernel.py. From about 64 tokens on
it is the faster one; kernels/tuned_configs.py knows.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Host code is fully typed; of Gluon's own names strict checking knows nothing.

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat
from mxcompile.kernels.gluon.hopper import NO_GLUON, TensorDescriptor, gl
from mxcompile.kernels.gluon.planes_kernel import _planes_kernel
from mxcompile.kernels.layout.planes import Planes
from mxcompile.kernels.triton.decode_planes import layout_constants
from mxcompile.kernels.triton.elements import capability, multiprocessors, unsupported_device
from mxcompile.kernels.triton.planes_linear import MOST_WEIGHTS


@dataclass(frozen=True)
class Config:
    """How a product is cut: `rows` tokens x `out` outputs (64, 128 or 256) a program, K in `split` parts.

    stages: how many times 128 columns are on their way. group: how many tiles of tokens run side by side for the same
    outputs (for L2). persistent: as many programs as the GPU can run at once, each of which takes tile after tile.
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
    """None if `linear` can serve `x`, or the reason why not."""
    if x.dtype != torch.bfloat16:
        return f"planes are decoded to bfloat16, the activation is {str(x.dtype).removeprefix('torch.')}"
    if reason := unsupported_device(x) or NO_GLUON:
        return reason
    if (found := capability(x.device)) != (9, 0):
        return f"the Gluon kernel needs compute capability 9.0, this GPU has {found[0]}.{found[1]}"
    if x.shape[-1] % 8 or any(stride % 8 for stride in x.stride()[:-1]) or x.data_ptr() % 16:
        return "the Gluon kernel needs an activation whose rows begin at multiples of 16 bytes"
    return None


def linear(x: Tensor, planes: Planes, bias: Tensor | None, config: Config, counters: Tensor | None = None) -> Tensor:
    """`x @ dequantize(w).T + bias`, summed in float32 and rounded once: x `[..., in]`, y `[..., out]`.

    For what `supports` has no objection to. counters: as for `linear` in triton/planes_linear.py.
    """
    return linears(x, planes, [planes.out], bias, config, counters)[0]


def linears(
    x: Tensor,
    planes: Planes,
    outs: Sequence[int],
    bias: Tensor | None,
    config: Config,
    counters: Tensor | None = None,
) -> list[Tensor]:
    """`linear` in one launch for up to three weights that lie behind each other in `planes`: `outs` rows of it each.

    `outs` of several are multiples of `config.out`. bias: of all of them, `[planes.out]`. See `linear` for the rest.
    """
    _check(x, planes, outs, bias, config)
    rows, slabs = math.prod(x.shape[:-1]), planes.words.shape[1]
    # TMA wants rows at multiples of 16 bytes.
    wide = [torch.empty((rows, -(-out // 8) * 8), dtype=x.dtype, device=x.device) for out in outs]
    ys = [y[:, :out] for y, out in zip(wide, outs, strict=True)]
    if rows:
        flat, config = x.reshape(rows, planes.size), replace(config, split=min(config.split, slabs))
        tiles = -(-rows // config.rows) * -(-planes.out // config.out)
        units = programs = tiles * config.split
        if config.persistent:
            programs = min(units, multiprocessors(x.device) * (3 - config.consumers))
        partial = wide[0]
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
        described = [TensorDescriptor.from_tensor(t, *block(name, config)) for name, t in tensors]
        with torch.cuda.device(x.device):
            cast(Any, _planes_kernel)[(programs,)](
                *described,
                *[None] * (MOST_WEIGHTS - len(outs)),
                wide[0] if bias is None else bias.contiguous(),
                partial,
                wide[0] if counters is None else counters,
                2.0**planes.lift,
                rows,
                planes.out,
                slabs,
                *(sum(outs[:i]) for i in range(1, MOST_WEIGHTS)),
                **constants(planes.fmt, config, bias is not None),
                **options(config),
            )
    return [y.contiguous().view(*x.shape[:-1], y.shape[1]) for y in ys]


def _check(x: Tensor, planes: Planes, outs: Sequence[int], bias: Tensor | None, config: Config) -> None:
    """Shapes that disagree would make the kernel write out of bounds."""
    unlike = x.shape[-1] != planes.size or (bias is not None and bias.shape != (planes.out,))
    if unlike or sum(outs) != planes.out:
        raise MXCompileError(f"a linear of {planes.size} inputs and {planes.out} outputs cannot take {tuple(x.shape)}")
    if len(outs) > MOST_WEIGHTS or (len(outs) > 1 and any(out % config.out for out in outs)):
        raise MXCompileError(f"weights of {list(outs)} outputs are not cut by tiles of {config.out}")


def counters_needed(rows: int, planes: Planes, config: Config) -> int:
    """Warpgroups' shares of the output, each of which needs a counter if K is split."""
    return -(-rows // config.rows) * -(-planes.out // config.out) * config.consumers


@cache
def block(name: str, config: Config) -> tuple[list[int], Any]:
    """What TMA moves at once of a tensor that the kernel takes, and its layout in shared memory."""
    part = config.out // config.consumers
    shape, dtype = {
        "x": ([config.rows, 128], gl.bfloat16),
        "words": ([part // 64, 1, 64, 32], gl.int16),
        "scales": ([part // 64, 1, 64], gl.int32),
        "y": ([config.rows, part], gl.bfloat16),
    }[name]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, dtype)


@cache
def constants(fmt: MXFormat, config: Config, has_bias: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    layout = layout_constants(fmt)
    cut = (config.rows, config.out, config.consumers, config.stages, config.group, has_bias, config.split)
    return {"SHAPE": layout["SHAPE"], "ASSEMBLY": layout["ASSEMBLY"], "CUT": cut}


def options(config: Config) -> dict[str, Any]:
    """What the compiler is told: three warpgroups (one is the producer's) share all registers, two half of them."""
    return {"num_warps": 4, "maxnreg": 168 if config.consumers == 2 else 128, "enable_fp_fusion": True}
