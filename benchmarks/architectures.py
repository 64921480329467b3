"""Tiny models of many Hugging Face architectures, with random weights, and inputs that fit them.

`build("llama")` returns the same bits every time, in eval mode; `inputs("llama", batch=3)` returns keyword arguments of
its forward. Models are made from transformers' configs, and nothing is downloaded. Weights are not initialized as in
transformers: channels of norms differ, two of them are outliers (8 times as large), and logits are far from uniform.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig

HIDDEN: Final = 64
VOCABULARY: Final = 128
IMAGE: Final = 16
MEL_BINS: Final = 16
OUTLIERS: Final = (3, 17)
OUTLIER_GAIN: Final = 8.0
MATRIX_GAIN: Final = 0.5
"""Standard deviation of a matrix's elements, in fan_in**-0.5; with outliers 1 would make a softmax near one-hot."""

_SIZES: Final[dict[str, Any]] = {
    **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1},
    **{"decoder_start_token_id": 1, "forced_eos_token_id": None, "use_cache": False, "sliding_window": 4},
    # the same sizes under other names
    **{"d_model": HIDDEN, "d_kv": 16, "d_ff": 2 * HIDDEN, "ffn_dim": 2 * HIDDEN, "embedding_size": HIDDEN},
    **{"word_embed_proj_dim": HIDDEN, "rotary_dim": 8, "ffn_hidden_size": 2 * HIDDEN, "num_layers": 2, "num_heads": 4},
    # encoder-decoders
    **{"num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 2 * HIDDEN, "decoder_ffn_dim": 2 * HIDDEN},
    **{"num_mel_bins": MEL_BINS, "max_source_positions": 64, "max_target_positions": 64},
    # images
    **{"image_size": IMAGE, "patch_size": 8, "mlp_ratio": 2},
    # mixtures of experts
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "moe_k": 2},
    **{"num_experts_per_tok": 2, "moe_topk": 2, "moe_intermediate_size": HIDDEN, "intermediate_size_mlp": 2 * HIDDEN},
    **{"shared_expert_intermediate_size": HIDDEN, "shared_intermediate_size": HIDDEN, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "decoder_sparse_step": 1, "moe_layer_start_index": 1, "n_group": 1, "topk_group": 1},
    # low-rank attention
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}
"""A config takes the entries whose names it has."""


def sizes(model_type: str) -> dict[str, Any]:
    """The small sizes that the config of this type has a name for."""
    config = AutoConfig.for_model(model_type)
    computed = {name for name in _SIZES if isinstance(getattr(type(config), name, None), property)}
    return {name: size for name, size in _SIZES.items() if name not in computed and hasattr(config, name)}


def auto(auto: str, model_type: str, **changes: Any) -> Callable[[], nn.Module]:
    """A builder: the model that transformers' class `auto` (or a model's own class) makes from that type's config."""

    def make() -> nn.Module:
        import transformers

        config = AutoConfig.for_model(model_type, **_changed(model_type, changes))
        chosen = getattr(transformers, auto)
        return chosen.from_config(config) if auto.startswith("Auto") else chosen(config)

    return make


