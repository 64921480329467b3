"""A linear layer of vLLM on packed weights: its parameters as vLLM's loaders divide them, and its matmul.

    weight             uint8 [out, blocks, bytes]   divided along out (column parallel) or blocks (row parallel)
    weight_scales      uint8 [out, blocks]          likewise
    weight_multiplier  float [in] or [in / n, n, n] whole in column parallel layers, divided in row parallel ones

Dimensions count rows and blocks, so vLLM's loaders need no packing factor. q, k and v, or gate and up, become rows of
one matrix, with the one multiplier that they share. After loading, a GPU's weights are converted to the planar layout;
one that cannot be stays row-major, which is slower, and the reason is logged.
"""

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ModelWeightParameter, RowvLLMParameter

from mxcompile.errors import CheckpointError, MXCompileError
from mxcompile.formats import parse_format
from mxcompile.kernels.layout.planes import PlanarScaling
from mxcompile.serving import engine_options, packed_linear, shard_limits
from mxcompile.serving.packed_linear import PackedPart
from mxcompile.serving.stored_model import StoredModel
from mxcompile.serving.warm_up import warm_up
from mxcompile.tensor.layout import MXLayout

logger = init_logger(f"vllm.{__name__}")
_NOT_LOADED: Final = 255  # a scale that is NaN, which no saved weight has
_ONE: Final = 127


@register_weight_loader_v2_supported_method
class MXCompileLinearMethod(LinearMethodBase):
    """Runs one layer. parts: the checkpoint's layers that it is made of, all with the same layout."""

    def __init__(self, prefix: str, parts: list[str], layout: MXLayout, stored: StoredModel) -> None:
        self.prefix, self.parts, self.layout, self.stored = prefix, parts, layout, stored
        self.pieces: list[tuple[str, str, PlanarScaling | None]] = []

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters. Raises CheckpointError if a share of the layer cannot be served."""
        del output_size
        self.options = engine_options.current()
        self.options.check_once(self.stored)
        shard_limits.check_layer(self.prefix, self.layout, input_size, input_size_per_partition)
        self.layout = replace(self.layout, size=input_size_per_partition)
        self.outs, self.dtype = list(output_partition_sizes), params_dtype
        fmt, load = parse_format(self.layout.format), extra_weight_attrs["weight_loader"]
        out, blocks = sum(output_partition_sizes), fmt.blocks(input_size_per_partition)
        elements = torch.zeros(out, blocks, fmt.block_bytes, dtype=torch.uint8)
        scales = torch.full((out, blocks), _ONE if self.options.dummy else _NOT_LOADED, dtype=torch.uint8)
        shard_limits.check_dtype(self.prefix, params_dtype, elements.device.type)
        dims: dict[str, Any] = {"output_dim": 0, "input_dim": 1, "weight_loader": load}
        layer.register_parameter("weight", ModelWeightParameter(data=elements, **dims))
        layer.register_parameter("weight_scales", ModelWeightParameter(data=scales, **dims))
        if self.layout.multiplier is not None:
            values = torch.full(self.layout.multiplier_shape, torch.nan, dtype=params_dtype)
            parameter = RowvLLMParameter(data=values, input_dim=0, weight_loader=load)
            layer.register_parameter("weight_multiplier", parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every value has arrived, convert the weight for the kernels of its device, and compile those."""
        if bool((layer.weight_scales == _NOT_LOADED).any()):
            raise CheckpointError(
                f"{self.prefix} was not loaded completely: the checkpoint has no values for some of its rows"
            )
        self._load_shared_multiplier(layer)
        whole = PackedPart(layer.weight.data.flatten(1), layer.weight_scales.data)
        self._place(layer, whole)
        if whole.elements.is_cuda:
            self._warm_up(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`, with the input prepared and quantized as it was measured."""
        parts = [PackedPart(getattr(layer, elements), getattr(layer, scales), p) for elements, scales, p in self.pieces]
        return packed_linear.linear(x, self.layout, getattr(layer, "weight_multiplier", None), parts, bias)

    def _load_shared_multiplier(self, layer: Any) -> None:
        """Read the multiplier from the file if it is stored under the name of a layer elsewhere in the model."""
        parameter = getattr(layer, "weight_multiplier", None)
        if parameter is None or not bool(parameter.isnan().any()):
            return
        values, size = self.stored.multiplier(self.parts[0]), len(parameter)
        start = 0 if len(values) == size else layer.tp_rank * size
        parameter.data.copy_(values[start : start + size])

    def _for_kernels(self, whole: PackedPart) -> list[PackedPart]:
        """The weight in the layout that the fastest kernel reads; logs once why it is not the planar one on a GPU."""
        if not whole.elements.is_cuda:
            return [whole]
        try:
            return packed_linear.to_planes(whole, self.layout, self.dtype, self.outs)
        except MXCompileError as reason:
            logger.warning_once(
                "mxcompile: weights such as %s stay row-major, which is slower: %s", self.prefix, reason
            )
            return [whole]

    def _place(self, layer: Any, whole: PackedPart) -> None:
        self._register(layer, self._for_kernels(whole))

    def _register(self, layer: Any, parts: list[PackedPart], name: str = "weight") -> None:
        """Make parameters of the parts that `apply` multiplies with, the first of them in place of the loaded ones."""
        self.pieces.clear()
        for number, part in enumerate(parts):
            suffix = f"_{number}" if number else ""
            names = f"{name}{suffix}", f"{name}_scales{suffix}"
            for each, values in zip(names, (part.elements, part.scales), strict=True):
                setattr(layer, each, nn.Parameter(values, requires_grad=False))
            self.pieces.append((*names, part.planes))

    def _warm_up(self, layer: Any) -> None:
        bias = getattr(layer, "bias", None)
        key = (replace(self.layout, multiplier=None), tuple(self.outs), self.pieces[0][2], bias is None, self.dtype)

        def run(x: Tensor) -> Tensor:
            return self.apply(layer, x.to(self.dtype), bias)

        fmt, device = parse_format(self.layout.format), layer.weight.device
        warm_up(run, key, fmt, self.layout.size, device, self._most_rows())

    def _most_rows(self) -> int:
        """The most rows of an input."""
        return self.options.most_tokens
