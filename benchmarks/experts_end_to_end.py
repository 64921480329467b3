"""A model of Qwen3-30B-A3B's shape with few layers: how fast it generates beside bfloat16, and what limits it.

    python benchmarks/experts_end_to_end.py --profile --out experts-end-to-end.jsonl           on a GPU
    python benchmarks/experts_end_to_end.py --device cpu --size small --tokens 4 --prefill 32  tries the script

Random bfloat16 weights, `--layers` decoder layers of 128 experts, 8 a token, and Qwen3's vocabulary; the head stays in
bfloat16. Each recipe beside the same model in bfloat16, through `generate` with a static cache; the decode step is
compiled and replayed as a CUDA graph, for the bfloat16 model by transformers itself.

For each batch size, `token_ms` is the mean time between two tokens of one call, after a prompt of `--prompt` tokens,
without the first step, which captures the CUDA graph; `step_ms` are the kernels of one decode step alone.
`prefill_ms` is one compiled forward of `--prefill` tokens; of the bfloat16 model also an eager one, and the faster one
counts. transformers decodes by `batched_mm`, which copies the weights of all choices; "bfloat16, grouped_mm" decodes
batches of several by `grouped_mm`. A ratio is over the fastest bfloat16 before it. `seconds` says how long building,
tracing, quantizing, deploying and the first call of `generate` took, with compilation in the last; `peak_gib` is the
GPU memory of quantizing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers
import triton
from llama_8b import by_step, generated, kernels, seconds, show, wait, write
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

import mxcompile
from mxcompile.inductor import compile_module
from mxcompile.passes.recipes import as_pipeline
from mxcompile.tensor.modules import stored_bytes

FLOAT: Final = "bfloat16"
GROUPED: Final = "bfloat16, grouped_mm"
SIZES: Final[dict[str, dict[str, Any]]] = {
    "qwen3-moe": {
        **{"vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4},
        **{"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
        **{"max_position_embeddings": 8192, "rope_theta": 1e6, "norm_topk_prob": True},
    },
    "small": {
        **{"vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 512, "norm_topk_prob": True},
    },
}
_KEPT: Final = "grouped_mm_for_decoding"
_WARM_UPS: Final = 2
_RUNS: Final = 3


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("experts_end_to_end.py needs a CUDA GPU, and this machine has none: --device cpu tries the script")
        return 1
    ExpertsInterface.register(_KEPT, grouped_mm_experts_forward)
    began = time.perf_counter()
    model = build(arguments.size, arguments.layers, arguments.device)
    took = {"build": time.perf_counter() - began}
    rows: list[dict[str, Any]] = []
    for way in arguments.ways:
        row = about(arguments, way)
        try:
            # transformers replaces "grouped_mm", and only this name, by "batched_mm" in decoding
            model.set_experts_implementation(_KEPT if way == GROUPED else "grouped_mm")
            ready = model if way in (FLOAT, GROUPED) else quantized(model, way, took)
            row |= memory(ready, way)
            row |= measured(ready, way, arguments, took)
        except Exception as problem:  # the others run
            row["failed"] = f"{type(problem).__name__}: {str(problem)[:500]}"
        row["seconds"] = {name: round(value, 2) for name, value in took.items()}
        rows.append(row)
        write(with_ratios(row, rows), arguments.out)
        took.clear()
        torch._dynamo.reset()
    return int(any("failed" in row for row in rows))


def parser() -> argparse.ArgumentParser:
    def split(text: str) -> list[str]:
        return [part for part in text.split(";") if part]

    def whole(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ways = f"{FLOAT};{GROUPED};w4a16-mxfp-quick;w4a8-mxint-quick"
    parser.add_argument("--ways", type=split, default=ways, help="separated by ;: %(default)s")
    parser.add_argument("--batches", type=whole, default="1,32", help="batch sizes, comma-separated: %(default)s")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the generated ones: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate: %(default)s")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the timed prefill: %(default)s")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a decode step and of prefill")
    parser.add_argument("--size", default="qwen3-moe", choices=SIZES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


def build(size: str, layers: int, device: str) -> Any:
    config = Qwen3MoeConfig(num_hidden_layers=layers, dtype="bfloat16", **SIZES[size])
    with torch.device(device):
        torch.manual_seed(0)
        model: Any = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    wait()
    return model


def about(arguments: argparse.Namespace, way: str) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    row = {"model": f"{arguments.size} shape, random", "layers": arguments.layers, "way": way}
    return row | {"prompt": arguments.prompt, "prefill": arguments.prefill, "device": device} | versions


def quantized(model: Any, recipe: str, took: dict[str, float]) -> Any:
    """What `quantize_and_compile` does, one step after the other; `took` gets the seconds of each."""

    def step(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        wait()
        took[name] = time.perf_counter() - began
        return result

    ids = torch.arange(16, device=model.device)[None]
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    program = step("trace", lambda: mxcompile.trace(model, {"input_ids": ids}))
    program = step("quantize", lambda: as_pipeline(recipe).run(program))
    deployed = step("deploy", lambda: mxcompile.deploy(program, model))
    return step("compile", lambda: compile_module(deployed))


def memory(model: Any, way: str) -> dict[str, float]:
    """GiB of the model and of its decoder, and the peak so far if it has just been quantized."""
    sizes = {"gib": stored_bytes(model), "decoder_gib": stored_bytes(model.model.layers)}
    if model.device.type == "cuda" and way not in (FLOAT, GROUPED):
        sizes["peak_gib"] = torch.cuda.max_memory_allocated()
    return {name: round(value / 2**30, 3) for name, value in sizes.items()}


@torch.no_grad()
def measured(model: Any, way: str, arguments: argparse.Namespace, took: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of a token and of its kernels for each batch size, and of prefill."""
    generator = torch.Generator(device=model.device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (32, arguments.prefill), generator=generator, device=model.device)
    row: dict[str, Any] = {}
    for batch in (batch for batch in arguments.batches if way != GROUPED or batch > 1):
        prompt = ids.repeat(-(-batch // 32), 1)[:batch, : arguments.prompt]
        began = time.perf_counter()
        generated(model, prompt, arguments.tokens)
        took[f"first generate, batch {batch}"] = time.perf_counter() - began
        runs = [generated(model, prompt, arguments.tokens) for _ in range(_WARM_UPS + _RUNS)][_WARM_UPS:]
        row[f"batch_{batch}"] = {"token_ms": round(min(run["token_ms"] for run in runs) * 1e3, 4)}
        if model.device.type == "cuda":
            title = f"{way}: a decode step, batch {batch}" if arguments.profile else None
            row[f"batch_{batch}"]["step_ms"] = round(step_milliseconds(model, prompt, arguments.tokens, title), 4)
    if way != GROUPED:
        row |= prefill(model, ids[:1], way, arguments)
    return row


def prefill(model: Any, ids: Tensor, way: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Compiled, and of a model in bfloat16 eager, too."""

    def timed(forward: Callable[..., Any], title: str) -> float:
        def call() -> None:
            forward(ids, use_cache=False, logits_to_keep=1)

        for _ in range(_WARM_UPS):
            call()
        least = seconds(call)
        if arguments.profile and ids.device.type == "cuda":
            print(f"{way}: prefill of {arguments.prefill} tokens, {title}", flush=True)
            show(kernels(call))
        return round(least * 1e3, 3)

    if way != FLOAT:
        return {"prefill_ms": timed(model, "compiled")}
    eager, compiled = timed(model, "eager"), timed(torch.compile(model), "compiled")
    return {"prefill_eager_ms": eager, "prefill_compiled_ms": compiled, "prefill_ms": min(eager, compiled)}


def step_milliseconds(model: Any, prompt: Tensor, count: int, title: str | None) -> float:
    """The kernels of the median decode step of one call of `generate`; printed below a title."""
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
    steps = by_step(kernels(lambda: model.generate(prompt, cache_implementation="static", **options)), count)
    steps.sort(key=lambda step: sum(event.time_range.elapsed_us() for event in step))
    middle = steps[len(steps) // 2]
    if title:
        print(title, flush=True)
        show(middle)
        first, last = middle[0].time_range.start, middle[-1].time_range.end
        print(f"{last - first:9.1f} us from the first kernel to the end of the last", flush=True)
    return sum(event.time_range.elapsed_us() for event in middle) / 1e3


def with_ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with its speed over the fastest bfloat16 of the rows so far."""
    floats = [other for other in rows if other["way"] in (FLOAT, GROUPED)]
    ratios: dict[str, float] = {}
    for name, value in row.items():
        if name.startswith("batch_"):
            times = [other[name]["token_ms"] for other in floats if name in other]
            ratios |= {name: round(min(times) / value["token_ms"], 3)} if times else {}
        elif name == "prefill_ms":
            times = [other[name] for other in floats if name in other]
            ratios |= {"prefill": round(min(times) / value, 3)} if times else {}
    return row | {"ratios": ratios}


if __name__ == "__main__":
    print(json.dumps({"command": " ".join(["python benchmarks/experts_end_to_end.py", *sys.argv[1:]])}), flush=True)
    sys.exit(main())
