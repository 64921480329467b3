"""Named pipelines: the one place where a default order is written."""

from typing import Final

from mxcompile.errors import UnknownNameError
from mxcompile.passes import PASSES
from mxcompile.pipeline.pipeline import Pipeline

DEFAULT: Final = "w4a8-mxint"
QUICK: Final = "w4a8-mxint-quick"
"""The default without calibration data: one token window is nothing to learn from."""


def _rounded(weight: str, activation: str | None) -> str:
    return f"round-weights{{format={weight}}} | lower-mx{{weight={weight}{_input(activation)}}}"


def _learned(weight: str, activation: str | None) -> str:
    """The most accurate: needs calibration data, 128 windows of 512 tokens or so.

    With 8-bit floating inputs GPTQ does better without a fold in front of it, with 4-bit ones also after rotations
    (`benchmarks/accuracy.py`).
    """
    given = _input(activation)
    prepared = f"{{{given[1:]}}}" if given else ""
    fold = "" if activation == "mxfp8_e4m3" else f"awq-fold{{weight={weight}{given}}} | "
    turn = f"rotate{{weight={weight}{given}}} | " if activation == "mxfp4" else ""
    return (
        f"{fold}{turn}gptq{{format={weight}{given},correction=0.25}} | tune-vectors{prepared} | "
        f"lower-mx{{weight={weight}{given}}}"
    )


def _input(activation: str | None) -> str:
    return f",activation={activation}" if activation else ""


_FOUR_BITS: Final[dict[str, tuple[str, str | None]]] = {
    "w4a8-mxint": ("mxint4", "mxint8"),
    "w4a8-mxfp": ("mxfp4", "mxfp8_e4m3"),
    "w4a4-mxfp": ("mxfp4", "mxfp4"),
    "w4a16-mxint": ("mxint4", None),
    "w4a16-mxfp": ("mxfp4", None),
}
_MORE_BITS: Final[dict[str, tuple[str, str | None]]] = {
    "w8a8-mxint": ("mxint8", "mxint8"),
    "w8a8-mxfp": ("mxfp8_e4m3", "mxfp8_e4m3"),
    "w6a6-mxint": ("mxint6", "mxint6"),
    "w6a6-mxfp": ("mxfp6_e2m3", "mxfp6_e2m3"),
    "w8a16-mxint": ("mxint8", None),
    "w6a16-mxfp": ("mxfp6_e2m3", None),
}
RECIPES: Final[dict[str, str]] = {
    **{name: _learned(*formats) for name, formats in _FOUR_BITS.items()},
    **{f"{name}-quick": _rounded(*formats) for name, formats in _FOUR_BITS.items()},
    **{name: _rounded(*formats) for name, formats in _MORE_BITS.items()},
}


def recipes() -> dict[str, Pipeline]:
    """Every recipe by name, as a Pipeline; `str()` of one is its text."""
    return {name: Pipeline.parse(text) for name, text in RECIPES.items()}


def as_pipeline(recipe: str | Pipeline) -> Pipeline:
    """A recipe's name, a Pipeline, or its text form, as a Pipeline. Raises UnknownNameError for a name of neither."""
    if isinstance(recipe, Pipeline):
        return recipe
    if recipe in RECIPES:
        return Pipeline.parse(RECIPES[recipe])
    if any(mark in recipe for mark in "|{") or recipe.strip() in PASSES:
        return Pipeline.parse(recipe)
    raise UnknownNameError("recipe", recipe, RECIPES)
