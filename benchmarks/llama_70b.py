"""A model of Llama-3-70B's shape, which is larger than a GPU: quantized from files, served with tensor parallelism.

    mount -o remount,size=230G /dev/shm
    python benchmarks/llama_70b.py --work /dev/shm/70b --out benchmarks/results/large.jsonl        two GPUs, 256 GiB

Random bfloat16 weights, 141 GB with all 80 layers. What is done, a record each, as soon as it is done; a part that
fails has a record that says why, and the parts that need nothing of it go on:

- `write`: the model is made on the GPU and written file by file.
- `quantize`: `quantize_files` to MXFP4 on the first GPU, from the cache of files.
- `serve`: vLLM with `--tensor-parallel` GPUs on the quantized model, whose files it does not check, and on the bfloat16
  model, whose weights it makes up; on one GPU one after the other, since bfloat16 leaves room for little else.
  `step_ms`, `prompt_ms` as `serving.py` has them. CUDA graphs without torch.compile. Kernels are compiled by an engine
  on a model of one layer while the weights are written.
- `compare`: mean distance of vLLM's log-probabilities of 4 prompts' tokens from those of the same folder loaded by
  mxcompile.load on one GPU, and of transformers' two attentions there from each other.
- `gptq`: `quantize_checkpoint` up to the end of its first `--segments` segments, where it is stopped: in one process on
  the last GPU, and then in `--tensor-parallel` processes (torchrun) with a GPU each. Seconds, and memory of the first
  process, as `low_memory.py` has them.

`--parts files` ends when the files are written and quantized, `--parts engines` goes on from there, in another process:
so that something else can be measured in between, while nothing of this runs. With `--after` the engines wait to be
measured until that file is there. WORK keeps its files. A machine without room for 141 GB: `--filled 8` leaves the
weights of the layers from the ninth on out of the files, where they are holes that are read as zeros.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, Final

import low_memory
import torch
from random_llama import SIZES, config_of, write_checkpoint
from serving import compared, log_probabilities
from serving_engine import EngineProcess

from mxcompile.errors import MXCompileError

SOURCE: Final = "source"
QUANTIZED: Final = "quantized"
PARTS: Final = ("all", "files", "engines")
_QUICK: Final = "w4a16-mxfp-quick"
_GRAPHS: Final = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
_QUANTIZE: Final = """
import json, sys, time
import torch, mxcompile
source, out, recipe, device, workers = sys.argv[1:]
began = time.perf_counter()
plan = mxcompile.quantize_files(source, out, recipe=recipe, device=device, workers=int(workers))
result = {"seconds": round(time.perf_counter() - began, 1), "workers": int(workers)}
result |= {"source bytes": sum(each.before for each in plan.tensors)}
result |= {"result bytes": sum(each.after for each in plan.tensors)}
if device != "cpu":
    result["device peak bytes"] = torch.cuda.max_memory_allocated()
