"""Seconds, peak memory and bytes of model-free quantization of a random model in the shape of Llama-3-8B.

    python benchmarks/model_free.py --work /tmp/model-free --layers 32 --workers 2 --out benchmarks/results/large.jsonl
    python benchmarks/model_free.py --work /tmp/model-free --layers 32 --device cuda --workers 4 --out ...

The model (bfloat16, the same bits every time) is written to WORK file by file unless it is there; 32 layers take 16 GB.
The run has a process of its own, which has quantized a tiny model before, so that all is imported. `peak bytes` is how
much the process grew from there at most: mapped pages of files count. `device peak bytes` is what torch held on the
GPU. `files read` says whether the files were in the page cache: they are read once before the run if so. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import torch
from random_llama import SIZES, write_checkpoint

_RUN: Final = """
import json, sys, time
import torch
import mxcompile

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

tiny, source, out, recipe, device, workers = sys.argv[1:]
options = {"recipe": recipe, "device": device, "workers": int(workers)}
mxcompile.quantize_files(tiny, out + "-tiny", **options)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
began = time.perf_counter()
plan = mxcompile.quantize_files(source, out, **options)
result = {"seconds": round(time.perf_counter() - began, 1), "peak bytes": status("VmHWM") - before}
if torch.cuda.is_available() and device != "cpu":
    result["device peak bytes"] = torch.cuda.max_memory_allocated()
tensors = plan.tensors
result |= {"source bytes": sum(each.before for each in tensors), "result bytes": sum(each.after for each in tensors)}
result["largest tensor bytes"] = max(each.before for each in tensors)
print(json.dumps(result))
"""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    work = Path(arguments.work)
    source, tiny, out = work / f"{arguments.size}-{arguments.layers}", work / "tiny", work / "quantized"
    write_checkpoint(source, arguments.size, arguments.layers)
    write_checkpoint(tiny, "tiny")
    for left in (out, work / "quantized-tiny"):
        shutil.rmtree(left, ignore_errors=True)
    if arguments.cached:
        for path in source.glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
    options = [arguments.recipe, arguments.device, str(arguments.workers)]
    command = [sys.executable, "-c", _RUN, str(tiny), str(source), str(out), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = {"benchmark": "model-free", "recipe": arguments.recipe, "device": arguments.device}
    row |= {
        "size": arguments.size,
        "layers": arguments.layers,
        "workers": arguments.workers,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }
    row |= {"files read": "before" if arguments.cached else "in the run", "load": round(os.getloadavg()[0], 1)}
    if arguments.device != "cpu":
        row["gpu"] = torch.cuda.get_device_name()
    return row | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default="/tmp/model-free", help="folder for the model and the result")
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recipe", default="w4a16-mxfp-quick")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cached", action="store_true", help="read the files into the page cache before the run")
    parser.add_argument("--out", help="file to add the record to")
    arguments = parser.parse_args()
    line = json.dumps(measure(arguments))
    print(line)
    if arguments.out:
        with Path(arguments.out).open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
