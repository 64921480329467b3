"""mxcompile's kernels for vLLM's own MXFP4 and MXFP8 layers, of folders in the format of compressed-tensors.

On a CPU vLLM has no kernel for them and takes these. On a GPU it takes the first of its list that runs, and these are
at the end: `VLLM_DISABLED_KERNELS` with the names of the others chooses them (docs/serving.md). Activations stay float,
whatever the folder says, as with vLLM's own kernels on Hopper: the format does not store the rule by which they are to
be rounded.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MxFp4LinearKernel, Mxfp8LinearKernel, register_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Dynamic
from vllm.platforms import PlatformEnum, current_platform

from mxcompile.checkpoint.interop.element_layouts import from_rows
from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFP4, MXFP8_E4M3, MXFormat
from mxcompile.serving import packed_linear
from mxcompile.serving.packed_linear import PackedPart
from mxcompile.tensor.layout import MXLayout

logger = init_logger(f"vllm.{__name__}")
_LEAST_CAPABILITY = 80


class _StockKernel:
    """Both kernels: the weight as packed bytes, planar on a GPU where it can be."""

    FORMAT: MXFormat

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Whether it runs on this machine, else the reason."""
        if not current_platform.is_cuda():
            return current_platform.is_cpu(), "runs on a CPU or an NVIDIA GPU"
        least = _LEAST_CAPABILITY
        has = current_platform.has_device_capability(least)
        return has, None if has else f"needs compute capability {least // 10}.{least % 10}"

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the loaded weight as bytes in our layout, and convert it for a GPU."""
        rows, scales = layer.weight.data.view(torch.uint8), layer.weight_scale.data.contiguous()
        self.layout = MXLayout(str(self.FORMAT), scales.shape[1] * self.FORMAT.block_size)
        weight = from_rows("a layer's weight", rows, scales, self.FORMAT, self.layout, torch.bfloat16)
        part = PackedPart(weight.elements, weight.scales)
        part = self._planar(part) if rows.is_cuda else part
        self.scaling = part.planes
        layer.weight = nn.Parameter(part.elements, requires_grad=False)
        layer.weight_scale = nn.Parameter(part.scales, requires_grad=False)

    def _planar(self, whole: PackedPart) -> PackedPart:
        try:
            return packed_linear.to_planes(whole, self.layout, torch.bfloat16, [len(whole.elements)])[0]
        except MXCompileError as reason:
            logger.warning_once("mxcompile: %s weights stay row-major, which is slower: %s", self.FORMAT, reason)
            return whole

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`."""
        part = PackedPart(layer.weight, layer.weight_scale, self.scaling)
        return packed_linear.linear(x, self.layout, None, [part], bias)


class MXCompileMxFp4LinearKernel(_StockKernel, MxFp4LinearKernel):
    """MXFP4 weights, two to a byte."""

    FORMAT = MXFP4

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """Whether it runs a layer: not with FP8 activations, for which vLLM then asks for none."""
        key = getattr(config, "activation_quant_key", None)  # since vLLM 0.32
        weight_only = key is None or key == kMxfp4Dynamic
        return weight_only, None if weight_only else f"runs weights only, not with {key} activations"


class MXCompileMxfp8LinearKernel(_StockKernel, Mxfp8LinearKernel):
    """MXFP8 weights (E4M3)."""

    FORMAT = MXFP8_E4M3

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Whether it runs a layer: any but batched ones."""
        batched = getattr(c, "bmm_batch_size", None) is not None  # since vLLM 0.32
        return not batched, "runs no batched matmuls" if batched else None


def register_kernels() -> None:
    """Offer both kernels to vLLM, after its own."""
    for platform in (PlatformEnum.CPU, PlatformEnum.CUDA):
        register_linear_kernel(MXCompileMxFp4LinearKernel, platform, "mxfp4")
        register_linear_kernel(MXCompileMxfp8LinearKernel, platform, "mxfp8")
