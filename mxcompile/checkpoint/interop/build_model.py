"""Tensors of another project's checkpoint -> a transformers model, or a module of the caller's, that holds them.

Names and shapes are compared with a model on the meta device first: nothing is loaded that does not fit, and no memory
is allocated for a size that a file claims without having tensors of that size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.interop.files import dtype_of
from mxcompile.checkpoint.interop.stored_names import join_experts
from mxcompile.checkpoint.stored_tensors import TensorNames, check_fits
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import named_tensors, set_tensors
from mxcompile.tensor.weight import MXWeight


def fill(source: Path, module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Put tensors into a module that has the same ones by name and shape; else raise, leaving it unchanged."""
    join_experts(str(source), module, tensors)
    check_fits(module, TensorNames(tuple(tensors), {}, {}, frozenset()), tensors)
    left = [name for name, tensor in named_tensors(module).items() if name not in tensors and tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{left[0]} of `model` is on the meta device and was not saved: build the model on the CPU"
        )
    set_tensors(module, list(tensors.items()))
    return module.requires_grad_(False).eval()


def build(source: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The transformers model of a configuration, with these tensors. source: the file or folder, for error messages."""
    own = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        kind, parsed = _kind(source, own), None
        parsed = kind.config_class.from_dict(own)
        _check_depth(source, parsed, tensors)
        with torch.device("meta"):
            empty = kind(parsed)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"transformers cannot build the model that {source} describes: {error}") from error
    join_experts(str(source), empty, tensors)
    _check_tensors(source, empty, tensors)
    return _load(source, kind, parsed, tensors, dtype_of(config, tensors))


def _kind(source: Path, config: Mapping[str, Any]) -> Any:
    from mxcompile.checkpoint.hf.models import find_class  # imports transformers

    names = config.get("architectures")
    name = cast(Any, names[0]) if isinstance(names, list) and names else None
    kind = find_class(name, config.get("model_type")) if isinstance(name, str) else None
    if kind is None:
        raise CheckpointError(
            f"{source} holds a {name}, which is not a transformers model: build one yourself and pass it: "
            "load(path, model=...)"
        )
    return kind


def _check_depth(source: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if layers > len(tensors):
        raise CheckpointError(f"{source} claims {layers} layers and holds {len(tensors)} tensors")


def _check_tensors(source: Path, empty: Any, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the model has exactly these tensors, in these shapes."""
    own, kind = named_tensors(empty), type(empty).__name__
    for name in [name for name in tensors if name not in own and name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]
    for name, tensor in tensors.items():
        if name not in own:
            raise CheckpointError(f"{source} holds {name}, which a {kind} of the installed transformers does not have")
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(tensor.shape)}, in a {kind} of that configuration it has "
                f"{list(own[name].shape)}"
            )
    tied = cast(dict[str, str], getattr(empty, "all_tied_weights_keys", {}) or {})
    names = set(empty.state_dict())
    missing = sorted(name for name in names - set(tensors) if tied.get(name) not in tensors)
    if missing:
        raise CheckpointError(f"{source} does not hold {missing[0]}, which a {kind} needs ({len(missing)} missing)")


def _load(source: Path, kind: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Load through transformers, which initializes what is not stored; then put the MX weights in place."""
    from transformers import GenerationConfig

    weights = {name: value for name, value in tensors.items() if isinstance(value, MXWeight)}
    placeholders = {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in weights.items()}
    try:
        model = kind.from_pretrained(None, config=config, state_dict={**tensors, **placeholders}, dtype=dtype)
        if model.can_generate() and (source / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source)
    except Exception as error:
        raise CheckpointError(f"transformers cannot load the {kind.__name__} of {source}: {error}") from error
    set_tensors(model, list(weights.items()))
    return model.requires_grad_(False).eval()
