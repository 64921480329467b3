"""Which products can be made of e4m3 numbers, exactly: what weights and activations have to be like.

A 4-bit element times a power of two is an e4m3 number, if that power is not too large or small. So where the scales of
a weight are not too far apart, all of it is e4m3 numbers times one power of two: `largest_span`. The same goes for the
elements of an activation, with one power of two for each token; its scales are not known before it is there. What is
more than `2**13` below its token's largest is rounded to steps of `2**-16` of that (triton_align.py).
"""

from typing import Final

from mxcompile.formats import MXFormat

FEWEST_TOKENS: Final = 512
"""Fewer are multiplied faster in bfloat16 (benchmarks/fp8_trial.py)."""
TOP_FIELDS: Final = {"mxint4": 20, "mxfp4": 30}
LEAST_FIELDS: Final = {"mxint4": 6, "mxfp4": 21}
"""The exponent fields that a scale may have as a float16 number; see fp8_decode.py."""
ACTIVATIONS: Final = frozenset({"mxfp4", "mxint4", "mxfp6_e2m3", "mxfp6_e3m2"})


def largest_span(fmt: MXFormat) -> int | None:
    """By how many powers of two the scales of a weight may differ; None for a format that is not decoded to e4m3."""
    return TOP_FIELDS[fmt.name] - LEAST_FIELDS[fmt.name] if fmt.name in TOP_FIELDS else None


def why_not(weight: MXFormat, activation: MXFormat | None, span: int | None = None) -> str | None:
    """Why products of such a weight and activation are not made of e4m3 numbers, in a sentence; None if they are.

    span: of the weight's scales, in powers of two; None if it is not known.
    """
    most = largest_span(weight)
    if most is None:
        return f"{weight.name} weights are no e4m3 numbers"
    if activation is None or activation.name not in ACTIVATIONS:
        given = "float" if activation is None else activation.name
        return f"{given} activations are no e4m3 numbers: {', '.join(sorted(ACTIVATIONS))} are"
    if span is not None and span > most:
        return f"the weight's scales span 2**{span}, 2**{most} is the most"
    return None
