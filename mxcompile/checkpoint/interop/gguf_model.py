"""Read models from GGUF files: those that mxcompile writes, with MXFP4 weights, or ones that ggml quantized.

    blk.0.ffn_up.weight (MXFP4) -> model.layers.0.mlp.up_proj.weight (MXWeight, mxfp4), the same bytes
    blk.0.ffn_gate_exps.weight, ffn_up_exps.weight -> model.layers.0.mlp.experts.gate_up_proj

A file does not state the format to which inputs are rounded: they stay float.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.interop.build_model import build
from mxcompile.checkpoint.interop.fused_experts import FusedTensor, fused_tensors, unstack
from mxcompile.checkpoint.interop.gguf_architectures import class_name, gguf_names, permuted, read_config
from mxcompile.checkpoint.interop.gguf_experts import lookups
from mxcompile.checkpoint.interop.gguf_file import GGUFFile
from mxcompile.errors import CheckpointError
from mxcompile.tensor.weight import MXWeight


@dataclass(frozen=True)
class _Stored:
    """Where a tensor of the model is stored. parts: name in the file -> its projection; None: the whole tensor.

    shape: the model's. fused: of a tensor that holds all experts of a layer.
    """

    parts: Mapping[str, str | None]
    shape: torch.Size
    fused: FusedTensor | None


def load(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformers model in a file. MXFP4 weights become MXWeights with float inputs; others are dequantized."""
    file = GGUFFile(path)
    architecture, kind = str(file.metadata.get("general.architecture")), class_name(file.metadata)
    if kind is None:
        raise CheckpointError(
            f"{path} holds a {architecture}, which mxcompile cannot build; mxcompile.read_gguf returns its tensors"
        )
    if "rope_freqs.weight" in file.entries:
        raise CheckpointError(f"{path} has a scaled rotary embedding, which mxcompile does not support")
    config = read_config(file, architecture)
    stored = _stored_tensors(path, architecture, kind, config)
    known = {name for tensor in stored.values() for name in tensor.parts}
    unknown = [name for name in file.entries if name not in known]
    if unknown:
        raise CheckpointError(f"{path} holds {', '.join(unknown)}, which a {kind} does not have")
    tensors: dict[str, Tensor] = {}
    for own, tensor in stored.items():
        if any(name in file.entries for name in tensor.parts):
            value = _read(file, own, tensor, dtype)
            tensors[own] = permuted(own, value, config, architecture, from_gguf=True)
    return build(path, config, tensors)


def read(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors of a file, under its names; the rows of q and k are not permuted."""
    file = GGUFFile(path)
    return {name: file.tensor(entry, dtype) for name, entry in file.entries.items()}


def _read(file: GGUFFile, own: str, stored: _Stored, dtype: torch.dtype) -> Tensor:
    missing = [name for name in stored.parts if name not in file.entries]
    if missing:
        raise CheckpointError(f"{file.path} does not hold {missing[0]}, which belongs to {own}")
    values = {name: file.tensor(file.entries[name], dtype) for name in stored.parts}
    if stored.fused is not None:
        parts = {str(projection): unstack(values[name]) for name, projection in stored.parts.items()}
        return stored.fused.join(f"{file.path}: {own}", parts, stored.shape)
    (value,) = values.values()
    # a matrix of one row, such as a shared expert's router, may be stored as a vector
    return value[None] if stored.shape == (1, *value.shape) and not isinstance(value, MXWeight) else value


def _stored_tensors(path: Path, architecture: str, kind: str, config: Mapping[str, Any]) -> dict[str, _Stored]:
    """Where each tensor of the model is stored; the model is built on the meta device for that."""
    import transformers

    model_class: Any = getattr(transformers, kind)
    try:
        with torch.device("meta"):
            model: Any = model_class(model_class.config_class.from_dict(dict(config)))
    except Exception as error:
        raise CheckpointError(f"transformers cannot build the model that {path} describes: {error}") from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    fused = fused_tensors(model)
    names = {own: lookups(own, fused) for own in shapes}
    stored = gguf_names(architecture, config["num_hidden_layers"], [name for own in names.values() for name in own])
    unnamed = [name for name, stored_name in stored.items() if stored_name is None]
    if unnamed:
        raise CheckpointError(f"{path} cannot be read: the gguf package has no name for {', '.join(unnamed)}")
    return {
        own: _Stored({str(stored[name]): part for name, part in parts.items()}, shapes[own], fused.get(own))
        for own, parts in names.items()
    }
