"""Tiny models of every kind that mxcompile must handle, and inputs for them.

`build("llama")` makes the same weights to the bit every time, in eval mode; `inputs("llama", batch=3)` returns keyword
arguments of its forward. Weights are not those of the library's initialization: the channels of a norm differ, so that
a fold that forgets one is noticed, and logits are far from uniform.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN: Final = 64
VOCABULARY: Final = 128
IMAGE: Final = 16


class MLP(nn.Module):
    """norm -> up -> relu -> down, `[..., 64]` to `[..., 64]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))


class CNN(nn.Module):
    """Two convolutions and two linears, `[batch, 3, 16, 16]` to `[batch, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=4, padding=1), nn.ReLU()
        )
        self.hidden = nn.Linear(16 * 2 * 2, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(F.relu(self.hidden(self.features(pixel_values).flatten(1))))


def _llama(*, tied: bool = False, layers: int = 1) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**_decoder(), "num_hidden_layers": layers, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))


def _gemma() -> nn.Module:
    """Norms that multiply by 1 + weight, a scaled embedding, and a tied head."""
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**_decoder(), num_key_value_heads=2, head_dim=16))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_decoder(), num_key_value_heads=2, num_local_experts=4))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 1, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_decoder(), max_position_embeddings=64))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "image_size": IMAGE, "patch_size": 8}
    return ViTModel(ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=4))


def _decoder() -> dict[str, Any]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN}
    return {**sizes, "num_hidden_layers": 1, "num_attention_heads": 4}


_BUILDERS: Final[dict[str, Callable[[], nn.Module]]] = {
    "mlp": MLP,
    "cnn": CNN,
    "llama": _llama,
    "llama-tied": lambda: _llama(tied=True),
    "gemma": _gemma,
    "gpt2": _gpt2,
    "bert": _bert,
    "vit": _vit,
    "mixtral": _mixtral,
}

MODELS: Final = tuple(_BUILDERS)
LANGUAGE_MODELS: Final = ("llama", "llama-tied", "gemma", "gpt2", "mixtral")
"""Those with logits over a vocabulary and an output head."""


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A new model of that name, always with the same weights, in eval mode."""
    return _filled(_BUILDERS[name], dtype)


def llama(layers: int) -> nn.Module:
    """The llama with that many layers."""
    return _filled(lambda: _llama(layers=layers), torch.float32)


def two_layers(model_type: str, auto: str = "AutoModelForCausalLM", **changes: Any) -> nn.Module:
    """An architecture of transformers with two layers, in an encoder and a decoder two each, without a cache.

    changes: other values of its config.
    """
    import transformers

    sizes = {**_decoder(), "num_hidden_layers": 2, "use_cache": False, "image_size": IMAGE, "patch_size": 8}
    sizes |= {"d_model": HIDDEN, "d_kv": 16, "d_ff": 2 * HIDDEN, "num_layers": 2, "num_heads": 4}
    sizes |= {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 2 * HIDDEN, "num_decoder_layers": 2}
    sizes |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 2 * HIDDEN}
    sizes |= {"num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": HIDDEN, "shared_expert_intermediate_size": HIDDEN}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, **changes}
    default = transformers.AutoConfig.for_model(model_type)
    config = transformers.AutoConfig.for_model(
        model_type, **{name: size for name, size in sizes.items() if hasattr(default, name)}
    )
    return _filled(lambda: getattr(transformers, auto).from_config(config), torch.float32)


def outliers() -> nn.Module:
    """The llama with two channels made 30 times larger by the norms, and smaller by their readers: same function."""
    model = build("llama")
    layer: Any = model.model.layers[0]
    with torch.no_grad():
        for norm, readers in (
            (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        ):
            norm.weight[[3, 17]] *= 30
            for reader in readers:
                reader.weight[:, [3, 17]] /= 30
    return model


def _filled(builder: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = builder()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.25)
                else:
                    parameter.copy_(torch.randn_like(parameter) * HIDDEN**-0.5)
    return model.to(dtype).eval()


def inputs(name: str, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for the model's forward; `length` is the number of tokens (images have none)."""
    generator = torch.Generator().manual_seed(seed)
    if name == "mlp":
        return {"x": torch.randn(batch, length, HIDDEN, generator=generator)}
    if name in ("cnn", "vit"):
        return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)}
    ids = torch.randint(VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def output(result: Any) -> Tensor:
    """The main tensor of a model's result: logits, the last hidden state, or the result itself."""
    if isinstance(result, Tensor):
        return result
    return result["logits"] if "logits" in result else result["last_hidden_state"]
