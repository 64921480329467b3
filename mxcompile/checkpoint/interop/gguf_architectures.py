"""What llama.cpp calls the parts of a model: architecture, settings, tensors. And what of a model it has no words for.

    model_type "llama", "mistral" -> "llama";  hidden_size -> llama.embedding_length
    model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight  (names: the `gguf` package)

The rows of Llama's q and k are permuted: RoPE rotates neighbouring channels in llama.cpp and halves of a head in
transformers. Of an absent entry nothing is made up: what ggml's docs/gguf.md does not define to have a default is None.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from mxcompile.checkpoint.interop.gguf_experts import (
    GPT_OSS,
    MIXTURES,
    Mixture,
    is_published_yarn,
    mixture_in,
    mixture_of,
    number_type,
    unsupported,
    yarn_settings,
)
from mxcompile.checkpoint.interop.gguf_file import GGUFFile, package
from mxcompile.errors import CheckpointError
from mxcompile.tensor.weight import MXWeight

CLASSES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""The transformers class of an architecture of llama.cpp without experts."""
_WRITTEN: Final = (
    {"MistralForCausalLM": "llama"}
    | {name: architecture for architecture, name in CLASSES.items()}
    | {mixture.class_name: mixture.architecture for mixture in MIXTURES}
)
_HEADS: Final = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_PERMUTED: Final = ("llama", "granitemoe")
_DIVIDED: Final = ("qwen2", "qwen2moe", "olmoe")
"""Architectures whose heads divide the hidden size."""
_IDS: Final = {"bos": "bos", "pad": "padding", "unk": "unknown"}
_DEFAULTED: Final = ("bos", "pad")
_ENDS: Final = ("eos", "eot", "eom")


def architecture_of(module: nn.Module) -> str | None:
    """llama.cpp's architecture for a transformers model of the classes that can be written; None for any other."""
    names = [kind.__name__ for kind in type(module).__mro__]
    return next((_WRITTEN[name] for name in names if name in _WRITTEN), None)


def written_classes() -> str:
    """Names of the classes that can be written, for messages."""
    return ", ".join(sorted(_WRITTEN))


def class_name(metadata: Mapping[str, Any]) -> str | None:
    """The transformers class that a file's metadata describe; None if it is not one that can be built."""
    architecture = str(metadata.get("general.architecture"))
    mixture = mixture_in(metadata)
    if mixture is not None:
        return mixture.class_name
    return None if metadata.get(f"{architecture}.expert_count") else CLASSES.get(architecture)


