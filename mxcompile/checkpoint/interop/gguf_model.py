"""Read and write models as GGUF files with MXFP4 weights: Llama, Mistral, Qwen2 and Qwen3, under llama.cpp's names.

    model.layers.0.mlp.up_proj.weight (MXWeight, mxfp4) <-> blk.0.ffn_up.weight (MXFP4), the same bytes

The rows of Llama's q and k are permuted: RoPE rotates neighbouring channels in llama.cpp and halves of a head in
transformers. Names come from the `gguf` package. The tokenizer is not written, and neither is the format to which
inputs are rounded: llama.cpp chooses its own for MXFP4 matmuls.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from mxcompile.checkpoint.interop.build_model import build
from mxcompile.checkpoint.interop.element_layouts import check_scales
from mxcompile.checkpoint.interop.gguf_file import GGUFFile, package
from mxcompile.checkpoint.stored_tensors import TensorNames
from mxcompile.errors import CheckpointError
from mxcompile.formats import MXFP4
from mxcompile.tensor.weight import MXLayout, MXWeight

_CLASSES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ARCHITECTURES: Final = {"mistral": "llama"} | {name: name for name in _CLASSES}
_FILE_TYPE: Final = 38  # LLAMA_FTYPE_MOSTLY_MXFP4_MOE of llama.h


def write(path: Path, module: nn.Module, names: TensorNames, config: Mapping[str, Any]) -> None:
    """Write a model. config: the model's own configuration.

    Raises CheckpointError if the architecture is not supported here, or GGUF cannot represent the model.
    """
    gguf, architecture = package(), _architecture(config)
    parsed: Any = getattr(module, "config", None)
    if architecture is None or parsed is None:
        raise CheckpointError(
            f"{type(module).__name__} cannot be written as GGUF: mxcompile supports {', '.join(_ARCHITECTURES)}; save "
            'others with format="compressed-tensors"'
        )
    metadata = _metadata(parsed, architecture)
    state = {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, MXWeight) or name not in names.aliases
    }
    gguf_names = _gguf_names(gguf, architecture, parsed.num_hidden_layers, state)
    arrays = {gguf_names[name]: _encoded(name, value, parsed, architecture) for name, value in state.items()}
    writer: Any = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, value)
        for name, data in arrays.items():
            packed = data.dtype == np.uint8
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.MXFP4 if packed else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def load(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformers model in a file. MXFP4 weights become MXWeights with float inputs; others are dequantized."""
    file, gguf = GGUFFile(path), package()
    architecture = file.metadata.get("general.architecture")
    if architecture not in _CLASSES:
        raise CheckpointError(
            f"{path} holds a {architecture}, which mxcompile cannot build; mxcompile.read_gguf returns its tensors"
        )
    config = _read_config(file, str(architecture))
    tied = config["tie_word_embeddings"]
    names = _parameters(str(path), config, tied)
    gguf_names = _gguf_names(gguf, str(architecture), config["num_hidden_layers"], names)
    own_names = {gguf_name: name for name, gguf_name in gguf_names.items()}
    tensors: dict[str, Tensor] = {}
    for name, entry in file.entries.items():
        if name == "rope_freqs.weight":
            raise CheckpointError(f"{path} has a scaled rotary embedding, which mxcompile does not support")
        if name not in own_names:
            raise CheckpointError(f"{path} holds {name}, which a {_CLASSES[str(architecture)]} does not have")
        own, value = own_names[name], file.tensor(entry, dtype)
        tensors[own] = _permuted(own, value, config, str(architecture), from_gguf=True)
    return build(path, config, tensors)


def read(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors of a file, under its names; the rows of q and k are not permuted."""
    file = GGUFFile(path)
    return {name: file.tensor(entry, dtype) for name, entry in file.entries.items()}


def _architecture(config: Mapping[str, Any]) -> str | None:
    return _ARCHITECTURES.get(str(config.get("model_type")))


def _metadata(config: Any, architecture: str) -> dict[str, int | float]:
    """Metadata entries of a model. Raises CheckpointError for settings that they cannot represent."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    unsupported = {
        "a scaled rotary embedding": rope.get("rope_type", "default") != "default",
        "sliding windows": getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None),
        f"{config.hidden_act} activations": config.hidden_act != "silu",
    }
    for what, applies in unsupported.items():
        if applies:
            raise CheckpointError(f"this {config.model_type} has {what}: mxcompile cannot write that as GGUF")
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    own: dict[str, int | float] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
    }
    general: dict[str, int | float] = {"general.file_type": _FILE_TYPE, "general.quantization_version": 2}
    return general | {f"{architecture}.{key}": value for key, value in own.items()}


