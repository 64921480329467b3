"""Decode steps and prompts on vLLM: bfloat16, its own Marlin kernels on MXFP4, and mxcompile's checkpoints, in one run.

    python benchmarks/serving.py --out benchmarks/results/serving-h200.jsonl             on a GPU with vLLM, 350 s
    python benchmarks/serving.py --tensor-parallel 2 --together --compare --out ...      on two GPUs
    bash benchmarks/two_gpus.sh PARTS OUT                      the same with llama_70b.py, where there is no network
    python benchmarks/serving.py --size small --batches 1,2 --prompt 32 --long 64        tries the script on a CPU

A model of Llama-3-8B's shape with `--layers` decoder layers and random weights; the head stays in bfloat16. Each
variant runs on an engine of its own, in a process of its own, one after the other, or with `--together` all start at
once, share the GPUs, and are measured one after the other once all are ready: "bf16"; "marlin", a
compressed-tensors folder of MXFP4, for which vLLM chooses the kernel (`kernels` names it); "mxfp4" and "w4a8", our own
folders with MXFP4 weights alone and with MXINT4 weights and MXINT8 activations.

`step_ms` is the time of a decode step at each batch size, after prompts of `--prompt` tokens: the difference of two
calls of `generate` that differ in `--steps` tokens, divided by that number. All prompts of a batch are one prefill.
`prompt_ms` is a call that makes one token from a prompt of `--long` tokens, at batch 1. Of both the best of `--rounds`.
Sampling and scheduling are included, as a user of vLLM has them; prefix caching is off. `over_bf16` and `over_marlin`
are times over times: above 1 the variant is faster. `compiled_late` names the kernels that were compiled while it
served, as vLLM's monitor reports. `kernel_us` lists the kernels of a decode step at the batch sizes of `--profile`, and
those of the prompt. vLLM makes the weights of the bfloat16 model up: 9 GB need not be written.

`--compare` adds `distance`: the mean distance of an engine's log-probabilities of 4 prompts' tokens from transformers'
on the same weights, and `own_distance`, by which transformers' own two implementations of attention differ. The
bfloat16 weights are then written, too.

`--tensor-parallel` divides each layer among so many GPUs of the machine. All-reduces do not use NVLink multicast
(VLLM_ALLREDUCE_USE_SYMM_MEM=0), which hosts that are shared do not allow.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from serving_engine import COMPARED, EngineProcess, ids

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
KV_BYTES: Final = 2 * 2  # of a key and a value, in bfloat16


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="serving-", dir=arguments.folder) as name:
        folders, expected = prepare(Path(name), arguments)
        print(f"{time.perf_counter() - began:.0f} s: checkpoints are written", flush=True)
        asked = {variant: request(arguments, variant) for variant in arguments.variants}
        for variant, result in results(folders, asked, arguments, began):
            row = {"variant": variant, "size": arguments.size, "layers": arguments.layers}
            row |= compared(result, expected.get("mxfp4" if variant == MARLIN else variant))
            rows.append(with_ratios(row, rows) | {"seconds": round(time.perf_counter() - began, 1)})
            print(json.dumps(rows[-1]), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(*table(rows, arguments.batches), sep="\n")
    return int(len(rows) < len(arguments.variants) or any("failed" in row for row in rows))


def results(
    folders: Mapping[str, Path], asked: Mapping[str, dict[str, Any]], arguments: argparse.Namespace, began: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each variant's engine has measured; those that are left when the time is over are not run."""
    engines = {variant: EngineProcess(folders[variant], question) for variant, question in asked.items()}
    try:
        if arguments.together:
            for engine in engines.values():
                engine.start()
            for engine in engines.values():
                engine.wait_until_ready()
            print(f"{time.perf_counter() - began:.0f} s: engines are ready", flush=True)
        for variant, engine in engines.items():
            if time.perf_counter() - began > arguments.seconds:
                print(f"out of time before {variant}", flush=True)
                return
            yield variant, engine.measure()
    finally:
        for engine in engines.values():
            engine.stop()


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
    parser.add_argument("--together", action="store_true", help="start all engines at once")
    parser.add_argument("--compare", action="store_true", help="log-probabilities with those of transformers")
    parser.add_argument("--profile", type=_numbers, default=[], help="batch sizes whose kernels are listed")
    parser.add_argument("--eager", action="store_true", help="no torch.compile and no CUDA graphs")
    parser.add_argument("--seconds", type=float, default=350.0, help="start no engine after that: %(default)s")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which an engine is stopped")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written for the time of the run")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


