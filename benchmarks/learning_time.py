"""Seconds that `learn-rounding` takes for models of Llama-3's shapes, from a few of their layers with random weights.

    python benchmarks/learning_time.py --size 8b --layers 3 --device cuda --out benchmarks/results/learning-h200.jsonl
    python benchmarks/learning_time.py --size smollm2 --layers 3 --windows 128

smollm2: the first layers of SmolLM2-135M, with its norm and head behind them.
`--windows` windows of 512 random tokens in batches of four. A record has the seconds of each segment (rounding first,
then training; the last segment, towards the logits, differs), and `model_seconds`: what all layers take by the mean of
the middle ones. `peak_gb` is the device's memory at most.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy import write
from random_llama import SIZES, config_of
from transformers import LlamaForCausalLM

import mxcompile
from mxcompile.analysis.matmuls import Matmul
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.learning.rounding_learner import RoundingLearner, SegmentNotes
from mxcompile.cli import smollm2
from mxcompile.pipeline.pipeline import Pipeline

SMOLLM2 = "smollm2"
PIPELINE = "learn-rounding{format=mxfp4,steps=50}"


def main() -> int:
    a = options()
    torch.manual_seed(0)
    model, every = model_of(a)
    tokens = torch.randint(model.config.vocab_size, (a.windows, 512), device=a.device)
    program = mxcompile.trace(model, {"input_ids": tokens[:2, :64]})
    batches = [{"input_ids": part} for part in tokens.split(4)]
    for text in a.pipelines.split("||"):
        seconds = timed_segments(a.device)
        began = time.perf_counter()
        Pipeline.parse(text.strip()).run(program, batches)
        wait(a.device)
        total = time.perf_counter() - began
        first, *middle, _ = by_layer(seconds, a.layers)
        row: dict[str, Any] = {"size": a.size, "layers": a.layers, "pipeline": text.strip(), "windows": a.windows}
        row |= {"seconds": round(total, 1), "segments": [round(each, 2) for each in seconds]}
        mean = sum(middle or [first]) / len(middle or [first])
        row["model_seconds"] = round(total + mean * (every - a.layers), 1)
        if a.device == "cuda":
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        write(row | {"device": a.device}, a.out)
    return 0


def model_of(a: argparse.Namespace) -> tuple[Any, int]:
    """A model with the first layers alone, and how many the whole one has."""
    if a.size == SMOLLM2:
        model: Any = smollm2.load()[0].to(a.device)
        every = len(model.model.layers)
        model.model.layers = model.model.layers[: a.layers]
        model.config.num_hidden_layers = a.layers
        return model, every
    config = config_of(a.size, a.layers)
    config.vocab_size = a.vocabulary or config.vocab_size
    with torch.device(a.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if a.size != "tiny" else torch.float32).eval()
    return model, SIZES[a.size]["num_hidden_layers"]


def timed_segments(device: str) -> list[float]:
    """A list that receives the seconds of each segment with weights, of runs from now on."""
    seconds, learn = list[float](), _LEARN

    def timed(learner: RoundingLearner, index: int, segment: Segment, weights: Sequence[Matmul]) -> SegmentNotes:
        wait(device)
        began = time.perf_counter()
        notes = learn(learner, index, segment, weights)
        wait(device)
        if weights:
            seconds.append(time.perf_counter() - began)
            print(f"segment {index}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        return notes

    RoundingLearner.learn = timed
    return seconds


_LEARN = RoundingLearner.learn


def by_layer(seconds: Sequence[float], layers: int) -> list[float]:
    """Seconds of each layer, which has as many segments as the others."""
    each = len(seconds) // layers
    return [sum(seconds[index * each : (index + 1) * each]) for index in range(layers)]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=[*SIZES, SMOLLM2], default="8b")
    options.add_argument("--layers", type=int, default=3)
    options.add_argument("--windows", type=int, default=32)
    options.add_argument("--vocabulary", type=int, help="another vocabulary, as that of the last segment takes long")
    options.add_argument("--pipelines", default=PIPELINE, help="with || between")
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path)
    return options.parse_args()


if __name__ == "__main__":
    sys.exit(main())