def unsupported_settings(config: Any, architecture: str) -> list[str]:
    """What a model's configuration asks for and neither `settings` nor llama.cpp's architecture has room for."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    heads, mixture = config.num_attention_heads, mixture_of(config)
    is_gpt_oss = architecture == GPT_OSS
    windows = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    scaled = not is_published_yarn(rope) if is_gpt_oss else rope.get("rope_type", "default") != "default"
    settings = {
        "a scaled rotary embedding": scaled,
        "a rotary embedding of a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "sliding windows": windows and not is_gpt_oss,
        f"{config.hidden_act} activations": config.hidden_act != "silu",
        f"{heads} heads of {_head_size(config)} channels for a hidden size of {config.hidden_size}": (
            architecture in _DIVIDED and heads * _head_size(config) != config.hidden_size
        ),
        "an attention output with a bias": architecture == "qwen3" and config.attention_bias,
        **({} if mixture is None else unsupported(config, mixture)),
    }
    return [what for what, applies in settings.items() if applies]


def settings(config: Any, architecture: str) -> dict[str, int | float | str]:
    """Metadata entries that describe a model of a transformers configuration."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    head = _head_size(config)
    mixture = mixture_of(config)
    own: dict[str, int | float | str] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
    }
    if mixture is not None:
        own |= {key: number_type(key)(getattr(config, name)) for key, name in mixture.settings.items()}
    if architecture == GPT_OSS:
        own |= yarn_settings(rope)
    return {f"{architecture}.{key}": value for key, value in own.items()}


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def read_config(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The transformers configuration that a file's metadata describe."""
    heads, width = _number(file, "attention.head_count", int), _number(file, "embedding_length", int)
    table = file.entries.get("token_embd.weight")
    if table is None or len(table.shape) != 2 or _number(file, "block_count", int) > len(file.entries):
        raise CheckpointError(f"{file.path} does not hold the layers or the embedding that it describes")
    is_scaled = any(key.startswith(f"{architecture}.rope.scaling.") for key in file.metadata)
    if is_scaled and architecture != GPT_OSS:
        raise CheckpointError(f"{file.path} has a scaled rotary embedding, which mxcompile does not support")
    mixture, theta = mixture_in(file.metadata), _number(file, "rope.freq_base", float, 10000.0)
    return {
        "model_type": architecture,
        "architectures": [class_name(file.metadata)],
        "hidden_size": width,
        "intermediate_size": _number(file, "feed_forward_length", int),
        "num_hidden_layers": _number(file, "block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(file, "attention.head_count_kv", int, heads),
        "head_dim": _number(file, "attention.key_length", int, width // heads),
        "max_position_embeddings": _number(file, "context_length", int),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon", float),
        **({"rope_parameters": _yarn(file, theta)} if is_scaled else {"rope_theta": theta}),
        "vocab_size": table.shape[0],
        "tie_word_embeddings": "output.weight" not in file.entries,
        "attention_bias": "blk.0.attn_output.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
        **({} if mixture is None else _mixture_config(file, mixture)),
        **token_ids(file),
    }


def _number(file: GGUFFile, key: str, kind: type, default: Any = None) -> Any:
    """A positive number of the metadata of a file's architecture."""
    architecture = file.metadata.get("general.architecture")
    value = file.metadata.get(f"{architecture}.{key}", default)
    if type(value) is not kind or value <= 0:
        raise CheckpointError(f"{file.path}: {architecture}.{key} is {value!r}, not a positive {kind.__name__}")
    # GGUF holds float32: 1e-5, not its float32 value in double precision, is what was written
    return value if kind is int else float(str(np.float32(value)))


def _mixture_config(file: GGUFFile, mixture: Mixture) -> dict[str, Any]:
    prefix = f"{mixture.architecture}."
    known = {prefix + key for key in mixture.settings}
    others = [
        key
        for key in file.metadata
        if key.startswith((f"{prefix}expert_", f"{prefix}attention.sliding_window")) and key not in known
    ]
    if others:
        raise CheckpointError(f"{file.path} has {others[0]}, which mxcompile does not support")
    numbers = {name: _number(file, key, number_type(key)) for key, name in mixture.settings.items()}
    flags = {name: tensor in file.entries for name, tensor in mixture.flags.items()}
    return {"model_type": mixture.model_type, **copy.deepcopy(dict(mixture.built_in)), **numbers, **flags}


def _yarn(file: GGUFFile, theta: float) -> dict[str, Any]:
    if file.metadata.get(f"{GPT_OSS}.rope.scaling.type") != "yarn":
        raise CheckpointError(f"{file.path} has a scaled rotary embedding that is not gpt-oss' own")
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": _number(file, "rope.scaling.factor", float),
        "original_max_position_embeddings": _number(file, "rope.scaling.original_context_length", int),
        "beta_fast": _number(file, "rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": _number(file, "rope.scaling.yarn_beta_slow", float, 1.0),
        "truncate": False,
    }


def token_ids(file: GGUFFile) -> dict[str, int | list[int] | None]:
    """The ids of special tokens that a file states, as a configuration has them.

    None where it states none, so that no default of a configuration class takes its place.
    """

    def stated(name: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or value < 0):
            raise CheckpointError(f"{file.path}: tokenizer.ggml.{name}_token_id is {value!r}, not a token id")
        return value

    own = {kind: stated(name) for kind, name in _IDS.items()}
    ids: dict[str, int | list[int] | None] = {
        f"{kind}_token_id": number for kind, number in own.items() if number is not None or kind in _DEFAULTED
    }
    ends = list(dict.fromkeys(number for number in map(stated, _ENDS) if number is not None))
    return ids | {"eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}


def gguf_names(architecture: str, layers: int, names: Iterable[str]) -> dict[str, str | None]:
    """llama.cpp's name of each tensor; None for one that has none."""
    gguf = package()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, layers)
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}


def permuted(name: str, value: Tensor, config: Mapping[str, Any], architecture: str, *, from_gguf: bool) -> Tensor:
    """Llama's and GraniteMoE's q and k with the rows of each head in the other program's order; others unchanged."""
    key = _HEADS.get(name.split(".")[-2]) if "." in name else None
    if architecture not in _PERMUTED or key is None:
        return value
    heads = config[key]
    if value.shape[0] % (2 * heads):
        raise CheckpointError(f"{name} has {value.shape[0]} rows, which {heads} heads cannot share evenly")
    inner = (-1, 2) if from_gguf else (2, -1)
    order = torch.arange(value.shape[0]).unflatten(0, (heads, *inner)).transpose(1, 2).flatten().to(value.device)
    if not isinstance(value, MXWeight):
        return value[order]
    return MXWeight(value.elements[order], value.scales[order], replace(value.layout_), value.dtype, value.multiplier)
