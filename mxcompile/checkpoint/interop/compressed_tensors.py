"""Checkpoints as llm-compressor writes them and `compressed-tensors` reads them: MXFP4, MXFP6 (E2M3), MXFP8 (E4M3).

    q_proj.weight (mxfp4)      <-> q_proj.weight_packed uint8 [out, in/2], q_proj.weight_scale uint8 [out, in/32]
    q_proj.weight (mxfp6_e2m3) <-> q_proj.weight_packed uint8 [out, in*3/4], q_proj.weight_scale
    q_proj.weight (mxfp8_e4m3) <-> q_proj.weight float8_e4m3fn [out, in], q_proj.weight_scale

`quantization_config` in config.json names the quantized Linears and the format that their inputs are rounded to at run
time. It has no entry for the scale rule of inputs: the program that runs the model chooses it. compressed-tensors uses
`even` for MXFP4 and MXFP6, and for MXFP8 `rceil`, except for an amax of exactly 1.75 * 2**n. A loaded model gets these
rules. Checked with compressed-tensors 0.20.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.checked_json import take, take_map
from mxcompile.checkpoint.config_json import CONFIG
from mxcompile.checkpoint.interop.compressed_layers import GroupBits, bits_of, check_writable, float_linears, notes
from mxcompile.checkpoint.interop.element_layouts import STORED, check_scales, from_rows, to_rows
from mxcompile.checkpoint.interop.files import dtype_of, read_tensors
from mxcompile.checkpoint.interop.stored_names import StoredParts, stored_parts
from mxcompile.checkpoint.shards import PendingTensor
from mxcompile.checkpoint.stored_tensors import TensorNames
from mxcompile.errors import CheckpointError, warn
from mxcompile.formats import ScaleRule
from mxcompile.tensor.modules import is_pretrained
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
_DTYPE: Final = "bfloat16"


def write(
    folder: Path,
    module: nn.Module,
    names: TensorNames,
    config: Mapping[str, Any],
    read: Callable[[str], Tensor] | None = None,
) -> dict[str, PendingTensor]:
    """Write config.json, and return the tensors to store, which are made when they are written.

    config: the model's own configuration. read: of a module on the meta device, returns the values of a tensor.
    Raises CheckpointError, naming every layer, for weights that compressed-tensors has no format for.
    """
    values = dict(_values(module, names))
    stored = stored_parts(module, {name: value.shape for name, value in values.items()})
    check_writable(module, values, stored)
    tensors: dict[str, PendingTensor] = {}
    groups: dict[GroupBits, list[str]] = {}
    for name, value in values.items():
        for part in stored[name].names:
            if isinstance(value, MXWeight):
                path = part.rpartition(".")[0]
                groups.setdefault(bits_of(value), []).append(path)
                tensors |= {path + leaf: tensor for leaf, tensor in _packed(name, value, stored[name], part, read)}
            else:
                make = partial(_take, name, value.detach(), stored[name], part, read)
                tensors[part] = PendingTensor(value.dtype, stored[name].shape_of(value, part), make, name)
    heads = _heads(module, stored)
    content = dict(config) | {"quantization_config": _describe(groups, float_linears(module, values, stored), heads)}
    if config and config.get("dtype") not in (None, _DTYPE):
        warn(
            f"this model is in {config['dtype']}, but compressed-tensors decodes MX weights to {_DTYPE}: config.json "
            f"says {_DTYPE}, in which other programs then load all of it; its float tensors are stored as they are"
        )
        content["dtype"] = _DTYPE
    if differences := notes(module, values):
        warn("; ".join(differences))
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return tensors


def read(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under their stored names, elements and scales assembled to MXWeights.

    config: its config.json.

    Raises CheckpointError if it is damaged or holds weights that an MXWeight cannot represent.
    """
    ours = take(dict(config), "quantization_config", dict)
    groups = _groups(folder, cast(dict[str, Any], ours))
    stored = read_tensors(folder)
    dtype = dtype_of(config, stored)
    tensors: dict[str, Tensor] = {}
    for path in [name.removesuffix(_SCALE) for name in stored if name.endswith(_SCALE)]:
        scales = stored.pop(path + _SCALE)
        rows = stored.pop(path + _PACKED, None)
        rows = stored.pop(path + _PLAIN, None) if rows is None else rows
        if rows is None:
            raise CheckpointError(f"{folder}: {path} has scales but no elements: copy the checkpoint again")
        tensors[path + _PLAIN] = _weight(folder, path, rows, scales, groups, dtype)
    for name in stored:
        leaf = name.rpartition(".")[2]
        if leaf.startswith(("weight_", "input_")):
            raise CheckpointError(f"{folder}: {name} belongs to no MX weight: mxcompile reads {_supported()}")
    return stored | tensors


def _take(name: str, value: Tensor, stored: StoredParts, part: str, read: Callable[[str], Tensor] | None) -> Tensor:
    """What is stored under a name of a tensor of the module, whose values are read if it has none."""
    if value.is_meta and read is not None:
        value = read(name)
        if isinstance(value, MXWeight):
            check_scales(name, value.scales)
    return stored.take(value, part)


