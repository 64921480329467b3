"""Mixtures of experts on vLLM: its `FusedMoEMethodBase` on the experts of a checkpoint of mxcompile.

vLLM routes tokens and adds up what the processes return; between the two, `mx::experts` runs all of a layer's experts
in one call. The weights do not go through vLLM's loaders: see stored_experts.py.
"""

import logging
from dataclasses import replace
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from mxcompile.errors import CheckpointError, MXCompileError
from mxcompile.formats import parse_format
from mxcompile.numerics.gates import Gate
from mxcompile.serving import engine_options, packed_experts
from mxcompile.serving.shard_limits import check_dtype
from mxcompile.serving.stored_experts import ExpertsShare, PackedExperts, StoredExperts, find_experts
from mxcompile.serving.stored_model import StoredModel
from mxcompile.serving.warm_up import warm_up

logger = logging.getLogger(f"vllm.{__name__}")

_GATES: Final = {
    MoEActivation.SILU: Gate("swish"),
    MoEActivation.GELU: Gate("gelu"),
    MoEActivation.GELU_TANH: Gate("gelu_tanh"),
    MoEActivation.SWIGLUOAI: Gate("swish", alpha=1.702, limit=7.0, shift=1.0, interleaved=True),
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: Gate("swish"),
}


def experts_method(layer: RoutedExperts, prefix: str, model: StoredModel) -> FusedMoEMethodBase:
    """What runs the experts of a layer of vLLM. Raises CheckpointError if nothing can."""
    stored = find_experts(model.checkpoint, prefix)
    method = FloatExpertsMethod if stored.packings is None else MXExpertsMethod
    return method(layer.moe_config, stored, model)


class MXExpertsMethod(FusedMoEMethodBase):
    """Quantized experts, the share of one process."""

    up: PackedExperts
    down: PackedExperts

    def __init__(self, moe: FusedMoEConfig, stored: StoredExperts, model: StoredModel) -> None:
        super().__init__(moe)
        self.stored, self.model = stored, model
        self.gate = ""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Check that the layer fits. Its tensors are read after vLLM has loaded all others."""
        del num_experts, hidden_size, intermediate_size_per_partition, extra_weight_attrs
        self.options = engine_options.current()
        self.options.check_once(self.model)
        self.enforce_eager = get_current_vllm_config().model_config.enforce_eager
        _check_layer(self.stored, layer)
        self.stored.channels(_share_of(layer))
        self.device, self.dtype = torch.empty(0).device, params_dtype
        check_dtype(self.stored.path, params_dtype, self.device.type)
        self.gate = str(gate_of(self.stored, layer))

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Read this process' share of the experts, convert it for the kernels of its device, and compile those."""
        config, share = layer.moe_config, _share_of(layer)
        if self.options.dummy:
            up, down = self.stored.invented(share, dtype=self.dtype)
        else:
            stored = replace(self.stored, folder=self.model.folder())
            stored.check(config.num_experts, config.hidden_dim, config.intermediate_size)
            up, down = stored.packed(share, interleaved="interleaved" in self.gate)
        self.up, self.down = self._placed(layer, "up", up), self._placed(layer, "down", down)
        if self.device.type == "cuda":
            self._warm_up(layer.top_k)

    def _warm_up(self, choices: int) -> None:
        key = ("experts", self.up.layout, self.down.layout, self.up.elements.shape, self.gate, choices, self.dtype)

        def run(x: Tensor) -> Tensor:
            numbers = torch.arange(len(x) * choices, device=x.device).view(-1, choices) % len(self.up.elements)
            weights = torch.ones(numbers.shape, device=x.device)
            return packed_experts.experts(x.to(self.dtype), numbers, weights, self.up, self.down, self.gate)

        fmt, size = parse_format(self.up.layout.format), self.up.layout.size
        warm_up(run, key, fmt, size, self.device, self.options.most_tokens)

    def _placed(self, layer: RoutedExperts, name: str, weight: PackedExperts) -> PackedExperts:
        """The weight on the layer's device, as parameters of the layer."""
        moved = {part: value.to(self.device) for part, value in weight.tensors.items()}
        moved |= {part: value.to(self.dtype) for part, value in moved.items() if value.is_floating_point()}
        weight = replace(weight, **moved)
        if self.device.type != "cpu":
            weight = self._planar(name, weight)
        registered = {part: nn.Parameter(value, requires_grad=False) for part, value in weight.tensors.items()}
        for part, parameter in registered.items():
            layer.register_parameter(f"mx_{name}_{part}", parameter)
        return replace(weight, **registered)

    def _planar(self, name: str, weight: PackedExperts) -> PackedExperts:
        try:
            return packed_experts.to_planes(weight, self.dtype)
        except MXCompileError as error:
            if not self.enforce_eager:
                raise CheckpointError(
                    f"{self.stored.path}.{name} cannot run in a CUDA graph: {error}. Add --enforce-eager, which is slow"
                ) from error
            _warn_once(str(error))
            return weight

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """Nothing: vLLM's own kernels are not used."""

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x `[tokens, hidden]`, the others `[tokens, k]`; returns what this process adds to the sum of all."""
        del shared_experts, shared_experts_input  # vLLM runs them before
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids]  # -1 for an expert of another process
        return packed_experts.experts(x, topk_ids, topk_weights, self.up, self.down, self.gate)


class FloatExpertsMethod(UnquantizedFusedMoEMethod):
    """Experts that were left in float: vLLM's own kernels, on weights from our file."""

    def __init__(self, moe: FusedMoEConfig, stored: StoredExperts, model: StoredModel) -> None:
        super().__init__(moe)
        self.stored, self.model, self.options = stored, model, engine_options.current()

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Read this process' share of the experts, and prepare them as vLLM does."""
        if self.options.dummy:
            super().process_weights_after_loading(layer)
            return
        interleaved = layer.activation == MoEActivation.SWIGLUOAI
        inner, stored = layer.moe_config.intermediate_size, replace(self.stored, folder=self.model.folder())
        floats = stored.floats(_share_of(layer), inner, interleaved=interleaved)
        for name, value in (("w13_weight", floats.up), ("w13_bias", floats.up_bias)):
            if value is not None:
                halves = (2, -1) if not interleaved else (1, -1)
                _fill(getattr(layer, name).data.unflatten(1, halves), value.unflatten(1, halves))
        for name, value in (("w2_weight", floats.down), ("w2_bias", floats.down_bias)):
            if value is not None:
                _fill(getattr(layer, name).data, value)
        super().process_weights_after_loading(layer)


