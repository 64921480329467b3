"""torchao, weight-only, round to nearest: its MX tensors under two rules for scales, and its grouped int4."""

from collections.abc import Mapping
from typing import Any

import plain
import torch
from torch import Tensor, nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_


def to_mxfp4(weight: Tensor, mode: ScaleCalculationMode) -> Tensor:
    """torchao's module-level MX configs quantize activations, too, so the tensor is made directly."""
    return MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, plain.GROUP, mode).dequantize(torch.float32)


def quantize(job: plain.Job, model: Any) -> Mapping[str, Tensor]:
    modes = {"rtn-rceil": ScaleCalculationMode.RCEIL, "rtn-even": ScaleCalculationMode.EVEN}
    layers = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    if job.format == "mxfp4" and job.algorithm in modes:
        mode = modes[job.algorithm]
        return {f"model.{name}.weight": to_mxfp4(module.weight.data, mode) for name, module in layers.items()}
    if (job.format, job.algorithm) == ("int4", "rtn"):
        config = IntxWeightOnlyConfig(torch.int4, PerGroup(plain.GROUP), scale_dtype=torch.bfloat16)
        quantize_(model.model, config)
        return {f"model.{name}.weight": module.weight.dequantize() for name, module in layers.items()}
    raise job.unknown("torchao")


if __name__ == "__main__":
    plain.run(quantize)
