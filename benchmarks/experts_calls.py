"""An experts layer as `mx::experts`, and as transformers' experts in bfloat16: what experts.py times."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from experts_timing import TURNS, Layer, Routes, Shape
from gemm_timing import Call
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import mxcompile.ops  # noqa: F401 - defines the mx:: operators
from mxcompile.formats import MXFormat, activation_rule
from mxcompile.kernels.layout import planes as planar

BATCHED, GROUPED, COMPILED = "batched_mm", "grouped_mm", ", compiled"
FORWARDS: dict[str, Callable[..., Tensor]] = {BATCHED: batched_mm_experts_forward, GROUPED: grouped_mm_experts_forward}
_GATHERED_BYTES = 16e9
"""batched_mm copies the weight of every choice; it is left out where they are more than this."""


@cache
def packed(layer: Layer) -> list[tuple[list[Tensor], list[int] | None]]:
    """Elements and scales of the two weights as the operator takes them, and their planar scaling; rows on a CPU."""
    if layer.up.elements.device.type == "cpu":
        return [([stack.elements, stack.scales], None) for stack in (layer.up, layer.down)]
    parts: list[tuple[list[Tensor], list[int] | None]] = []
    for stack in (layer.up, layer.down):
        count, out, size = stack.values.shape
        weight = planar.to_planes(stack.elements.flatten(0, 1), stack.scales.flatten(0, 1), layer.fmt, size)
        both = [part.contiguous().view(count, out, -1) for part in planar.to_bytes(weight)]
        parts.append((both, [weight.lift, weight.top]))
    return parts


def our_call(layer: Layer, x: Tensor, routes: Routes, activation: MXFormat | None) -> Call:
    """What a deployed model calls; x has been rounded."""
    (up, up_planes), (down, down_planes) = packed(layer)
    biases, form, gate = (layer.up.bias, layer.down.bias), str(layer.fmt), str(layer.shape.gate)
    rounding = (str(activation), str(activation_rule(activation))) if activation is not None else (None, None)

    def call(i: int) -> Tensor:
        experts, weights = routes.experts[i % TURNS], routes.weights[i % TURNS]
        options = (form, form, gate, *rounding, up_planes, down_planes)
        return torch.ops.mx.experts(x, experts, weights, up, biases[0], down, biases[1], *options)

    return call


def float_experts(layer: Layer) -> nn.Module:
    """The module of transformers with the same weights in bfloat16."""
    shape, values = layer.shape, {"gate_up_proj": layer.up.values, "down_proj": layer.down.values}
    sizes: dict[str, Any] = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.choices}
    with torch.device("meta"):
        if shape.family == "qwen3_moe":
            module: nn.Module = Qwen3MoeExperts(
                Qwen3MoeConfig(num_experts=shape.experts, moe_intermediate_size=shape.inner, **sizes)
            )
        else:
            module = GptOssExperts(
                GptOssConfig(num_local_experts=shape.experts, intermediate_size=shape.inner, **sizes)
            )
            values = {name: value.mT.contiguous() for name, value in values.items()}
    assert (layer.up.bias is None) == (layer.down.bias is None)
    if layer.up.bias is not None and layer.down.bias is not None:
        values |= {"gate_up_proj_bias": layer.up.bias, "down_proj_bias": layer.down.bias}
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    return module


def float_paths(shape: Shape, tokens: int, compiled: list[str]) -> list[str]:
    """Transformers' experts in bfloat16 that can be timed: batched_mm is left out where it would copy too much."""
    gathered = tokens * shape.choices * 2 * sum(out * size for out, size in shape.sizes)
    paths = [name for name in FORWARDS if name != BATCHED or gathered <= _GATHERED_BYTES]
    return paths + [name + COMPILED for name in paths if name in compiled]


def float_call(path: str, module: nn.Module, x: Tensor, routes: Routes) -> Call:
    """A whole layer by transformers' experts in bfloat16."""
    name = path.removesuffix(COMPILED)
    forward = FORWARDS[name] if name == path else _compiled(name)
    return lambda i: forward(module, x, routes.experts[i % TURNS], routes.weights[i % TURNS])


@cache
def _compiled(name: str) -> Callable[..., Tensor]:
    """For all numbers of tokens but 1 at once, as `generate` would compile it."""
    return torch.compile(FORWARDS[name], dynamic=True)


def grouped_matmuls(module: nn.Module, layer: Layer, x: Tensor, routes: Routes) -> Call:
    """The two matmuls alone, on rows sorted by expert before the call."""
    up, down = (part.detach() for part in (module.gate_up_proj, module.down_proj))
    if layer.shape.family == "qwen3_moe":
        up, down = up.mT, down.mT
    inner = torch.randn(len(x) * layer.shape.choices, layer.shape.inner, device=x.device).to(torch.bfloat16)
    turns: list[tuple[Tensor, Tensor]] = []
    for experts in routes.experts:
        order = experts.flatten().argsort()
        ends = experts.flatten().bincount(minlength=layer.shape.experts).cumsum(0).int()
        turns.append((x[order // layer.shape.choices], ends))

    def call(i: int) -> Tensor:
        rows, ends = turns[i % TURNS]
        torch._grouped_mm(rows, up, offs=ends)
        return torch._grouped_mm(inner, down, offs=ends)

    return call
