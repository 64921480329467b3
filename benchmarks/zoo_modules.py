"""Models of the zoo that transformers' configs do not make: of diffusers, peft, and of PyTorch's own modules."""

from collections.abc import Callable
from typing import Any, Final

import torch
from architectures import ARCHITECTURES, HIDDEN, VOCABULARY, Draw
from torch import Tensor, nn
from torch.nn import functional

LATENT: Final = 8
"""Height and width of a latent image."""


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, HIDDEN),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,
    )


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=LATENT, num_embeds_ada_norm=10
    )


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        axes_dims_rope=(4, 6, 6),
    )


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=HIDDEN,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        pos_embed_max_size=LATENT,
    )


def _latent(draw: Draw) -> Tensor:
    return draw.normal(4, LATENT, LATENT)


def _flux_inputs(draw: Draw) -> dict[str, Tensor]:
    return {
        "hidden_states": draw.normal(16, 16),
        "encoder_hidden_states": draw.normal(draw.length, HIDDEN),
        "pooled_projections": draw.normal(HIDDEN),
        "timestep": draw.normal().abs(),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(draw.length, 3),
    }


Specimen = tuple[Callable[[], nn.Module], Callable[[Draw], dict[str, Tensor]]]
DIFFUSION: Final[dict[str, Specimen]] = {
    "unet": (
        _unet,
        lambda draw: {
            "sample": _latent(draw),
            "timestep": draw.integers(1000),
            "encoder_hidden_states": draw.normal(draw.length, HIDDEN),
        },
    ),
    "dit": (
        _dit,
        lambda draw: {
            "hidden_states": _latent(draw),
            "timestep": draw.integers(1000),
            "class_labels": draw.integers(10),
        },
    ),
    "flux": (_flux, _flux_inputs),
    "sd3": (
        _sd3,
        lambda draw: {
            "hidden_states": _latent(draw),
            "encoder_hidden_states": draw.normal(draw.length, HIDDEN),
            "pooled_projections": draw.normal(HIDDEN),
            "timestep": draw.integers(1000),
        },
    ),
}


def llama_lora() -> nn.Module:
    """A Llama that peft wraps, whose adapters are not zero."""
    import peft

    model: Any = ARCHITECTURES["llama"]()
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))


def llama_lora_merged() -> nn.Module:
    """The Llama that `merge_and_unload` returns."""
    model: Any = llama_lora()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.merge_and_unload()


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.recurrent = kind(HIDDEN, HIDDEN, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, VOCABULARY))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.embedding(input_ids))
        return self.head(hidden)


class _Expert(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(HIDDEN, 2 * HIDDEN), nn.SiLU(), nn.Linear(2 * HIDDEN, HIDDEN))


class _Experts(nn.Module):
    """The two best of four experts for each token: each runs on the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 4, bias=False)
        self.experts = nn.ModuleList(_Expert() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(2)
        result = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            row, column = torch.where(chosen == index)
            result = result.index_add(0, row, expert(tokens[row]) * weights[row, column, None])
        return result.reshape(x.shape)


class _Decoder(nn.Module):
    """Token ids -> logits through one block with a residual."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.block = block
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        return self.head(hidden + self.block(self.norm(hidden)))


class _LinearAttention(nn.Module):
    """Causal attention without a softmax: elu(q) + 1 times the running sum of (elu(k) + 1) v^T."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, HIDDEN // 4)).unbind(-3)
        query, key = functional.elu(query) + 1, functional.elu(key) + 1
        state = torch.einsum("blhk,blhv->blhkv", key, value).cumsum(1)
        total = torch.einsum("blhk,blhk->blh", query, key.cumsum(1))
        return self.out((torch.einsum("blhk,blhkv->blhv", query, state) / total[..., None]).flatten(-2))


class _Autocast(nn.Module):
    """A block whose first half computes in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = functional.gelu(self.up(x))
        return self.down(hidden.float())


def experts_in_a_loop() -> nn.Module:
    return _Decoder(_Experts())


def linear_attention() -> nn.Module:
    return _Decoder(_LinearAttention())


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, 4, 2 * HIDDEN, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


def _convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, HIDDEN, 3, stride=2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(HIDDEN, 2 * HIDDEN), nn.ReLU(), nn.Linear(2 * HIDDEN, 10)),
    )


def _ids(draw: Draw) -> dict[str, Tensor]:
    return {"input_ids": draw.ids()}


MODULES: Final[dict[str, Specimen]] = {
    "lstm": (lambda: _Recurrent(nn.LSTM), _ids),
    "gru": (lambda: _Recurrent(nn.GRU), _ids),
    "transformer_encoder": (_encoder, lambda draw: {"src": draw.normal(draw.length, HIDDEN)}),
    "convolutions": (_convolutions, lambda draw: {"input": draw.normal(3, 16, 16)}),
    "autocast_region": (lambda: _Decoder(_Autocast()), _ids),
}
