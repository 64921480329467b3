"""A linear layer of vLLM on packed weights: its parameters as vLLM's loaders divide them, and its matmul.

    weight             uint8 [out, blocks, bytes]   divided along out (column parallel) or blocks (row parallel)
    weight_scales      uint8 [out, blocks]          likewise
    weight_multiplier  float [in]                   whole in column parallel layers, divided in row parallel ones

Dimensions count rows and blocks, so vLLM's loaders need no packing factor. q, k and v, or gate and up, become rows of
one matrix, with the one multiplier that they share.
"""

from typing import Any, Final

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ModelWeightParameter, RowvLLMParameter

from mxcompile.errors import CheckpointError
from mxcompile.formats import parse_format
from mxcompile.serving import packed_linear, shard_limits
from mxcompile.serving.packed_linear import PackedPart
from mxcompile.serving.stored_model import StoredModel
from mxcompile.tensor.layout import MXLayout

_NOT_LOADED: Final = 255  # a scale that is NaN, which no saved weight has
_ONE: Final = 127


@register_weight_loader_v2_supported_method
class MXCompileLinearMethod(LinearMethodBase):
    """Runs one layer. parts: the checkpoint's layers that it is made of, all with the same layout."""

    def __init__(self, prefix: str, parts: list[str], layout: MXLayout, stored: StoredModel) -> None:
        self.prefix, self.parts, self.layout, self.stored = prefix, parts, layout, stored

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
        shard_limits.check_layer(self.prefix, self.layout, input_size, input_size_per_partition)
        fmt, load = parse_format(self.layout.format), extra_weight_attrs["weight_loader"]
        out, blocks = sum(output_partition_sizes), fmt.blocks(input_size_per_partition)
        scale = _ONE if _loads_nothing() else _NOT_LOADED
        elements = torch.zeros(out, blocks, fmt.block_bytes, dtype=torch.uint8)
        scales = torch.full((out, blocks), scale, dtype=torch.uint8)
        shard_limits.check_dtype(self.prefix, params_dtype, elements.device.type)
        self.outs, self.size, self.dtype = list(output_partition_sizes), input_size_per_partition, params_dtype
        dims: dict[str, Any] = {"output_dim": 0, "input_dim": 1, "weight_loader": load}
        layer.register_parameter("weight", ModelWeightParameter(data=elements, **dims))
        layer.register_parameter("weight_scales", ModelWeightParameter(data=scales, **dims))
        if self.layout.multiplier is not None:
            values = torch.full((input_size_per_partition,), torch.nan, dtype=params_dtype)
            parameter = RowvLLMParameter(data=values, input_dim=0, weight_loader=load)
            layer.register_parameter("weight_multiplier", parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every value has arrived."""
        if bool((layer.weight_scales == _NOT_LOADED).any()):
            raise CheckpointError(f"{self.prefix} was not loaded completely: the checkpoint lacks some of its rows")
        self._load_shared_multiplier(layer)

    def _load_shared_multiplier(self, layer: Any) -> None:
        """Read the multiplier from the file if it is stored under the name of a layer elsewhere in the model."""
        parameter = getattr(layer, "weight_multiplier", None)
        if parameter is None or not bool(parameter.isnan().any()):
            return
        values = self.stored.multiplier(self.parts[0])
        start = 0 if len(values) == self.size else layer.tp_rank * self.size
        parameter.data.copy_(values[start : start + self.size])

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ weight.T + bias`, with the input prepared and quantized as it was measured."""
        multiplier = getattr(layer, "weight_multiplier", None)
        parts = [PackedPart(layer.weight.flatten(1), layer.weight_scales)]
        return packed_linear.linear(x, self.layout, multiplier, parts, bias)


def _loads_nothing() -> bool:
    """Whether vLLM was told to run on invented weights (`--load-format dummy`)."""
    return get_current_vllm_config().load_config.load_format == "dummy"