def _fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a value into a parameter of vLLM, which may be padded."""
    parameter.zero_()[tuple(slice(size) for size in value.shape)] = value


@cache
def _warn_once(reason: str) -> None:
    logger.warning("Experts run slowly, in their row-major layout: %s", reason)


def _check_layer(stored: StoredExperts, layer: RoutedExperts) -> None:
    if layer.apply_router_weight_on_input:
        raise CheckpointError(
            f"{stored.path} cannot be served: its inputs are multiplied by the router's weights, which mxcompile's "
            "experts do not do. Serve it with mxcompile serve --engine transformers"
        )
    if layer.moe_config.has_bias != stored.has_bias:
        raise CheckpointError(f"{stored.path} and the engine's layer do not agree on whether experts have a bias")


def _share_of(layer: RoutedExperts) -> ExpertsShare:
    """This process' share: numbers of experts, in the order of their rows, and a range of inner channels."""
    config, experts = layer.moe_config, range(layer.moe_config.num_experts)
    if layer.expert_map is not None:
        local: list[int] = layer.expert_map.tolist()
        numbers = sorted((place, number) for number, place in enumerate(local) if place >= 0)
        experts = range(numbers[0][1], numbers[-1][1] + 1)
        if [number for _, number in numbers] != list(experts):
            raise CheckpointError(
                f"{layer.layer_name}: experts that are not consecutive cannot be served. Leave out "
                "--expert-placement-strategy"
            )
    return ExpertsShare(experts, config.tp_rank, config.tp_size)


def gate_of(stored: StoredExperts, layer: RoutedExperts) -> Gate:
    """The activation between the two matmuls."""
    gate = _GATES.get(layer.activation)
    if gate is None:
        raise CheckpointError(
            f"{stored.path} cannot be served: mxcompile's experts do not have the activation {layer.activation.value}. "
            "Serve it with mxcompile serve --engine transformers"
        )
    if layer.activation == MoEActivation.SWIGLUOAI:
        return gate
    limit, alpha, shift = (getattr(layer, f"swiglu_{name}", None) for name in ("limit", "alpha", "beta"))
    if limit is not None:
        gate = replace(gate, limit=float(limit))
    if layer.activation == MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        gate = replace(gate, alpha=float(1.0 if alpha is None else alpha), shift=float(shift or 0.0))
    return gate
