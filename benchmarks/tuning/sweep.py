"""Times every candidate tile config of the GPU linears, for each weight format, shape and number of tokens.

    python -m tuning.sweep --out sweep.jsonl                                  in benchmarks/, on the GPU
    python -m tuning.sweep --out sweep.jsonl --formats mxint4 --rows 1,16     a part of it

A result is compared with float64 first, and must be equal bit for bit when it is computed again; one that fails is
recorded and not timed. `gemm_timing.py` says what a time is. README.md has the second command, which writes the table.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from gemm_timing import (
    DEVICE,
    SHAPES,
    Call,
    Case,
    Run,
    Weight,
    add_case_options,
    in_a_line,
    make_case,
    make_weight,
    totals,
    warm_up,
)
from torch import Tensor
from torch.nn import functional as F

from mxcompile.formats import MXFormat
from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.triton import dequantize
from mxcompile.kernels.triton import planes_linear as triton_planes
from mxcompile.kernels.triton.elements import multiprocessors
from mxcompile.kernels.tuned_configs import DEQUANTIZED, GLUON, TRITON
from tuning.candidates import Config, candidates
from tuning.compile_ahead import compile_all
from tuning.write_configs import fastest

_FEWEST_DEQUANTIZED = 256
"""Fewer tokens are not worth writing a dequantized weight to memory for."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tuning.sweep", description=(__doc__ or "").splitlines()[0])
    add_case_options(parser)
    parser.set_defaults(formats="mxint4,mxfp4,mxfp6_e2m3,mxint8,mxfp8_e4m3", rows="1,8,16,32,64,256,512,2048")
    parser.set_defaults(seconds=3600.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning.sweep needs a CUDA GPU, and this machine has none")
        return 1
    run = Run(" ".join(["python -m tuning.sweep", *sys.argv[1:]]), arguments.seconds, arguments.out)
    sweep(run, arguments.formats, arguments.rows, [SHAPES[shape] for shape in arguments.shapes])
    print(*totals(fastest(run.lines)), sep="\n")
    if arguments.out:
        name = "sm{}{}".format(*torch.cuda.get_device_capability())
        print(f"python -m tuning.write_configs {arguments.out} ../mxcompile/kernels/configs/{name}.jsonl")
    return 0


def sweep(run: Run, formats: Sequence[MXFormat], rows: Sequence[int], shapes: Sequence[tuple[int, int]]) -> None:
    """Time every candidate; cases that the time does not reach are missing."""
    warm_up()
    gluon = gluon_planes.supports(torch.zeros(1, 128, dtype=torch.bfloat16, device=DEVICE)) is None
    count = multiprocessors(torch.device(DEVICE, torch.cuda.current_device()))
    configs = {(fmt, n, m): candidates(fmt, n, m, count, gluon) for fmt, (n, _), m in product(formats, shapes, rows)}
    jobs = {(str(fmt), config) for (fmt, _, _), several in configs.items() for config in several}
    timed = sum(len(configs[fmt, n, m]) for fmt, (n, _), m in product(formats, shapes, rows))
    print(f"compiling {len(jobs)} kernels, to time {timed} candidates", flush=True)
    compile_all(sorted(jobs, key=str), sorted({k for _, k in shapes}))
    print(f"compiled after {run.elapsed:.0f} s", flush=True)
    for fmt, (n, k) in product(formats, shapes):
        w = make_weight(fmt, n, k)
        for m in rows:
            if run.out_of_time:
                print(f"out of time before {fmt} {n} x {k}, {m} tokens", flush=True)
                return
            _sweep_case(run, make_case(w, m), configs[fmt, n, m])
        del w


def _sweep_case(run: Run, case: Case, configs: Sequence[Config]) -> None:
    counters = torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE)
    first = len(run.lines)
    for config in configs:
        counters.zero_()
        path = GLUON if isinstance(config, gluon_planes.Config) else TRITON
        run.add(case, path, fused_call(case.w, case.x, config, counters), config=asdict(config))
    if len(case.x) >= _FEWEST_DEQUANTIZED:
        run.add(case, DEQUANTIZED, dequantized_call(case.w, case.x), config={})
    for line in fastest(run.lines[first:]):
        print(f"{run.elapsed:5.0f} s: {in_a_line(line)}, {line['config']}", flush=True)


def fused_call(w: Weight, x: Tensor, config: Config, counters: Tensor) -> Call:
    copies = w.of("planes")
    linear: Any = (gluon_planes if isinstance(config, gluon_planes.Config) else triton_planes).linear
    return lambda i: linear(x, copies[i % len(copies)], None, config, counters)


def dequantized_call(w: Weight, x: Tensor) -> Call:
    """As `kernels/gpu_linears.py` does it: the weight dequantized to memory, then cuBLAS."""
    copies = w.of("planes")
    return lambda i: F.linear(x, dequantize.dequantize(copies[i % len(copies)], k_steps=1))


if __name__ == "__main__":
    sys.exit(main())
