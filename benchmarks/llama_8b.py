"""A model of Llama-3-8B's shape on a GPU: how fast it generates, and what quantizing it takes.

    python benchmarks/llama_8b.py generate --out benchmarks/results/decode-h100.jsonl
    python benchmarks/llama_8b.py generate --together --batches 1,8,32 --out benchmarks/results/decode-h200.jsonl
    python benchmarks/llama_8b.py quantize --layers 4 --out benchmarks/results/large-h100.jsonl

Random bfloat16 weights, `--layers` of its 32 decoder layers.

`generate`: MX weights beside the same model in bfloat16, through `generate` with a static cache, for `--batch` prompts
of equal length; the decode step is compiled and replayed as a CUDA graph, for the bfloat16 model by transformers
itself. `token_ms` is the mean time between two tokens of one call, after a prompt of `--prompt` tokens, without the
first step, which captures the CUDA graph; `call_ms` is the whole call, `step_ms` the kernels of one decode step alone;
`sampled_token_ms`, with `--sample`, is a token drawn with a temperature and top-p. `prefill_ms` is one compiled forward
of `--prefill` tokens, `prefill_kernels_ms` its kernels, for batch 1 alone. `first_token_s` and `second_token_s` are of
the first call, which compiles. "head mxint8": the output head is quantized, too. `--together`: a process for each
recipe and number of prompts, which compile at the same time and are then timed in turns; that takes 120 GB and 12
cores. Layers of a quantized model have equal weights, each its own copy.

`quantize`: seconds from the model to its deployed copy, calibrated on random tokens in batches of four windows, and the
peak of GPU memory. Both are extrapolated to 32 layers: one layer takes `(t(n) - t(1)) / (n - 1)`, and each layer left
out adds twice its weights to the peak, the model's own and the quantized copy's.
"""

import argparse
import copy
import fcntl
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import transformers
import triton
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import StoppingCriteria, StoppingCriteriaList

import mxcompile
from mxcompile.inductor import compile_module
from mxcompile.passes.recipes import as_pipeline
from mxcompile.tensor.modules import stored_bytes

FLOAT: Final = "bfloat16"
HEAD: Final = ", head mxint8"
SAMPLED: Final = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
LISTED: Final = 14
LAYERS: Final = 32
FORMATS: Final = "weight=mxint4,activation=mxint8"
PIPELINES: Final = {
    "rtn": "w4a8-mxint-quick",
    "gptq": f"gptq{{format=mxint4,activation=mxint8}} | lower-mx{{{FORMATS}}}",
    "awq-fold + gptq": f"awq-fold{{{FORMATS}}} | gptq{{format=mxint4,activation=mxint8,correction=0.25}} "
    f"| lower-mx{{{FORMATS}}}",
}


def main() -> None:
    arguments = parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("llama_8b.py needs a CUDA GPU, and this machine has none")
    arguments.run(arguments)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    speed = commands.add_parser("generate", help="milliseconds a token, and of prefill")
    speed.set_defaults(run=compare_speed)
    speed.add_argument("--layers", type=int, default=LAYERS)
    speed.add_argument("--recipes", default=f"w4a8-mxint-quick{HEAD};w4a8-mxint-quick", help="separated by ;")
    speed.add_argument("--prompt", type=int, default=1900, help="tokens before the generated ones")
    speed.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    speed.add_argument("--prefill", type=int, default=2048, help="tokens of the timed prefill")
    speed.add_argument("--batches", default="1", help="comma-separated: prompts of one call")
    speed.add_argument("--sample", action="store_true", help="time sampling, too")
    speed.add_argument("--alone", action="store_true", help="without the model in bfloat16")
    speed.add_argument("--profile", action="store_true", help="print the kernels of one decode step and of prefill")
    speed.add_argument("--together", action="store_true", help="one process each, compiled at the same time")
    speed.add_argument("--turn", type=Path, help=argparse.SUPPRESS)  # a file, which who is timed holds locked
    cost = commands.add_parser("quantize", help="seconds and peak memory of quantizing")
    cost.set_defaults(run=measure_quantizing)
    cost.add_argument("--layers", type=int, default=4)
    cost.add_argument("--windows", type=int, default=128, help="calibration windows")
    cost.add_argument("--length", type=int, default=2048, help="tokens a window")
    cost.add_argument("--pipelines", default="rtn,gptq", help=f"comma-separated, of {', '.join(PIPELINES)}")
    for command in (speed, cost):
        command.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


