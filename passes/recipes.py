"""Recipes: named pipelines. The only place where a default order of passes is defined."""

from typing import Final

from mxcompile.errors import PipelineError, UnknownNameError
from mxcompile.formats import MXFormat
from mxcompile.passes import PASSES, LowerMX
from mxcompile.pipeline.pipeline import Pipeline

DEFAULT: Final = "w4a8-mxint"
QUICK: Final = "w4a8-mxint-quick"
"""The default without calibration data: a single example is too little for passes that learn."""


def _rounded(weight: str, activation: str | None) -> str:
    return f"round-weights{{format={weight}}} | lower-mx{{weight={weight}{_activation_option(activation)}}}"


def _learned(weight: str, activation: str | None) -> str:
    """The most accurate pipeline; needs calibration data, about 128 windows of 512 tokens.

    Measured (`benchmarks/accuracy.py`): with FP8 activations, GPTQ is more accurate without a fold before it; with
    4-bit activations, it also gains from rotations.
    """
    option = _activation_option(activation)
    tune = f"tune-vectors{{{option[1:]}}}" if option else "tune-vectors"
    fold = "" if activation == "mxfp8_e4m3" else f"awq-fold{{weight={weight}{option}}} | "
    rotate = f"rotate{{weight={weight}{option}}} | " if activation == "mxfp4" else ""
    return (
        f"{fold}{rotate}gptq{{format={weight}{option},correction=0.25}} | {tune} | lower-mx{{weight={weight}{option}}}"
    )


def _activation_option(activation: str | None) -> str:
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
    """All recipes by name, as Pipelines; `str()` of a Pipeline is its text form."""
    return {name: Pipeline.parse(text) for name, text in RECIPES.items()}


def as_pipeline(recipe: str | Pipeline) -> Pipeline:
    """A Pipeline from a recipe's name or a pipeline's text form. Raises UnknownNameError for any other name,
    PipelineError for anything else."""
    if isinstance(recipe, Pipeline):
        return recipe
    if not isinstance(recipe, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PipelineError(f"a recipe is a name, a pipeline's text form or a Pipeline, not {recipe!r}")
    if recipe in RECIPES:
        return Pipeline.parse(RECIPES[recipe])
    if any(mark in recipe for mark in "|{") or recipe.strip() in PASSES:
        return Pipeline.parse(recipe)
    raise UnknownNameError("recipe", recipe, RECIPES)


def weight_formats(pipeline: Pipeline) -> set[MXFormat]:
    """The formats in which a pipeline leaves weights; empty if it does not lower."""
    lowerings = [current for current in pipeline.passes if isinstance(current, LowerMX)]
    return {fmt for step in lowerings for fmt in (step.weight, *step.overrides.values()) if fmt is not None}
