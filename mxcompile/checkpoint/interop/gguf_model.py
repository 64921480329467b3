"""Read models from GGUF files: Llama, Mistral, Qwen2 and Qwen3 with MXFP4 weights, or ones that ggml quantized.

    blk.0.ffn_up.weight (MXFP4) -> model.layers.0.mlp.up_proj.weight (MXWeight, mxfp4), the same bytes

A file does not state the format to which inputs are rounded: they stay float.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.interop.build_model import build
from mxcompile.checkpoint.interop.gguf_architectures import CLASSES, gguf_names, permuted, read_config
from mxcompile.checkpoint.interop.gguf_file import GGUFFile
from mxcompile.errors import CheckpointError


def load(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformers model in a file. MXFP4 weights become MXWeights with float inputs; others are dequantized."""
    file = GGUFFile(path)
    architecture = str(file.metadata.get("general.architecture"))
    if architecture not in CLASSES:
        raise CheckpointError(
            f"{path} holds a {architecture}, which mxcompile cannot build; mxcompile.read_gguf returns its tensors"
        )
    if "rope_freqs.weight" in file.entries:
        raise CheckpointError(f"{path} has a scaled rotary embedding, which mxcompile does not support")
    config = read_config(file, architecture)
    own_names = _own_names(path, architecture, config)
    unknown = [name for name in file.entries if name not in own_names]
    if unknown:
        raise CheckpointError(f"{path} holds {', '.join(unknown)}, which a {CLASSES[architecture]} does not have")
    tensors: dict[str, Tensor] = {}
    for name, entry in file.entries.items():
        own = own_names[name]
        tensors[own] = permuted(own, file.tensor(entry, dtype), config, architecture, from_gguf=True)
    return build(path, config, tensors)


def read(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors of a file, under its names; the rows of q and k are not permuted."""
    file = GGUFFile(path)
    return {name: file.tensor(entry, dtype) for name, entry in file.entries.items()}


def _own_names(path: Path, architecture: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The model's name of each tensor, by the file's; the model is built on the meta device for that."""
    import transformers

    kind: Any = getattr(transformers, CLASSES[architecture])
    try:
        with torch.device("meta"):
            names = list(kind(kind.config_class.from_dict(dict(config))).state_dict())
    except Exception as error:
        raise CheckpointError(f"transformers cannot build the model that {path} describes: {error}") from error
    if config["tie_word_embeddings"]:
        names.remove("lm_head.weight")
    stored_names = gguf_names(architecture, config["num_hidden_layers"], names)
    unnamed = [name for name, stored_name in stored_names.items() if stored_name is None]
    if unnamed:
        raise CheckpointError(f"{path} cannot be read: the gguf package has no name for {', '.join(unnamed)}")
    return {str(stored_name): name for name, stored_name in stored_names.items()}
