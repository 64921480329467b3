"""Support for tests of other projects' checkpoints: tiny mixtures of experts that those projects have."""

from typing import Any, Final

import torch
from torch import nn

import mxcompile

SIZES: Final = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: Final = 3
_KINDS: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "mixtral": ("Mixtral", "Mixtral", {"num_local_experts": EXPERTS, "sliding_window": None}),
    "qwen3": (
        "Qwen3Moe",
        "Qwen3Moe",
        {"num_experts": EXPERTS, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen2": (
        "Qwen2Moe",
        "Qwen2Moe",
        {"num_experts": EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    ),
    "olmoe": ("Olmoe", "Olmoe", {"num_experts": EXPERTS, "num_key_value_heads": 4}),
    "gpt-oss": ("GptOss", "GptOss", {"num_local_experts": EXPERTS, "head_dim": 16, "sliding_window": 8}),
    "llama4": (
        "Llama4",
        "Llama4Text",
        {"num_local_experts": EXPERTS, "head_dim": 16, "intermediate_size_mlp": 64, "attention_chunk_size": 64},
    ),
    "granite": ("GraniteMoe", "GraniteMoe", {"num_local_experts": EXPERTS}),
}


def mixture(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
    """A model whose attention, norms, biases, routers and experts matter. changes: of its configuration."""
    import transformers

    model, config, own = _KINDS[name]
    torch.manual_seed(0)
    made = getattr(transformers, f"{config}Config")(**SIZES | own | changes)
    module: nn.Module = getattr(transformers, f"{model}ForCausalLM")(made).eval()
    for key, parameter in module.named_parameters():  # not buffers: transformers loads those in float32
        values = torch.randn_like(parameter) * (0.4 if parameter.dim() == 1 or key.endswith("_bias") else 0.25)
        parameter.data = (values + ("norm" in key)).to(dtype)
    return module


def routers(model: nn.Module) -> list[str]:
    """Names of the modules that choose experts."""
    ends = ("mlp.gate", "router", "shared_expert_gate", "router.layer")
    return [name for name, _ in model.named_modules() if name.endswith(ends)]


def quantized_mixture(
    name: str,
    weight: str = "mxfp4",
    dtype: torch.dtype = torch.bfloat16,
    exclude: tuple[str, ...] = ("lm_head*",),
    **changes: Any,
) -> nn.Module:
    """The model with all but its routers, and what is excluded, in an MX format; inputs stay float."""
    model = mixture(name, dtype, **changes)
    return mxcompile.quantize_and_compile(
        model,
        {"input_ids": torch.arange(24)[None] * 5 % 128},
        recipe=f"lower-mx{{weight={weight},activation=none}}",
        compile=False,
        exclude=[*routers(model), *exclude],
        allow_partial=True,
    )
