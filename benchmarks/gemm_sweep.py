"""Every candidate cut of our kernels for every number of tokens: what `gemm.py --sweep` times."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from gemm_candidates import candidates, dependents
from gemm_compile import compile_all
from gemm_timing import DEVICE, Call, Run, Weight, make_case, make_weight, warm_up
from torch import Tensor

from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.planes import Planes, plane_layout
from mxcompile.kernels.triton import dequantize, planes_linear
from mxcompile.kernels.triton.planes_linear import Config
from mxcompile.kernels.tuned_configs import DEQUANTIZED, TRITON


def sweep(run: Run, formats: list[MXFormat], rows: list[int], shapes: dict[str, tuple[int, int]]) -> None:
    """Time every candidate; where time runs out, what comes last is missing."""
    jobs = {
        (str(fmt), config)
        for fmt, m, (n, _) in product(formats, rows, shapes.values())
        for config in candidates(m, n, plane_layout(fmt).columns)
    }
    print(f"compiling {len(jobs)} kernels", flush=True)
    compile_all(sorted(jobs, key=str), sorted({k for _, k in shapes.values()}))
    print(f"compiled after {time.monotonic() - run.start:.0f} s", flush=True)
    counters = torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE)
    warm_up()
    for fmt, (name, (n, k)) in product(formats, shapes.items()):
        if run.out_of_time:
            print(f"out of time before {fmt} {name}")
            return
        w = make_weight(fmt, n, k)
        for m in rows:
            _sweep_case(run, w, m, counters)
            best = min(_right(run.lines, w, m), key=lambda line: line["us"], default=None)
            print(fmt, name, m, best and (best["us"], best["ratio"], best["floor_share"], best["config"]), flush=True)
        del w


def _sweep_case(run: Run, w: Weight, m: int, counters: Tensor) -> None:
    case = make_case(w, m)
    timed: list[tuple[float, Config]] = []

    def measure(config: Config) -> None:
        counters.zero_()
        us = run.add(case, TRITON, planes_call(w, case.x, config, counters), config=asdict(config))
        if us is not None:
            timed.append((us, config))

    for config in candidates(m, w.n, plane_layout(w.fmt).columns):
        measure(config)
    if m < 1024:
        for _, best in sorted(timed, key=lambda pair: pair[0])[:2]:
            for config in dependents(best):
                measure(config)
    else:
        for slabs, warps, chunk in ((1, 4, w.n), (2, 4, w.n), (4, 8, w.n), (2, 4, 4096), (2, 4, 8192)):
            call = dequantized_call(w, case.x, slabs, warps, chunk)
            run.add(case, DEQUANTIZED, call, config={"slabs": slabs, "warps": warps, "chunk": chunk})


def _right(lines: Iterable[dict[str, Any]], w: Weight, m: int) -> list[dict[str, Any]]:
    key = (str(w.fmt), w.n, w.k, m)
    return [line for line in lines if "us" in line and (line["weight"], line["n"], line["k"], line["m"]) == key]


def planes_call(w: Weight, x: Tensor, config: Config, counters: Tensor) -> Call:
    copies = w.of("planes")
    return lambda i: planes_linear.linear(x, copies[i % len(copies)], None, config, counters)


def dequantized_call(w: Weight, x: Tensor, slabs: int, warps: int, chunk: int) -> Call:
    """Dequantize to bfloat16 and multiply with cuBLAS, `chunk` rows at a time through one buffer that L2 can hold."""
    copies, rows = w.of("planes"), min(chunk, w.n)
    buffer = torch.empty(rows, w.k, dtype=torch.bfloat16, device=DEVICE)

    def call(i: int) -> Tensor:
        planes: Planes = copies[i % len(copies)]
        y = torch.empty(x.shape[0], w.n, dtype=x.dtype, device=x.device)
        for first in range(0, w.n, rows):
            tiles = slice(first // 64, -(-min(first + rows, w.n) // 64))
            out = min(rows, w.n - first)
            part = Planes(planes.words[tiles], planes.scales[tiles], w.fmt, out, w.k, planes.lift, planes.top)
            values = dequantize.dequantize(part, buffer[:out], slabs, warps)
            torch.mm(x, values.T, out=y[:, first : first + out])
        return y

    return call
