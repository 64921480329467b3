"""Which matmuls can run on FP8 (e4m3) tensor cores with exact operands: conditions on weights and activations.

A 4-bit element times a power of two is an e4m3 number unless that power is too large or too small. A weight whose
scales are close enough (`largest_span`) is therefore e4m3 numbers times a single power of two. So is each token of an
activation, but its scales are known only at run time: elements more than `2**13` below the largest of their token are
rounded to multiples of `2**-16` of it (triton/align.py). MXFP8 E4M3 activations would lose more; they use FP8 tensor
cores only in the aligned format (`reference.align`).
"""

from typing import Final

from mxcompile.formats import E4M3_COMPATIBLE, MXFP8_E4M3, MXFormat

MIN_TOKENS: Final = 512
"""With fewer tokens the bfloat16 kernels are faster."""
MAX_EXPONENT_FIELD: Final = {"mxint4": 20, "mxfp4": 12}
MIN_EXPONENT_FIELD: Final = {"mxint4": 6, "mxfp4": 1}
"""The exponent fields allowed for a scale: of the scale itself as a float16 number (integers), of 0.5 times the scale
as an e4m3 number (floats); see gluon/decode_to_e4m3.py."""
_LONG_ACCUMULATION: Final = 14336
_SHORT_ACCUMULATION: Final = 4096
"""Columns accumulated by the FP8 tensor core, with about 14 bits. Longer K is split into chunks, whose partial sums are
added in float32 (gluon/fp8_linear.py)."""


def largest_span(fmt: MXFormat) -> int | None:
    """The largest log2 ratio of a weight's scales; None for a format that is not decoded to e4m3."""
    return MAX_EXPONENT_FIELD[fmt.name] - MIN_EXPONENT_FIELD[fmt.name] if fmt.name in MAX_EXPONENT_FIELD else None


def columns_per_accumulation(activation: MXFormat, size: int) -> int:
    """How many of `size` columns the FP8 tensor core may accumulate before the partial sum is added in float32.

    All of them, up to 14336, for 4-bit activations, whose products have few bits, and for MXFP8, which the model aligns
    for speed; else 4096. On normally distributed values the error is at most 1.2 times that of rounding to bfloat16,
    with aligned MXFP8 1.4 times (a fiftieth of the error of 4-bit quantization): docs/kernels.md.
    """
    return _LONG_ACCUMULATION if activation.bits != 6 and size <= _LONG_ACCUMULATION else _SHORT_ACCUMULATION


def why_not(weight: MXFormat, activation: MXFormat | None, *, fits: bool = True) -> str | None:
    """Why such a weight and activation cannot use FP8 tensor cores, in a sentence; None if they can.

    fits: the weight's scales are close enough (`planes.PlanarScaling.top`).
    """
    span = largest_span(weight)
    if span is None:
        return f"{weight.name} weights are not exact in e4m3"
    if activation is None or not (activation.aligned or activation.name in E4M3_COMPATIBLE):
        name = "float" if activation is None else activation.name
        compatible = ", ".join(sorted(E4M3_COMPATIBLE))
        aligned = f", and {MXFP8_E4M3.with_alignment()}" if name == MXFP8_E4M3.name else ""
        return f"{name} activations are not exact in e4m3: {compatible} are{aligned}"
    return None if fits else f"the weight's scales are too far apart for e4m3: 2**{span} is the most"
