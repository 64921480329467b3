"""Checkpoints as llm-compressor writes them and `compressed-tensors` reads them: MXFP4, MXFP6 (E2M3), MXFP8 (E4M3).

    q_proj.weight (mxfp4)      <-> q_proj.weight_packed uint8 [out, in/2], q_proj.weight_scale uint8 [out, in/32]
    q_proj.weight (mxfp6_e2m3) <-> q_proj.weight_packed uint8 [out, in*3/4], q_proj.weight_scale
    q_proj.weight (mxfp8_e4m3) <-> q_proj.weight float8_e4m3fn [out, in], q_proj.weight_scale

`quantization_config` in config.json says which Linears, and what their inputs are rounded to at run time. Scales of
inputs are chosen by the program that runs the model: there is no place for a rule. compressed-tensors' own is `even`
for MXFP4 and MXFP6 and, but for an amax of exactly 1.75 * 2**n, `rceil` for MXFP8; these are what a loaded model gets.
Checked with compressed-tensors 0.20.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.checked_json import take, take_map
from mxcompile.checkpoint.config_json import CONFIG
from mxcompile.checkpoint.interop.element_layouts import STORED, check_scales, from_rows, to_rows
from mxcompile.checkpoint.interop.files import read_tensors
from mxcompile.checkpoint.stored_tensors import Names
from mxcompile.errors import CheckpointError
from mxcompile.formats import FORMATS, ScaleRule, parse_format
from mxcompile.tensor.weight import MXLayout, MXWeight

METHOD: Final = "compressed-tensors"
_FORMATS: Final = {
    "mxfp4-pack-quantized": 4,
    "mxfp6-pack-quantized": 6,
    "mxfp8-quantized": 8,
}
_NAMES: Final = {bits: name for name, bits in _FORMATS.items()}
_MIXED: Final = "mixed-precision"
_RULES: Final = {4: ScaleRule.EVEN, 6: ScaleRule.EVEN, 8: ScaleRule.RCEIL}
_SCALE, _PACKED, _PLAIN = ".weight_scale", ".weight_packed", ".weight"
Group = tuple[int, int | None]
"""Bits of weights, and of their inputs."""


def write(folder: Path, module: nn.Module, names: Names, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Write config.json, and give the tensors to store. config: the model's own.

    Raises CheckpointError, naming the layer, for a weight that compressed-tensors has no format for.
    """
    tensors: dict[str, Tensor] = {}
    groups: dict[Group, list[str]] = {}
    for name, value in _values(module, names):
        if not isinstance(value, MXWeight):
            tensors[name] = value.detach()
            continue
        path, _, leaf = name.rpartition(".")
        bits = _bits(name, value, module.get_submodule(path) if leaf == "weight" else None)
        groups.setdefault(bits, []).append(path)
        rows = to_rows(value, STORED[bits[0]])
        tensors |= {path + _PLAIN: rows.view(torch.float8_e4m3fn)} if bits[0] == 8 else {path + _PACKED: rows}
        tensors[path + _SCALE] = value.scales
    content = dict(config) | {"quantization_config": _describe(module, groups)}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return tensors


