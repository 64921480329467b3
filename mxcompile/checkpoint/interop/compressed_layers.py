"""Which layers of a model compressed-tensors can hold: all reasons against it at once, each with its layers."""

from collections.abc import Iterator, Mapping
from typing import Final

from torch import Tensor, nn

from mxcompile.checkpoint.interop.element_layouts import STORED, check_scales
from mxcompile.checkpoint.interop.stored_names import StoredParts
from mxcompile.errors import CheckpointError
from mxcompile.formats import FORMATS, parse_format
from mxcompile.tensor.weight import MXWeight

GroupBits = tuple[int, int | None]
"""Bits of a group's weights, and of their inputs (None: float)."""
_JOINED: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Layers that vLLM runs as one, so that they need one format."""
_EXPERTS: Final = ".experts."
_LISTED: Final = 3
_ADVICE: Final = "mxcompile.save without format=... saves it unchanged"


def bits_of(weight: MXWeight) -> GroupBits:
    """Bits of a weight and of its input, whose formats are among `STORED`."""
    activation = weight.layout_.activation
    return parse_format(weight.layout_.format).bits, None if activation is None else parse_format(activation).bits


def check_writable(module: nn.Module, values: Mapping[str, Tensor], stored: Mapping[str, StoredParts]) -> None:
    """Raise CheckpointError with every reason for which the module cannot be written, and the layers of each."""
    layers: dict[str, list[str]] = {}
    for name, value in values.items():
        if isinstance(value, MXWeight):
            for reason in _reasons(name, value, _is_linear(module, name, value, stored[name])):
                layers.setdefault(reason, []).append(name)
    for reason, names in _joined_differently(values, stored):
        layers.setdefault(reason, []).append(names)
    if layers:
        raise CheckpointError("\n".join(f"{names[0]}: {reason}{_also(names[1:])}" for reason, names in layers.items()))


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


def _joined_differently(values: Mapping[str, Tensor], stored: Mapping[str, StoredParts]) -> Iterator[tuple[str, str]]:
    """(reason, layers) for layers of different formats that vLLM runs as one."""
    formats: dict[str, dict[str, str]] = {}
    for name, value in values.items():
        layout = value.layout_ if isinstance(value, MXWeight) else None
        fmt = "float" if layout is None else f"{layout.format} with {layout.activation or 'float'} inputs"
        for part in stored[name].names if value.dim() > 1 else ():
            if part.endswith(".bias"):
                continue
            path = part.removesuffix(".weight")
            parent, _, leaf = path.rpartition(".")
            for joined in _JOINED:
                if leaf in joined:
                    formats.setdefault(f"{parent}: {', '.join(joined)}", {})[leaf] = fmt
            if _EXPERTS in path:
                formats.setdefault(f"{path.partition(_EXPERTS)[0]}.experts", {})[leaf] = fmt
    for layers, of_each in formats.items():
        if len(set(of_each.values())) > 1:
            listed = ", ".join(f"{leaf} {fmt}" for leaf, fmt in of_each.items())
            yield f"vLLM runs these layers as one and needs one format for them, not {listed}", layers


def _also(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" (also {', '.join(names[:_LISTED])}{more})" if names else ""
