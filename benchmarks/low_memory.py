"""Memory and time of quantizing a model from its files (`quantize_checkpoint`), beside a model in memory.

    python benchmarks/low_memory.py smollm2 --out benchmarks/results/low-memory.jsonl   # about 10 minutes
    python benchmarks/low_memory.py llama --folder FOLDER --layers 24                    # 13 GB, written if missing
    python benchmarks/low_memory.py device --folder FOLDER --layers 32 --device cuda     # an 8B shape on a GPU

Each run has a process of its own, which has quantized a tiny model before, so that all is imported; what it had then is
subtracted. `anonymous MB`: the most memory that only this process has and the system cannot drop (RssAnon). `mapped
MB`: the most pages of mapped files that were in memory beside it (RssFile): the system's cache of these files, which it
drops when others need the room. `peak MB`: the most of both at a time. Linux only; read every 20 ms from outside.

smollm2: SmolLM2-135M in float32, every stage of `--recipe` (by default awq-fold | gptq | lower-mx), calibrated on
`--calibration` windows of 512 tokens. `same bytes` compares the weight files of both runs.
llama: random weights in the shape of Llama-3-8B in bfloat16, rounded to nearest; and `gptq` up to the end of its first
segments, after which the run is stopped.
device: gptq of the same shape, from files and in memory, and the most memory on the device. With `--parts`, also where
the seconds go, and the functions that take longest (`cProfile`); the whole then takes longer.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from random_llama import SIZES, config_of, write_checkpoint
from transformers import LlamaForCausalLM

from mxcompile.cli import smollm2
from mxcompile.cli.texts import help_text

_RECIPE = "awq-fold{weight=mxint4,activation=mxint8} | gptq{format=mxint4,activation=mxint8,correction=0.25} | " + (
    "lower-mx{weight=mxint4,activation=mxint8}"
)
GPTQ = "gptq{format=mxint4,activation=mxint8,correction=0.25} | lower-mx{weight=mxint4,activation=mxint8}"
_CHILD = """
import contextlib, cProfile, json, os, pstats, sys, time
import torch
import mxcompile
from transformers import AutoModelForCausalLM
from mxcompile.calibration.ranks.process_group import is_first, launched_group
from mxcompile.pipeline.interfaces import Instrument

class Stop(Exception):
    pass

class Stages(Instrument):
    def __init__(self, until=None):
        self.until = until

    def segment(self, program, step, done, total):
        say(stage=step.current.name, done=done)
        if self.until is not None and step.current.name == "gptq" and done == self.until:
            raise Stop("that is enough")

def say(**what):
    if is_first():
        print(json.dumps(what), flush=True)

def run(how, source, out, recipe, data, device, until, memory):
    batches = list(torch.load(data).split(4))
    instruments = [Stages(until)]
    if how == "files":
        mxcompile.quantize_checkpoint(source, batches[0][:1, :64], out, recipe=recipe, calibration=batches,
                                      device=device, weights_in_memory=memory, states_in_memory=memory,
                                      instruments=instruments)
    else:
        model = AutoModelForCausalLM.from_pretrained(source).to(device)
        batches = [batch.to(device) for batch in batches]
        made = mxcompile.quantize_and_compile(model, batches[0][:1, :64], recipe=recipe, calibration=batches,
                                              compile=False, instruments=instruments)
        if is_first():
            mxcompile.save(made, out)

tiny, real = json.loads(sys.argv[1])
folder, parts = real.pop("parts", None), None
with launched_group(real["device"]) as device:
    if device != "cpu":
        torch.cuda.set_device(torch.empty(0, device=device).device)
    run(**tiny | {"device": device})
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    watched = contextlib.nullcontext()
    if folder is not None:
        sys.path.insert(0, folder)
        from seconds_by_part import SecondsByPart, watch_quantization
        parts, watched = SecondsByPart(torch.cuda.synchronize if device != "cpu" else int), cProfile.Profile()
        watch_quantization(parts)
    say(ready=True, process=os.getpid())
    began = time.perf_counter()
    try:
        with watched:
            run(**real | {"device": device})
    except Exception as error:
        if "that is enough" not in str(error):
            raise
    seconds = time.perf_counter() - began
    if parts is not None:
        print(parts.table(), file=sys.stderr)
        for order in ("tottime", "cumtime"):
            pstats.Stats(watched, stream=sys.stderr).strip_dirs().sort_stats(order).print_stats(40)
    on_device = torch.cuda.max_memory_allocated(device) if device != "cpu" else 0
    say(seconds=seconds, device=on_device)