def _read_config(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The transformers configuration that a file's metadata describe."""

    def number(key: str, kind: type, default: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if type(value) is not kind or value <= 0:
            raise CheckpointError(f"{file.path}: {architecture}.{key} is {value!r}, not a positive {kind.__name__}")
        return value

    heads, width = number("attention.head_count", int), number("embedding_length", int)
    table = file.entries.get("token_embd.weight")
    if table is None or len(table.shape) != 2 or number("block_count", int) > len(file.entries):
        raise CheckpointError(f"{file.path} does not hold the layers or the embedding that it describes")
    if any(key.startswith(f"{architecture}.rope.scaling.") for key in file.metadata):
        raise CheckpointError(f"{file.path} has a scaled rotary embedding, which mxcompile does not support")
    return {
        "model_type": architecture,
        "architectures": [_CLASSES[architecture]],
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length", int),
        "num_hidden_layers": number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", int, heads),
        "head_dim": number("attention.key_length", int, width // heads),
        "max_position_embeddings": number("context_length", int),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", float),
        "rope_theta": number("rope.freq_base", float, 10000.0),
        "vocab_size": table.shape[0],
        "tie_word_embeddings": "output.weight" not in file.entries,
        "attention_bias": "blk.0.attn_output.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
    }


def _parameters(source: str, config: Mapping[str, Any], tied: bool) -> list[str]:
    """Names of a model's tensors; the model is built on the meta device for that."""
    import transformers

    kind: Any = getattr(transformers, config["architectures"][0])
    try:
        with torch.device("meta"):
            names = list(kind(kind.config_class.from_dict(dict(config))).state_dict())
    except Exception as error:
        raise CheckpointError(f"transformers cannot build the model that {source} describes: {error}") from error
    return [name for name in names if not (tied and name == "lm_head.weight")]


def _gguf_names(gguf: Any, architecture: str, layers: int, names: Any) -> dict[str, str]:
    """llama.cpp's name of each tensor. Raises CheckpointError for one that has none."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, layers)
    gguf_names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unnamed = next((name for name, gguf_name in gguf_names.items() if gguf_name is None), None)
    if unnamed is not None:
        raise CheckpointError(f"{unnamed} has no name in llama.cpp's {architecture}")
    return gguf_names


def _encoded(name: str, value: Tensor, config: Any, architecture: str) -> Any:
    """A tensor as the GGUF writer takes it: MXFP4 as bytes `[out, in/32 * 17]`, others as float16 or float32."""
    sizes = {key: getattr(config, key) for key in ("num_attention_heads", "num_key_value_heads")}
    permuted = _permuted(name, value, sizes, architecture, from_gguf=False)
    if not isinstance(permuted, MXWeight):
        kind = torch.float16 if value.dtype == torch.float16 else torch.float32
        return permuted.detach().to("cpu", kind).contiguous().numpy()
    layout = permuted.layout_
    reasons = {
        f"{layout.format} weights (quantize to {MXFP4} in blocks of 32)": layout.format != str(MXFP4),
        "an input that is multiplied by a vector (use awq-fold{multiply=false})": layout.multiplier,
        "an input that is rotated (use a recipe without rotate)": layout.rotation,
        f"a row of {layout.size} values, not a multiple of 32 (skip it with exclude)": layout.size % 32,
    }
    for what, applies in reasons.items():
        if applies or layout.transposed:
            raise CheckpointError(f"{name}: GGUF cannot hold {what}; mxcompile.save to a folder saves it unchanged")
    check_scales(name, permuted.scales)
    blocks = permuted.elements.unflatten(-1, (-1, MXFP4.block_bytes))
    return torch.cat([permuted.scales[..., None], blocks], dim=-1).flatten(-2).cpu().contiguous().numpy()


def _permuted(name: str, value: Tensor, config: Mapping[str, Any], architecture: str, *, from_gguf: bool) -> Tensor:
    """Llama's q and k with the rows of each head in the other program's order; any other tensor unchanged."""
    key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if architecture != "llama" or key is None:
        return value
    heads = config[key]
    if value.shape[0] % (2 * heads):
        raise CheckpointError(f"{name} has {value.shape[0]} rows, which {heads} heads cannot share evenly")
    inner = (-1, 2) if from_gguf else (2, -1)
    order = torch.arange(value.shape[0]).unflatten(0, (heads, *inner)).transpose(1, 2).flatten()
    if not isinstance(value, MXWeight):
        return value[order]
    layout = MXLayout(value.layout_.format, value.layout_.size, value.layout_.transposed, None, None)
    lost = (value.layout_.multiplier, value.layout_.rotation)
    return value if any(lost) else MXWeight(value.elements[order], value.scales[order], layout, value.dtype)
