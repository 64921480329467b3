"""What kernels in Gluon for Hopper (sm_90) share: its parts, as Triton 3.6 or 3.9 names them, and steps of a pipeline.

Where Triton has no Gluon, `NO_GLUON` says so, and nothing else here can be used.
"""

# ruff: noqa: N803, N806  (upper case marks what is known at compile time, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# As in triton/elements.py: strict checking has nothing true to say about jit functions.

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

    # Triton 3.6, or what these are called in 3.9.
    fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    send = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
    NEW = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
    jit: Any = gluon.jit
    NO_GLUON = None
except (ImportError, AttributeError) as error:
    NO_GLUON = f"this version of Triton lacks what the Gluon kernels need: {error}"
    nothing: Any = None
    gl = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = TensorDescriptor = nothing
    fetch = send = thread_barrier = NEW = nothing

    def _undecorated(fn: Any = None, **_: Any) -> Any:
        return fn or _undecorated

    jit = _undecorated


@jit
def next_stage(stage, phase, STAGES: tl.constexpr):
    """The stage after one, and the phase of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@jit
def send_result(y, m, n, result, buffer):
    """`result` `[out, tokens]` to y through `buffer` `[tokens, out]`, which may be written again afterwards."""
    buffer.permute((1, 0)).store(result)
    fence_async_shared()
    send(y, [m, n], buffer)
    tma.store_wait(0)
    thread_barrier()


@jit
def in_lines(acc, LINES: tl.constexpr):
    """Sums `[out, tokens]` of a warpgroup as `[.., 512]`, where a warp's lie side by side, 16 bytes a thread; nothing
    moves between threads."""
    BLOCKS: tl.constexpr = acc.shape[0] // 64
    TOKENS: tl.constexpr = acc.shape[1] // 8
    lines = acc.reshape([BLOCKS, 4, 2, 8, TOKENS, 4, 2]).permute((0, 4, 1, 3, 5, 2, 6)).reshape([BLOCKS * TOKENS, 512])
    return gl.convert_layout(lines, LINES, assert_trivial=True)


@jit
def from_lines(lines, OUT: tl.constexpr, MMA: tl.constexpr):
    """The inverse of `in_lines`."""
    BLOCKS: tl.constexpr = OUT // 64
    TOKENS: tl.constexpr = lines.shape[0] // BLOCKS
    sums = lines.reshape([BLOCKS, TOKENS, 4, 8, 4, 2, 2]).permute((0, 2, 5, 3, 1, 4, 6)).reshape([OUT, TOKENS * 8])
    return gl.convert_layout(sums, MMA, assert_trivial=True)
