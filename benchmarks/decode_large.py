"""Decoding and prefill of a model of Llama-3-8B's shape on a GPU: MX weights beside the same model in bfloat16.

    python benchmarks/decode_large.py --out benchmarks/results/decode-h100.jsonl

Random weights, batch 1, through `generate` with a static cache: the decode step is compiled and replayed as a CUDA
graph, for the bfloat16 model by transformers itself. A token's time is the mean between two tokens of one call of
`generate`, after a prompt of `--prompt` tokens, without the first step, in which the CUDA graph is recorded; the call's
has all in it. A step's time is that of its kernels alone. "head mxint8": the output head, too, is in MX.
Prefill is one compiled forward of `--prefill` tokens. With `--profile`, the kernels of a step and of prefill.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
import transformers
import triton
from large import build
from transformers.generation import StoppingCriteria, StoppingCriteriaList

import mxcompile
from mxcompile.formats import MXINT8
from mxcompile.inductor import compile_module
from mxcompile.tensor.modules import stored_bytes

FLOAT: Final = "bfloat16"
HEAD: Final = ", head mxint8"
LISTED: Final = 14


def main() -> None:
    arguments = parser().parse_args()
    model = build(arguments.layers, "cuda")
    rows: list[dict[str, Any]] = []
    for recipe in (FLOAT, *arguments.recipes.split(";")):
        began = time.perf_counter()
        ready = model if recipe == FLOAT else quantized(model, recipe)
        sizes = [stored_bytes(part) / 2**30 for part in (ready, ready.model.layers)]
        row = {"model": "Llama-3-8B shape, random", "layers": arguments.layers, "recipe": recipe}
        row |= {"gib": round(sizes[0], 3), "decoder_gib": round(sizes[1], 3)}
        row |= measured(ready, arguments)
        row["seconds_to_prepare"] = round(time.perf_counter() - began, 1)
        row |= {"ratio": round(rows[0]["token_ms"] / row["token_ms"], 2) if rows else 1.0}
        row |= {"step_ratio": round(rows[0]["step_ms"] / row["step_ms"], 2) if rows else 1.0}
        row |= {"prefill_ratio": round(rows[0]["prefill_ms"] / row["prefill_ms"], 2) if rows else 1.0}
        row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        rows.append(row | {"transformers": transformers.__version__})
        print(json.dumps(rows[-1]), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        torch._dynamo.reset()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recipes", default=f"w4a8-mxint-quick{HEAD};w4a8-mxint-quick", help="separated by ;")
    parser.add_argument("--prompt", type=int, default=1900)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--profile", action="store_true", help="print the kernels of one decode step and of prefill")
    parser.add_argument("--out", type=Path, help="add the results here, one JSON object a line")
    return parser


def quantized(model: Any, recipe: str) -> Any:
    ids = torch.arange(16, device="cuda")[None]
    head: Any = {"include": ["lm_head"], "overrides": {"lm_head": MXINT8}} if recipe.endswith(HEAD) else {}
    return mxcompile.quantize_and_compile(
        model, {"input_ids": ids}, recipe=recipe.removesuffix(HEAD), probe=False, **head
    )


@torch.no_grad()
def measured(model: Any, arguments: argparse.Namespace) -> dict[str, float]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    ids = torch.randint(100, 100000, (1, arguments.prefill), generator=generator, device="cuda")
    prompt = ids[:, : arguments.prompt]

    runs = [generated(model, prompt, arguments.tokens) for _ in range(6)][3:]
    step = step_seconds(model, arguments)
    if model._compiled_call_impl is None:
        compile_module(model)  # the float model's prefill, compiled the way ours is
    for _ in range(2):
        model(ids, use_cache=False, logits_to_keep=1)
    prefill = seconds(lambda: model(ids, use_cache=False, logits_to_keep=1))
    if arguments.profile:
        print(f"prefill of {arguments.prefill}: {prefill * 1e3:.2f} ms", flush=True)
        show(kernels(lambda: model(ids, use_cache=False, logits_to_keep=1)))
    times = {name: min(run[name] for run in runs) for name in runs[0]} | {"step_ms": step, "prefill_ms": prefill}
    return {name: round(value * 1e3, 3) for name, value in times.items()}


class Clock(StoppingCriteria):
    """Takes the time at each token, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generated(model: Any, prompt: torch.Tensor, count: int) -> dict[str, float]:
    """Seconds that one call of `generate` takes, that a token takes, and that the first decode step does."""
    clock = Clock()
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
    torch.cuda.synchronize()
    began = time.perf_counter()
    model.generate(prompt, cache_implementation="static", stopping_criteria=StoppingCriteriaList([clock]), **options)
    torch.cuda.synchronize()
    whole, (first, second, *_, last) = time.perf_counter() - began, clock.times
    return {"token_ms": (last - second) / (count - 2), "first_step_ms": second - first, "call_ms": whole}


def step_seconds(model: Any, arguments: argparse.Namespace) -> float:
    """Time of the kernels of one decode step, from a profile of `generate`."""
    ids = torch.arange(arguments.prompt, device="cuda")[None] + 100
    count = arguments.tokens
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
    steps = by_step(kernels(lambda: model.generate(ids, cache_implementation="static", **options)), count)
    busy = sorted(sum(e.time_range.elapsed_us() for e in step) for step in steps)
    if arguments.profile and steps:
        show(steps[len(steps) // 2])
    return busy[len(busy) // 2] / 1e6


def kernels(call: Callable[[], Any]) -> list[Any]:
    """What the GPU did in a call, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sorted((e for e in profile.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)


def by_step(events: list[Any], count: int) -> list[list[Any]]:
    """The kernels of the last few tokens: the sequence of names repeats, and the argmax ends a token."""
    ends = [i for i, event in enumerate(events) if "argmax" in event.name.lower() or "ArgMax" in event.name]
    ends = ends[-min(8, count - 4) :]
    return [events[first + 1 : last + 1] for first, last in pairwise(ends)]


def show(step: list[Any]) -> None:
    print(f"{sum(e.time_range.elapsed_us() for e in step):9.1f} us {len(step):4}  all kernels", flush=True)
    totals: dict[str, list[float]] = {}
    for event in step:
        totals.setdefault(event.name[:70], []).append(event.time_range.elapsed_us())
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:LISTED]:
        print(f"{sum(times):9.1f} us {len(times):4}x {name}", flush=True)


def seconds(call: Callable[[], Any]) -> float:
    """The least of three."""
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
