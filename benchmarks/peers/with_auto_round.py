"""auto-round, weight-only: signed-gradient rounding, 50 iterations a layer, other options at their defaults."""

from collections.abc import Mapping
from typing import Any

import plain
import torch
from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

DATA_TYPES = {"mxfp4": "mx_fp", "mxint4": "mx_int", "int4": "int"}
ITERATIONS = 50
BATCH = 8


def quantize(job: plain.Job, model: Any) -> Mapping[str, Tensor]:
    if job.format not in DATA_TYPES or job.algorithm != "signed-gradient":
        raise job.unknown("auto-round")
    kind = DATA_TYPES[job.format]
    scheme = QuantizationScheme(bits=4, group_size=plain.GROUP, data_type=kind, sym=True, act_bits=16)
    names = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.windows]
    count, length = job.windows.shape
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.checkpoint),
        scheme=scheme,
        dataset=DataLoader(rows, batch_size=BATCH),
        iters=ITERATIONS,
        nsamples=count,
        seqlen=length,
        seed=job.seed,
        device_map="cpu",
    )
    quantized, _ = rounding.quantize()
    state = quantized.state_dict()
    return {f"model.{name}.weight": state[f"model.{name}.weight"] for name in names}


if __name__ == "__main__":
    plain.run(quantize)
