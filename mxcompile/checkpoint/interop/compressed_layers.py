"""Which layers of a model compressed-tensors can hold: all reasons against it at once, each with its layers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from torch import Tensor, nn

from mxcompile.checkpoint.interop.element_layouts import STORED, check_scales
from mxcompile.checkpoint.interop.joined_layers import different_by_data_flow, different_by_name
from mxcompile.checkpoint.interop.stored_names import StoredParts
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import CheckpointError
from mxcompile.formats import FORMATS, parse_format
from mxcompile.tensor.weight import MXWeight

GroupBits = tuple[int, int | None]
"""Bits of a group's weights, and of their inputs (None: float)."""
_NOT_IN_VLLM: Final = str(STORED[6])
_LISTED: Final = 3
_ADVICE: Final = "mxcompile.save without format=... saves it unchanged"


def bits_of(weight: MXWeight) -> GroupBits:
    """Bits of a weight and of its input, whose formats are among `STORED`."""
    activation = weight.layout_.activation
    return parse_format(weight.layout_.format).bits, None if activation is None else parse_format(activation).bits


def format_of(value: Tensor) -> str:
    """The formats of a layer with this weight, for people."""
    return named_format(value.layout_.format, value.layout_.activation) if isinstance(value, MXWeight) else "float"


def named_format(weight: str | None, activation: str | None) -> str:
    """The same of names of formats; None is float."""
    return "float" if weight is None else f"{weight} with {activation or 'float'} inputs"


def check_writable(module: nn.Module, values: Mapping[str, Tensor], stored: Mapping[str, StoredParts]) -> None:
    """Raise CheckpointError with every reason for which the module cannot be written, and the layers of each."""
    reasons = [
        (reason, name)
        for name, value in values.items()
        if isinstance(value, MXWeight)
        for reason in _reasons(name, value, _is_linear(module, name, value, stored[name]))
    ]
    formats = {
        part.removesuffix(".weight"): format_of(value)
        for name, value in values.items()
        if value.dim() > 1
        for part in stored[name].names
        if not part.endswith(".bias")
    }
    if lines := by_reason((*reasons, *different_by_name(formats))):
        raise CheckpointError("\n".join(lines))


def notes(module: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """What vLLM does otherwise than the model, with what is written of it."""
    weights = [value for value in values.values() if isinstance(value, MXWeight)]
    pairs = {(value.layout_.format, value.layout_.activation) for value in weights}
    linears = {
        name.removesuffix(".weight"): format_of(value)
        for name, value in values.items()
        if isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Linear) and name.endswith(".weight")
    }
    return [*_cache_notes(module), *vllm_notes(pairs), *by_reason(different_by_data_flow(module, linears))]


def _cache_notes(module: nn.Module) -> list[str]:
    """What `kv_cache_scheme` cannot state: it knows FP8 numbers with one float scale for a tensor or a head."""
    provenance = Provenance.of(module)
    if provenance is None or provenance.cache is None:
        return []
    return [f"kv_cache_scheme has no caches in MX formats ({provenance.cache}), so other programs cache in float"]


def by_reason(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason, with the layers that have it: from (reason, layer) pairs."""
    layers: dict[str, list[str]] = {}
    for reason, layer in reasons:
        layers.setdefault(reason, []).append(layer)
    return [f"{names[0]}: {reason}{_also(names[1:])}" for reason, names in layers.items()]


def vllm_notes(pairs: Iterable[tuple[str, str | None]]) -> Iterator[str]:
    """What vLLM cannot do, or ignores, of weights in these pairs of formats (weight, input) in this file format."""
    weights, inputs = ({str(fmt) for fmt in formats if fmt is not None} for formats in zip(*pairs, strict=True))
    if _NOT_IN_VLLM in weights:
        yield f"vLLM has no scheme for {_NOT_IN_VLLM} in compressed-tensors folders; transformers reads them"
    if inputs and weights != {_NOT_IN_VLLM}:
        yield (
            f"vLLM ignores on Hopper that inputs are rounded to {' and '.join(sorted(inputs))}: there it runs the "
            "weights with bfloat16 inputs; mxcompile's own format serves both as measured"
        )


def float_linears(module: nn.Module, values: Mapping[str, Tensor], stored: Mapping[str, StoredParts]) -> list[str]:
    """Stored names of the layers that stay float: each Linear, and what other programs have as one, such as routers."""
    names: list[str] = []
    for name, value in module.state_dict(keep_vars=True).items():
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(value, MXWeight) or value.dim() not in (2, 3) or isinstance(owner, nn.Embedding):
            continue
        if name in values or isinstance(owner, nn.Linear):  # a tied head has no value of its own
            parts = stored[name].names if name in stored else [name]
            names += [part.removesuffix(".weight") for part in parts if part.endswith(".weight")]
    return names


def _is_linear(module: nn.Module, name: str, weight: MXWeight, stored: StoredParts) -> bool:
    """True for a Linear's weight, and for experts that are stored one by one, if their blocks run along the inputs."""
    path, _, leaf = name.rpartition(".")
    transposed = stored.fused is not None and stored.fused.transposed
    is_linear = leaf == "weight" and isinstance(module.get_submodule(path), nn.Linear)
    return weight.layout_.transposed == transposed and (stored.are_experts or is_linear)


def _reasons(name: str, weight: MXWeight, linear: bool) -> Iterator[str]:
    layout, fmt = weight.layout_, parse_format(weight.layout_.format)
    activation = None if layout.activation is None else parse_format(layout.activation)
    for needed in (fmt, activation):
        if needed is not None and needed not in STORED.values():
            what = "" if needed is fmt else " for inputs"
            yield (
                f"compressed-tensors has no {needed}{what}; of {', '.join(map(str, FORMATS))} it has only "
                f"{', '.join(map(str, STORED.values()))}, in blocks of 32: quantize to these, or {_ADVICE}"
            )
    reasons = {
        "an input that is multiplied by a vector (use awq-fold{multiply=false})": layout.multiplier,
        "an input that is rotated (use a recipe without rotate)": layout.rotation,
        "a weight that is not an nn.Linear's (skip it with exclude)": not linear,
        f"a row of {layout.size} values, not a multiple of 32 (skip it with exclude)": layout.size % 32,
    }
    for what, applies in reasons.items():
        if applies:
            yield f"compressed-tensors cannot hold {what}; {_ADVICE}"
    try:
        check_scales(name, weight.scales)
    except CheckpointError as error:
        yield str(error).removeprefix(f"{name} ")


def _also(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" (also {', '.join(names[:_LISTED])}{more})" if names else ""