def _changed(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The small sizes with these changes; a size that has two names in the config changes under both."""
    other_names = type(AutoConfig.for_model(model_type)).attribute_map
    changed = {other_names.get(name, name) for name in changes}
    kept = {name: size for name, size in sizes(model_type).items() if other_names.get(name, name) not in changed}
    return {**kept, **changes}


def causal(model_type: str, **changes: Any) -> Callable[[], nn.Module]:
    return auto("AutoModelForCausalLM", model_type, **changes)


def masked(model_type: str, **changes: Any) -> Callable[[], nn.Module]:
    return auto("AutoModelForMaskedLM", model_type, **changes)


def seq2seq(model_type: str, **changes: Any) -> Callable[[], nn.Module]:
    return auto("AutoModelForSeq2SeqLM", model_type, **changes)


def image(model_type: str, **changes: Any) -> Callable[[], nn.Module]:
    return auto("AutoModelForImageClassification", model_type, num_labels=10, **changes)


def _clip() -> nn.Module:
    """An image encoder and a text encoder; the result is how well they match."""
    parts = {f"{part}_config": sizes(f"clip_{part}_model") for part in ("text", "vision")}
    return auto("AutoModel", "clip", **parts, projection_dim=HIDDEN)()


_SLIDING_AND_FULL: Final = ["sliding_attention", "full_attention"]

ARCHITECTURES: Final[dict[str, Callable[[], nn.Module]]] = {
    # decoders
    "llama": causal("llama"),
    "mistral": causal("mistral"),
    "qwen2": causal("qwen2"),
    "qwen3": causal("qwen3"),
    "gemma": causal("gemma"),
    "gemma2": causal("gemma2", query_pre_attn_scalar=16),
    "gemma3": causal("gemma3_text", query_pre_attn_scalar=16, layer_types=_SLIDING_AND_FULL),
    "phi": causal("phi"),
    "phi3": causal("phi3"),
    "olmo": causal("olmo"),
    "olmo2": causal("olmo2"),
    "olmo3": causal("olmo3", layer_types=_SLIDING_AND_FULL),
    "gpt2": causal("gpt2"),
    "gpt_neo": causal("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=4),
    "gpt_neox": causal("gpt_neox"),
    "gpt_bigcode": causal("gpt_bigcode"),
    "gptj": causal("gptj"),
    "codegen": causal("codegen"),
    "opt": causal("opt"),
    "bloom": causal("bloom"),
    "falcon": causal("falcon"),
    "falcon_40b": causal("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "mpt": causal("mpt"),
    "glm": causal("glm"),
    "glm4": causal("glm4"),
    "granite": causal("granite", embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=2.0),
    "cohere": causal("cohere", logit_scale=1.0),
    "cohere2": causal("cohere2", logit_scale=1.0, layer_types=_SLIDING_AND_FULL),
    "starcoder2": causal("starcoder2"),
    "stablelm": causal("stablelm"),
    "smollm3": causal("smollm3", no_rope_layers=[1, 0]),
    "nemotron": causal("nemotron"),
    "helium": causal("helium"),
    "exaone4": causal("exaone4", layer_types=_SLIDING_AND_FULL),
    "hunyuan": causal("hunyuan_v1_dense"),
    "seed_oss": causal("seed_oss"),
    "apertus": causal("apertus"),
    "arcee": causal("arcee"),
    "bitnet": causal("bitnet"),
    "diffllama": causal("diffllama"),
    "persimmon": causal("persimmon"),
    "biogpt": causal("biogpt"),
    "nanochat": causal("nanochat"),
    # mixtures of experts
    "mixtral": causal("mixtral"),
    "qwen2_moe": causal("qwen2_moe"),
    "qwen3_moe": causal("qwen3_moe"),
    "olmoe": causal("olmoe"),
    "phimoe": causal("phimoe"),
    "gpt_oss": causal("gpt_oss"),
    "deepseek_v2": causal("deepseek_v2", num_key_value_heads=4),
    "deepseek_v3": causal("deepseek_v3", num_key_value_heads=4, head_dim=8),
    "glm4_moe": causal("glm4_moe"),
    "ernie4_5_moe": causal("ernie4_5_moe"),
    "granitemoe": causal("granitemoe"),
    "granitemoeshared": causal("granitemoeshared"),
    "llama4": causal("llama4_text", attention_chunk_size=4, no_rope_layers=[1, 0], interleave_moe_layer_step=2),
    "hunyuan_moe": causal("hunyuan_v1_moe"),
    "minimax": causal("minimax", block_size=64),
    "minimax_m2": causal("minimax_m2"),
    "dots1": causal("dots1", layer_types=_SLIDING_AND_FULL),
    "jetmoe": causal("jetmoe", kv_channels=16),
    # with state spaces, linear attention or convolutions
    "mamba": causal("mamba"),
    "mamba2": causal("mamba2", num_heads=8, head_dim=16, n_groups=2, state_size=16, chunk_size=4),
    "jamba": causal("jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2),
    "lfm2": causal("lfm2", layer_types=["conv", "full_attention"], block_multiple_of=32),
    "qwen3_next": causal(
        "qwen3_next",
        layer_types=["linear_attention", "full_attention"],
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16},
        linear_value_head_dim=16,
    ),
    # encoders
    "bert": masked("bert"),
    "roberta": masked("roberta"),
    "distilbert": masked("distilbert", dim=HIDDEN, hidden_dim=2 * HIDDEN),
    "electra": masked("electra"),
    "albert": masked("albert"),
    "mpnet": masked("mpnet"),
    "deberta_v2": masked("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "modernbert": masked("modernbert", local_attention=4),
    # encoder-decoders
    "t5": seq2seq("t5", tie_word_embeddings=False, decoder_start_token_id=0),
    "t5_v1_1": seq2seq("t5", tie_word_embeddings=False, decoder_start_token_id=0, feed_forward_proj="gated-gelu"),
    "bart": seq2seq("bart"),
    "pegasus": seq2seq("pegasus"),
    "m2m_100": seq2seq("m2m_100"),
    "whisper": auto("AutoModelForSpeechSeq2Seq", "whisper"),
    # images
    "vit": image("vit"),
    "dinov2": image("dinov2"),
    "beit": image("beit"),
    "siglip": auto("AutoModel", "siglip_vision_model"),
    "clip": _clip,
}

_IMAGES: Final = ("vit", "dinov2", "beit", "siglip")
_ENCODER_DECODERS: Final = ("t5", "t5_v1_1", "bart", "pegasus", "m2m_100")


def build(name: str) -> nn.Module:
    """A new model of that name, always with the same weights, float32, in eval mode, without a key/value cache."""
    return made(ARCHITECTURES[name])


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` returns, as `build` returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().float().eval()
        with torch.no_grad():
            gains = [norm for norm in map(_gain, model.modules()) if norm is not None]
            _randomize(model)
            for gain, offset in gains:
                channels = list(OUTLIERS)
                gain[channels] = (gain[channels] + offset) * OUTLIER_GAIN - offset
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return model


def _gain(module: nn.Module) -> tuple[nn.Parameter, float] | None:
    """A norm's weight if it has one per hidden channel, and what the norm adds to it: 1 if it is initialized to 0."""
    weight = getattr(module, "weight", None)
    if "Norm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or weight.shape != (HIDDEN,):
        return None
    return weight, 1.0 if not weight.any() or type(module).__name__.endswith("1P") else 0.0


def _randomize(model: nn.Module) -> None:
    """Add noise to 1-D parameters, and draw those of more dimensions anew."""
    convolutions = {m.weight for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    for parameter in model.parameters():
        if parameter.dim() <= 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.25)
        else:
            fan_in = parameter[0].numel() if parameter in convolutions else parameter.shape[-1]
            parameter.copy_(torch.randn_like(parameter) * MATRIX_GAIN * fan_in**-0.5)


def inputs(name: str, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for the model's forward; `length` is the number of tokens (images have none)."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        return torch.randint(3, VOCABULARY, (batch, length), generator=generator)

    if name == "whisper":
        features = torch.randn(batch, MEL_BINS, 2 * _SIZES["max_source_positions"], generator=generator)
        return {"input_features": features, "decoder_input_ids": ids()}
    arguments = {}
    if name in (*_IMAGES, "clip"):
        arguments["pixel_values"] = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    if name not in _IMAGES:
        arguments["input_ids"] = ids()
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    if name in _ENCODER_DECODERS:
        arguments["decoder_input_ids"] = ids()
    return arguments


class Draw:
    """Random inputs of a batch size and, for texts, a length, from a seed."""

    def __init__(self, batch: int, length: int, seed: int) -> None:
        self.batch, self.length, self.seed = batch, length, seed
        self.generator = torch.Generator().manual_seed(seed)

    def ids(self) -> Tensor:
        return torch.randint(3, VOCABULARY - 8, (self.batch, self.length), generator=self.generator)

    def mask(self) -> Tensor:
        return torch.ones(self.batch, self.length, dtype=torch.int64)

    def full(self, value: int, length: int) -> Tensor:
        return torch.full((self.batch, length), value)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def integers(self, below: int) -> Tensor:
        return torch.randint(0, below, (self.batch,), generator=self.generator)


def output(result: Any) -> Tensor:
    """The one tensor that matters in a model's result: logits, embeddings (CLIP's), or the last hidden state."""
    if isinstance(result, Tensor):
        return result
    if "image_embeds" in result:
        return torch.cat((result["text_embeds"], result["image_embeds"]), -1)
    return result["logits"] if "logits" in result else result["last_hidden_state"]
