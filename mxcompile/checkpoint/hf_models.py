"""transformers models: save their configuration and generation config, and build them again from a checkpoint."""

import copy
import json
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PreTrainedModel

from mxcompile.checkpoint.config_json import untie
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.stored_tensors import TensorNames
from mxcompile.errors import CheckpointError, MXCompileError
from mxcompile.tensor.dtypes import torch_name


def build(checkpoint: Checkpoint) -> PreTrainedModel:
    """The saved model. Raises CheckpointError if transformers does not have its class or cannot build it."""
    name = checkpoint.config.class_name
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel) or kind.config_class is None:
        raise CheckpointError(
            f"{checkpoint.folder} holds a {name}, which is not a transformers model: build one yourself and pass it: "
            "load(path, model=...)"
        )
    try:
        config = kind.config_class.from_pretrained(checkpoint.folder)
        config.quantization_config["verify"] = checkpoint.verify
        return kind.from_pretrained(checkpoint.folder, config=config)
    except MXCompileError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build the {name} in {checkpoint.folder}: {error}"
        ) from error


def configuration(model: PreTrainedModel, names: TensorNames) -> dict[str, Any]:
    """A model's configuration as transformers writes it to `config.json`, without traces of an earlier quantization."""
    config = copy.deepcopy(model.config)
    for leftover in ("quantization_config", "transformers_weights"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    config.architectures = [type(model).__name__]
    config.dtype = torch_name(model.dtype)
    tied = cast(dict[str, str], getattr(model, "all_tied_weights_keys", {}))
    if any(len(set(names.sources(pair))) > 1 for pair in tied.items()):
        untie(config)
    return json.loads(config.to_json_string(use_diff=True))


def save_generation(model: PreTrainedModel, folder: Path) -> None:
    """Write the generation config of a model that generates, without its `compile_config`, which is for one device."""
    if not model.can_generate():
        return
    config = copy.copy(model.generation_config)
    config.compile_config = None
    try:
        config.save_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(f"transformers refuses to save model.generation_config: {error}") from error