def _names(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(VARIANTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def prepare(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Path], dict[str, list[Any]]]:
    """Write the checkpoints of the variants: each random model is quantized once, from the same weights.

    Returns their folders, and with `--compare` log-probabilities (`log_probabilities`) by variant.
    """
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
    folders, expected = {variant: folder / variant for variant in VARIANTS}, dict[str, list[Any]]()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folders[BF16])
    if arguments.compare and BF16 in arguments.variants:
        model.save_pretrained(folders[BF16])
        expected[BF16] = log_probabilities(model)
    program, quantized = mxcompile.trace(model, example), None
    for variant, recipe in RECIPES.items():
        formats = {variant: "mxcompile", **({MARLIN: "compressed-tensors"} if variant == "mxfp4" else {})}
        wanted = {each: fmt for each, fmt in formats.items() if each in arguments.variants}
        if wanted:
            quantized = mxcompile.deploy(as_pipeline(recipe).run(program.copy()), model, check=False)
        for each, fmt in wanted.items():
            mxcompile.save(quantized, folders[each], format=fmt)
        if wanted and arguments.compare:
            expected[variant] = log_probabilities(quantized)
    del model, program, quantized
    gc.collect()  # graphs refer to themselves
    torch.cuda.empty_cache()  # an engine asks for nearly all of the memory
    return folders, expected


def log_probabilities(model: Any) -> list[Any]:
    """Of the compared prompts' tokens from the second on, with either implementation of attention: two tensors."""
    import torch

    tokens = torch.tensor(ids(*COMPARED, model.config.vocab_size), device=next(model.parameters()).device)
    found: list[Any] = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            values = torch.log_softmax(model(input_ids=tokens).logits[:, :-1].float(), dim=-1)
        found.append(values.gather(2, tokens[:, 1:, None])[..., 0].cpu())
    return found


def compared(row: dict[str, Any], expected: Sequence[Any] | None) -> dict[str, Any]:
    """The row with its distances, in place of the log-probabilities."""
    import torch

    found = row.pop("log_probabilities", None)
    if found is None or expected is None:
        return row
    distance = (torch.tensor(found) - expected[0]).abs().mean().item()
    own = (expected[1] - expected[0]).abs().mean().item()
    return row | {"distance": float(f"{distance:.4g}"), "own_distance": float(f"{own:.4g}")}


def request(arguments: argparse.Namespace, variant: str) -> dict[str, Any]:
    """What an engine's process is asked for, but for its model."""
    names = ("batches", "prompt", "long", "steps", "rounds", "eager", "tensor_parallel", "profile", "compare", "limit")
    size = SIZES[arguments.size]
    options: dict[str, Any] = {"load_format": "dummy" if variant == BF16 and not arguments.compare else "auto"}
    if arguments.together:
        tokens = max(arguments.batches) * (arguments.prompt + 2 * arguments.steps + 32) + arguments.long
        width = size["num_key_value_heads"] * size["hidden_size"] // size["num_attention_heads"]
        options["kv_cache_memory_bytes"] = 2 * KV_BYTES * width * arguments.layers * tokens // arguments.tensor_parallel
        options["gpu_memory_utilization"] = 0.85 / len(arguments.variants)
    asked = {name: getattr(arguments, name) for name in names} | {"options": options}
    return asked | {"vocabulary": size["vocab_size"], "waits": arguments.together}


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
