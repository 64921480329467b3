"""Attention of one query on the CPU, compiled: torch's kernel beside the sums of `mxcompile/attention.py`.

    python benchmarks/attention.py

bfloat16, batch 1, keys and values of fewer heads than queries as transformers hands them over, a mask. Microseconds a
call, the best of 50, of each in a graph of its own.
"""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

from mxcompile.inductor import compile_options

SHAPES = ((9, 3, 98, 64), (9, 3, 2048, 64), (9, 3, 8192, 64), (32, 8, 2048, 128), (12, 12, 1024, 64))


def main() -> None:
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
