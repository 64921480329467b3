"""Mixtures of experts in GGUF: their settings, the settings that llama.cpp has built in, and their stacked tensors.

    num_experts, num_experts_per_tok -> qwen3moe.expert_count, qwen3moe.expert_used_count
    mlp.experts.gate_up_proj (MXWeight) -> blk.0.ffn_gate_exps.weight, ffn_up_exps.weight [experts, inner, hidden]

What llama.cpp computes for an architecture beyond its metadata (whether the weights of a token's experts sum to 1,
which layers have experts, gpt-oss' activation function) was read in src/models of version 0.5.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mxcompile.checkpoint.interop.fused_experts import MIXTRAL_NAMES, FusedTensor

_COUNTS: Final = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL: Final = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_EVERY_LAYER: Final[Mapping[str, Any]] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GRANITE_EXPERTS: Final = ".block_sparse_moe.experts"
_ENDINGS: Final = {
    ".sinks": ".sinks.weight",
    ".block_sparse_moe.router.weight": ".block_sparse_moe.router.layer.weight",
}
"""Ends of names that the gguf package knows otherwise."""
ROUTERS: Final = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")
"""Ends of the names of routers, which llama.cpp's converter keeps in F32."""


@dataclass(frozen=True)
class Mixture:
    """A class of transformers that is a mixture of experts, and what llama.cpp has for it.

    settings: metadata key -> attribute of the configuration. built_in: attributes that no metadata state, with the
    values that llama.cpp computes with. flags: attributes that are true if the file has that tensor.
    """

    model_type: str
    class_name: str
    architecture: str
    settings: Mapping[str, str]
    built_in: Mapping[str, Any] = field(default_factory=dict[str, Any])
    flags: Mapping[str, str] = field(default_factory=dict[str, str])


MIXTURES: Final = (
    Mixture("mixtral", "MixtralForCausalLM", "llama", _LOCAL),
    Mixture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        "granitemoe",
        _LOCAL
        | {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    Mixture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        _COUNTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        _EVERY_LAYER | {"norm_topk_prob": True, "attention_bias": False},
    ),
    Mixture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "qwen2moe",
        _COUNTS
        | {
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        _EVERY_LAYER | {"norm_topk_prob": False, "tie_word_embeddings": False},
        {"qkv_bias": "blk.0.attn_q.bias"},
    ),
    Mixture(
        "olmoe",
        "OlmoeForCausalLM",
        "olmoe",
        _COUNTS,
        {"norm_topk_prob": False, "clip_qkv": None, "attention_bias": False, "tie_word_embeddings": False},
    ),
    Mixture(
        "gpt_oss",
        "GptOssForCausalLM",
        "gpt-oss",
        _LOCAL | {"expert_feed_forward_length": "intermediate_size", "attention.sliding_window": "sliding_window"},
        {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True, "tie_word_embeddings": False},
    ),
)
GPT_OSS: Final = "gpt-oss"
"""The one architecture that is written with sliding windows and a scaled rotary embedding."""


def mixture_of(config: Any) -> Mixture | None:
    """What llama.cpp has for a model of a transformers configuration; None if it is no mixture of experts."""
    return next((mixture for mixture in MIXTURES if mixture.model_type == config.model_type), None)


def mixture_in(metadata: Mapping[str, Any]) -> Mixture | None:
    """The mixture of experts that a file's metadata describe; None if they describe none that can be built."""
    architecture = metadata.get("general.architecture")
    if not metadata.get(f"{architecture}.expert_count"):
        return None
    return next((mixture for mixture in MIXTURES if mixture.architecture == architecture), None)


def number_type(key: str) -> type:
    """Of the value of a metadata key."""
    return float if key.endswith("scale") else int


def unsupported(config: Any, mixture: Mixture) -> dict[str, bool]:
    """What a configuration asks for that llama.cpp has otherwise, and whether it does."""
    differing = {
        f"{name} {getattr(config, name)!r}, while llama.cpp has {value!r} built in": True
        for name, value in mixture.built_in.items()
        if getattr(config, name, value) != value
    }
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    return differing | {
        f"{key_heads} heads for keys and {heads} for queries": mixture.model_type == "olmoe" and heads != key_heads,
        "layers with and without sliding windows in another order than in turn": (
            mixture.architecture == GPT_OSS and not _is_alternating(config)
        ),
    }


def _is_alternating(config: Any) -> bool:
    kinds = [_FULL if layer % 2 else _SLIDING for layer in range(config.num_hidden_layers)]
    return bool(config.sliding_window) and list(config.layer_types) == kinds


def lookups(name: str, fused: Mapping[str, FusedTensor]) -> dict[str, str | None]:
    """The names by which the gguf package knows the parts of a tensor -> the projection of each; None: all of it."""
    if name in fused:
        own = fused[name]
        names = MIXTRAL_NAMES if own.path.endswith(_GRANITE_EXPERTS) else {}
        return {f"{own.path}.{names.get(p, p)}.{own.leaf}": p for p in own.projections}
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), "")
    return {name.removesuffix(ending) + _ENDINGS.get(ending, ""): None}


def yarn_settings(rope: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Metadata entries, without their architecture, of gpt-oss' rotary embedding."""
    if rope.get("rope_type", "default") == "default":
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }


def is_published_yarn(rope: Mapping[str, Any]) -> bool:
    """Whether a rotary embedding differs from the published one of gpt-oss in no more than numbers of `yarn_settings`.

    A file has no entry for `truncate`, which all published models turn off; llama.cpp rounds the range all the same.
    """
    kind, others = rope.get("rope_type", "default"), ("attention_factor", "mscale", "mscale_all_dim")
    return kind == "default" or (kind == "yarn" and rope.get("truncate") is False and not any(map(rope.get, others)))