"""


def memory_of(process: int) -> dict[str, int]:
    """Bytes of the process's own memory, and of mapped files in memory."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    if not fields:  # it is ending, or has ended
        return {"anonymous MB": 0, "mapped MB": 0, "peak MB": 0}
    sizes = {name: int(value.split()[0]) * 1024 for name, value in fields.items()}
    return {"anonymous MB": sizes["RssAnon"], "mapped MB": sizes["RssFile"], "peak MB": sum(sizes.values())}


def measured(
    tiny: dict[str, Any], real: dict[str, Any], processes: int = 1, limit: float | None = None
) -> dict[str, Any]:
    """Run both in a new process; the peaks of the second above what the process had before, in all and by stage.

    processes: started by torchrun, of which the first is measured. limit: seconds after which they are ended.
    """
    command = [sys.executable, "-c", _CHILD, json.dumps([tiny, real])]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launch, "--no-python", *command]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said: list[dict[str, Any]] = []
    reader = threading.Thread(target=_read, args=(child, said))
    reader.start()
    began = time.perf_counter()
    before: dict[str, int] = {}
    peaks: dict[str, dict[str, int]] = {}
    while child.poll() is None:
        if any("ready" in line for line in said):
            later = said[[("ready" in line) for line in said].index(True) :]
            now = memory_of(later[0]["process"])
            before = before or now
            stage = next((line["stage"] for line in reversed(later) if "stage" in line), "load")
            own = peaks.setdefault(stage, dict.fromkeys(now, 0))
            peaks[stage] = {name: max(own[name], value - before[name]) for name, value in now.items()}
        if limit is not None and time.perf_counter() - began > limit:
            child.terminate()
        time.sleep(0.02)
    reader.join()
    if child.returncode:
        raise SystemExit(f"the run failed with {child.returncode}")
    result = said[-1]
    by_stage = {name: {key: round(value / 1e6) for key, value in own.items()} for name, own in peaks.items()}
    whole = {key: max(own[key] for own in by_stage.values()) for key in next(iter(by_stage.values()))}
    return {
        "seconds": round(result["seconds"], 1),
        **whole,
        "device MB": round(result["device"] / 1e6),
        "stages": by_stage,
    }


def _read(child: "subprocess.Popen[str]", said: list[dict[str, Any]]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            said.append(json.loads(line))


def settings(how: str, source: Path, out: Path, recipe: str, data: Path, **options: Any) -> dict[str, Any]:
    """Arguments of the child's `run`."""
    defaults = {"device": "cpu", "until": None, "memory": 100 * 10**6}
    return (
        {"how": how, "source": str(source), "out": str(out), "recipe": recipe, "data": str(data)} | defaults | options
    )


def write_tiny(folder: Path) -> tuple[Path, Path]:
    """A tiny model in a folder, and token ids for it."""
    write_checkpoint(folder / "tiny", "tiny")
    torch.save(torch.randint(0, 128, (8, 64)), folder / "tiny.pt")
    return folder / "tiny", folder / "tiny.pt"


def write_smollm2(folder: Path, windows: int) -> tuple[Path, Path, int]:
    """SmolLM2 in float32 as safetensors, token ids `[windows, 512]`, and the bytes of its parameters."""
    model, tokenizer = smollm2.load()
    ids = tokenizer(help_text(), return_tensors="pt", verbose=False).input_ids[0]
    torch.save(ids[: windows * 512].view(windows, 512).clone(), folder / "ids.pt")
    config = model.config
    del config.quantization_config
    config.dtype = "float32"
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / "float")
    return folder / "float", folder / "ids.pt", sum(p.numel() * p.element_size() for p in model.parameters())


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same weight files."""
    files = [{path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in (one, other)]
    return files[0] == files[1]


def of_smollm2(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A run from files and one in memory."""
    source, data, size = write_smollm2(work, options.calibration)
    tiny, ids = write_tiny(work)
    records: list[dict[str, Any]] = []
    for how in ("files", "memory"):
        recipe = options.recipe or _RECIPE
        small = settings(how, tiny, work / f"tiny-{how}", recipe, ids)
        real = settings(how, source, work / how, recipe, data, memory=options.memory)
        numbers = measured(small, real, options.processes)
        states = options.calibration * 512 * 576 * 4
        records.append(
            {"model": "SmolLM2-135M", "model MB": round(size / 1e6), "weights": how, "recipe": recipe}
            | ({"processes": options.processes} if options.processes > 1 else {})
            | {"calibration": options.calibration, "one state MB": round(states / 1e6), **numbers}
            | {"anonymous over model": round(numbers["anonymous MB"] * 1e6 / size, 2)}
        )
    return [record | {"same bytes": same_weights(work / "files", work / "memory")} for record in records]