def build(layers: int, device: str = "cuda") -> Any:
    """Llama-3-8B's shape with fewer layers."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, rope_theta=500000.0, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    with torch.device(device):
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def write(row: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(row), flush=True)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure_quantizing(arguments: argparse.Namespace) -> None:
    quantizing(1, PIPELINES["rtn"], 4, arguments.length)  # imports, and compiles kernels
    layer_gib = sum(p.numel() * p.element_size() for p in build(1, "meta").model.layers.parameters()) / 2**30
    for name in arguments.pipelines.split(","):
        one, _ = quantizing(1, PIPELINES[name], arguments.windows, arguments.length)
        several, peak = quantizing(arguments.layers, PIPELINES[name], arguments.windows, arguments.length)
        layer = (several - one) / (arguments.layers - 1)
        row = {"model": "Llama-3-8B shape, random", "pipeline": name, "layers": arguments.layers}
        row |= {"calibration": f"{arguments.windows}x{arguments.length}", "seconds": round(several, 1)}
        row |= {"seconds_one_layer": round(one, 1), "seconds_a_layer": round(layer, 2)}
        row |= {"seconds_32_layers": round(one + (LAYERS - 1) * layer, 1), "peak_gib": round(peak, 2)}
        row |= {"peak_gib_32_layers": round(peak + 2 * layer_gib * (LAYERS - arguments.layers), 2)}
        write(row | {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "seed": 0}, arguments.out)


def quantizing(layers: int, recipe: str, windows: int, length: int) -> tuple[float, float]:
    """(seconds from the model to its deployed copy, peak GiB)."""
    model = build(layers)
    generator = torch.Generator(device="cuda").manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (windows, length), generator=generator, device="cuda")
    batches = [{"input_ids": part} for part in ids.split(4)]
    wait()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    program = mxcompile.trace(model, {"input_ids": ids[:1, :64]})
    lowered = as_pipeline(recipe).run(program, batches)
    mxcompile.deploy(lowered, model, check=False)
    wait()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30


def compare_speed(arguments: argparse.Namespace) -> None:
    recipes = ([] if arguments.alone else [FLOAT]) + arguments.recipes.split(";")
    cases = [(recipe, int(batch)) for batch in arguments.batches.split(",") for recipe in recipes]
    rows = together(arguments, cases) if arguments.together else []
    for recipe, batch in [] if arguments.together else cases:
        rows.append(timed(recipe, batch, arguments))
        write(rows[-1], arguments.out)
        torch._dynamo.reset()
        gc.collect()
    for row in rows:
        baseline = next((r for r in rows if r["recipe"] == FLOAT and r["batch"] == row["batch"]), None)
        if baseline is not None and baseline is not row:
            names = [name for name in row if name.endswith("_ms") and name in baseline]
            ratios = ", ".join(f"{name.removesuffix('_ms')} {baseline[name] / row[name]:.2f}x" for name in names)
            print(f"batch {row['batch']}, {row['recipe']}: {ratios}", flush=True)


def together(arguments: argparse.Namespace, cases: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """The rows of cases, each measured by a process of its own."""
    with TemporaryDirectory() as folder:
        out, turn = Path(folder, "rows.jsonl"), Path(folder, "turn")
        options = [f"--{name}={getattr(arguments, name)}" for name in ("layers", "prompt", "tokens", "prefill")]
        options += [f"--{name}" for name in ("sample", "profile") if getattr(arguments, name)]
        command = [sys.executable, __file__, "generate", "--alone", f"--out={out}", f"--turn={turn}", *options]
        jobs = [subprocess.Popen([*command, f"--recipes={recipe}", f"--batches={batch}"]) for recipe, batch in cases]
        for job in jobs:
            job.wait()
        text = out.read_text() if out.exists() else ""
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(text)
    return [json.loads(line) for line in text.splitlines()]


def timed(recipe: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    model = build(arguments.layers) if recipe == FLOAT else quantized(recipe, arguments.layers)
    sizes = [stored_bytes(part) / 2**30 for part in (model, model.model.layers)]
    row = {"model": "Llama-3-8B shape, random", "layers": arguments.layers, "recipe": recipe, "batch": batch}
    row |= {"prompt": arguments.prompt, "gib": round(sizes[0], 3), "decoder_gib": round(sizes[1], 3)}
    with turns(arguments) as wait_for_turn:
        row |= measured(model, batch, arguments, wait_for_turn)
    row["seconds_to_prepare"] = round(time.perf_counter() - began, 1)
    row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    return row | {"transformers": transformers.__version__}


@contextmanager
def turns(arguments: argparse.Namespace) -> Generator[Callable[[], None]]:
    """Gives a function that waits until no process of `--together` compiles any more or is timed."""
    if arguments.turn is None:
        yield lambda: None
        return
    with arguments.turn.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)

        def wait_for_turn() -> None:
            torch.cuda.empty_cache()
            fcntl.flock(file, fcntl.LOCK_EX)

        yield wait_for_turn


def quantized(recipe: str, layers: int, compiled: bool = True) -> Any:
    """`build`, quantized, its layers with equal weights."""
    ids = torch.arange(16, device="cuda")[None]
    head: Any = {"head": "mxint8"} if recipe.endswith(HEAD) else {}
    recipe = recipe.removesuffix(HEAD)
    model = mxcompile.quantize_and_compile(
        build(1), {"input_ids": ids}, recipe=recipe, probe=False, compile=False, **head
    )
    for index in range(1, layers):
        layer = copy.deepcopy(model.model.layers[0])
        layer.self_attn.layer_idx = index
        model.model.layers.append(layer)
    model.config.num_hidden_layers = layers
    if compiled:
        compile_module(model)
    return model


@torch.no_grad()
def measured(
    model: Any, batch: int, arguments: argparse.Namespace, wait_for_turn: Callable[[], None]
) -> dict[str, float]:
    prompts, tokens = random_ids(batch, arguments.prompt), arguments.tokens
    first = generated(model, prompts, tokens)
    found = {name: round(first[name], 2) for name in ("first_token_s", "second_token_s")}
    if arguments.sample:
        generated(model, prompts, tokens, **SAMPLED)
    prefill = prepared_prefill(model, arguments) if batch == 1 else None
    wait_for_turn()
    runs = [generated(model, prompts, tokens) for _ in range(5)][2:]
    times = {name: min(run[name] for run in runs) for name in ("token_ms", "first_step_ms", "call_ms")}
    if arguments.sample:
        times["sampled_token_ms"] = min(generated(model, prompts, tokens, **SAMPLED)["token_ms"] for _ in range(3))
    times["step_ms"] = step_seconds(model, batch, arguments)
    if prefill is not None:
        launched, name = kernels(prefill), f"prefill of {arguments.prefill}"
        times["prefill_ms"] = seconds(prefill)
        times["prefill_kernels_ms"] = busy_us(launched) / 1e6
        if arguments.profile:
            print(f"{name}: {times['prefill_ms'] * 1e3:.2f} ms", flush=True)
            show(launched)
    return found | {name: round(value * 1e3, 3) for name, value in times.items()}


def prepared_prefill(model: Any, arguments: argparse.Namespace) -> Callable[[], Any]:
    """A compiled forward of `--prefill` tokens; that of the float model is compiled the way ours is."""
    ids = random_ids(1, arguments.prefill)
    if model._compiled_call_impl is None:
        model = copy.copy(model)  # whose `generate` stays that of transformers
        model.generation_config = copy.deepcopy(model.generation_config)
        compile_module(model)

    def call() -> Any:
        return model(ids, use_cache=False, logits_to_keep=1)

    for _ in range(2):
        call()
    return call


def random_ids(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(0)
    return torch.randint(100, 100000, (batch, length), generator=generator, device="cuda")


def wait() -> None:
    """For what a GPU still computes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock(StoppingCriteria):
    """Records the time of each token, and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generated(model: Any, prompt: torch.Tensor, count: int, **sampling: Any) -> dict[str, float]:
    """Seconds of one call of `generate`, of a token in it, and of its first decode step."""
    clock = Clock()
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, **sampling}
    wait()
    began = time.perf_counter()
    model.generate(prompt, cache_implementation="static", stopping_criteria=StoppingCriteriaList([clock]), **options)
    wait()
    whole, (first, second, *_, last) = time.perf_counter() - began, clock.times
    return {"token_ms": (last - second) / (count - 2), "first_step_ms": second - first, "call_ms": whole} | {
        "first_token_s": first - began, "second_token_s": second - began
    }  # fmt: skip


def step_seconds(model: Any, batch: int, arguments: argparse.Namespace) -> float:
    """Time of the kernels of one decode step, from a profile of `generate`; NaN if no steps are found in it."""
    ids = (torch.arange(arguments.prompt, device="cuda") + 100).expand(batch, -1)
    count = arguments.tokens
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
    steps = by_step(kernels(lambda: model.generate(ids, cache_implementation="static", **options)), count)
    busy = sorted(map(busy_us, steps))
    if arguments.profile and steps:
        print(f"batch {batch}, one step:", flush=True)
        show(steps[len(steps) // 2])
    return busy[len(busy) // 2] / 1e6 if busy else float("nan")


def busy_us(events: list[Any]) -> float:
    """The time in which at least one of the kernels runs: with dependent launch, they overlap."""
    total, end = 0.0, 0.0
    for event in events:
        span = event.time_range
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total


def kernels(call: Callable[[], Any]) -> list[Any]:
    """The kernels that a call launched, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        wait()
    return sorted((e for e in profile.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)


def by_step(events: list[Any], count: int) -> list[list[Any]]:
    """The kernels of each of the last few tokens: the argmax is the last kernel of a token."""
    ends = [i for i, event in enumerate(events) if "argmax" in event.name.lower() or "ArgMax" in event.name]
    ends = ends[-min(8, count - 4) :]
    return [events[first + 1 : last + 1] for first, last in pairwise(ends)]


def show(step: list[Any]) -> None:
    print(f"{busy_us(step):9.1f} us {len(step):4}  all kernels", flush=True)
    totals: dict[str, list[float]] = {}
    for event in step:
        totals.setdefault(event.name[:70], []).append(event.time_range.elapsed_us())
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:LISTED]:
        print(f"{sum(times):9.1f} us {len(times):4}x {name}", flush=True)


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, the least of three."""
    best = float("inf")
    for _ in range(3):
        wait()
        began = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