def _packed(
    name: str, value: MXWeight, stored: StoredParts, part: str, read: Callable[[str], Tensor] | None
) -> Iterator[tuple[str, PendingTensor]]:
    """(end of the name, tensor) for what is stored of a weight under a name."""
    bits = bits_of(value)[0]
    *leading, size = stored.shape_of(value, part)
    shape, dtype = torch.Size((*leading, size * bits // 8)), torch.float8_e4m3fn if bits == 8 else torch.uint8

    def taken() -> MXWeight:
        own = _take(name, value, stored, part, read)
        assert isinstance(own, MXWeight)
        return own

    yield (
        _PLAIN if bits == 8 else _PACKED,
        PendingTensor(dtype, shape, lambda: to_rows(taken(), STORED[bits]).view(dtype), name),
    )
    yield _SCALE, PendingTensor(torch.uint8, torch.Size((*leading, size // 32)), lambda: taken().scales, name)


def _weight(
    folder: Path, path: str, rows: Tensor, scales: Tensor, groups: Mapping[int, Any], dtype: torch.dtype
) -> MXWeight:
    if rows.dtype == torch.float8_e4m3fn:
        rows = rows.view(torch.uint8)
    size = 32 * scales.shape[-1] if scales.dim() == 2 else 0
    bits = rows.shape[-1] * 8 // size if size and rows.dim() == 2 else 0
    if bits not in groups:
        raise CheckpointError(
            f"{folder}: {path} has elements {list(rows.shape)} and scales {list(scales.shape)}, which match no group "
            "of its quantization_config"
        )
    inputs = groups[bits](path)
    activation = None if inputs is None else str(STORED[inputs])
    rule = None if inputs is None else str(_RULES[inputs])
    layout = MXLayout(str(STORED[bits]), size, activation=activation, rule=rule)
    return from_rows(f"{folder}: {path}", rows, scales, STORED[bits], layout, dtype)


def _values(module: nn.Module, names: TensorNames) -> Iterable[tuple[str, Tensor]]:
    """The state dict: plain tensors once each, an MX weight, row-major, under all its names."""
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, MXWeight):
            yield name, value.to_row_major()
        elif name not in names.aliases:
            yield name, value


def _heads(module: nn.Module, stored: Mapping[str, StoredParts]) -> set[str]:
    """Stored paths of the output head of a transformers model."""
    head: Any = module.get_output_embeddings() if is_pretrained(module) else None  # pyright: ignore
    names = [name for name, layer in module.named_modules() if layer is head]
    return {
        part.rpartition(".")[0]
        for name in names
        if f"{name}.weight" in stored
        for part in stored[f"{name}.weight"].names
    }


def _describe(groups: Mapping[GroupBits, list[str]], ignored: list[str], heads: set[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    A quantized head is a target under its path: vLLM's class of it is a ParallelLMHead, which "Linear" does not match.
    """
    formats = {_NAMES[bits] for bits, _ in groups}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{n}": {
                "targets": ["Linear", *sorted(heads & set(paths))] if len(groups) == 1 else sorted(paths),
                "format": _NAMES[bits],
                "weights": _arguments(bits, dynamic=False),
                "input_activations": None if inputs is None else _arguments(inputs, dynamic=True),
                "output_activations": None,
            }
            for n, ((bits, inputs), paths) in enumerate(sorted(groups.items(), key=str))
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _arguments(bits: int, *, dynamic: bool) -> dict[str, Any]:
    """`QuantizationArgs`, as the presets MXFP4, MXFP6A8 and MXFP8 have them."""
    own = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    return own | {"dynamic": dynamic, "scale_dtype": "torch.uint8"}


def _groups(folder: Path, ours: dict[str, Any]) -> dict[int, Any]:
    """For each number of weight bits, a function from a module's path to the bits of its input."""
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if ours.get(key):
            raise CheckpointError(
                f"{folder} has a {key}, which an MX weight cannot represent: mxcompile reads {_supported()}"
            )
    by_bits: dict[int, list[tuple[list[Any], int | None]]] = {}
    try:
        for name, group in take_map(ours, "config_groups", dict).items():
            fmt = str(group.get("format") or ours.get("format"))
            if fmt not in _FORMATS:
                raise CheckpointError(f"{name} is in {fmt!r}, mxcompile reads {_supported()}")
            if group.get("output_activations"):
                raise CheckpointError(f"{name} rounds its outputs, which an MX weight cannot represent")
            bits = _read_arguments(group.get("weights"), dynamic=False)
            inputs = group.get("input_activations")
            if bits != _FORMATS[fmt]:
                raise CheckpointError(f"{name} has weights of {bits} bits, but {fmt} has {_FORMATS[fmt]} bits")
            input_bits = None if inputs is None else _read_arguments(inputs, dynamic=True)
            by_bits.setdefault(bits, []).append((take(group, "targets", list), input_bits))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return {bits: _input_bits(folder, groups) for bits, groups in by_bits.items()}


def _input_bits(folder: Path, groups: list[tuple[list[Any], int | None]]) -> Any:
    def input_bits(path: str) -> int | None:
        candidates = {bits for _, bits in groups}
        if len(candidates) > 1:
            candidates = {bits for targets, bits in groups if any(_is_target(target, path) for target in targets)}
        if len(candidates) != 1:
            raise CheckpointError(f"{folder}: no single group contains {path}: targets are names, or re:...")
        return next(iter(candidates))

    return input_bits


def _is_target(target: Any, path: str) -> bool:
    """As compressed-tensors matches them: a module's name, or a regular expression from its beginning on."""
    if not isinstance(target, str):
        return False
    try:
        return target == path or (target.startswith("re:") and re.match(target[3:], path) is not None)
    except re.error:
        return False


def _read_arguments(arguments: Any, *, dynamic: bool) -> int:
    expected = _arguments(0, dynamic=dynamic)
    bits = take(arguments, "num_bits", int)
    # Older versions leave scale_dtype out.
    stated = {key: arguments.get(key) for key in expected if key != "num_bits" and arguments.get(key) is not None}
    different = [key for key, value in stated.items() if value != expected[key]]
    missing = {"type", "group_size"} - set(stated)
    if bits not in STORED or different or missing:
        raise CheckpointError(f"{arguments} is not an MX format: mxcompile reads {_supported()}")
    return bits


def _supported() -> str:
    return ", ".join(_FORMATS)
