"""How long a token of `generate` takes, beside the kernels of its decode step, with our loop and with transformers'.

    python benchmarks/generate_loop.py --layers 8 --out benchmarks/results/generate-loop-h200.jsonl

Llama-3-8B's shape with random weights, `w4a8-mxint-quick`, a static cache, on a GPU. `token_ms` is the mean time
between two tokens of one call, the best of three, with `max_new_tokens` of `--tokens` and no end token. `kernels_ms` is
the time of the kernels of a step in a profile, `gaps_ms` that between them, `launches` how many they are.
`transformers` is the loop of transformers with our decode step, as it was before our loop. Tokens of both loops are
compared.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from llama_8b import build, kernels, quantized, wait, write

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1900)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = quantized(build(arguments.layers), "w4a8-mxint-quick")
    for batch in map(int, arguments.batches.split(",")):
        compare(model, batch, arguments)


def compare(model: Any, batch: int, arguments: argparse.Namespace) -> None:
    generator = torch.Generator(device="cuda").manual_seed(batch)
    ids = torch.randint(100, 100000, (batch, arguments.prompt), generator=generator, device="cuda")
    ways = {"ours": model.generate, "transformers": type(model).generate.__get__(model)}
    for options in (GREEDY, SAMPLED):
        tokens = dict[str, torch.Tensor]()
        for way, generate in ways.items():
            row = {"layers": arguments.layers, "batch": batch, "way": way, "sampled": options["do_sample"]}
            tokens[way] = call(generate, ids, arguments.tokens, options)
            row |= measured(generate, ids, arguments.tokens, options)
            row["equal"] = torch.equal(tokens[way], tokens["ours"])
            row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
            write(row | {"transformers": transformers.__version__}, arguments.out)
    check_ends(ways, ids, tokens["ours"][0, ids.shape[1] :], arguments.tokens)


def call(generate: Any, ids: torch.Tensor, count: int, options: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    mask = torch.ones_like(ids)
    ends = {"eos_token_id": None, **options}
    return generate(ids, attention_mask=mask, max_new_tokens=count, cache_implementation="static", **ends)


def measured(generate: Any, ids: torch.Tensor, count: int, options: dict[str, Any]) -> dict[str, float]:
    """The difference of a long and a short call, so that neither prefill nor the start of the loop counts.

    transformers makes the cache of a short call as long as that of a long one before it: both run the same step.
    """
    times = {tokens: min(seconds(generate, ids, tokens, options) for _ in range(3)) for tokens in (count, 8)}
    row = {"token_ms": round(1e3 * (times[count] - times[8]) / (count - 8), 3)}
    events = kernels(lambda: call(generate, ids, 24, options))
    events = [event for event in events if "Memcpy DtoH" not in event.name]
    spans = steps_of(events, 24)
    busy = sorted(sum(e.time_range.elapsed_us() for e in step) for step in spans)
    row["kernels_ms"] = round(busy[len(busy) // 2] / 1e3, 3)
    whole = sorted(step[-1].time_range.end - step[0].time_range.start for step in spans)
    row["gaps_ms"] = round(whole[len(whole) // 2] / 1e3 - row["kernels_ms"], 3)
    return row | {"launches": len(spans[0])}


def seconds(generate: Any, ids: torch.Tensor, count: int, options: dict[str, Any]) -> float:
    """Of one call."""
    wait()
    began = time.perf_counter()
    call(generate, ids, count, options)
    wait()
    return time.perf_counter() - began


def steps_of(events: list[Any], count: int) -> list[list[Any]]:
    """The kernels of the last ten steps, from one launch of a kernel that runs once a step to the next."""
    names = [event.name for event in events]
    once = [name for name in dict.fromkeys(reversed(names)) if count - 2 <= names.count(name) <= count]
    places = [i for i, name in enumerate(names) if name == once[0]][-11:]
    return [events[first:last] for first, last in pairwise(places)]


def check_ends(ways: dict[str, Any], ids: torch.Tensor, tokens: torch.Tensor, count: int) -> None:
    """Both ways stop at the same token, with the same padding, and leave the same random numbers."""
    ends = {"eos_token_id": sorted({int(token) for token in tokens[[3, 9, 20]]}), "pad_token_id": 0}
    for options in (GREEDY, SAMPLED):
        results = []
        for generate in ways.values():
            result = call(generate, ids, count, {**options, **ends})
            results.append((result, torch.rand(1, device="cuda")))
        same = [torch.equal(*pair) for pair in zip(*results, strict=True)]
        shape = [list(result.shape) for result, _ in results]
        print(json.dumps({"batch": len(ids), "ends": True, **options, "equal": same, "shapes": shape}), flush=True)


if __name__ == "__main__":
    main()
