"""Every format x block x dtype x shape through the Triton linear on a GPU: right (against float64), and how slow.

    python benchmarks/kernel_check.py --out check.jsonl --formats mxfp4,mxint8 --shapes 4096x4096

`error` is the largest |y - y64| over what a float32 sum and one rounding may lose: at most 1 passes. `time` is the
kernel's over that of torch's own linear with a bfloat16 weight of the same shape, both as CUDA graph replays of the
same few calls, so with weights in L2 where they fit: information, not a measurement to quote.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from mxcompile.formats import FORMATS, MXFormat, ScaleRule, parse_format
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CALLS, _REPLAYS = 20, 5
HEADER = f"{'format':12} {'block':>5} {'dtype':5} {'M':>5} {'N':>6} {'K':>6} {'error':>8} {'time':>8}"


@dataclass(frozen=True)
class Result:
    format: str
    block: int
    dtype: str
    m: int
    n: int
    k: int
    error_over_bound: float
    microseconds: float
    time_over_bf16: float

    def __str__(self) -> str:
        shape = f"{self.m:5} {self.n:6} {self.k:6}"
        name = self.format.partition(":")[0]
        return (
            f"{name:12} {self.block:5} {self.dtype:5} {shape} {self.error_over_bound:8.4f} {self.time_over_bf16:7.2f}x"
        )


def error_over_bound(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """The largest |y - y64| / bound; the bound is derived in tests/kernels/conftest.py."""
    x64, w64 = x.double(), weight.double()
    exact = x64 @ w64.T
    n_u = (x.shape[-1] + 1) * 2.0**-23
    error = n_u / (1 - n_u) * (x64.abs() @ w64.abs().T)
    info = torch.finfo(y.dtype)
    bound = error + info.eps / 2 * (exact.abs() + error) + info.smallest_normal * info.eps / 2
    return ((y.double() - exact).abs() / bound).nan_to_num(nan=torch.inf).max().item()


def microseconds(call: Callable[[], object]) -> float:
    """Time of one call within a CUDA graph of several, the best of a few replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    best = float("inf")
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1000 / _CALLS)
    return best


def check(fmt: MXFormat, dtype: str, rows: list[int], n: int, k: int) -> Iterator[Result]:
    """One weight, all row counts."""
    from mxcompile.kernels.triton import rows_linear

    generator = torch.Generator(device="cuda").manual_seed(0)
    values = torch.randn(n, k, generator=generator, device="cuda")
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    elements = pack(codes, fmt)
    weight = reference.dequantize(codes, scales, fmt, k, DTYPES[dtype])
    dense = values.to(torch.bfloat16)
    for m in rows:
        x = torch.randn(m, k, generator=generator, device="cuda").to(DTYPES[dtype])
        y = rows_linear.linear(x, elements, scales, None, fmt)
        xb = x.to(torch.bfloat16)
        time = microseconds(lambda x=x: rows_linear.linear(x, elements, scales, None, fmt))
        dense_time = microseconds(lambda xb=xb: torch.nn.functional.linear(xb, dense))
        yield Result(str(fmt), fmt.block_size, dtype, m, n, k, error_over_bound(y, x, weight), time, time / dense_time)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here too, one JSON object a line")
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated")
    parser.add_argument("--blocks", default="32", help="comma-separated: 16, 32, 64, 128")
    parser.add_argument("--dtypes", default="bf16,fp16,fp32", help="comma-separated")
    parser.add_argument("--rows", default="1,3,16,64,257,2048", help="M, comma-separated")
    parser.add_argument("--shapes", default="257x1000,4096x4096", help="NxK, comma-separated")
    return parser.parse_args()


def results(arguments: argparse.Namespace) -> Iterator[Result]:
    rows = [int(m) for m in arguments.rows.split(",")]
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    formats, blocks = arguments.formats.split(","), map(int, arguments.blocks.split(","))
    for name, block, dtype, (n, k) in product(formats, blocks, arguments.dtypes.split(","), shapes):
        yield from check(parse_format(name).with_block(block), dtype, rows, n, k)


def main() -> int:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        print("kernel_check: no CUDA GPU here, nothing was checked")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n{HEADER}")
    wrong = 0
    lines: list[str] = []
    for result in results(arguments):
        print(result, flush=True)
        lines.append(json.dumps(asdict(result)))
        wrong += not result.error_over_bound <= 1
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} checked, {wrong} beyond the bound")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
