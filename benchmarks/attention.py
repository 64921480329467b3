"""Attention of one query: torch's kernel beside the sums of `decompose_attention.py`, or on a GPU `mx::attend`.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --splits 16,32

bfloat16, batch 1, keys and values of fewer heads than queries as transformers hands them over, a mask. On the CPU
microseconds a call, the best of 50, of each in a graph of its own, compiled. On a GPU microseconds of a CUDA graph of
many calls on as many caches, more than L2 holds, by its length: `repeated` copies keys and values for every query head
as transformers does, `attention` is what torch takes for them alone, `read` what memory delivers in the time of
`attend`. `--splits` are other numbers of programs to share a cache than the kernel's own choice.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

from mxcompile.inductor.backend import compile_options

SHAPES = ((9, 3, 98, 64), (9, 3, 2048, 64), (9, 3, 8192, 64), (32, 8, 2048, 128), (12, 12, 1024, 64))


HEADS, SHARED, SIZE = 32, 8, 128
KEYS = (98, 512, 1024, 2048, 4096, 8192)
CACHES = 200_000_000
"""Bytes of all caches of a graph, 4 times an H100's L2."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--splits", default="", help="comma-separated, on a GPU only")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        on_gpu([int(text) for text in arguments.splits.split(",") if text])
    else:
        on_cpu()


def on_cpu() -> None:
    table = Table("query heads", "key heads", "keys", "size", "torch, us", "sums, us", "", box=None)
    for shape in SHAPES:
        plain, opened = (microseconds(shape, options) for options in ({}, compile_options()))
        table.add_row(*map(str, shape), f"{plain:.0f}", f"{opened:.0f}", f"{plain / opened:.1f}x")
    Console().print(table)


@torch.no_grad()
def microseconds(shape: tuple[int, int, int, int], options: dict) -> float:
    heads, shared, keys, size = shape
    given = [
        torch.randn(1, count, length, size).bfloat16() for count, length in ((heads, 1), (shared, keys), (shared, keys))
    ]
    mask = torch.zeros(1, 1, 1, keys, dtype=torch.bfloat16)

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        key, value = (part[:, :, None].expand(1, shared, heads // shared, keys, size) for part in (key, value))
        key, value = (part.reshape(1, heads, keys, size) for part in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    torch._dynamo.reset()
    with fresh_cache():
        compiled = torch.compile(attention, options=options)
        return least(lambda: compiled(*given, mask))


@torch.no_grad()
def on_gpu(splits: Sequence[int]) -> None:
    from mxcompile.kernels.dispatch import prepare

    prepare(torch.device("cuda", torch.cuda.current_device()))
    names = ("keys", "repeated, us", "attention, us", "attend, us", "", "read, TB/s", "cut")
    cuts = [f"{count} splits" for count in splits]
    table = Table(*names, *cuts, box=None, title=torch.cuda.get_device_name())
    for keys in KEYS:
        table.add_row(*row_on_gpu(keys, splits))
    Console(width=160).print(table)


def row_on_gpu(keys: int, splits: Sequence[int]) -> list[str]:
    from mxcompile.kernels.triton.attention import Cut, attend, cut_for

    bytes_of_one = 2 * SHARED * keys * SIZE * 2
    caches = torch.randn(max(2, CACHES // bytes_of_one), 2, 1, SHARED, keys, SIZE, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, HEADS, 1, SIZE, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 1, keys, device="cuda", dtype=torch.bfloat16)

    def by_torch(key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    whole = replayed([lambda c=c: by_torch(*repeated(*c)) for c in caches])
    wide = [repeated(*cache) for cache in caches[: max(2, len(caches) * SHARED // HEADS)]]
    alone = replayed([lambda c=c: by_torch(*c) for c in wide])
    own = cut_for(caches[0, 0], SHARED)
    cuts = own, *(Cut(count, own.block, own.warps, own.stages) for count in splits)
    times = [replayed([lambda c=c, cut=cut: attend(query, *c, mask, SIZE**-0.5, cut) for c in caches]) for cut in cuts]
    ratio, speed = f"{whole / times[0]:.1f}x", f"{bytes_of_one / times[0] / 1e6:.2f}"
    found = [f"{taken:.1f}" for taken in (whole, alone, *times)]
    return [str(keys), *found[:3], ratio, speed, f"{own.splits} x {own.block}", *found[3:]]


def repeated(*parts: Tensor) -> list[Tensor]:
    """Keys and values for each head of queries, copied, as transformers makes them."""
    shape = (1, SHARED, HEADS // SHARED, parts[0].shape[2], SIZE)
    return [part[:, :, None].expand(shape).reshape(1, HEADS, *shape[3:]) for part in parts]


def replayed(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds a call in a CUDA graph of all of them, the best of 20."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(20):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        best = min(best, began.elapsed_time(ended))
    return best * 1e3 / len(calls)


def least(call: Callable[[], object]) -> float:
    call()
    best = float("inf")
    for _ in range(50):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best * 1e6


if __name__ == "__main__":
    main()
