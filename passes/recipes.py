"""Named pipelines: the one place where a default order is written."""

from typing import Final

from mxcompile.pipeline import Pipeline

DEFAULT: Final = "w4a8-mxint"


def _rounded(weight: str, activation: str | None) -> str:
    operands = f"weight={weight}" + (f",activation={activation}" if activation else "")
    return f"round-weights{{format={weight}}} | lower-mx{{{operands}}}"


RECIPES: Final[dict[str, str]] = {
    "w8a8-mxint": _rounded("mxint8", "mxint8"),
    "w8a8-mxfp": _rounded("mxfp8_e4m3", "mxfp8_e4m3"),
    "w6a6-mxint": _rounded("mxint6", "mxint6"),
    "w6a6-mxfp": _rounded("mxfp6_e2m3", "mxfp6_e2m3"),
    "w4a8-mxint": _rounded("mxint4", "mxint8"),
    "w4a8-mxfp": _rounded("mxfp4", "mxfp8_e4m3"),
    "w4a4-mxfp": _rounded("mxfp4", "mxfp4"),
    "w8a16-mxint": _rounded("mxint8", None),
    "w4a16-mxint": _rounded("mxint4", None),
    "w4a16-mxfp": _rounded("mxfp4", None),
    "w6a16-mxfp": _rounded("mxfp6_e2m3", None),
}


def recipes() -> dict[str, Pipeline]:
    """Every recipe by name, as a Pipeline; `str()` of one is its text."""
    return {name: Pipeline.parse(text) for name, text in RECIPES.items()}
