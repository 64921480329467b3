"""Tensors of another project's checkpoint -> a model of transformers, or the module given, that holds them.

Names and shapes are compared with an empty model first: nothing is loaded that does not fit, and no size that a file
claims is allocated before tensors of that size are there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.stored_tensors import Names, check_fits
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import own_tensors, place_all
from mxcompile.tensor.weight import MXWeight

_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """Of a model's values, by its configuration."""
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), torch.float32)


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put tensors into a module that has the same ones by name and shape; nothing happens to it if not."""
    check_fits(module, Names(tuple(tensors), {}, {}, frozenset()), tensors)
    left = [name for name, tensor in own_tensors(module).items() if name not in tensors and tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{left[0]} of the model given is on the meta device and was not saved: build it on the CPU"
        )
    place_all(module, list(tensors.items()))
    return module.requires_grad_(False).eval()


def build(source: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The model of transformers that a configuration describes, filled. source: what errors name."""
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
    _check_tensors(source, empty, tensors)
    return _load(source, kind, parsed, tensors)


def _kind(source: Path, config: Mapping[str, Any]) -> Any:
    import transformers

    names = config.get("architectures")
    name = cast(Any, names[0]) if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel) or kind.config_class is None:
        raise CheckpointError(
            f"{source} holds a {name}, which is no model of transformers: build one yourself and give "
            "load(path, model=...)"
        )
    return kind


def _check_depth(source: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if layers > len(tensors):
        raise CheckpointError(f"{source} claims {layers} layers and holds {len(tensors)} tensors")


def _check_tensors(source: Path, empty: Any, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the model has the tensors, all of them, in their shapes."""
    own, kind = own_tensors(empty), type(empty).__name__
    for name in [name for name in tensors if name not in own and name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]
    for name, tensor in tensors.items():
        if name not in own:
            raise CheckpointError(f"{source} holds {name}, which a {kind} of this transformers does not have")
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {name} has the shape {list(tensor.shape)}, a {kind} of that configuration has "
                f"{list(own[name].shape)}"
            )
    tied = cast(dict[str, str], getattr(empty, "all_tied_weights_keys", {}) or {})
    names = set(empty.state_dict())
    missing = sorted(name for name in names - set(tensors) if tied.get(name) not in tensors)
    if missing:
        raise CheckpointError(f"{source} does not hold {missing[0]}, which a {kind} needs ({len(missing)} missing)")


def _load(source: Path, kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """By transformers, which fills in what is not stored; MX weights take their places afterwards."""
    from transformers import GenerationConfig

    weights = {name: value for name, value in tensors.items() if isinstance(value, MXWeight)}
    blank = {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in weights.items()}
    try:
        model = kind.from_pretrained(None, config=config, state_dict={**tensors, **blank}, dtype=config.dtype)
        if model.can_generate() and (source / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source)
    except Exception as error:
        raise CheckpointError(f"transformers cannot load the {kind.__name__} of {source}: {error}") from error
    place_all(model, list(weights.items()))
    return model.requires_grad_(False).eval()
