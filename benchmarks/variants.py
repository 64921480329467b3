"""Variants of a Llama-like model that compute the same and are harder to quantize.

`plant`: in front of every attention and MLP, 1 % of the norm's channels are multiplied by 8 to 64, and the matching
columns of the linears that read them divided by as much: the outliers that make large models hard to quantize.

`plant_hidden`: the same with 1 % of the channels of the MLPs' inner value.

`take_off_grid`: the channels of every norm and of the MLPs' inner value are multiplied by random factors in [1/2, 2],
and the linears that read them divide: weights read from a 4-bit file no longer lie on the levels of its format.
"""

import math

import torch
from torch import Tensor, nn

SHARE, LARGEST = 0.01, 64.0


def plant(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change a model in place and return it. Factors are log-uniform in [8, 64]; powers of two, so nothing rounds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:  # pyright: ignore
            for norm, readers in norms_and_readers(layer):
                _plant(norm, readers, generator)
    return model


def plant_hidden(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change a model in place and return it. The factors are those of `plant`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:  # pyright: ignore
            up, down = layer.mlp.up_proj, layer.mlp.down_proj
            chosen, factors = _outliers(up.out_features, generator)
            up.weight[chosen] *= factors.to(up.weight.device).unsqueeze(1)
            down.weight[:, chosen] /= factors.to(down.weight.device)
    return model


def take_off_grid(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change a model in place and return it. Factors are log-uniform; the function changes by float rounding alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:  # pyright: ignore
            for norm, readers in norms_and_readers(layer):
                factors = _spread(norm.weight, generator)
                norm.weight *= factors
                for reader in readers:
                    reader.weight /= factors
            mlp = layer.mlp
            factors = _spread(mlp.up_proj.weight[:, 0], generator)
            mlp.up_proj.weight *= factors.unsqueeze(1)
            mlp.down_proj.weight /= factors
    return model


def norms_and_readers(layer: nn.Module) -> list[tuple[nn.Module, list[nn.Linear]]]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ]  # pyright: ignore


def _spread(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.exp2(2 * torch.rand(len(like), generator=generator) - 1).to(like.device)


def _plant(norm: nn.Module, readers: list[nn.Linear], generator: torch.Generator) -> None:
    chosen, factors = _outliers(norm.weight.numel(), generator)
    factors = factors.to(norm.weight.device)
    norm.weight[chosen] *= factors
    for reader in readers:
        reader.weight[:, chosen] /= factors


def _outliers(channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(chosen channels, their factors)."""
    chosen = torch.randperm(channels, generator=generator)[: math.ceil(SHARE * channels)]
    exponents = torch.randint(3, int(math.log2(LARGEST)) + 1, (len(chosen),), generator=generator)
    return chosen, torch.exp2(exponents.float())
