"""Seconds of gptq in one and in several processes, and whether equal runs give equal bytes.

    python benchmarks/ranks.py --out benchmarks/results/large.jsonl   # on 2 CPU cores, which have nothing else to do
    python benchmarks/ranks.py --windows 8 --length 128 --layers 4                            # a short run
    python benchmarks/ranks.py --random /dev/shm/8b --windows 128 --length 2048 --device cuda   # two GPUs, 8 minutes

SmolLM2-135M in float32, or the model of a folder, calibrated on Python's help topics. Every run is started by torchrun,
also that of one process; on the CPU each process has one thread. One process makes `--repeats` runs, and then
`--processes` do; the fastest counts.

`gptq`: seconds of the pass, between its start and its end in the first process. `whole`: of `quantize_and_compile`
without compiling, once all processes have the model; it includes tracing, which each process does. On a GPU a model of
one small layer is quantized first, which compiles kernels and connects the GPUs. `speedup`: of one process over
several. `same bytes`: all runs of several processes have made the same model. `tensors alike`: of the stored tensors,
how many are those of one process to the bit; others differ by the order of sums. `distance`: between the logits of the
models that several processes and one have made, over the distance of the latter from the float model's; `error`: the
distance of the former from the float model's, over the same. Both of the first tokens of the last window. `peak GiB`:
the most that torch held on a GPU, the model included. `load`: the average of one minute when the runs began; on a
machine that is at work already, seconds say little. With `--verbose` each run's seconds are printed when it ends.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import torch.distributed as dist
from random_llama import SIZES, config_of, write_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mxcompile
from mxcompile.calibration.data.windows import token_ids
from mxcompile.calibration.ranks.process_group import is_first, launched_group
from mxcompile.cli import smollm2
from mxcompile.cli.model_source import load_model
from mxcompile.cli.texts import help_text
from mxcompile.graph.program import Program
from mxcompile.graph.records import PassRecord
from mxcompile.pipeline.interfaces import Instrument, PipelineStep
from mxcompile.tensor.digest import tensor_sha256
from mxcompile.tensor.weight import MXWeight

RECIPE: Final = "gptq{format=mxint4,activation=mxint8,correction=0.25} | lower-mx{weight=mxint4,activation=mxint8}"
_BATCH: Final = 4  # windows
_EXAMPLE: Final = 64  # tokens
_COMPARED: Final = 256  # tokens whose logits are compared


class Stopwatch(Instrument):
    """Seconds of each pass, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = 0.0

    def before(self, program: Program, step: PipelineStep) -> None:
        """A pass begins."""
        _wait_for_gpu()
        self._began = time.perf_counter()

    def after(self, program: Program, step: PipelineStep, record: PassRecord) -> None:
        """It has ended."""
        _wait_for_gpu()
        name = step.current.name
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self._began


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def write_work(work: Path, options: argparse.Namespace) -> None:
    """The float model in `work/model`, cut to its first layers, and token ids `[windows, length]` in `work/ids.pt`."""
    if options.random is not None:
        (work / "model").symlink_to(write_checkpoint(options.random, options.size, options.layers).resolve())
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config_of(options.size).vocab_size, (options.windows, options.length), generator=generator)
        torch.save(ids, work / "ids.pt")
        return
    model, tokenizer = smollm2.load() if options.model is None else load_model(options.model)
    ids = token_ids(tokenizer, help_text())
    count = options.windows * options.length
    if len(ids) < count:
        raise SystemExit(f"the help topics have {len(ids)} tokens, not {options.windows} windows of {options.length}")
    torch.save(ids[:count].view(options.windows, options.length).clone(), work / "ids.pt")
    plain = as_plain(model) if options.model is None else model
    if options.layers is not None:
        plain.model.layers = plain.model.layers[: options.layers]
        plain.config.num_hidden_layers = len(plain.model.layers)
        if getattr(plain.config, "layer_types", None):
            plain.config.layer_types = plain.config.layer_types[: options.layers]
    plain.save_pretrained(work / "model")


def as_plain(model: Any) -> LlamaForCausalLM:
    """SmolLM2 in float32, without what its file says of its quantization."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = "float32"
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    return plain


def run_here(work: Path, options: argparse.Namespace) -> None:
    """One process of a launch; the first one prints what is measured, a line a run, and writes logits to `work`."""
    device, began = options.device, time.perf_counter()
    if device == "cpu":
        torch.set_num_threads(1)

    def say(what: str) -> None:
        if options.verbose and is_first():
            print(f"{what} after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

    with launched_group(device) as own:
        if device != "cpu":
            warm_up(own, options.recipe)
            say("warm")
        model = AutoModelForCausalLM.from_pretrained(work / "model").to(own).eval()
        batches = [batch.to(own) for batch in torch.load(work / "ids.pt").split(_BATCH)]
        compared = batches[-1][-1:, :_COMPARED]
        exact = logits_of(model, compared)
        say("loaded")
        for _ in range(options.repeats):
            result, quantized = measured(model, batches, own, options.recipe)
            say("quantized")
            if is_first():
                print(json.dumps(result | {"tensors": digests(quantized)}), flush=True)
        if is_first():
            count = dist.get_world_size() if dist.is_initialized() else 1
            torch.save((exact, logits_of(quantized, compared)), work / f"logits-{count}.pt")


def measured(model: nn.Module, batches: list[torch.Tensor], own: str, recipe: str) -> tuple[dict[str, Any], nn.Module]:
    """Seconds of a run, the peak of all processes, and the quantized model."""
    watch = Stopwatch()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(own)
    if dist.is_initialized():
        dist.barrier()
    began = time.perf_counter()
    quantized = mxcompile.quantize_and_compile(
        model, batches[0][:1, :_EXAMPLE], recipe=recipe, calibration=batches, compile=False, instruments=[watch]
    )
    _wait_for_gpu()
    whole = time.perf_counter() - began
    peak = largest(torch.cuda.max_memory_allocated(own) if torch.cuda.is_initialized() else 0)
    return {"gptq": watch.seconds.get("gptq", 0.0), "whole": whole, "peak": peak}, quantized


def warm_up(device: str, recipe: str) -> None:
    """Quantize one small layer."""
    model = LlamaForCausalLM(config_of("tiny")).to(device, torch.bfloat16).eval()
    ids = torch.randint(config_of("tiny").vocab_size, (2 * _BATCH, _EXAMPLE), device=device)
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        dist.broadcast(ids, 0)
    batches = list(ids.split(_BATCH))
    mxcompile.quantize_and_compile(model, batches[0][:1], recipe=recipe, calibration=batches, compile=False)


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Float32, on the CPU."""
    with torch.no_grad():
        return model(input_ids=ids).logits.float().cpu()


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if not dist.is_initialized():
        return number
    numbers = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return max(numbers)