def of_llama(work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rounding to nearest, and the first segments of gptq, from files."""
    source = write_checkpoint(options.folder, "8b", options.layers)
    tiny, ids = write_tiny(work)
    torch.save(torch.randint(0, 128256, (4, 512), generator=torch.Generator().manual_seed(0)), work / "ids.pt")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    runs = {"w4a16-mxfp-quick": None, GPTQ: options.segments}
    for number, (recipe, until) in enumerate(runs.items()):
        small = settings("files", tiny, work / f"tiny-{number}", recipe, ids)
        out = options.folder.parent / "low-memory-out"
        real = settings("files", source, out, recipe, work / "ids.pt", until=until, memory=options.memory)
        what = {
            "model": f"Llama-3-8B shape, {options.layers} layers",
            "model MB": round(size / 1e6),
            "weights": "files",
        }
        yield what | {"recipe": recipe, "segments": until, **measured(small, real)}


def of_device(work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """gptq on a device, from files and in memory."""
    source = write_checkpoint(options.folder, options.size, options.layers)
    tiny, ids = write_tiny(work)
    vocabulary = config_of(options.size).vocab_size
    torch.save(torch.randint(0, vocabulary, (128, 512), generator=torch.Generator().manual_seed(0)), work / "ids.pt")
    for how in options.weights:
        small = settings(how, tiny, work / f"tiny-{how}", GPTQ, ids, device=options.device)
        out = options.folder.parent / f"low-memory-{how}"
        real = settings(how, source, out, GPTQ, work / "ids.pt", device=options.device, memory=2 * 10**9)
        real |= {"parts": str(Path(__file__).parent)} if options.parts else {}
        device = options.device if options.device == "cpu" else torch.cuda.get_device_name(options.device)
        model = f"Llama-3-{options.size.upper()} shape, {options.layers} layers"
        what = {"model": model, "weights": how, "device": device}
        yield what | {"recipe": GPTQ, **measured(small, real)}


def main() -> None:
    """Run a benchmark; print its records, and append them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["smollm2", "llama", "device"])
    parser.add_argument("--recipe")
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--memory", type=int, default=50 * 10**6, help="bytes of weights, and of states, in memory")
    parser.add_argument("--folder", type=Path, default=Path("out/llama-shape"))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--segments", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="smollm2: started by torchrun; the first is measured")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=[*SIZES], default="8b", help="device: of the model")
    parser.add_argument("--weights", nargs="+", choices=["files", "memory"], default=["files", "memory"])
    parser.add_argument("--parts", action="store_true", help="device: print where the seconds go")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run = {"smollm2": of_smollm2, "llama": of_llama, "device": of_device}[options.what]
    with TemporaryDirectory() as folder:
        for record in run(Path(folder), options):
            print(json.dumps(record), flush=True)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
