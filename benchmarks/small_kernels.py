"""What a decode step launches between its matmuls, timed on a GPU: one token's attention, norms, gated products.

    python benchmarks/small_kernels.py --out benchmarks/results/small-kernels-h200.jsonl

Shapes of Llama-3-8B: 32 query heads, 8 KV heads of 128, 4096 channels, 14336 in the MLP; bfloat16, rounded to MXINT8.
Each kernel is checked against its definition, then launched many times in a CUDA graph; `us` is the time of a launch,
with the gap before it. Attention reads caches of 400 MB in turn, more than the L2 cache holds; `floor` is the time that
a copy at `--bandwidth` takes to read one. Lines with `default` are what a model runs.
"""

# pyright: basic

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch

from mxcompile.formats import MXINT8, ScaleRule
from mxcompile.kernels.triton import gate_product, norm, split_k_counters
from mxcompile.kernels.triton.attention import one_token
from mxcompile.numerics import reference
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.next_token import attend_next
from mxcompile.numerics.norms import Norm

ROUNDING: Final = (MXINT8, ScaleRule.FLOOR)
RMS: Final = Norm(1e-6, narrowed=True)
HEADS, SHARED, SIZE, HIDDEN, INNER = 32, 8, 128, 4096, 14336
KINDS: Final = tuple(
    one_token.Config(16, block, warps, stages, dependent)
    for block, warps, stages, dependent in (
        (64, 4, 3, False), (64, 8, 3, False), (128, 8, 2, False), (32, 4, 4, False), (64, 4, 3, True), (64, 8, 3, True),
    )
)  # fmt: skip
SPLITS: Final = {1: (8, 16, 32), 8: (1, 2, 4)}
BYTES: Final = 400e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    parser.add_argument("--bandwidth", type=float, default=4.27, help="TB/s of a copy on this GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("small_kernels.py needs a CUDA GPU, and this machine has none")
    prepare()
    jobs: list[Any] = [replace(kind, splits=splits) for kind in KINDS for splits in (16, 4, 1)]
    jobs += [(name, value, dependent) for name, value in (("norm", 16), ("norm", 8), ("gate", 256), ("gate", 128))
             for dependent in (False, True)]  # fmt: skip
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        for problem in filter(None, pool.map(compile_ahead, jobs)):
            print(problem, flush=True)
    check()
    for row in chain(row_rows(), attention_rows(arguments.bandwidth)):
        row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def prepare() -> None:
    """Counters must exist before a CUDA graph is captured."""
    split_k_counters.device_counters(torch.device("cuda", torch.cuda.current_device()))


def compile_ahead(job: Any) -> str | None:
    """Run a kernel once, in a process of its own, so that it is in Triton's cache."""
    try:
        prepare()
        if isinstance(job, one_token.Config):
            step(1, 512, 400)(job)
        else:
            rows(job[0], 1)(job[1], job[2])
        torch.cuda.synchronize()
    except Exception as error:  # it fails again, with its traceback, where it is checked or timed
        return f"{job}: {' '.join(str(error).split())[:160]}"
    return None


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def step(batch: int, keys: int, place: int, caches: Any = None) -> Callable[..., Any]:
    """Attention of one token, as a function of the config, and of which cache it reads."""
    query, key, value = (random(batch, 1, n, SIZE).transpose(1, 2) for n in (HEADS, SHARED, SHARED))
    angles = 6 * torch.rand(1, 1, 1, SIZE // 2, device="cuda").repeat(1, 1, 1, 2)
    new = (key, value, torch.tensor([place], device="cuda"), angles.cos().bfloat16(), angles.sin().bfloat16())
    mask = (torch.arange(keys, device="cuda") <= place).expand(batch, 1, 1, keys).contiguous()
    mask[0, ..., : place // 9] = False
    caches = caches or [[random(batch, SHARED, keys, SIZE) for _ in range(2)]]

    def run(config: Any, number: int = 0, definition: bool = False) -> torch.Tensor:
        pair = caches[number % len(caches)]
        if definition:
            return reference.quantize_dequantize(attend_next(query, *pair, new, mask, SIZE**-0.5), *ROUNDING)
        token = one_token.NewToken(*new)
        return one_token.attend(query, *pair, mask, SIZE**-0.5, config, token, ROUNDING)

    return run


def rows(name: str, count: int) -> Callable[..., Any]:
    """A norm with its residual sum, or a gated product, of rows; as a function of warps or tile, and `dependent`."""
    if name == "norm":
        x, residual, weight = random(count, HIDDEN), random(count, HIDDEN), random(HIDDEN)
        return lambda warps, dependent, _=0: norm.add_norm(x, residual, weight, None, RMS, ROUNDING, warps, dependent)
    gate, up = random(count, INNER), random(count, INNER)
    return lambda tile, dependent, _=0: gate_product.multiply_and_round(gate, up, Gate(), ROUNDING, tile, dependent)


def check() -> None:
    """All configs against the definition, and equal bits on repeat."""
    for batch, keys, place in ((1, 2048, 1900), (8, 2047, 2046), (3, 300, 0)):
        run = step(batch, keys, place)
        expected = run(None, definition=True).double()
        for kind in KINDS:
            for splits in (1, 4, 16):
                config = replace(kind, splits=splits)
                if splits > 1 and splits * kind.block > keys + kind.block:
                    continue
                y = run(config)
                error = ((y.double() - expected).norm() / expected.norm()).item()
                if error > 1e-2 or not torch.equal(run(config), y):
                    sys.exit(f"batch {batch}, {keys} keys, {config}: relative error {error}")
        print(f"batch {batch}, {keys} keys: right", flush=True)


def attention_rows(bandwidth: float) -> Iterator[dict[str, Any]]:
    for batch, keys in ((1, 2048), (1, 8192), (1, 32768), (8, 2048), (8, 8192), (8, 32768)):
        size = batch * SHARED * keys * SIZE * 4
        caches = [[random(batch, SHARED, keys, SIZE) for _ in range(2)] for _ in range(max(2, int(BYTES / size) + 1))]
        run, launches = step(batch, keys, keys - 2, caches), max(8, len(caches))
        default = one_token.config_for(caches[0][0], batch * SHARED)
        configs = [replace(kind, splits=splits) for kind in KINDS for splits in SPLITS[batch]]
        for config in (default, *configs):
            us = time_of(partial(run, config), launches)
            row = {"kernel": "attend_next", "batch": batch, "keys": keys, "us": round(us, 2)}
            row |= {"floor": round(size / bandwidth / 1e6, 2), "share": round(size / bandwidth / 1e6 / us, 3)}
            yield row | asdict(config) | ({"default": True} if config is default else {})


def row_rows() -> Iterator[dict[str, Any]]:
    for name, values in (("norm", (8, 16)), ("gate", (128, 256))):
        for count in (1, 8):
            run = rows(name, count)
            for value in values:
                for dependent in (False, True):
                    us = time_of(partial(run, value, dependent), 100)
                    what = "warps" if name == "norm" else "tile"
                    yield {"kernel": name, "rows": count, "us": round(us, 2), what: value, "dependent": dependent}


def time_of(call: Callable[[int], Any], launches: int) -> float:
    """Microseconds of a launch among many in a CUDA graph, the median of five replays."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(launches):
            call(number)
    times: list[float] = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[2] * 1e3 / launches


if __name__ == "__main__":
    main()
