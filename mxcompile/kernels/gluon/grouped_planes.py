"""Experts with planar weights for many tokens: each token times the weights of its experts. Gluon, Hopper only.

Choices are sorted by expert on the GPU (triton/routing.py), each expert's part padded to whole tiles of tokens. The
kernel of gluon/planes_linear.py then multiplies tile after tile, each with the weight of its expert; how many tiles
there are, it reads from memory, so nothing waits for the GPU. All values between the two matmuls stay in the sorted
order. Rows in padding are multiplied too, whatever they hold, but no row depends on another and none is read back.

The results of the matmuls are rounded to bfloat16, as those of the composition of ops are; the gate and the weighted
sum are computed in float32.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Host code is fully typed; strict checking has no types for Gluon.

from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.gluon import planes_linear
from mxcompile.kernels.gluon.hopper import TensorDescriptor
from mxcompile.kernels.gluon.planes_kernel import _planes_kernel
from mxcompile.kernels.gluon.planes_linear import Config
from mxcompile.kernels.layout.planes import plane_layout
from mxcompile.kernels.triton import align, gate_rows, routing
from mxcompile.kernels.triton.elements import multiprocessors
from mxcompile.kernels.triton.expert_slices import Stack, check_shapes
from mxcompile.kernels.triton.routing import Routing
from mxcompile.numerics.gates import Gate

_SHARED_BYTES: Final = 220_000
_OUT: Final = 256
_TILE_ROWS: Final = ((24, 32), (80, 64))
"""(most tokens of an expert on average, tokens of a tile). Measured on an H200 with 128 experts: with 16 tokens each,
tiles of 32 are 1.2 times as fast as tiles of 64; with 128 each, tiles of 128 beat those of 64 by 4 %, with 512 each by
27 %, and those of 256 by 19 % or more."""
_LARGEST_TILE: Final = 128


def supports(x: Tensor) -> str | None:
    """None if `grouped_linear` and `experts` support x `[rows, in]`, else the reason."""
    return planes_linear.supports(x)


def config_for(weight: Stack, choices: int) -> Config:
    """The tile config for that many choices: tiles of about as many tokens as an expert gets."""
    tokens = choices / min(weight.count, choices)
    rows = next((rows for most, rows in _TILE_ROWS if tokens <= most), _LARGEST_TILE)
    return Config(rows, _OUT, stages_that_fit(weight.planes.fmt, rows, _OUT))


def stages_that_fit(fmt: MXFormat, rows: int, out: int) -> int:
    """Loads of 128 columns that shared memory holds."""
    words = min(plane_layout(fmt).words, 2)
    return min(8, _SHARED_BYTES // (rows * 256 + out * (64 * words + 4)))


def grouped_linear(x: Tensor, experts: Tensor, weight: Stack, config: Config | None = None) -> Tensor:
    """`x[r] @ W[experts[r, j]].T + bias` in row `r * k + j`: x `[rows, in]` bfloat16, experts (integers) `[rows, k]`.

    Zeros for numbers of no expert. Returns `[rows * k, out]`. Only for calls that `supports` accepts.
    """
    _check(x, experts, weight)
    config = config or config_for(weight, max(1, experts.numel()))
    routed = routing.route(experts, weight.count, config.rows)
    return routing.ungather(multiply(routing.gather(x, routed), weight, routed, config), routed)


def experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Stack,
    down: Stack,
    gate: Gate,
    rounding: tuple[MXFormat, ScaleRule] | None,
    configs: tuple[Config, Config] | None = None,
) -> Tensor:
    """The sum of the chosen experts of each token, `down(gate(up(x)))`, with weights `[tokens, k]` of any float dtype.

    x `[tokens, hidden]` bfloat16, experts (integers) `[tokens, k]`; rounding: of the value after the gate. configs: of
    up and down, for as many rows. Returns `[tokens, hidden]`. Only for calls that `supports` accepts.
    """
    _check(x, experts, up)
    if (up.out, up.count) != (2 * down.planes.size, down.count):
        raise MXCompileError(f"experts of {up.out} gates and values cannot feed those of {down.planes.size} inputs")
    choices = max(1, experts.numel())
    up_config, down_config = configs or (config_for(up, choices), config_for(down, choices))
    routed = routing.route(experts, up.count, up_config.rows)
    hidden = multiply(routing.gather(x, routed), up, routed, up_config)
    hidden = _gated(hidden, routed, gate, rounding)
    y = multiply(hidden, down, routed, down_config)
    return routing.weighted_sum(y, routed, weights, x.dtype)


def _gated(hidden: Tensor, routed: Routing, gate: Gate, rounding: tuple[MXFormat, ScaleRule] | None) -> Tensor:
    if rounding is None or not rounding[0].aligned:
        return gate_rows.gate_rows(hidden, routed.used, routed.tile, gate, rounding)
    return align.values(gate_rows.gate_rows(hidden, routed.used, routed.tile, gate, None), rounding)


def multiply(rows: Tensor, weight: Stack, routed: Routing, config: Config) -> Tensor:
    """Rows in the sorted order `[slots, in]` times the weights of their experts: `[slots, out]`, rounded once."""
    config = replace(config, split=1)
    planes, out, slots = weight.planes, weight.out, routed.slots
    if rows.shape != (slots, planes.size) or config.rows != routed.tile:
        raise MXCompileError(f"rows {tuple(rows.shape)} are not those of experts of {planes.size} inputs and {config}")
    y = torch.empty((slots, out), dtype=rows.dtype, device=rows.device)
    if not y.numel():
        return y
    tiles = slots // config.rows * -(-out // config.out)
    tensors = {
        "x": rows,
        "words": planes.words.view(planes.words.shape[0], -1, 64, 32),
        "scales": planes.scales.view(planes.words.shape[0], -1, 64),
        "y": y,
    }
    descriptors = [TensorDescriptor.from_tensor(t, *planes_linear.block(name, config)) for name, t in tensors.items()]
    with torch.cuda.device(rows.device):
        cast(Any, _planes_kernel)[(min(tiles, multiprocessors(rows.device) * (3 - config.consumers)),)](
            *descriptors,
            None,
            None,
            y if weight.bias is None else weight.bias.contiguous(),
            y,
            y,
            routed.block_experts,
            routed.used,
            2.0**planes.lift,
            0,
            out,
            planes.words.shape[1],
            0,
            0,
            **planes_linear.constants(planes.fmt, config, weight.bias is not None),
            **planes_linear.options(config),
        )
    return y


def _check(x: Tensor, experts: Tensor, weight: Stack) -> None:
    """Shapes that disagree would make the kernels read or write out of bounds."""
    check_shapes(x, weight)
    if len(experts) != len(x):
        raise MXCompileError(f"choices of {len(experts)} rows do not belong to {len(x)} rows")