def distances(work: Path, processes: int) -> dict[str, float]:
    """Of the logits that several processes' model gives, as in the docstring above."""
    exact, alone = torch.load(work / "logits-1.pt")
    several = torch.load(work / f"logits-{processes}.pt")[1]
    error = (alone - exact).norm()
    found = {"distance": (several - alone).norm() / error, "error": (several - exact).norm() / error}
    return {name: float(f"{float(each):.3g}") for name, each in found.items()}


def digests(model: nn.Module) -> dict[str, str]:
    """A digest of every tensor's bytes."""
    tensors = model.state_dict(keep_vars=True)
    parts = {name: each.parts if isinstance(each, MXWeight) else (each,) for name, each in tensors.items()}
    return {name: " ".join(map(tensor_sha256, each)) for name, each in parts.items()}


def launch(work: Path, processes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the first of so many processes prints: a result for each run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    command += [
        "--child-of",
        str(work),
        "--repeats",
        str(options.repeats),
        "--device",
        options.device,
        "--recipe",
        options.recipe,
    ]
    command += ["--verbose"] * options.verbose
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run of {processes} processes failed with {done.returncode}: see above")
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if options.verbose:
        for result in results:
            print({"processes": processes} | {name: result[name] for name in ("gptq", "whole", "peak")}, flush=True)
    return results


def compared(alone: list[dict[str, Any]], several: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and bytes of the runs of one process and of several, as in the docstring above."""
    record: dict[str, Any] = {}
    for what in ("gptq", "whole"):
        one, many = min(each[what] for each in alone), min(each[what] for each in several)
        record[f"{what} seconds, 1 process"] = round(one, 2)
        record[f"{what} seconds"], record[f"{what} speedup"] = round(many, 2), round(one / many, 2)
    expected, found = alone[0]["tensors"], several[0]["tensors"]
    if alone[0]["peak"]:
        record["peak GiB, 1 process"], record["peak GiB"] = (
            round(max(each["peak"] for each in runs) / 2**30, 2) for runs in (alone, several)
        )
    record["same bytes"] = all(each["tensors"] == found for each in several)
    record["tensors alike"] = sum(found.get(name) == digest for name, digest in expected.items())
    return record | {"tensors": len(expected)}


def name_of(options: argparse.Namespace) -> str:
    return (
        f"Llama-3-{options.size.upper()} shape, random" if options.random is not None else options.model or smollm2.NAME
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The record."""
    record: dict[str, Any] = {"benchmark": "ranks", "model": name_of(options), "recipe": options.recipe}
    record |= {"processes": options.processes, "windows": options.windows, "length": options.length}
    record |= {"layers": options.layers or "all", "device": options.device, "repeats": options.repeats}
    record |= {"torch": torch.__version__, "cpus": os.cpu_count()}
    if options.device != "cpu":
        record["gpu"] = torch.cuda.get_device_name()
    with TemporaryDirectory() as folder:
        work = Path(folder)
        write_work(work, options)
        record["load"] = round(os.getloadavg()[0], 1)
        alone, several = (launch(work, processes, options) for processes in (1, options.processes))
        return record | compared(alone, several) | distances(work, options.processes)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id; SmolLM2-135M if not given")
    parser.add_argument("--random", type=Path, help="folder of a random model in Llama-3's shape, random tokens")
    parser.add_argument("--size", choices=SIZES, default="8b", help="of that model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--windows", type=int, default=32, help="of calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--layers", type=int, help="the first so many; all if not given")
    parser.add_argument("--recipe", default=RECIPE, help="a pipeline with gptq")
    parser.add_argument("--repeats", type=int, default=2, help="runs with each number of processes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="file to add the record to")
    parser.add_argument("--verbose", action="store_true", help="print the seconds of each run")
    parser.add_argument("--child-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.processes, options.repeats) < 2 or (options.layers is not None and options.layers < 1):
        parser.error("--processes and --repeats are at least 2, --layers at least 1")
    return options


def main() -> None:
    """Print the record, and append it to a file."""
    options = parsed()
    if options.child_of is not None:
        run_here(options.child_of, options)
        return
    line = json.dumps(measure(options))
    print(line)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
