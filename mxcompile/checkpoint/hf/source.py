"""A transformers model without values, and which stored tensors make each of its tensors.

transformers itself says both: its conversion mapping renames stored tensors, and splits or merges them (experts that
are stored one by one become one parameter), exactly as `from_pretrained` does. Names and functions used here exist in
transformers 5.17 to 5.24 (`core_model_loading`).
"""

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import logging

from mxcompile.checkpoint.hf.models import find_class
from mxcompile.checkpoint.stored_files import StoredTensor
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import named_tensors, set_tensors

_QUANTIZATION: Final = "quantization_config"


@dataclass(frozen=True)
class Assembly:
    """How stored tensors make one or several tensors of a model.

    transform: of transformers. sources: the stored tensors as (name, pattern that it matched), in order. first: the
    name that transformers calls the result by. model: on the meta device, which some transforms ask for sizes.
    """

    transform: Any
    first: str
    model: Any
    sources: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def is_renaming(self) -> bool:
        """Whether it only gives a tensor another name."""
        return isinstance(self.transform, WeightRenaming)

    def make(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors of the model by name. read: returns a stored tensor; it is called when its values are needed."""
        transform = copy.deepcopy(self.transform)
        for name, pattern in self.sources:
            transform.add_tensor(self.first, name, pattern, partial(read, name))
        made: dict[str, Any] = transform.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def model_class(folder: Path, config: Mapping[str, Any]) -> Any:
    """The class that a folder's `config.json` names; None if it names none, or one that is not at hand."""
    names = config.get("architectures")
    name = cast(Any, names[0]) if isinstance(names, list) and names else None
    return find_class(name, config.get("model_type")) if isinstance(name, str) else None


def assemblies(model: Any, stored: Mapping[str, StoredTensor]) -> tuple[dict[str, Assembly], list[str]]:
    """How each tensor of the model is made, and the names of stored tensors that the model has no place for."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own: dict[str, Tensor] = model.state_dict()
    prefix = model.base_model_prefix
    made: dict[str, Assembly] = {}
    left: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = rename_source_key(name, [], [], prefix, own)
        if target not in own:
            left.append(name)
        elif pattern is None:
            made.setdefault(target, Assembly(WeightRenaming(name, target), target, model)).sources.append((name, name))
        else:
            assembly = made.setdefault(target, Assembly(by_pattern[pattern], target, model))
            assembly.sources.append((name, pattern))
    return _by_target(made, stored), left


def _by_target(made: Mapping[str, Assembly], stored: Mapping[str, StoredTensor]) -> dict[str, Assembly]:
    """The assemblies under all names that they make, found with tensors without values."""
    targets: dict[str, Assembly] = {}
    for first, assembly in made.items():
        sources = [name for name, _ in assembly.sources]
        file = stored[sources[0]].file
        try:
            results = assembly.make(lambda name: torch.empty(stored[name].shape, device="meta"))
        except Exception as error:  # of transformers, whose operations state no errors
            raise CheckpointError(
                f"{file}: transformers {transformers.__version__} cannot make {first} of {len(sources)} stored tensors "
                f"({', '.join(sources[:3])}): {error}"
            ) from error
        own = assembly.model.state_dict()
        for name, value in results.items():
            if name in own and own[name].shape != value.shape:
                raise CheckpointError(
                    f"{file}: {name} would have shape {list(value.shape)}, in a "
                    f"{type(assembly.model).__name__} of that configuration it has {list(own[name].shape)}"
                )
            targets[name] = assembly
    return targets


def read_config(folder: Path, kind: Any) -> Any:
    """The configuration of a folder for a class, without what it says of a quantization."""
    try:
        config = kind.config_class.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"transformers cannot read the config.json of {folder}: {error}") from error
    if hasattr(config, _QUANTIZATION):
        delattr(config, _QUANTIZATION)
    return config


def empty_model(folder: Path, config: Any, kind: Any) -> Any:
    """The model of a configuration with everything on the meta device: for names and shapes."""
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:
        raise CheckpointError(f"transformers cannot build the model that {folder} describes: {error}") from error


def stated_values(
    model: Any, made: Mapping[str, Assembly], dtype: torch.dtype, differ: Callable[[str, str], bool]
) -> dict[str, Tensor]:
    """A tensor that takes no memory for each that is made: zeros, or ones where a tied one has other values.

    model: the empty one. differ: whether two of the tensors have different values.
    """
    own: dict[str, Tensor] = model.state_dict()
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    untied = {target for target, source in tied.items() if {target, source} <= made.keys() and differ(target, source)}
    return {
        name: torch.full((), float(name in untied), dtype=dtype if value.is_floating_point() else value.dtype).expand(
            value.shape
        )
        for name, value in own.items()
        if name in made
    }


def model_without_values(folder: Path, config: Any, kind: Any, dtype: torch.dtype, stated: Mapping[str, Tensor]) -> Any:
    """The model as `from_pretrained(folder)` returns it, in eval mode, but with the stored tensors on the meta device.

    Everything else is as there: which tensors are one, dtypes, buffers that the model computes, its generation config.
    stated: by name, tensors of a single value, expanded, in the place of those that the files hold; equal where they
    are tied.
    """
    try:
        with _without_bars():
            model = kind.from_pretrained(None, config=config, state_dict=dict(stated), dtype=dtype)
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"transformers cannot build the {kind.__name__} of {folder}: {error}") from error
    own = named_tensors(model)
    empty = {id(own[name]): _without_values(own[name]) for name in stated}
    set_tensors(model, [(name, empty[id(value)]) for name, value in own.items() if id(value) in empty])
    return model.requires_grad_(False).eval()


@contextmanager
def _without_bars() -> Generator[None]:
    """No progress bar of transformers: nothing is loaded here."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
