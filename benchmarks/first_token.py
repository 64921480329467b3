"""Seconds from `quantize_and_compile` to the first tokens, with empty caches of torch and with full ones.

    python benchmarks/first_token.py --out benchmarks/results/first-token-cpu.jsonl
    python benchmarks/first_token.py --model llama --layers 32 --out benchmarks/results/first-token-h200.jsonl

SmolLM2-135M-Instruct on the CPU, or Llama-3-8B's shape with `--layers` random layers on a GPU; W4A8 MXINT, bfloat16,
batch 1, a prompt of `--prompt` tokens, greedy, static cache, through `generate`. The clock starts when
`quantize_and_compile` has returned. `first_s`: the first token, which prefill gives. `second_s`: the second one, for
which the decode step is compiled; on a GPU the decode loop reports both together. `cpu_s`: processor seconds of the
process and its children up to the second token. `call_ms`: a later call, of `--tokens` tokens. Each row is a process of
its own: one with caches of torch and Triton in an empty folder (cold), then one that finds them there (warm). `whole`:
graphs are compiled as a whole, with equal layers again and again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor
from transformers.generation import StoppingCriteria, StoppingCriteriaList

import mxcompile
from mxcompile.cli import smollm2
from mxcompile.inductor import backend

RECIPE: Final = "w4a8-mxint-quick"
SMOLLM2, LLAMA = "SmolLM2-135M-Instruct", "llama"
WAYS: Final = ("layers once", "whole")


class Clock(StoppingCriteria):
    """When each token was there; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.cpu.append(cpu_seconds())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def main() -> None:
    arguments = parser().parse_args()
    if arguments.way:
        print(json.dumps(measured(arguments)))
        return
    for way in arguments.ways.split(","):
        with TemporaryDirectory() as folder:
            for caches in ("cold", "warm"):
                row = in_process(arguments, way, caches, folder)
                print(json.dumps(row), flush=True)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2, choices=(SMOLLM2, LLAMA))
    parser.add_argument("--layers", type=int, default=32, help="of the llama")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the generated ones")
    parser.add_argument("--tokens", type=int, default=37, help="tokens to generate")
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated: %(default)s")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def in_process(arguments: argparse.Namespace, way: str, caches: str, folder: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("model", "layers", "prompt", "tokens")]
    variables = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    command = [sys.executable, __file__, *options, f"--way={way}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "caches": caches}


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.way == "whole":
        backend.compile_in_pieces = lambda *_: None
    model, ids = (loaded if arguments.model == SMOLLM2 else random_llama)(arguments)
    count: dict[str, Any] = {"min_new_tokens": arguments.tokens, "max_new_tokens": arguments.tokens}
    options = {"do_sample": False, "cache_implementation": "static", **count}
    clock, began, used = Clock(), time.perf_counter(), cpu_seconds()
    output = model.generate(ids, stopping_criteria=StoppingCriteriaList([clock]), **options)
    about: dict[str, Any] = {"model": arguments.model, "layers": model.config.num_hidden_layers, "way": arguments.way}
    about |= {"prompt": ids.shape[1], "first_s": round(clock.times[0] - began, 2)}
    about |= {"second_s": round(clock.times[1] - began, 2), "cpu_s": round(clock.cpu[1] - used, 1)}
    about["call_ms"] = round(1e3 * min(seconds(lambda: model.generate(ids, **options)) for _ in range(3)), 1)
    tokens = output[0, ids.shape[1] :].tolist()
    device = torch.cuda.get_device_name() if ids.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    return about | {"tokens": tokens[:8], "device": device, "torch": torch.__version__}


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes, the GPU's work included."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def loaded(arguments: argparse.Namespace) -> tuple[Any, Tensor]:
    """(SmolLM2, quantized and compiled; ids of a prompt `[1, prompt]`)"""
    model, tokenizer = smollm2.load(torch.bfloat16)
    text = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is " * 64
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.prompt]
    return mxcompile.quantize_and_compile(model, {"input_ids": ids}, recipe=RECIPE), ids


def random_llama(arguments: argparse.Namespace) -> tuple[Any, Tensor]:
    """(Llama-3-8B's shape with equal random layers, quantized and compiled; ids `[1, prompt]`)"""
    from llama_8b import quantized

    model = quantized(RECIPE, arguments.layers)
    return model, torch.randint(model.config.vocab_size, (1, arguments.prompt), device="cuda")


def cpu_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
