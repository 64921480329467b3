"""Outlier channels planted into a Llama-like model without changing what it computes.

In front of every attention and MLP, 1 % of the norm's channels are multiplied by up to 64 and the same columns of the
linears that read them divided by as much: the outliers that make large models hard to quantize, in a small one.
"""

import math

import torch
from torch import nn

SHARE, LARGEST = 0.01, 64.0


def plant(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change a model in place and return it. Factors are log-uniform in [8, 64]; powers of two, so nothing rounds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:  # pyright: ignore
            attention, mlp = layer.self_attn, layer.mlp
            _plant(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], generator)
            _plant(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], generator)
    return model


def _plant(norm: nn.Module, readers: list[nn.Linear], generator: torch.Generator) -> None:
    channels = norm.weight.numel()
    chosen = torch.randperm(channels, generator=generator)[: math.ceil(SHARE * channels)]
    exponents = torch.randint(3, int(math.log2(LARGEST)) + 1, (len(chosen),), generator=generator)
    factors = torch.exp2(exponents.float()).to(norm.weight.device)
    norm.weight[chosen] *= factors
    for reader in readers:
        reader.weight[:, chosen] /= factors
