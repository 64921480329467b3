"""Experts with planar weights for many tokens: each token times the weights of its experts. Gluon, Hopper only.

Choices are sorted by expert on the GPU (triton/routing.py), each expert's part padded to whole tiles of tokens. The
kernel of gluon/planes_linear.py then multiplies tile after tile, each with the weight of its expert; how many tiles
there are, it reads from memory, so nothing waits for the GPU. All values between the two matmuls stay in the sorted
order. A tile that is half empty or more is multiplied as a smaller one; the rest of the padding is multiplied too,
whatever it holds, but no row depends on another and none is read back.

The first matmul ends with the gate and its rounding (gated_epilogue.py), where its tiles hold whole channels; else
gate_rows.py follows. The results of the matmuls are rounded to bfloat16, as those of the composition of ops are; the
gate and the weighted sum are computed in float32.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Host code is fully typed; strict checking has no types for Gluon.

from dataclasses import replace
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.gluon import planes_linear
from mxcompile.kernels.gluon.hopper import TensorDescriptor
from mxcompile.kernels.gluon.planes_kernel import _planes_kernel
from mxcompile.kernels.gluon.planes_linear import Config
from mxcompile.kernels.layout.planes import TILE, plane_layout
from mxcompile.kernels.triton import align, gate_rows, routing
from mxcompile.kernels.triton.elements import multiprocessors
from mxcompile.kernels.triton.expert_slices import Stack, check_shapes
from mxcompile.kernels.triton.gates import gate_constants
from mxcompile.kernels.triton.grouped_planes import rounding_constants
from mxcompile.kernels.triton.launches import launch
from mxcompile.kernels.triton.routing import Routing
from mxcompile.numerics.gates import Gate

Rounding: TypeAlias = tuple[MXFormat, ScaleRule]
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
    rounding: Rounding | None,
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
    hidden = _gated(routing.gather(x, routed), up, routed, up_config, gate, rounding)
    y = multiply(hidden, down, routed, down_config)
    return routing.weighted_sum(y, routed, weights, x.dtype)


def _gated(rows: Tensor, up: Stack, routed: Routing, config: Config, gate: Gate, rounding: Rounding | None) -> Tensor:
    """The gate of the products of rows in the sorted order, in as few launches as there are kernels for."""
    if rounding is not None and rounding[0].aligned:
        return align.values(_gated(rows, up, routed, config, gate, None), rounding)
    if why_not_fused(up, config, gate, rounding) is None:
        return gated_multiply(rows, up, routed, config, gate, rounding)
    return gate_rows.gate_rows(multiply(rows, up, routed, config), routed.used, routed.tile, gate, rounding)


def why_not_fused(up: Stack, config: Config, gate: Gate, rounding: Rounding | None) -> str | None:
    """None if `gated_multiply` takes the call, else the reason. rounding: not to an aligned format."""
    if config.out != _OUT:
        return f"a consumer of tiles of {config.out} outputs has no whole channels"
    if not gate.interleaved and up.out % (2 * TILE):
        return f"{up.out // 2} gates are not whole tiles of {TILE} rows"
    if rounding is not None and TILE % rounding[0].block_size:
        return f"blocks of {rounding[0].block_size} do not fit in {TILE} channels"
    return None


def gated_multiply(
    rows: Tensor, up: Stack, routed: Routing, config: Config, gate: Gate, rounding: Rounding | None
) -> Tensor:
    """`multiply`, then gate and rounding, in one launch: `[slots, out / 2]`; only if `why_not_fused` has no reason."""
    h = torch.empty((routed.slots, up.out // 2), dtype=rows.dtype, device=rows.device)
    _launch(rows, up, routed, config, h, gate, rounding)
    return h


def multiply(rows: Tensor, weight: Stack, routed: Routing, config: Config) -> Tensor:
    """Rows in the sorted order `[slots, in]` times the weights of their experts: `[slots, out]`, rounded once."""
    y = torch.empty((routed.slots, weight.out), dtype=rows.dtype, device=rows.device)
    _launch(rows, weight, routed, config, y, None, None)
    return y


def _launch(
    rows: Tensor,
    weight: Stack,
    routed: Routing,
    config: Config,
    y: Tensor,
    gate: Gate | None,
    rounding: Rounding | None,
) -> None:
    planes, config = weight.planes, replace(config, split=1)
    if rows.shape != (routed.slots, planes.size) or config.rows != routed.tile:
        raise MXCompileError(f"rows {tuple(rows.shape)} are not those of experts of {planes.size} inputs and {config}")
    if not y.numel():
        return
    tiles = routed.slots // config.rows * -(-weight.out // config.out)
    programs = min(tiles, multiprocessors(rows.device) * (3 - config.consumers))
    launch(
        _planes_kernel,
        programs,
        *_descriptors(rows, weight, y, config, gate),
        None,
        None,
        y if weight.bias is None else weight.bias.contiguous(),
        y,
        y,
        routed.block_experts,
        routed.block_tokens,
        routed.used,
        2.0**planes.lift,
        0,
        weight.out,
        planes.words.shape[1],
        0,
        0,
        **planes_linear.constants(planes.fmt, config, weight.bias is not None),
        **gate_constants(gate),
        **rounding_constants(rounding),
        **planes_linear.options(config),
    )


def _descriptors(rows: Tensor, weight: Stack, y: Tensor, config: Config, gate: Gate | None) -> list[Any]:
    words = weight.planes.words.view(weight.planes.words.shape[0], -1, 64, 32)
    scales = weight.planes.scales.view(words.shape[0], -1, 64)
    names = ("x", "words", "scales", "y" if gate is None else "gated")
    if gate is not None and not gate.interleaved:
        names = ("x", "paired_words", "paired_scales", "gated")
        words, scales = (_paired(part, weight.out // 2 // TILE) for part in (words, scales))
    tensors = zip(names, (rows, words, scales, y), strict=True)
    return [TensorDescriptor.from_tensor(tensor, *planes_linear.block(name, config)) for name, tensor in tensors]


def _paired(tiles: Tensor, distance: int) -> Tensor:
    """A view `[2, ...]` of tiles: those that begin at a tile, and at one `distance` tiles behind it."""
    shape, stride = tiles.shape, tiles.stride()
    return tiles.as_strided((2, shape[0] - distance, *shape[1:]), (distance * stride[0], *stride))


def _check(x: Tensor, experts: Tensor, weight: Stack) -> None:
    """Shapes that disagree would make the kernels read or write out of bounds."""
    check_shapes(x, weight)
    if len(experts) != len(x):
        raise MXCompileError(f"choices of {len(experts)} rows do not belong to {len(x)} rows")
