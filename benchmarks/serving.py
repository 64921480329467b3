"""Decode steps and prompts on vLLM: bfloat16, its own Marlin kernels on MXFP4, and mxcompile's checkpoints, in one run.

    python benchmarks/serving.py --out benchmarks/results/serving-h200.jsonl             on a GPU with vLLM, 350 s
    python benchmarks/serving.py --size small --batches 1,2 --prompt 32 --long 64        tries the script on a CPU

A model of Llama-3-8B's shape with `--layers` decoder layers and random weights; the head stays in bfloat16. Each
variant runs on an engine of its own, in a process of its own, one after the other: "bf16"; "marlin", a
compressed-tensors folder of MXFP4, for which vLLM chooses the kernel (`kernels` names it); "mxfp4" and "w4a8", our own
folders with MXFP4 weights alone and with MXINT4 weights and MXINT8 activations.

`step_ms` is the time of a decode step at each batch size, after prompts of `--prompt` tokens: the difference of two
calls of `generate` that differ in `--steps` tokens, divided by that number. All prompts of a batch are one prefill.
`prompt_ms` is a call that makes one token from a prompt of `--long` tokens, at batch 1. Of both the best of `--rounds`.
Sampling and scheduling are included, as a user of vLLM has them; prefix caching is off. `over_bf16` and `over_marlin`
are times over times: above 1 the variant is faster. `compiled_late` names the kernels that were compiled while it
served, as vLLM's monitor reports. `kernel_us` lists the kernels of a decode step at the batch sizes of `--profile`, and
those of the prompt. vLLM makes the weights of the bfloat16 model up: 9 GB need not be written.

`--tensor-parallel` divides each layer among so many GPUs of the machine. All-reduces do not use NVLink multicast
(VLLM_ALLREDUCE_USE_SYMM_MEM=0), which hosts that are shared do not allow.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

BF16, MARLIN = "bf16", "marlin"
RECIPES: Final = {"mxfp4": "w4a16-mxfp-quick", "w4a8": "w4a8-mxint-quick"}
VARIANTS: Final = (BF16, MARLIN, *RECIPES)
SIZES: Final[dict[str, dict[str, Any]]] = {
    "llama-3-8b": {
        **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 8192},
    },
    "small": {
        **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "max_position_embeddings": 512},
    },
}
LAYERS: Final = {"llama-3-8b": 16, "small": 2}
SETTINGS: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
_KERNEL: Final = re.compile(r"Using (\w+) for (MX\w+)")
_LATE: Final = re.compile(r"during inference: (\w+)")


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    if arguments.engine:
        Path(arguments.engine[1]).write_text(json.dumps(measure(json.loads(Path(arguments.engine[0]).read_text()))))
        return 0
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="serving-", dir=arguments.folder) as name:
        folders = prepare(Path(name), arguments)
        print(f"{time.perf_counter() - began:.0f} s: checkpoints are written", flush=True)
        for variant in arguments.variants:
            if time.perf_counter() - began > arguments.seconds:
                print(f"out of time before {variant}", flush=True)
                return 1
            row = {"variant": variant, "size": arguments.size, "layers": arguments.layers}
            asked = request(arguments) | {"load_format": "dummy" if variant == BF16 else "auto"}
            row |= in_own_process(folders[variant], Path(name), asked)
            rows.append(with_ratios(row, rows) | {"seconds": round(time.perf_counter() - began, 1)})
            print(json.dumps(rows[-1]), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(*table(rows, arguments.batches), sep="\n")
    return int(any("failed" in row for row in rows))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="decoder layers; 16, of the small size 2")
    parser.add_argument("--variants", type=_names, default=list(VARIANTS), help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 16, 32, 64], help="1,8,16,32,64 by default")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt before the decode steps")
    parser.add_argument("--long", type=int, default=2048, help="tokens of the prompt that is timed itself")
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share each layer")
    parser.add_argument("--profile", type=_numbers, default=[], help="batch sizes whose kernels are listed")
    parser.add_argument("--eager", action="store_true", help="no torch.compile and no CUDA graphs")
    parser.add_argument("--seconds", type=float, default=350.0, help="start no engine after that: %(default)s")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which an engine is stopped")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written for the time of the run")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)
    return parser


def _names(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(VARIANTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """Write the checkpoints of the variants: each random model is quantized once, from the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import mxcompile
    from mxcompile.passes.recipes import as_pipeline

    arguments.layers = arguments.layers or LAYERS[arguments.size]
    config = LlamaConfig(**SIZES[arguments.size], num_hidden_layers=arguments.layers, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        example = {"input_ids": torch.arange(16)[None]}
    folders = {variant: folder / variant for variant in VARIANTS}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folders[BF16])
    program, quantized = mxcompile.trace(model, example), None
    for variant, recipe in RECIPES.items():
        formats = {variant: "mxcompile", **({MARLIN: "compressed-tensors"} if variant == "mxfp4" else {})}
        wanted = {each: fmt for each, fmt in formats.items() if each in arguments.variants}
        if wanted:
            quantized = mxcompile.deploy(as_pipeline(recipe).run(program.copy()), model, check=False)
        for each, fmt in wanted.items():
            mxcompile.save(quantized, folders[each], format=fmt)
    del model, program, quantized
    gc.collect()  # graphs refer to themselves
    torch.cuda.empty_cache()  # an engine asks for nearly all of the memory
    return folders


