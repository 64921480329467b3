"""What `generate` adds to the kernels of a decode step: the host between two steps, and the choice of the token.

    python benchmarks/generate_loop.py --out benchmarks/results/generate-loop-h200.jsonl

`token`: microseconds between two tokens of a model of one tiny layer, the difference of a call of 240 and one of 40
tokens, the least of three each; `call_ms` is the call of 40, prefill uncompiled. "ours" is our loop, "transformers"
that of transformers with the same compiled, on a GPU captured step. `step`: of a profile, the distance of two steps,
their kernels and launches. `after`: what follows the model for a vocabulary of 128256, captured and replayed 100 times
(`gpu_us`, with the start of its graph), and what it adds behind a graph of 560 kernels (`added_us`). The last two need
a GPU.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import mxcompile
from mxcompile.inductor.captured_step import CudaGraph
from mxcompile.inductor.generation.loop import Options, Sequences, follow
from mxcompile.inductor.generation.scores import Scores
from mxcompile.inductor.generation.sequences import Ends

DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"
CHOICES: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.9},
}
PROCESSORS: Final[dict[str, tuple[Any, ...]]] = {
    "greedy": (),
    "temperature, top-p": (TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)),
    "temperature, top-k, top-p": (TemperatureLogitsWarper(0.8), TopKLogitsWarper(50), TopPLogitsWarper(0.9)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    about = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    rows = measure_tokens() + (measure_choices() if DEVICE == "cuda" else [])
    for row in rows:
        line = json.dumps({**row, **about})
        print(line, flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(line + "\n")


def measure_tokens() -> list[dict[str, Any]]:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.arange(64, device=DEVICE)[None] % 100 + 3
    ready: Any = mxcompile.quantize_and_compile(
        model.bfloat16().to(DEVICE), {"input_ids": ids[:, :8]}, recipe="w4a8-mxint-quick", probe=False
    )
    ready._compiled_call_impl = None  # prefill is not what is measured, and takes as long to compile
    rows = list[dict[str, Any]]()
    for choice, options in CHOICES.items():
        for way, generate in {"ours": ready.generate, "transformers": type(ready).generate.__get__(ready)}.items():
            call(generate, ids, 240, options)
            long, short = (min(call(generate, ids, n, options) for _ in range(3)) for n in (240, 40))
            row = {"measured": "token", "choice": choice, "way": way, "token_us": round((long - short) / 200 * 1e6)}
            rows.append(row | {"call_ms": round(short * 1e3, 1)})
    return rows + ([profiled(ready, ids)] if DEVICE == "cuda" else [])


def call(generate: Callable[..., Any], ids: torch.Tensor, count: int, options: dict[str, Any]) -> float:
    """Seconds of a call."""
    wait()
    began = time.perf_counter()
    fixed = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "cache_implementation": "static"}
    generate(ids, max_new_tokens=count, **fixed, **options)
    wait()
    return time.perf_counter() - began


def wait() -> None:
    """For what a GPU still computes."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def profiled(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """The last ten steps of a greedy call, each from one launch of our last kernel to the next."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(model.generate, ids, 40, CHOICES["greedy"])
    events = sorted((e for e in profile.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    places = [i for i, event in enumerate(events) if "_append_kernel" in event.name]
    first, last = places[-11], places[-1]
    whole = (events[last].time_range.start - events[first].time_range.start) / 10
    busy = sum(event.time_range.elapsed_us() for event in events[first:last]) / 10
    row = {"measured": "step", "step_us": round(whole, 1), "kernels_us": round(busy, 1)}
    return row | {"launches": (last - first) / 10}


def measure_choices() -> list[dict[str, Any]]:
    values = torch.zeros(64, device=DEVICE)

    def many() -> None:
        for _ in range(560):
            values.add_(1)

    many()
    model, rows = CudaGraph(), list[dict[str, Any]]()
    model.capture(many)
    for batch in (1, 8):
        logits = torch.randn(batch, 1, 128256, device=DEVICE, dtype=torch.bfloat16) * 3
        for name, processors in PROCESSORS.items():
            sequences, run = following(logits, processors)
            run(logits)
            after = CudaGraph()
            after.capture(lambda run=run, logits=logits: run(logits))
            replays = (after.replay,), (model.replay, after.replay), (model.replay,)
            alone, both, only = (replayed(calls, sequences) for calls in replays)
            row = {"measured": "after", "batch": batch, "scores": name, "gpu_us": round(alone, 1)}
            rows.append(row | {"added_us": round(both - only, 1)})
    return rows


def following(logits: torch.Tensor, processors: tuple[Any, ...]) -> tuple[Sequences, Callable[[torch.Tensor], None]]:
    batch = len(logits)
    ends = Ends(torch.tensor([5, 9], device=DEVICE), torch.tensor(0, device=DEVICE))
    options = Options(Scores(processors, 0, None), bool(processors), ends, 10, (), None)
    sequences = Sequences(batch, 2048, logits.shape[-1], ends, logits.device)
    inputs = {name: torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE) for name in ("input_ids", "position_ids")}
    inputs["attention_mask"] = torch.zeros(batch, 1, 1, 2048, dtype=torch.bool, device=DEVICE)
    return sequences, follow(sequences, inputs, torch.tensor(100, device=DEVICE), options)


def replayed(calls: tuple[Callable[[], None], ...], sequences: Sequences) -> float:
    """Microseconds on the GPU, the mean of 100."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for index in range(101):
        if index == 1:
            sequences.length.fill_(1)
            torch.cuda.synchronize()
            begin.record()
        for replay in calls:
            replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 10


if __name__ == "__main__":
    main()
