"""Recipes: named pipelines. The only place where a default order of passes is defined."""

from typing import Final

from mxcompile.calibration.format_costs.gptq_errors import FormatRounding
from mxcompile.errors import PipelineError, UnknownNameError
from mxcompile.formats import MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT4, MXINT6, MXINT8, MXFormat
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.passes import PASSES, Allocate, Gptq, LowerMX, QuantizeCache
from mxcompile.pipeline.pipeline import Pipeline

DEFAULT: Final = "w4a8-mxint"
QUICK: Final = "w4a8-mxint-quick"
"""The default without calibration data: a single example is too little for passes that learn."""
_INTEGERS: Final = (MXINT4, MXINT6, MXINT8)
_FLOATS: Final = (MXFP4, MXFP6_E2M3, MXFP8_E4M3)


def _rounded(weight: str, activation: str | None) -> str:
    return f"round-weights{{format={weight}}} | lower-mx{{weight={weight}{_activation_option(activation)}}}"


def _learned(weight: str, activation: str | None) -> str:
    """The most accurate pipeline; needs calibration data, about 128 windows of 512 tokens.

    Measured (`benchmarks/accuracy.py`, `chains.py`): with FP8 activations, GPTQ is more accurate without a fold before
    it; with 4-bit activations, it also gains from rotations.
    """
    option = _activation_option(activation)
    tune = f"tune-vectors{{{option[1:]}}}" if option else "tune-vectors"
    fold = "" if activation == "mxfp8_e4m3" else f"awq-fold{{weight={weight}{option}}} | "
    rotate = f"rotate{{weight={weight}{option}}} | " if activation == "mxfp4" else ""
    return (
        f"{fold}{rotate}gptq{{format={weight}{option},correction=0.25}} | {tune} | lower-mx{{weight={weight}{option}}}"
    )


def _distilled(weight: str, activation: str) -> str:
    """Vectors, then weights trained too: on a GPU, with about 1000 windows (`benchmarks/learned.py`)."""
    rounded, _, lower = _learned(weight, activation).rpartition(" | ")
    rounding, _, _ = rounded.rpartition(" | ")
    vectors = f"distill{{activation={activation},steps=100,snapshots=2,epochs=5}}"
    weights = f"distill{{activation={activation},train=weights,steps=300,rate=0.015,epochs=5}}"
    return f"{rounding} | {vectors} | {weights} | {lower}"


