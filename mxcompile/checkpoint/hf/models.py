"""transformers models: save their configuration and generation config, and build them again from a checkpoint."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from mxcompile.checkpoint.config_json import untie
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.stored_tensors import TensorNames
from mxcompile.errors import CheckpointError, MXCompileError, warn
from mxcompile.tensor.dtypes import torch_name


def build(checkpoint: Checkpoint) -> PreTrainedModel:
    """The saved model. Raises CheckpointError if its class is not at hand or transformers cannot build it."""
    name, config = checkpoint.config.class_name, checkpoint.config.model_config
    kind = find_class(name, config.get("model_type"))
    if kind is None:
        raise CheckpointError(f"{checkpoint.folder} holds a {name}, {_how_to_load(config)}")
    try:
        parsed: Any = kind.config_class.from_pretrained(checkpoint.folder)
        parsed.quantization_config["verify"] = checkpoint.verify
        return kind.from_pretrained(checkpoint.folder, config=parsed)
    except MXCompileError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build the {name} in {checkpoint.folder}: {error}"
        ) from error


def find_class(name: str, model_type: Any) -> Any:
    """The model class of that name: transformers' own, or one that is imported, as those registered with AutoModel are.

    None if there is none. model_type: of its configuration, which must be the class's.
    """
    own = getattr(transformers, name, None)
    candidates = [own, *(kind for kind in _subclasses(PreTrainedModel) if kind.__name__ == name)]
    models = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
    usable = [cast(Any, kind) for kind in models if kind.config_class is not None]
    fitting = [kind for kind in usable if kind.config_class.model_type == model_type]
    return next(iter([*fitting[-1:], *usable[:1]]), None)


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _how_to_load(config: Mapping[str, Any]) -> str:
    auto_map: Any = config.get("auto_map")
    if isinstance(auto_map, dict):
        auto = next((name for name in cast(dict[str, Any], auto_map) if name.startswith("AutoModel")), "AutoModel")
        return (
            "which is not a transformers model: its code lies in the folder. Read it, then load it with "
            f"transformers.{auto}.from_pretrained(path, trust_remote_code=True)"
        )
    return (
        "which is not a transformers model: import the module that defines it, or build one yourself and pass it: "
        "load(path, model=...)"
    )


def save_code(model: PreTrainedModel, config: Any, folder: Path) -> None:
    """Write the Python files of a model with code of its own, as transformers does, and its `auto_map` to the config.

    Warns of a class whose code is not written: only a process that imports it can load what is saved.
    """
    missing: list[str] = []
    for part in (config, model):
        kind = type(part)
        if kind.__module__.partition(".")[0] == "transformers":
            continue
        if getattr(kind, "_auto_class", None) is None or kind.__module__ == "__main__":
            missing.append(f"{kind.__qualname__} ({kind.__module__})")
        else:
            custom_object_save(part, folder, config=config)
    if missing:
        warn(
            f"the code of {' and '.join(missing)} is not saved: only a process that imports it can load this. To save "
            "it too, define it in a module of its own and call register_for_auto_class of each class"
        )


def configuration(model: PreTrainedModel, names: TensorNames, folder: Path) -> dict[str, Any]:
    """A model's configuration as transformers writes it to `config.json`, without traces of an earlier quantization.

    The code of a model that is not in transformers is written to the folder.
    """
    config = copy.deepcopy(model.config)
    for leftover in ("quantization_config", "transformers_weights"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    config.architectures = [type(model).__name__]
    config.dtype = torch_name(model.dtype)
    tied = cast(dict[str, str], getattr(model, "all_tied_weights_keys", {}))
    if any(len(set(names.sources(pair))) > 1 for pair in tied.items()):
        untie(config)
    save_code(model, config, folder)
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
