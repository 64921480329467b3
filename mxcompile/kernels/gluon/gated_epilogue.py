"""The gate of an expert at the end of its first matmul, in gluon/planes_kernel.py: store f(gate) * up instead of both.

A consumer has 128 rows of a tile: those of 64 gates and of the values that belong to them. It writes them to shared
memory as bfloat16 `[tokens, 128]`, as it would store them, and reads them back with gate and value of a channel in the
same thread. The result is computed in float32, rounded to bfloat16 and, if asked, to an MX format, as the composition
of ops does.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton.language as tl

from mxcompile.kernels.gluon.hopper import (
    fence_async_shared,
    first_tokens,
    gl,
    jit,
    send,
    thread_barrier,
    tma,
)
from mxcompile.kernels.triton.gates import gated
from mxcompile.kernels.triton.quantize import round_to_elements
from mxcompile.kernels.triton.reductions import maximum


@jit
def channel_rows(channel, ROWS: tl.constexpr, n_size, LAYOUT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The rows of the weight in a consumer's share that begins at `channel`, and which of them exist."""
    row = gl.arange(0, ROWS, LAYOUT)
    if INTERLEAVED:
        n = 2 * channel + row
        inside = n < n_size
    else:
        inner = n_size // 2
        mine = channel + row % (ROWS // 2)
        n = mine + row // (ROWS // 2) * inner
        inside = mine < inner
    return n, inside


@jit
def store_gated(
    h,
    m,
    channel,
    result,
    buffer,
    lower,
    upper,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Store the gate of `result` `[128, tokens]` to h at token `m` and `channel`.

    buffer: shared memory `[tile, 128]`; `lower` and `upper` are its halves `[tile, 64]`. Tokens beyond those of
    `result` are stored as what the buffer holds.
    """
    TOKENS: tl.constexpr = result.shape[1]
    first_tokens(buffer, TOKENS).permute((1, 0)).store(result)
    thread_barrier()
    if INTERLEAVED:
        PAIRS: tl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
        gate, up = first_tokens(buffer, TOKENS).load(PAIRS).reshape([TOKENS, 64, 2]).split()
    else:
        HALF: tl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        gate = first_tokens(lower, TOKENS).load(HALF)
        up = first_tokens(upper, TOKENS).load(HALF)
    values = gated(gate.to(gl.float32), up.to(gl.float32), GATE).to(gl.bfloat16)
    if ROUNDING is not None:
        values = _rounded(values.to(gl.float32), ROUNDING).to(gl.bfloat16)
    thread_barrier()
    first_tokens(lower, TOKENS).store(values)
    fence_async_shared()
    thread_barrier()
    send(h, [m, channel], lower)
    tma.store_wait(0)
    thread_barrier()


@jit
def _rounded(values, ROUNDING: tl.constexpr):
    """Float32 values `[tokens, 64]` rounded to elements times the scales of their blocks."""
    bits = values.to(gl.int32, bitcast=True).reshape([values.shape[0], 64 // ROUNDING[0], ROUNDING[0]])
    amax = gl.reduce(bits & 0x7FFFFFFF, 2, maximum).expand_dims(2)
    rounded = round_to_elements(
        bits, amax, ROUNDING[1], ROUNDING[2], ROUNDING[3], ROUNDING[4], ROUNDING[5], ROUNDING[6], ROUNDING[7]
    )
    return rounded.reshape([values.shape[0], 64])