def _trained(weight: str, activation: str | None) -> str:
    """Weights and vectors trained at once, from where elements were before GPTQ rounded them (`benchmarks/learned.py`).

    Without a fold where inputs are of 8 bits or float: so it was measured.
    """
    option = _activation_option(activation)
    fold = "".join(f"{name}{{weight={weight}{option}}} | " for name in ("awq-fold", "rotate") if activation == "mxfp4")
    inputs = f"{option[1:]}," if option else ""
    train = f"distill{{{inputs}train=all,steps=400,rate=0.001,snapshots=3,epochs=5}}"
    return (
        f"{fold}gptq{{format={weight}{option},correction=0.25,latents=true}} | {train}"
        f" | lower-mx{{weight={weight}{option}}}"
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
_EIGHT_BITS: Final[dict[str, tuple[str, str | None]]] = {
    "w8a8-mxint": ("mxint8", "mxint8"),
    "w8a8-mxfp": ("mxfp8_e4m3", "mxfp8_e4m3"),
}
_MORE_BITS: Final[dict[str, tuple[str, str | None]]] = {
    "w6a6-mxint": ("mxint6", "mxint6"),
    "w6a6-mxfp": ("mxfp6_e2m3", "mxfp6_e2m3"),
    "w8a16-mxint": ("mxint8", None),
    "w6a16-mxfp": ("mxfp6_e2m3", None),
}
_CALIBRATED: Final = {**_FOUR_BITS, **_EIGHT_BITS}
_CACHES: Final = {
    "kv8": "quantize-cache",
    "kv6": "quantize-cache{value=mxint4,window=32,rotate=head}",
    "kv4": "quantize-cache{key=mxint4,value=mxint4,window=32,rotate=head}",
}
"""Caches that lose less than 0.002, 0.012 and 0.02 nats of KL divergence a token (`benchmarks/cache.py`)."""
_CACHED: Final = ("w8a8-mxint", "w4a8-mxint", "w4a4-mxfp")


def _cached(recipe: str, cache: str) -> str:
    return f"{_CACHES[cache]} | {_learned(*_CALIBRATED[recipe])}"


RECIPES: Final[dict[str, str]] = {
    **{name: _learned(*formats) for name, formats in _CALIBRATED.items()},
    **{f"{name}-quick": _rounded(*formats) for name, formats in _CALIBRATED.items()},
    **{name: _rounded(*formats) for name, formats in _MORE_BITS.items()},
    "w4a8-mxint-distilled": _distilled("mxint4", "mxint8"),
    "w4a16-mxfp-distilled": _trained("mxfp4", None),
    "w4a8-mxfp-distilled": _trained("mxfp4", "mxfp8_e4m3"),
    "w4a4-mxfp-distilled": _trained("mxfp4", "mxfp4"),
    **{f"{recipe}-{cache}": _cached(recipe, cache) for recipe in _CACHED for cache in _CACHES},
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


def with_bits(recipe: str | Pipeline, bits: float) -> Pipeline:
    """A recipe that gives each weight one of several formats, `bits` stored bits a weight on average.

    `allocate` goes in front of the first pass that rounds, with integer or floating formats of 4, 6 and 8 bits as the
    recipe has them. Inputs have the recipe's format, but at least the bits of their weights. In front of `gptq` costs
    are of what it leaves, if inputs have one format: otherwise that has not been measured. Raises PipelineError for a
    recipe that chooses formats already or does not lower.
    """
    pipeline = as_pipeline(recipe)
    lowering = next((current for current in pipeline.passes if isinstance(current, LowerMX)), None)
    if lowering is None or any(isinstance(current, Allocate) for current in pipeline.passes):
        reason = "has no lower-mx" if lowering is None else "chooses formats already"
        raise PipelineError(f"{bits:g} bits a weight: the recipe {reason}; add allocate{{...}} to its text yourself")
    kind = _INTEGERS if lowering.weight.is_integer else _FLOATS
    formats = tuple(fmt.with_block(lowering.weight.block_size) for fmt in kind)
    activation = lowering.activation
    rounds = any(isinstance(current, Gptq) for current in pipeline.passes)
    rounding = FormatRounding.GPTQ if rounds else FormatRounding.NEAREST
    if activation is None or activation.bits >= 8:
        allocate = Allocate(formats, bits=bits, rounding=rounding, activation=activation)
    else:  # 8-bit weights are multiplied no faster with inputs of 4 bits
        inputs = tuple(activation if fmt.bits <= activation.bits else fmt for fmt in formats)
        allocate = Allocate(formats, bits=bits, activations=inputs)
    place = next(i for i, current in enumerate(pipeline.passes) if "overrides" in vars(current))
    return Pipeline([*pipeline.passes[:place], allocate, *pipeline.passes[place:]])


def with_cache(recipe: str | Pipeline, cache: str | CacheFormat) -> Pipeline:
    """A recipe that also gives keys and values of generation a format, as `CacheFormat.parse` reads it.

    `quantize-cache` goes first: it may rotate values by the weights that are rounded later, and passes that learn then
    see the attention that generation will compute. Raises PipelineError for a recipe that chooses a format already.
    """
    pipeline = as_pipeline(recipe)
    if any(isinstance(current, QuantizeCache) for current in pipeline.passes):
        raise PipelineError(f"cache {cache}: the recipe has a quantize-cache already; change its options in the text")
    form = CacheFormat.parse(cache) if isinstance(cache, str) else cache
    return Pipeline([*Pipeline.parse(f"quantize-cache{{{form}}}").passes, *pipeline.passes])


def weight_formats(pipeline: Pipeline) -> set[MXFormat]:
    """The formats in which a pipeline leaves weights; empty if it does not lower."""
    lowerings = [current for current in pipeline.passes if isinstance(current, LowerMX)]
    chosen = [fmt for current in pipeline.passes if isinstance(current, Allocate) for fmt in current.formats]
    named = [fmt for step in lowerings for fmt in (step.weight, *step.overrides.values())]
    return {fmt for fmt in (*named, *(chosen if lowerings else ())) if fmt is not None}