print(json.dumps(result))
"""


class Records:
    """Prints each record, and appends it to a file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._began, self._out = time.perf_counter(), options.out
        device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
        self._common = {"size": options.size, "layers": options.layers, "device": device, "torch": torch.__version__}
        self._common |= {} if options.filled is None else {"filled": options.filled}
        self.failed = False

    def run(self, what: str, about: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Add what the work returns, or why it failed, which is printed in full. about: what is said of it anyway."""
        try:
            record = work()
        except (MXCompileError, RuntimeError, OSError, SystemExit) as error:
            traceback.print_exc()
            record = {"failed": str(error)}
        self.add(what, about | record)

    def add(self, what: str, record: dict[str, Any]) -> None:
        """what: the part of the work."""
        self.failed |= "failed" in record
        at = round(time.perf_counter() - self._began, 1)
        line = json.dumps({"benchmark": "llama-70b", "what": what} | self._common | record | {"at": at})
        print(line, flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(line + "\n")


def quantize(source: Path, out: Path, options: argparse.Namespace, *, workers: int) -> dict[str, Any]:
    """`quantize_files` in a process of its own: nothing of it stays on the GPU."""
    command = [sys.executable, "-c", _QUANTIZE, str(source), str(out), _QUICK, options.device, str(workers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"quantize_files failed with {done.returncode}: see above")
    return {"recipe": _QUICK, **json.loads(done.stdout.splitlines()[-1])}


def engine(model: Path, options: argparse.Namespace, **changes: Any) -> EngineProcess:
    """An engine on a folder. changes: of what is asked."""
    most = max(options.batches) * (options.prompt + 2 * options.steps + 32) + options.long
    config = config_of(options.size)
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    llm: dict[str, Any] = {"load_format": "auto", "max_num_batched_tokens": options.step_tokens}
    llm["gpu_memory_utilization"] = 0.05  # must be free at the start; more is used
    llm["kv_cache_memory_bytes"] = 2 * 4 * width * options.layers * most // options.tensor_parallel
    llm["additional_config"] = {"mxcompile": {"verify": False}}
    if options.device != "cpu":
        llm["compilation_config"] = _GRAPHS | {"cudagraph_capture_sizes": sorted({1, 2, 4, *options.batches})}
    asked = {name: getattr(options, name) for name in ("batches", "prompt", "long", "steps", "tensor_parallel")}
    asked |= {"rounds": 3, "eager": options.device == "cpu", "profile": [], "compare": True, "limit": options.limit}
    asked |= {"vocabulary": config.vocab_size, "waits": True, "options": llm}
    asked["options"] |= changes.pop("llm", {})
    return EngineProcess(model, asked | changes)


def gptq(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    """The first segments of gptq from files, in one process or in several, which torchrun starts."""
    folder = options.work / f"gptq-{processes}"
    folder.mkdir()
    tiny, tiny_ids = low_memory.write_tiny(folder)
    size = (options.calibration, options.long)
    ids = torch.randint(config_of(options.size).vocab_size, size, generator=torch.Generator().manual_seed(0))
    torch.save(ids, folder / "ids.pt")
    device, recipe = options.device, low_memory.GPTQ
    if device != "cpu" and processes == 1:
        device = f"cuda:{torch.cuda.device_count() - 1}"
    small = low_memory.settings("files", tiny, folder / "out-tiny", recipe, tiny_ids, device=device)
    settings = {"device": device, "until": options.segments, "memory": 4 * 10**9}
    real = low_memory.settings("files", options.work / SOURCE, folder / "out", recipe, folder / "ids.pt", **settings)
    record = {"recipe": recipe, "segments": options.segments, "calibration": "x".join(map(str, size))}
    return record | {"processes": processes, **low_memory.measured(small, real, processes, options.limit)}


def load_and_run(folder: Path, device: str, results: list[Any]) -> dict[str, Any]:
    """Add the log-probabilities of the folder's model on one device, with either attention, to the results."""
    import mxcompile

    began = time.perf_counter()
    try:
        results += log_probabilities(mxcompile.load(folder, device=device, verify=False))
    finally:
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    return {"seconds": round(time.perf_counter() - began, 1)}


def make_files(options: argparse.Namespace, records: Records) -> None:
    """Write the model and quantize it, while an engine compiles kernels."""
    warming = Thread(target=compile_kernels, args=(options, records))
    warming.start()
    records.run("write", {}, lambda: write_source(options))
    source, out = options.work / SOURCE, options.work / QUANTIZED
    records.run("quantize", {}, lambda: quantize(source, out, options, workers=options.workers))
    warming.join()


def write_source(options: argparse.Namespace) -> dict[str, Any]:
    """The bfloat16 weights."""
    began = time.perf_counter()
    source = write_checkpoint(options.work / SOURCE, options.size, options.layers, options.workers, options.filled)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if options.device != "cpu":
        torch.cuda.empty_cache()
    return {"seconds": round(time.perf_counter() - began, 1), "bytes": size}


def compile_kernels(options: argparse.Namespace, records: Records) -> None:
    """Run an engine on one layer of that shape: its kernels are found in Triton's cache by the next."""

    def serve_one_layer() -> dict[str, Any]:
        source = write_checkpoint(options.work / "one-layer-source", options.size, 1)
        quantize(source, options.work / "one-layer", options, workers=2)
        began = time.perf_counter()
        one = engine(options.work / "one-layer", options, waits=False, compare=False)
        result = one.measure()
        for folder in (source, options.work / "one-layer"):
            shutil.rmtree(folder)
        return {**result, "seconds": round(time.perf_counter() - began, 1)}

    records.run("one layer", {}, serve_one_layer)


def run_engines(options: argparse.Namespace, records: Records) -> None:
    """Measure the engine on the quantized model, that on the float one, and gptq."""
    floats, out = options.work / "bf16", options.work / QUANTIZED
    config_of(options.size, options.layers).save_pretrained(floats)
    of_floats = engine(floats, options, compare=False, llm={"load_format": "dummy"})
    quantized, together = engine(out, options), options.tensor_parallel > 1
    try:
        quantized.start()
        expected: list[Any] = []
        records.run("load", {}, lambda: load_and_run(out, options.device, expected))
        if together:
            of_floats.start()
            of_floats.wait_until_ready()
        quantized.wait_until_ready()
        print("the engine is ready", flush=True)
        while options.after is not None and not options.after.exists():
            time.sleep(0.1)
        result = quantized.measure()
        found = result.pop("log_probabilities", None)
        records.add("serve", {"weights": _QUICK, **result})
        if expected and found:
            records.add("compare", compared({"log_probabilities": found}, expected))
        if not together:
            of_floats.start()
            of_floats.wait_until_ready()
        records.add("serve", {"weights": "bfloat16", **of_floats.measure()})
    finally:
        of_floats.stop()
        quantized.stop()
    for processes in sorted({1, options.tensor_parallel} if options.segments else ()):
        records.run("gptq", {"processes": processes}, lambda processes=processes: gptq(options, processes))


def main() -> int:
    """The parts that were asked for, one after the other. Returns 1 if one of them failed."""
    options = parsed()
    records = Records(options)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.parts != "engines":
        make_files(options, records)
    if options.parts != "files":
        run_engines(options, records)
    return int(records.failed)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for 190 GB")
    parser.add_argument("--size", choices=SIZES, default="70b")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="tensors at a time")
    parser.add_argument("--calibration", type=int, default=16, help="windows of --long tokens for gptq")
    parser.add_argument("--segments", type=int, default=2)
    parser.add_argument("--tensor-parallel", type=int, default=2)
    parser.add_argument("--batches", type=lambda text: [int(each) for each in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--long", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for an engine to be ready, and to measure")
    parser.add_argument("--step-tokens", type=int, default=8192, help="the most of one step of an engine")
    parser.add_argument("--filled", type=int, help="layers with weights in the files; all if not given")
    parser.add_argument("--after", type=Path, help="measure once this file is there")
    parser.add_argument("--parts", choices=PARTS, default=PARTS[0])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
