"""Times every candidate tile config of the GPU linears, for each weight format, shape and number of tokens.

    python -m tuning.sweep --out sweep.jsonl                                  in benchmarks/, on the GPU
    python -m tuning.sweep --out sweep.jsonl --formats mxint4 --rows 1,16     a part of it
    python -m tuning.sweep --kernels FOLDER                                   without a GPU: compiles into FOLDER

A result is compared with float64 first, and must be equal bit for bit when it is computed again; one that fails is
recorded and not timed. All are timed quickly (`quick_us`), then the fastest with care (`us`). `gemm_timing.py` says
what a time is. README.md has the second command, which writes the table.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

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
    names,
    totals,
    warm_up,
)
from torch import Tensor
from torch.nn import functional as F

from mxcompile.formats import MXFormat
from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.triton import dequantize, held_planes
from mxcompile.kernels.triton import planes_linear as triton_planes
from mxcompile.kernels.triton.elements import multiprocessors
from mxcompile.kernels.tuned_configs import DEQUANTIZED, GLUON, path_name
from tuning import carried_cache
from tuning.candidates import Config, candidates
from tuning.carried_cache import MULTIPROCESSORS
from tuning.compile_ahead import compile_all
from tuning.write_configs import fastest

Candidates: TypeAlias = dict[tuple[MXFormat, int, int, int], list[Config]]
_TIMED_AGAIN = 3
_FEWEST_DEQUANTIZED = 256
"""Fewer tokens are not worth writing a dequantized weight to memory for."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tuning.sweep", description=(__doc__ or "").splitlines()[0])
    add_case_options(parser)
    parser.set_defaults(formats="mxint4,mxfp4,mxfp6_e2m3,mxint8,mxfp8_e4m3", rows="1,8,16,32,64,256,512,2048")
    parser.set_defaults(seconds=3600.0)
    parser.add_argument("--paths", type=names, help="the only kernels to time, comma-separated: planes, held, gluon")
    parser.add_argument("--dependent", action="store_true", help="time the kernel `held` with dependent launch, too")
    arguments = parser.parse_args()
    shapes, options = [SHAPES[shape] for shape in arguments.shapes], (arguments.paths, arguments.dependent)
    if not torch.cuda.is_available():
        if arguments.kernels is None:
            print("tuning.sweep needs a CUDA GPU, and this machine has none; with --kernels it compiles")
            return 1
        compile_candidates(
            candidates_of_cases(arguments.formats, arguments.rows, shapes, MULTIPROCESSORS, True, *options),
            arguments.kernels,
        )
        return 0
    run = Run(" ".join(["python -m tuning.sweep", *sys.argv[1:]]), arguments.seconds, arguments.out)
    sweep(run, arguments.formats, arguments.rows, shapes, arguments.kernels, *options)
    print(*totals(fastest(run.lines)), sep="\n")
    if arguments.out:
        name = "sm{}{}".format(*torch.cuda.get_device_capability())
        print(f"python -m tuning.write_configs {arguments.out} ../mxcompile/kernels/configs/{name}.jsonl")
    return 0


def sweep(
    run: Run,
    formats: Sequence[MXFormat],
    rows: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    kernels: Path | None = None,
    paths: Sequence[str] | None = None,
    dependent: bool = False,
) -> None:
    """Time every candidate; cases that the time does not reach are missing. kernels: a folder of compiled kernels.
    paths, dependent: as for `candidates_of_cases`."""
    if kernels is not None:
        carried_cache.use(kernels)
    warm_up()
    gluon = gluon_planes.supports(torch.zeros(1, 128, dtype=torch.bfloat16, device=DEVICE)) is None
    count = multiprocessors(torch.device(DEVICE, torch.cuda.current_device()))
    configs = candidates_of_cases(formats, rows, shapes, count, gluon, paths, dependent)
    if kernels is None:
        compile_candidates(configs, None)
        print(f"compiled after {run.elapsed:.0f} s", flush=True)
    weights: dict[tuple[MXFormat, int, int], Weight] = {}
    for m, fmt, (n, k) in product(rows, formats, shapes):
        if run.out_of_time:
            print(f"out of time before {fmt} {n} x {k}, {m} tokens", flush=True)
            return
        if (fmt, n, k) not in weights:
            weights[fmt, n, k] = make_weight(fmt, n, k)
        _sweep_case(run, make_case(weights[fmt, n, k], m), configs[fmt, n, k, m])