def request(arguments: argparse.Namespace) -> dict[str, Any]:
    """What an engine's process is asked for, but for its model."""
    names = ("batches", "prompt", "long", "steps", "rounds", "eager", "tensor_parallel", "profile")
    return {name: getattr(arguments, name) for name in names} | {
        "vocabulary": SIZES[arguments.size]["vocab_size"],
        "limit": arguments.limit,
    }


def in_own_process(model: Path, folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The measurements of an engine, and what its log says; `failed` has the end of the log of one that failed."""
    question, answer, log = folder / "request.json", folder / "result.json", folder / "log.txt"
    question.write_text(json.dumps({"model": str(model), **asked}))
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--engine", str(question), str(answer)]
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, env=os.environ | SETTINGS, stdout=file, stderr=file, timeout=asked["limit"], check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    printed = log.read_text(errors="replace")
    if status != 0 or not answer.exists():
        why = f"stopped after {asked['limit']:.0f} s" if status is None else f"status {status}"
        return {"failed": f"{why}: {printed[-1500:]}"}
    return {**json.loads(answer.read_text()), **from_log(printed)}


def from_log(printed: str) -> dict[str, Any]:
    """What vLLM says of kernels: the ones it chose, and those that were compiled while it served."""
    kernels = sorted({f"{name} ({kind})" for name, kind in _KERNEL.findall(printed)})
    return {"kernels": kernels, "compiled_late": sorted(set(_LATE.findall(printed)))}


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: times of one engine."""
    import torch
    import vllm
    from vllm import LLM

    began = time.perf_counter()
    most = max(max(asked["batches"]) * asked["prompt"], asked["long"])
    sizes = sorted({1, 2, 4, *asked["batches"]})
    options: dict[str, Any] = {"enforce_eager": True}
    if not asked["eager"]:
        options = {"compilation_config": {"cudagraph_capture_sizes": sizes}}
    engine = LLM(
        asked["model"],
        skip_tokenizer_init=True,
        load_format=asked["load_format"],
        tensor_parallel_size=asked["tensor_parallel"],
        max_model_len=max(asked["long"], asked["prompt"] + 2 * asked["steps"]) + 8,
        max_num_batched_tokens=most,
        max_num_seqs=max(asked["batches"]),
        enable_prefix_caching=False,
        **options,
    )
    ready = time.perf_counter() - began
    steps = {str(batch): round(step_ms(engine, asked, batch), 3) for batch in asked["batches"]}
    long = ids(1, asked["long"], asked["vocabulary"])
    prompt = min(call_seconds(engine, long, 1) for _ in range(asked["rounds"] + 1))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    profiles = {str(batch): step_kernels(engine, asked, batch) for batch in asked["profile"]}
    profiles |= {"prompt": kernels(lambda: call_seconds(engine, long, 1), 1)} if profiles else {}
    return {
        **{"step_ms": steps, "prompt_ms": round(prompt * 1e3, 2), "ready_seconds": round(ready, 1)},
        **{name: asked[name] for name in ("prompt", "long", "steps", "rounds", "eager", "tensor_parallel")},
        **{"device": device, "vllm": vllm.__version__, "torch": torch.__version__},
        **({"kernel_us": profiles} if profiles else {}),
    }


def step_ms(engine: Any, asked: Mapping[str, Any], batch: int) -> float:
    """Milliseconds of a decode step: of a long call less a short one."""
    prompts = ids(batch, asked["prompt"], asked["vocabulary"])
    short, long = 2, 2 + asked["steps"]
    call_seconds(engine, prompts, short)
    times = {
        count: min(call_seconds(engine, prompts, count) for _ in range(asked["rounds"])) for count in (short, long)
    }
    return (times[long] - times[short]) / asked["steps"] * 1e3


def step_kernels(engine: Any, asked: Mapping[str, Any], batch: int) -> dict[str, float]:
    """Microseconds of a decode step's kernels: of a long call less a short one."""
    prompts = ids(batch, asked["prompt"], asked["vocabulary"])
    short = kernels(lambda: call_seconds(engine, prompts, 2), 0)
    long = kernels(lambda: call_seconds(engine, prompts, 2 + asked["steps"]), 0)
    step = {name: round((us - short.get(name, 0.0)) / asked["steps"], 1) for name, us in long.items()}
    return {name: us for name, us in sorted(step.items(), key=lambda each: -each[1]) if us >= 1}


def kernels(call: Callable[[], Any], least: float) -> dict[str, float]:
    """Microseconds by kernel of a GPU, or operator of a CPU, in a call, the longest first; `all` is their sum."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    times = dict[str, float]()
    for each in profiler.key_averages():
        name = each.key[:60]
        us = each.self_device_time_total if on_gpu else each.self_cpu_time_total
        times[name] = times.get(name, 0.0) + us
    longest = sorted(times.items(), key=lambda each: -each[1])
    return {"all": round(sum(times.values()), 1)} | {name: round(us, 1) for name, us in longest if us >= least}


def call_seconds(engine: Any, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Seconds in which the engine generates that many tokens for each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    results = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    generated = [len(result.outputs[0].token_ids) for result in results]
    if generated != [tokens] * len(prompts):
        raise RuntimeError(f"the engine generated {generated} tokens, not {tokens} for each prompt")
    return seconds


def ids(batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random prompts, the same for every engine."""
    import torch

    generator = torch.Generator().manual_seed(batch)
    return torch.randint(100, vocabulary, (batch, length), generator=generator).tolist()


def with_ratios(row: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row, with how many times as fast as bfloat16 and as vLLM's own kernel it is, where those were measured."""
    for name, baseline in (("over_bf16", BF16), ("over_marlin", MARLIN)):
        other = next((each for each in [*rows, row] if each["variant"] == baseline and "step_ms" in each), None)
        if other is not None and "step_ms" in row:
            ratios = {batch: round(other["step_ms"][batch] / ms, 3) for batch, ms in row["step_ms"].items()}
            row = row | {name: ratios | {"prompt": round(other["prompt_ms"] / row["prompt_ms"], 3)}}
    return row


def table(rows: Sequence[Mapping[str, Any]], batches: Sequence[int]) -> list[str]:
    """The times, for people."""
    lines = [f"{'ms':8}" + "".join(f"{f'batch {batch}':>10}" for batch in batches) + f"{'prompt':>10}"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['variant']:8} failed: {row['failed'].splitlines()[0]}")
            continue
        times = [*(row["step_ms"][str(batch)] for batch in batches), row["prompt_ms"]]
        lines.append(f"{row['variant']:8}" + "".join(f"{ms:10.2f}" for ms in times))
    return lines


if __name__ == "__main__":
    sys.exit(main())
