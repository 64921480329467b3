"""What every peer's script does alike, in the peer's own environment: a plain checkpoint in, a plain state dict out.

The state dict has the checkpoint's names, shapes and values, but for the weights that the peer has quantized: they are
what the peer's elements and scales stand for.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

GROUP = 32


@dataclass(frozen=True)
class Job:
    """algorithm, format: as the rows of `peers.py` name them. windows: token ids `[windows, length]`."""

    checkpoint: Path
    algorithm: str
    format: str
    windows: Tensor
    seed: int

    def unknown(self, peer: str) -> SystemExit:
        return SystemExit(f"{peer} is not asked for {self.algorithm} to {self.format}: see the rows of peers.py")


def run(quantize: Callable[[Job, Any], Mapping[str, Tensor]]) -> None:
    """Give `quantize` the float32 model; it returns the dequantized weights by their names in the state dict."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "calibration", "out"):
        parser.add_argument(name, type=Path)
    for name in ("algorithm", "format"):
        parser.add_argument(name)
    parser.add_argument("seed", type=int)
    given = parser.parse_args()
    windows = load_file(given.calibration)["input_ids"]
    job = Job(given.checkpoint, given.algorithm, given.format, windows, given.seed)
    torch.manual_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.float32)
    began = time.perf_counter()
    weights = quantize(job, model)
    seconds = time.perf_counter() - began
    state = load_file(job.checkpoint / "model.safetensors")
    state |= {name: weight.detach().to("cpu", torch.float32).contiguous() for name, weight in weights.items()}
    save_file(state, given.out, metadata={"seconds": f"{seconds:.1f}"})