def candidates_of_cases(
    formats: Sequence[MXFormat],
    rows: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    count: int,
    gluon: bool = True,
    paths: Sequence[str] | None = None,
    dependent: bool = False,
) -> Candidates:
    """The candidates of each case, for a GPU of `count` multiprocessors. paths: the only kernels. dependent: those of
    `held` also with dependent launch."""

    def of_case(fmt: MXFormat, n: int, m: int) -> list[Config]:
        configs = [
            config for config in candidates(fmt, n, m, count, gluon) if paths is None or path_name(config) in paths
        ]
        held = [config for config in configs if dependent and isinstance(config, held_planes.Config)]
        return [*configs, *(replace(config, dependent=True) for config in held)]

    return {(fmt, n, k, m): of_case(fmt, n, m) for fmt, (n, k), m in product(formats, shapes, rows)}


def compile_candidates(configs: Candidates, kernels: Path | None) -> None:
    jobs = {(str(fmt), config) for (fmt, *_), several in configs.items() for config in several}
    print(f"compiling {len(jobs)} kernels, to time {sum(map(len, configs.values()))} candidates", flush=True)
    compile_all(sorted(jobs, key=str), sorted({k for _, _, k, _ in configs}), kernels)


def _sweep_case(run: Run, case: Case, configs: Sequence[Config]) -> None:
    """Every config alone, then the fastest ones again, each alternating with cuBLAS."""
    counters = torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE)
    first, calls = len(run.lines), [fused_call(case.w, case.x, config, counters) for config in configs]
    paths = [path_name(config) for config in configs]
    times: list[tuple[float, int]] = []
    for i, (config, path, call) in enumerate(zip(configs, paths, calls, strict=True)):
        counters.zero_()
        us = run.add_quickly(case, path, call, config=changed(config))
        times += [] if us is None else [(us, i)]
    others = [time for time in times if paths[time[1]] != GLUON]
    for _, i in dict.fromkeys([*sorted(times)[:_TIMED_AGAIN], *sorted(others)[:1]]):
        run.add(case, paths[i], calls[i], config=changed(configs[i]))
    if len(case.x) >= _FEWEST_DEQUANTIZED:
        run.add(case, DEQUANTIZED, dequantized_call(case.w, case.x), config={})
    for line in fastest(run.lines[first:]):
        print(f"{run.elapsed:5.0f} s: {in_a_line(line)}, {line['config']}", flush=True)


def changed(config: Config) -> dict[str, Any]:
    """The fields of a config that are not the default."""
    default = asdict(type(config)()) if isinstance(config, gluon_planes.Config) else asdict(type(config)(0, 0))
    return {name: value for name, value in asdict(config).items() if value != default[name]}


def fused_call(w: Weight, x: Tensor, config: Config, counters: Tensor) -> Call:
    copies = w.of("planes")
    if isinstance(config, held_planes.Config):
        return lambda i: held_planes.linear(x, copies[i % len(copies)], None, config)
    linear: Any = (gluon_planes if isinstance(config, gluon_planes.Config) else triton_planes).linear
    counters_of_split = counters if config.split > 1 else None  # else another kernel would be compiled
    return lambda i: linear(x, copies[i % len(copies)], None, config, counters_of_split)


def dequantized_call(w: Weight, x: Tensor) -> Call:
    """As `kernels/gpu_linears.py` does it: the weight dequantized to memory, then cuBLAS."""
    copies = w.of("planes")
    return lambda i: F.linear(x, dequantize.dequantize(copies[i % len(copies)], k_steps=1))


if __name__ == "__main__":
    sys.exit(main())
