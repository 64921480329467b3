"""The part that all peers' scripts share, in the peer's environment: reads a checkpoint and writes a state dict.

The state dict has the names, shapes and values of the checkpoint, except that weights that the peer has quantized are
replaced by their dequantized values.
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
    """One quantization. algorithm, format: as in the rows of `peers.py`. windows: token ids `[windows, length]`."""

    checkpoint: Path
    algorithm: str
    format: str
    windows: Tensor
    seed: int

    def unknown(self, peer: str) -> SystemExit:
        return SystemExit(f"{peer} has no row for {self.algorithm} to {self.format}: see peers.py")


def run(quantize: Callable[[Job, Any], Mapping[str, Tensor]]) -> None:
    """Call `quantize` with the float32 model; it returns dequantized weights by their names in the state dict."""
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "calibration", "out"):
        parser.add_argument(name, type=Path)
    for name in ("algorithm", "format"):
        parser.add_argument(name)
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    windows = load_file(arguments.calibration)["input_ids"]
    job = Job(arguments.checkpoint, arguments.algorithm, arguments.format, windows, arguments.seed)
    torch.manual_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.float32)
    began = time.perf_counter()
    weights = quantize(job, model)
    seconds = time.perf_counter() - began
    state = load_file(job.checkpoint / "model.safetensors")
    state |= {name: weight.detach().to("cpu", torch.float32).contiguous() for name, weight in weights.items()}
    save_file(state, arguments.out, metadata={"seconds": f"{seconds:.1f}"})
