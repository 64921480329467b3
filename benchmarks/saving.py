"""Size of a checkpoint, time and memory of loading it, and what torch's cache saves a second process.

    python benchmarks/saving.py --out benchmarks/results/saving.jsonl

SmolLM2-135M (or `--model`). Every load has a process of its own, which has loaded a tiny model before so that all is
imported. `peak over stored` is how much its peak memory grew, over the size of the packed model. The first forward of
the compiled model (64 tokens) is timed in two processes; the first finds an empty cache. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from costs import load
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mxcompile
from mxcompile.tensor.modules import stored_bytes

_LOAD = """
import json, sys, time
import torch
import mxcompile

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

tiny, folder, verify, compile = sys.argv[1], sys.argv[2], sys.argv[3] == "verified", sys.argv[4] == "compiled"
mxcompile.load(tiny)
before, began = peak(), time.perf_counter()
model = mxcompile.load(folder, compile=compile, verify=verify)
result = {"seconds": time.perf_counter() - began, "bytes": peak() - before}
if compile:
    began = time.perf_counter()
    with torch.no_grad():
        model(input_ids=torch.arange(64).unsqueeze(0))
    result["first forward"] = time.perf_counter() - began
print(json.dumps(result))
"""


def loaded(work: Path, verified: str, compiled: str = "") -> dict[str, float]:
    """Seconds and bytes of one load, in a process of its own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(work / "cache")}
    command = [sys.executable, "-c", _LOAD, str(work / "tiny"), str(work / "model"), verified, compiled]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def quantized(model: nn.Module, recipe: str) -> nn.Module:
    example = {"input_ids": torch.arange(64).unsqueeze(0)}
    return mxcompile.quantize_and_compile(model, example, recipe=recipe, compile=False)


def measure(source: str | None, recipe: str, rounds: int, work: Path) -> dict[str, Any]:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    mxcompile.save(quantized(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)), recipe), work / "tiny")
    model = quantized(load(source), recipe)
    size, folder = stored_bytes(model), work / "model"
    began = time.perf_counter()
    mxcompile.save(model, folder)
    row: dict[str, Any] = {"recipe": recipe, "torch": torch.__version__, "cpus": os.cpu_count(), "stored bytes": size}
    row["save seconds"] = round(time.perf_counter() - began, 2)
    row["weight file bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    row["index bytes"] = sum(path.stat().st_size for path in folder.glob("*.index.json"))
    for verified in ("verified", "unverified"):
        runs = [loaded(work, verified) for _ in range(rounds)]
        row[f"{verified} load seconds"] = round(median(run["seconds"] for run in runs), 3)
        row[f"{verified} peak over stored"] = round(max(run["bytes"] for run in runs) / size, 3)
    for process in ("first", "second"):
        run = loaded(work, "verified", "compiled")
        row[f"{process} process forward seconds"] = round(run["first forward"], 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a local path or hub id; default: SmolLM2-135M")
    parser.add_argument("--recipe", default="w4a8-mxint-quick", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each kind: median time, largest peak")
    parser.add_argument("--out", type=Path, help="append the result to this file, one JSON object a line")
    options = parser.parse_args()
    with TemporaryDirectory() as work:
        row = measure(options.model, options.recipe, options.rounds, Path(work))
    print(json.dumps(row))
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(f"{json.dumps(row)}\n")


if __name__ == "__main__":
    main()
