"""Decode one plane of a planar weight (planes.py) to bfloat16 in registers, in Triton kernels; PTX from its layout.

Each bit field of a plane costs at most one shift or rotation and one LOP3; then one fused multiply-add decodes two
elements. The interpreter, which has no PTX, applies the same bit fields with integer operations.
"""

# ruff: noqa: N803, N806  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.planes import BitField, PlaneLayout, plane_layout
from mxcompile.kernels.triton.elements import narrow, widen


@cache
def layout_constants(fmt: MXFormat) -> dict[str, tuple[Any, ...]]:
    """The constexpr arguments that describe a planar layout.

    SHAPE: planes, words, constant, offset. FIELDS: of every plane. ASSEMBLY: PTX of every plane, then of the addend.
    """
    layout = plane_layout(fmt)
    assembly = [_assembly(layout, plane) for plane in range(layout.planes)]
    return {
        "SHAPE": (layout.planes, layout.words, layout.constant, layout.offset),
        "FIELDS": tuple(tuple((int(f.word == 2), f.rotation, f.mask) for f in plane) for plane in layout.fields),
        "ASSEMBLY": (*assembly, _addend_assembly(layout)),
    }


def shift_instruction(field: BitField) -> str | None:
    """PTX that shifts the bits of a field in register %s to their position in the pattern; None if they are there."""
    sources = [bit + field.rotation for bit in range(16) if field.mask >> bit & 1]
    if field.rotation == 0:
        return None
    if max(sources) < 16:
        return f"shr.b32 t, %s, {field.rotation};"
    if min(sources) >= 16:
        return f"shl.b32 t, %s, {16 - field.rotation};"
    return {8: "prmt.b32 t, %s, 0, 0x2301;"}[field.rotation]


def _assembly(layout: PlaneLayout, plane: int) -> str:
    """PTX that decodes two adjacent elements: $0 = value, $1 = first word, $2 = last word, $3 = scales, $5 = addends.

    Scales and addends are bfloat16 pairs in 32-bit registers, of which `scale_pairs` says which half is used; Triton
    passes one for each of the two elements. ptxas needs no instruction to use a half twice.
    """
    half = "l" if plane % 4 < 2 else "h"
    lines = [f"mov.b32 {{l, h}}, $3; mov.b32 s, {{{half}, {half}}};"]
    lines += [f"mov.b32 {{l, h}}, $5; mov.b32 a, {{{half}, {half}}};"] if layout.offset else []
    lines += [f"mov.b32 p, {in_both_halves(layout.constant)};"] if layout.constant else []
    for field in layout.fields[plane]:
        source, shift = "$2" if field.word == 2 else "$1", shift_instruction(field)
        if shift is not None:
            lines.append(shift % source)
            source = "t"
        if layout.constant == 0 and field is layout.fields[plane][0]:
            lines.append(f"and.b32 p, {source}, {in_both_halves(field.mask)};")
        else:
            lines.append(f"lop3.b32 p, {source}, {in_both_halves(field.mask)}, p, 0xEA;")
    lines += [] if layout.offset else ["mov.b32 a, 0x80008000;"]
    return f"{{ .reg .b32 p, t, s, a; .reg .b16 l, h; {' '.join(lines)} fma.rn.bf16x2 $0, p, s, a; }}"


def _addend_assembly(layout: PlaneLayout) -> str:
    """PTX that multiplies both scales of a bfloat16 pair by the offset."""
    offset = int(torch.tensor(float(layout.offset)).to(torch.bfloat16).view(torch.int16)) & 0xFFFF
    return (
        f"{{ .reg .b32 c, z; mov.b32 c, {in_both_halves(offset)}; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, c, z; }}"
    )


def in_both_halves(half: int) -> str:
    """A 16-bit constant in both halves of a register, in PTX."""
    return f"0x{half:04X}{half:04X}"


@triton.jit
def _decode(first, last, scales, plane, FIELDS: tl.constexpr, CONSTANT: tl.constexpr, OFFSET: tl.constexpr):
    """The same as the PTX in plain operations: words `[n, 32]` and scale words `[n]` to float32 `[n, 32]`."""
    pattern = CONSTANT
    for from_last, rotation, mask in FIELDS[plane]:
        word = (last if from_last else first).to(tl.int32) & 0xFFFF
        pattern = pattern | (((word >> rotation) | (word << (16 - rotation))) & mask)
    value = (pattern << 16).to(tl.float32, bitcast=True) + OFFSET  # pyright: ignore[reportAttributeAccessIssue]
    scale = (((scales >> (8 * (plane % 4))) & 0xFF) << 23).to(tl.float32, bitcast=True)
    return widen(narrow(value * scale[:, None], tl.bfloat16))  # pyright: ignore[reportArgumentType]


@triton.jit
def scale_pairs(scales, plane: tl.constexpr):
    """Two scales as bfloat16 in the halves of a 32-bit register: of four planes those of 0 and 2, or of 1 and 3.
    `_assembly` uses the half that belongs to `plane`."""
    shifted = scales << 7 if plane % 2 == 0 else scales >> 1
    return shifted & 0x7F807F80


@triton.jit
def plane_values(
    w0,
    w1,
    w2,
    s0,
    s1,
    plane: tl.constexpr,
    SHAPE: tl.constexpr,
    FIELDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One plane of a tile, `[n, 32]`, from the words and scales of a K-step: bfloat16, or float32 if interpreted."""
    PLANES: tl.constexpr = SHAPE[0]
    WORDS: tl.constexpr = SHAPE[1]
    OFFSET: tl.constexpr = SHAPE[3]
    word = w0 if WORDS == 1 or 2 * plane < PLANES else w1
    scales = s0 if plane < 4 else s1
    if INTERPRETED:
        values = _decode(word, w2, scales, plane, FIELDS, SHAPE[2], OFFSET)
    else:
        pair = scale_pairs(scales, plane)
        addend = pair
        if OFFSET != 0:
            addend = tl.inline_asm_elementwise(ASSEMBLY[PLANES], "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1)
        values = tl.inline_asm_elementwise(
            ASSEMBLY[plane],
            "=r,r,r,r,r,r,r",
            [
                word,
                w2,
                tl.broadcast_to(pair[:, None], word.shape),
                tl.broadcast_to(addend[:, None], word.shape),  # pyright: ignore[reportArgumentType]
            ],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return values
