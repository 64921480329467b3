"""llm-compressor, weight-only: round to nearest (`QuantizationModifier`) or GPTQ, defaults but for the group size."""

from collections.abc import Mapping
from typing import Any

import plain
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import Tensor

MODIFIERS = {"rtn": QuantizationModifier, "gptq": GPTQModifier}


def scheme(job: plain.Job) -> QuantizationScheme:
    """MXFP4 is a preset; int4 is the W4A16 preset with groups as small as MX blocks and 16-bit scales."""
    if job.format == "mxfp4":
        return preset_name_to_scheme("MXFP4A16", ["Linear"])
    if job.format == "int4":
        preset = preset_name_to_scheme("W4A16", ["Linear"])
        changed = {**preset.weights.model_dump(), "group_size": plain.GROUP, "scale_dtype": torch.bfloat16}
        return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**changed))
    raise job.unknown("llm-compressor")


def quantize(job: plain.Job, model: Any) -> Mapping[str, Tensor]:
    if job.algorithm not in MODIFIERS:
        raise job.unknown("llm-compressor")
    modifier = MODIFIERS[job.algorithm](config_groups={"group_0": scheme(job)}, ignore=["lm_head"])
    calibration = Dataset.from_dict(
        {"input_ids": job.windows.tolist(), "attention_mask": torch.ones_like(job.windows).tolist()}
    )
    data = {} if job.algorithm == "rtn" else {"dataset": calibration, "shuffle_calibration_samples": False}
    count, length = job.windows.shape
    oneshot(model=model, recipe=modifier, num_calibration_samples=count, max_seq_length=length, **data)
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "weight_scale")}
    return {
        f"{name}.weight": forward_quantize(module, module.weight, "weight", module.quantization_scheme.weights)
        for name, module in modules.items()
    }


if __name__ == "__main__":
    plain.run(quantize)
