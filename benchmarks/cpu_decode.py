"""The quantized model on a CPU against dequantizing all its weights at every call, and against its float self.

    python benchmarks/cpu_decode.py --recipe w4a16-mxint --out benchmarks/results/cpu-decode.jsonl

SmolLM2-135M (or `--model`), one forward pass of `--tokens` tokens without a cache. Four ways, timed in turn in every
round: `float` (the untouched model), `dequantize all` (every packed weight to float, then the float model: what a
checkpoint in packed form costs without fused operators), `deployed`, and `compiled`. The median of the rounds.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from costs import load
from torch import Tensor, nn
from torch.func import functional_call

import mxcompile
from mxcompile.inductor import compile_module
from mxcompile.weight import MXWeight


def dequantize_all(deployed: nn.Module, model: nn.Module) -> Callable[[Tensor], Any]:
    """A call that decodes every packed weight first; activations stay as the recipe's weight-only form has them."""

    def call(ids: Tensor) -> Any:
        weights = {n: p.dequantize() if isinstance(p, MXWeight) else p for n, p in deployed.named_parameters()}
        return functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False})

    return call


def seconds(ways: dict[str, Callable[[Tensor], Any]], ids: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a call, the ways taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            began = time.perf_counter()
            call(ids)
            times[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in times.items()}


def measure(source: str | None, recipe: str, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    model = load(source)
    example = torch.arange(64).unsqueeze(0)
    deployed = mxcompile.quantize_and_compile(model, {"input_ids": example}, recipe=recipe, compile=False)
    compiled = compile_module(copy.deepcopy(deployed))
    ways = {
        "float": lambda ids: model(input_ids=ids, use_cache=False),
        "dequantize all": dequantize_all(deployed, model),
        "deployed": lambda ids: deployed(input_ids=ids, use_cache=False),
        "compiled": lambda ids: compiled(input_ids=ids, use_cache=False),
    }
    rows: list[dict[str, Any]] = []
    for tokens in lengths:
        ids = torch.arange(tokens).unsqueeze(0)
        for call in ways.values():
            call(ids)
        result = seconds(ways, ids, rounds)
        rows.append(
            {"recipe": recipe, "tokens": tokens, "torch": torch.__version__, "threads": torch.get_num_threads()}
        )
        rows[-1] |= {f"{name} ms": round(value * 1e3, 1) for name, value in result.items()}
        rows[-1]["compiled over dequantize all"] = round(result["compiled"] / result["dequantize all"], 3)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a local path or hub id; SmolLM2-135M if left out")
    parser.add_argument("--recipe", default="w4a16-mxint")
    parser.add_argument("--tokens", default="1,16,256", help="lengths, comma-separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="add the results here, one JSON object a line")
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.tokens.split(",")]
    with torch.no_grad():
        rows = measure(arguments.model, arguments.recipe, lengths, arguments.rounds)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
