"""Which products can be made of e4m3 numbers, exactly: what weights and activations have to be like.

A 4-bit element times a power of two is an e4m3 number, if that power is not too large or small. So where the scales of
a weight are not too far apart, all of it is e4m3 numbers times one power of two: `largest_span`. The same goes for the
elements of an activation, with one power of two for each token; its scales are not known before it is there. What is
more than `2**13` below its token's largest is rounded to steps of `2**-16` of that (triton/align.py). Elements of MXFP8
E4M3 would lose more so; they are e4m3 numbers only where the model says that they are aligned (`reference.align`).
"""

from typing import Final

from mxcompile.formats import ALIGNED_AS_THEY_ARE, MXFormat, why_not_aligned

FEWEST_TOKENS: Final = 512
"""Fewer are multiplied faster in bfloat16 (benchmarks/fp8_trial.py)."""
TOP_FIELDS: Final = {"mxint4": 20, "mxfp4": 12}
LEAST_FIELDS: Final = {"mxint4": 6, "mxfp4": 1}
"""The exponent fields that a scale may have: its own as a float16 number (integers), that of 0.5 on it as an e4m3
number (floats); see gluon/decode_to_e4m3.py."""
_WHOLE: Final = 14336
_PIECE: Final = 4096
"""The most columns that the tensor core sums, with about 14 bits; sums of them are added in float32
(gluon/fp8_linear.py)."""


def largest_span(fmt: MXFormat) -> int | None:
    """By how many powers of two the scales of a weight may differ; None for a format that is not decoded to e4m3."""
    return TOP_FIELDS[fmt.name] - LEAST_FIELDS[fmt.name] if fmt.name in TOP_FIELDS else None


def columns_at_once(activation: MXFormat, size: int) -> int:
    """How many of `size` columns the tensor core may sum: up to 14336 where a model's activations are of 4 bits, whose
    products have few bits, or MXFP8 that it wants aligned, for speed.

    Normal values lose at most 1.2 times what rounding to bfloat16 alone does, aligned MXFP8 1.4 times (a fiftieth of
    what quantizing to 4 bits does): results/notes.md, 13.
    """
    return _WHOLE if activation.bits != 6 and size <= _WHOLE else _PIECE


def why_not(weight: MXFormat, activation: MXFormat | None, *, aligned: bool = False, fits: bool = True) -> str | None:
    """Why products of such a weight and activation are not made of e4m3 numbers, in a sentence; None if they are.

    aligned: the activation is, by the model. fits: the weight's scales are near enough (`planes.Scaling.top`).
    """
    most = largest_span(weight)
    if most is None:
        return f"{weight.name} weights are no e4m3 numbers"
    if activation is None or not (aligned or activation.name in ALIGNED_AS_THEY_ARE):
        given = "float" if activation is None else activation.name
        known = ", ".join(sorted(ALIGNED_AS_THEY_ARE))
        could = activation is not None and why_not_aligned(activation) is None
        return f"{given} activations are no e4m3 numbers: {known} are" + (
            ", and these if aligned (lower-mx{align=true})" if could else ""
        )
    return None if fits else f"the weight's scales are too far apart for e4m3 numbers: 2**{most} is the most"
