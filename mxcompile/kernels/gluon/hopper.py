"""Shared by the Gluon kernels for Hopper (sm_90): Gluon under the names of Triton 3.6 or 3.9, and pipeline steps.

Where Triton has no Gluon, `GLUON_UNAVAILABLE` says why, and nothing else here can be used.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import math
from typing import Any

import triton.language as tl

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # The name in Triton 3.6, or else in 3.9.
    fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    send = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
    HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
    jit: Any = gluon.jit
    GLUON_UNAVAILABLE = None
except (ImportError, AttributeError) as error:
    GLUON_UNAVAILABLE = f"this version of Triton lacks what the Gluon kernels need: {error}"
    missing: Any = None
    gl = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = TensorDescriptor = missing
    fetch = send = thread_barrier = HAS_REINTERPRET = missing

    def _undecorated(fn: Any = None, **_: Any) -> Any:
        return fn or _undecorated

    jit = _undecorated


def contiguous(*shape: int) -> tuple[list[int], list[int]]:
    """Shape and strides of a contiguous tensor, as a TensorDescriptor takes them."""
    return list(shape), [math.prod(shape[i + 1 :]) for i in range(len(shape))]


@jit
def next_stage(stage, phase, STAGES: tl.constexpr):
    """The next stage, and the phase of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@jit
def first_tokens(buffer, TOKENS: tl.constexpr):
    """The first TOKENS rows of `buffer` `[tokens, columns]`."""
    return buffer if buffer.shape[0] == TOKENS else buffer.slice(0, TOKENS, dim=0)


@jit
def store_tile(y, m, n, result, buffer):
    """Store `result` `[out, tokens]` to y by TMA through `buffer` `[tokens, out]`, which is free again afterwards.

    If `result` has fewer tokens, the others are stored as what `buffer` holds.
    """
    first_tokens(buffer, result.shape[1]).permute((1, 0)).store(result)
    fence_async_shared()
    send(y, [m, n], buffer)
    tma.store_wait(0)
    thread_barrier()


@jit
def to_coalesced(acc, COALESCED: tl.constexpr):
    """Accumulators `[out, tokens]` of a warpgroup as `[.., 512]`, so that a warp stores contiguous memory, 16 bytes per
    thread; no data moves between threads."""
    BLOCKS: tl.constexpr = acc.shape[0] // 64
    TOKENS: tl.constexpr = acc.shape[1] // 8
    coalesced = (
        acc.reshape([BLOCKS, 4, 2, 8, TOKENS, 4, 2]).permute((0, 4, 1, 3, 5, 2, 6)).reshape([BLOCKS * TOKENS, 512])
    )
    return gl.convert_layout(coalesced, COALESCED, assert_trivial=True)


@jit
def from_coalesced(coalesced, OUT: tl.constexpr, MMA: tl.constexpr):
    """The inverse of `to_coalesced`."""
    BLOCKS: tl.constexpr = OUT // 64
    TOKENS: tl.constexpr = coalesced.shape[0] // BLOCKS
    accumulators = (
        coalesced.reshape([BLOCKS, TOKENS, 4, 8, 4, 2, 2]).permute((0, 2, 5, 3, 1, 4, 6)).reshape([OUT, TOKENS * 8])
    )
    return gl.convert_layout(accumulators, MMA, assert_trivial=True)