def read(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a checkpoint, MX weights made of their parts. config: its config.json.

    Raises CheckpointError if it is damaged or holds what MXWeights cannot be.
    """
    ours = take(dict(config), "quantization_config", dict)
    groups = _groups(folder, cast(dict[str, Any], ours))
    stored = read_tensors(folder)
    tensors: dict[str, Tensor] = {}
    for path in [name.removesuffix(_SCALE) for name in stored if name.endswith(_SCALE)]:
        scales = stored.pop(path + _SCALE)
        rows = stored.pop(path + _PACKED, None)
        rows = stored.pop(path + _PLAIN, None) if rows is None else rows
        if rows is None:
            raise CheckpointError(f"{folder}: {path} has scales and no elements: copy the checkpoint again")
        tensors[path + _PLAIN] = _weight(folder, path, rows, scales, groups, dtype)
    for name in stored:
        leaf = name.rpartition(".")[2]
        if leaf.startswith(("weight_", "input_")):
            raise CheckpointError(f"{folder}: {name} belongs to no MX weight: mxcompile reads {_known()}")
    return stored | tensors


def _weight(
    folder: Path, path: str, rows: Tensor, scales: Tensor, groups: Mapping[int, Any], dtype: torch.dtype
) -> MXWeight:
    if rows.dtype == torch.float8_e4m3fn:
        rows = rows.view(torch.uint8)
    size = 32 * scales.shape[-1] if scales.dim() == 2 else 0
    bits = rows.shape[-1] * 8 // size if size and rows.dim() == 2 else 0
    if bits not in groups:
        raise CheckpointError(
            f"{folder}: {path} has elements {list(rows.shape)} and scales {list(scales.shape)}, which is no weight "
            "that its quantization_config describes"
        )
    inputs = groups[bits](path)
    activation = None if inputs is None else str(STORED[inputs])
    rule = None if inputs is None else str(_RULES[inputs])
    layout = MXLayout(str(STORED[bits]), size, activation=activation, rule=rule)
    return from_rows(f"{folder}: {path}", rows, scales, STORED[bits], layout, dtype)


def _values(module: nn.Module, names: Names) -> Iterable[tuple[str, Tensor]]:
    """What a state dict holds, shared plain tensors once; an MX weight under all its names."""
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, MXWeight) or name not in names.aliases:
            yield name, value


def _bits(name: str, weight: MXWeight, owner: nn.Module | None) -> Group:
    """Bits of a weight and of its input. Raises CheckpointError if it has no equivalent."""
    layout, fmt = weight.layout_, parse_format(weight.layout_.format)
    activation = None if layout.activation is None else parse_format(layout.activation)
    advice = "mxcompile.save without format=... keeps it as it is"
    for wanted in (fmt, activation):
        if wanted is not None and wanted not in STORED.values():
            what = "" if wanted is fmt else " for inputs"
            raise CheckpointError(
                f"{name}: compressed-tensors has no {wanted}{what}, of {', '.join(map(str, FORMATS))} only "
                f"{', '.join(map(str, STORED.values()))} in blocks of 32: quantize to these, or {advice}"
            )
    reasons = {
        "an input that is multiplied by a vector (use awq-fold{multiply=false})": layout.multiplier,
        "an input that is rotated (use a recipe without rotate)": layout.rotation,
        "an input that is aligned (use lower-mx{align=false})": layout.aligned,
        "a weight that is no nn.Linear's (leave it out with exclude)": not isinstance(owner, nn.Linear)
        or layout.transposed,
        f"a row of {layout.size} values, no multiple of 32 (leave it out with exclude)": layout.size % 32,
    }
    for what, found in reasons.items():
        if found:
            raise CheckpointError(f"{name}: compressed-tensors cannot hold {what}; {advice}")
    check_scales(name, weight.scales)
    return fmt.bits, None if activation is None else activation.bits


def _describe(module: nn.Module, groups: Mapping[Group, list[str]]) -> dict[str, Any]:
    """`quantization_config`."""
    quantized = {path for paths in groups.values() for path in paths}
    linears = [path for path, child in module.named_modules() if isinstance(child, nn.Linear)]
    one = len(groups) == 1
    formats = {_NAMES[bits] for bits, _ in groups}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{n}": {
                "targets": ["Linear"] if one else sorted(paths),
                "format": _NAMES[bits],
                "weights": _arguments(bits, dynamic=False),
                "input_activations": None if inputs is None else _arguments(inputs, dynamic=True),
                "output_activations": None,
            }
            for n, ((bits, inputs), paths) in enumerate(sorted(groups.items(), key=str))
        },
        "ignore": [path for path in linears if path not in quantized],
        "kv_cache_scheme": None,
    }


def _arguments(bits: int, *, dynamic: bool) -> dict[str, Any]:
    """`QuantizationArgs`, as the presets MXFP4, MXFP6A8 and MXFP8 have them."""
    own = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    return own | {"dynamic": dynamic, "scale_dtype": "torch.uint8"}


def _groups(folder: Path, ours: dict[str, Any]) -> dict[int, Any]:
    """For each number of bits of weights, what gives those of the input by a module's path."""
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if ours.get(key):
            raise CheckpointError(f"{folder} has a {key}, which an MX weight cannot carry: mxcompile reads {_known()}")
    found: dict[int, list[tuple[list[Any], int | None]]] = {}
    try:
        for name, group in take_map(ours, "config_groups", dict).items():
            fmt = str(group.get("format") or ours.get("format"))
            if fmt not in _FORMATS:
                raise CheckpointError(f"{name} is in {fmt!r}, mxcompile reads {_known()}")
            if group.get("output_activations"):
                raise CheckpointError(f"{name} rounds its outputs, which an MX weight cannot carry")
            bits = _read_arguments(group.get("weights"), dynamic=False)
            inputs = group.get("input_activations")
            if bits != _FORMATS[fmt]:
                raise CheckpointError(f"{name} has weights of {bits} bits, {fmt} has {_FORMATS[fmt]}")
            choice = None if inputs is None else _read_arguments(inputs, dynamic=True)
            found.setdefault(bits, []).append((take(group, "targets", list), choice))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return {bits: _chooser(folder, choices) for bits, choices in found.items()}


def _chooser(folder: Path, choices: list[tuple[list[Any], int | None]]) -> Any:
    def choose(path: str) -> int | None:
        inputs = {bits for _, bits in choices}
        inputs = {bits for targets, bits in choices if path in targets} if len(inputs) > 1 else inputs
        if len(inputs) != 1:
            raise CheckpointError(
                f"{folder}: which group {path} is in cannot be told: its targets must be names of modules"
            )
        return next(iter(inputs))

    return choose


def _read_arguments(arguments: Any, *, dynamic: bool) -> int:
    wanted = _arguments(0, dynamic=dynamic)
    bits = take(arguments, "num_bits", int)
    # older versions left scale_dtype out
    given = {key: arguments.get(key) for key in wanted if key != "num_bits" and arguments.get(key) is not None}
    strange = [key for key, value in given.items() if value != wanted[key]]
    needed = {"type", "group_size"} - set(given)
    if bits not in STORED or strange or needed:
        raise CheckpointError(f"{arguments} are no MX values: mxcompile reads {_known()}")
    return bits


def _known() -> str:
    return ", ".join(_FORMATS)
