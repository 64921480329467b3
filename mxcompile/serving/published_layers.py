"""The names under which a model is published, where transformers gives its modules others.

    model.layers.0.mlp.gate.weight (Mixtral in transformers) -> model.layers.0.block_sparse_moe.gate.weight

Our files have the names of transformers' modules. Engines read published files, so their loaders know the names that
transformers reads and writes, and it is asked for them.
"""

import re
from collections.abc import Mapping
from typing import Final

import torch
import transformers

from mxcompile.checkpoint.hf import models
from mxcompile.checkpoint.interop.stored_names import published_names
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.serving.stored_experts import tensors_of

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")


def renamed_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Name of a tensor in the module -> its published name, where they differ. Experts are left out.

    Empty for a model whose class is not at hand.
    """
    config = checkpoint.config
    kind = models.find_class(config.class_name, config.model_config.get("model_type"))
    if kind is None:
        return {}
    with torch.device("meta"):
        model: transformers.PreTrainedModel = kind(kind.config_class.from_dict(dict(config.model_config)))
    experts = tensors_of(checkpoint.names)
    names = [name for name in (*checkpoint.names.plain, *checkpoint.names.weights) if name not in experts]
    return {name: published for name, published in published_names(model, names).items() if name != published}


def patterns(renamed: Mapping[str, str]) -> dict[re.Pattern[str], str | None]:
    """The same as regular expressions, one for all layers, for tensors and the component tensors of MX weights."""
    found = dict(_pattern(name, published) for name, published in renamed.items())
    return {re.compile(rf"^{name}(?=$|\.(?:scales|multiplier)$)"): published for name, published in found.items()}


def _pattern(name: str, published: str) -> tuple[str, str]:
    """`layers.0.gate.weight` -> `layers\\.(\\d+)\\.gate\\.weight`, and its replacement with `\\1`."""
    numbers = _NUMBER.findall(name)
    if _NUMBER.findall(published) != numbers:
        return re.escape(name), published
    groups = (f"\\{group}" for group in range(1, len(numbers) + 1))
    return r"(\d+)".join(map(re.escape, _NUMBER.split(name))), _NUMBER.sub(lambda _: next(groups), published)
