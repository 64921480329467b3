"""Host time of an operator call on a GPU: how long Python takes to choose and launch the kernels of a linear layer.

    python benchmarks/host_time.py --out benchmarks/results/host-time-h200.jsonl
    python benchmarks/host_time.py --rows 2048 --profile profile.txt

`us` is the median over repeats of the time to issue some calls without waiting for the GPU, divided by their number.
The shape is so small that the GPU is done sooner than the host, and the launches fit into the GPU's queue; `gpu_us` is
the time of a call with the wait for the last one, which shows it. `mx::multiply` minus `torch.mul` is what an operator
defined in Python costs. `--profile` writes where the time goes, by function, which the profiler itself lengthens.
"""

# pyright: basic

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from mxcompile.formats import MXFormat, ScaleRule, parse_format
from mxcompile.kernels import dispatch
from mxcompile.kernels.layout.planes import scale_range, scaling_for, to_bytes, to_planes
from mxcompile.numerics import packing, reference
from mxcompile.ops import LINEARS, MULTIPLY, QUANTIZE_DEQUANTIZE

FORMATS: Final = (("mxfp4", None), ("mxint4", "mxint8"), ("mxfp4", "mxfp8_e4m3"), ("mxfp4", "mxfp4"))
"""(weight, activation or None for bfloat16)"""
Call = Callable[[], Any]


def main() -> None:
    arguments = parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("host_time.py needs a CUDA GPU, and this machine has none")
    dispatch.prepare(torch.device("cuda", torch.cuda.current_device()))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
    write({**versions, "python_ns": round(python_step() * 1e9, 1), "command": " ".join(sys.argv)}, arguments.out)
    for rows in arguments.rows:
        for name, call in calls(rows, *arguments.shape):
            us, gpu_us = host_us(call, arguments.calls, arguments.repeats)
            line = {"call": name, "rows": rows, "us": round(us, 1), "gpu_us": round(gpu_us, 1)}
            write(line, arguments.out)
            if arguments.profile:
                profile(call, arguments.calls, json.dumps(line), arguments.profile)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 16], help="numbers of tokens")
    parser.add_argument("--shape", type=int, nargs=2, default=[1024, 1024], help="outputs and inputs of the linear")
    parser.add_argument("--calls", type=int, default=100, help="calls between two waits for the GPU")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--profile", type=Path, help="append the functions with the most time to this file")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    return parser


def calls(rows: int, n: int, k: int) -> Iterator[tuple[str, Call]]:
    """What is timed: (name, call)."""
    x = torch.randn(rows, k, device="cuda").to(torch.bfloat16)
    values = torch.randn(n, k, device="cuda").to(torch.bfloat16) * 0.05
    vector = torch.ones(k, device="cuda", dtype=torch.bfloat16)
    yield "torch.mul", lambda: torch.mul(x, vector)
    yield "mx::multiply", lambda: MULTIPLY(x, vector, "")
    yield "F.linear bf16", lambda: F.linear(x, values)
    for activation in dict.fromkeys(activation for _, activation in FORMATS if activation is not None):
        yield f"mx::quantize_dequantize {activation}", rounding(x, activation)
    for weight, activation in FORMATS:
        yield f"mx::linears {weight} x {activation or 'bf16'}", linear(x, values, parse_format(weight), activation)


def rounding(x: Tensor, activation: str) -> Call:
    return lambda: QUANTIZE_DEQUANTIZE(x, activation, "floor")


def linear(x: Tensor, values: Tensor, fmt: MXFormat, activation: str | None) -> Call:
    """A call of the operator for one planar weight."""
    codes, exponents = reference.quantize(values, fmt, ScaleRule.FLOOR)
    packed = packing.pack(codes, fmt)
    scaling = scaling_for(*scale_range(packed, exponents, fmt), fmt)
    elements, scales = to_bytes(to_planes(packed, exponents, fmt, values.shape[1], scaling))
    rule = None if activation is None else "floor"
    return lambda: LINEARS(x, [elements], [scales], [None], str(fmt), activation, rule, list(scaling))


def host_us(call: Call, count: int, repeats: int) -> tuple[float, float]:
    """Medians of the us to issue a call, and with the wait for the GPU, after a first call that compiles."""
    call()
    issued, done = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            call()
        issued.append((time.perf_counter() - began) / count * 1e6)
        torch.cuda.synchronize()
        done.append((time.perf_counter() - began) / count * 1e6)
    return median(issued), median(done)


def python_step(steps: int = 200_000) -> float:
    """Seconds of one step of an empty loop, to compare hosts."""
    began = time.perf_counter()
    for _ in range(steps):
        pass
    return (time.perf_counter() - began) / steps


def profile(call: Call, count: int, title: str, path: Path) -> None:
    """Append the functions in which some calls spend the most time."""
    torch.cuda.synchronize()
    profiler = cProfile.Profile()
    profiler.runcall(lambda: [call() for _ in range(count)])
    with path.open("a") as file:
        print(f"{title}, {count} calls", file=file)
        pstats.Stats(profiler, stream=file).strip_dirs().sort_stats("tottime").print_stats(30)


def write(line: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(line), flush=True)
    if out is not None:
        with out.open("a") as file:
            print(json.dumps(line), file=file)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
