"""The product of the kernels of experts (grouped_planes.py, expert_sums.py): a part of K for each warp of a program.

    acc[slice, out, choice] += plane[slice, out, 128] @ x[slice, 128, choice]

In planes_linear.py parts of K of one output are programs of their own and meet in memory (split-K). Here each warp has
its own part, a *slice*: one batched product with the warps along the batch, and its sum over the slices in shared
memory. The experts layer of few tokens is bound by latencies, and a semaphore costs several accesses to memory.

There are always as many warps as slices: products of two slices a warp were wrong (Triton 3.6, H200).
"""

# ruff: noqa: N803  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.kernels.layout.planes import TILE, PlanarWeight, plane_layout
from mxcompile.kernels.triton.decode_planes import layout_constants, plane_values
from mxcompile.kernels.triton.planes_linear import concatenate_planes, multiply


@dataclass(frozen=True)
class Config:
    """A program computes `out` rows of a weight for up to `choices` choices; `slices` warps have a part of K each.

    parts: how many slices have parts of the same choice in `multiply_and_sum`; in a grouped matmul all do. held: how
    many K-steps of a slice are loaded into registers ahead (held_slices.py); 0: loads go through shared memory in a
    pipeline of `stages`. decoded: what is held is decoded ahead, too, in `multiply_and_sum` alone, where it is all of a
    slice. registers: limit per thread, 0 for the compiler's choice. dependent, early: see grouped_planes.py.
    """

    choices: int = 1
    out: int = 64
    slices: int = 8
    parts: int = 1
    stages: int = 3
    held: int = 0
    decoded: bool = False
    registers: int = 0
    dependent: bool = False
    early: bool = False

    @property
    def halves(self) -> int:
        """Parts of K among the 16 rows of a tensor-core instruction: two if a program has 8 rows (held_slices.py)."""
        return 16 // min(self.out, 16)


@dataclass(frozen=True)
class Stack:
    """The weights of all experts: planar, `count * out` rows, and their biases `[count, out]`, or None."""

    planes: PlanarWeight
    count: int
    bias: Tensor | None

    @property
    def out(self) -> int:
        """Rows of one expert, a multiple of 64."""
        return self.planes.out // self.count


def check_shapes(x: Tensor, stack: Stack) -> None:
    """Shapes that disagree would make the kernel read or write out of bounds."""
    if x.dim() != 2 or x.shape[1] != stack.planes.size or stack.out % TILE or stack.planes.out % stack.count:
        raise MXCompileError(
            f"{stack.count} experts of {stack.planes.size} inputs, {stack.planes.out} outputs in all, cannot take "
            f"{tuple(x.shape)}"
        )
    if stack.bias is not None and stack.bias.shape != (stack.count, stack.out):
        raise MXCompileError(f"experts of {stack.out} outputs cannot take a bias of shape {tuple(stack.bias.shape)}")


def constants(planes: PlanarWeight, config: Config, parts: int) -> dict[str, Any]:
    """The constexpr arguments of both kernels that follow from weight and config."""
    k_steps, parts = planes.words.shape[1], parts * config.halves
    uneven = k_steps % parts != 0
    steps = -(-k_steps // parts)
    return {
        **layout_constants(planes.fmt),
        "TILE_M": config.choices * config.halves,
        "TILE_N": config.out * config.halves,
        "SLICES": config.slices,
        "HELD": min(config.held, steps),
        "STEPS": steps if config.held else 0,
        "UNEVEN": uneven,
        "PADDED": uneven or planes.size % plane_layout(planes.fmt).columns != 0,
        "DEPENDENT": config.dependent,
        "EARLY": config.early,
    }


def options(config: Config) -> dict[str, Any]:
    """Compiler options."""
    return {
        "num_warps": config.slices,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
        **({"launch_pdl": True} if config.dependent else {}),
        **({"maxnreg": config.registers} if config.registers else {}),
    }


@triton.jit
def chosen_expert(experts, index, inside, count):
    """Numbers of experts as int32, -1 for those that are none."""
    number = tl.load(experts + index, mask=inside, other=-1)
    return tl.where((number >= 0) & (number < count), number, -1).to(tl.int32)


@triton.jit
def _load(pointers, mask, POLICY: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(pointers, mask=tl.broadcast_to(mask, pointers.shape), other=0, eviction_policy=POLICY)
    else:
        values = tl.load(pointers, eviction_policy=POLICY)
    return values


@triton.jit
def _load_k_step(w, s, mask, SHAPE: tl.constexpr, MASKED: tl.constexpr):
    """Words and scales of a K-step; those that the format lacks repeat others."""
    w0 = _load(w, mask[:, None], "evict_first", MASKED)
    w1 = _load(w + 2048, mask[:, None], "evict_first", MASKED) if SHAPE[1] > 1 else w0
    w2 = _load(w + 4096, mask[:, None], "evict_first", MASKED) if SHAPE[1] > 2 else w0
    s0 = _load(s, mask, "", MASKED)
    s1 = _load(s + 64, mask, "", MASKED) if SHAPE[0] > 4 else s0
    return w0, w1, w2, s0, s1


@triton.jit
def multiply_slices(
    rows,
    inside,
    words,
    scales,
    tile,
    row,
    stored,
    count,
    k_size,
    k_steps,
    PARTS: tl.constexpr,
    SOME: tl.constexpr,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SLICES: tl.constexpr,
    UNEVEN: tl.constexpr,
    PADDED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The products `[SLICES, TILE_N, TILE_M]` of each slice; slice s has K-steps `s % PARTS + i * PARTS` for i < count.

    rows, inside: rows of x, `[SLICES or 1, 1, TILE_M]`. tile, row: position of each row of the weight,
    `[SLICES * TILE_N]`; stored: whether it is to be read, if only SOME are.
    """
    part_of_row = tl.arange(0, SLICES * TILE_N) // TILE_N % PARTS
    part = (tl.arange(0, SLICES) % PARTS)[:, None, None]
    first = tile.to(tl.int64) * k_steps + part_of_row
    w = words + (first * (SHAPE[1] * 64 * 32) + row * 32)[:, None] + tl.arange(0, 32)[None, :]
    s = scales + first * (SHAPE[0] // 4 * 64) + row
    acc = tl.full((SLICES, TILE_N, TILE_M), 0.0, tl.float32)
    for i in range(count):
        mask = stored & (i * PARTS + part_of_row < k_steps) if UNEVEN else stored
        w0, w1, w2, s0, s1 = _load_k_step(w, s, mask, SHAPE, SOME or UNEVEN)
        for quad in tl.static_range(SHAPE[0] // 4):
            values = concatenate_planes(
                plane_values(w0, w1, w2, s0, s1, 4 * quad, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
                plane_values(w0, w1, w2, s0, s1, 4 * quad + 1, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
                plane_values(w0, w1, w2, s0, s1, 4 * quad + 2, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
                plane_values(w0, w1, w2, s0, s1, 4 * quad + 3, SHAPE, FIELDS, ASSEMBLY, INTERPRETED),
            )
            k = (i * PARTS + part) * (SHAPE[0] * 32) + quad * 128 + tl.arange(0, 128)[None, :, None]
            pointers = rows + k
            present = inside & (k < k_size) if PADDED else inside
            x = tl.load(pointers, mask=tl.broadcast_to(present, pointers.shape), other=0.0)
            acc = multiply(tl.reshape(values, (SLICES, TILE_N, 128)), x, acc, INTERPRETED)
        w += PARTS * SHAPE[1] * 64 * 32
        s += PARTS * (SHAPE[0] // 4 * 64)
    return acc
