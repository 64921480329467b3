"""Time of an MX linear layer on a GPU beside cuBLAS bf16 in the same run: formats x Llama-3-8B's shapes x tokens.

    python benchmarks/gemm.py --rows 1,64,2048 --out gemm.jsonl       what a compiled model calls
    python benchmarks/gemm.py --beside humming,tinygemm               then other projects' kernels
    python benchmarks/gemm.py --rows 2048 --fp8 mxfp4,mxfp8_e4m3+aligned    then the FP8 path, with these activations

`us` is the time of one call within a CUDA graph of many, over as many copies of the weight as exceed the L2 cache
several times; the median of five replays. Everything that the call launches is in it. `ratio` is cuBLAS's time over it;
the two are measured alternately. `floor_share` is the larger of bytes / 3.0 TB/s (4.27 on an H200) and operations / 795
TFLOP/s, over `us`. Each result is first compared with float64 on random data: `error` is the largest error over what
float32 accumulation and one rounding may lose, so that at most 1 is correct. A result that is not is recorded and not
timed.

With `--activations` a kernel that quantizes and dequantizes the activation is part of the call. With `--fp8` the kernel
that quantizes and aligns it is (`align_us` of `us`); `error` and `rounding` are then |y - y64| / |y64| (Euclidean
norms) of the result, and of y64 rounded to bfloat16.

Other projects' kernels run in processes of their own after ours, and have at most half of the time; gemm_peers.py says
how they are checked. `tuning/` measures which config is fastest, and writes the table that these calls look it up in.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import gemm_peers
import torch
from gemm_peers import PEERS
from gemm_timing import (
    SHAPES,
    Call,
    Case,
    Exact,
    Run,
    Weight,
    add_case_options,
    cases,
    formats,
    in_a_line,
    microseconds,
    names,
    read,
    reason,
    totals,
    warm_up,
)
from torch import Tensor
from tuning import carried_cache
from tuning.compile_ahead import compile_all

from mxcompile.formats import MXFormat, activation_rule
from mxcompile.kernels import gpu_linears
from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.layout.planes import PlanarScaling, to_bytes
from mxcompile.kernels.triton import align, quantize
from mxcompile.kernels.tuned_configs import DEQUANTIZED, Config, config_for, path_name
from mxcompile.numerics import reference

_GRACE = 60
"""Seconds that a peer may exceed its time by, to finish the case that it has begun."""
_GROSS = 0.02
"""Error of an FP8 result, relative to its norm, beyond which it is wrong and not timed."""


def compiled_call(w: Weight, x: Tensor) -> Call:
    """What the fused operator of a compiled model calls."""
    copies = [(*to_bytes(planes), None) for planes in w.of("planes")]
    scaling = PlanarScaling(w.planes.lift, w.planes.top)
    return lambda i: gpu_linears.linears(x, [copies[i % len(copies)]], w.fmt, scaling)[0]


def path_of(case: Case) -> tuple[str, Config | None]:
    """The kernel that it selects, and its config."""
    gluon = gluon_planes.supports(case.x) is None
    config = config_for(case.w.fmt, case.w.n, case.w.k, len(case.x), case.x.device, gluon)
    if config is None:
        return DEQUANTIZED, None
    return path_name(config), config


def time_ours(run: Run, arguments: argparse.Namespace) -> None:
    """Float activations, then activations that are quantized first, then the FP8 path."""
    shapes = [SHAPES[shape] for shape in arguments.shapes]
    jobs = {
        (str(fmt), config_for(fmt, n, k, m, torch.device("cuda")))
        for fmt, m, (n, k) in product(arguments.formats, arguments.rows, shapes)
    }
    try:
        if arguments.kernels is not None:
            carried_cache.use(arguments.kernels)
        else:
            compile_all(sorted(jobs, key=str), sorted({k for _, k in shapes}))
        print(f"{len(jobs)} kernels compiled after {run.elapsed:.0f} s", flush=True)
    except Exception as problem:  # then each is compiled at its first call
        print(f"not compiled ahead: {reason(problem)}", flush=True)
    warm_up()
    for case in cases(run, arguments):
        path, config = path_of(case)
        more = {"config": asdict(config)} if config is not None else {}
        run.add(case, path, compiled_call(case.w, case.x), **more)
        print(in_a_line(run.lines[-1]), flush=True)
        for fmt in arguments.activations:
            run.add(*quantized(case, path, fmt), activation=str(fmt), **more)
            print(in_a_line(run.lines[-1]), flush=True)
        for fmt in arguments.fp8:
            run.keep(fp8_line(case, fmt))
            print(in_a_line(run.lines[-1]), flush=True)


def quantized(case: Case, path: str, fmt: MXFormat) -> tuple[Case, str, Call]:
    """The same call, in which the activation is quantized and dequantized first."""
    rule = activation_rule(fmt)

    def call(i: int) -> Tensor:
        return compiled_call(case.w, quantize.quantize_dequantize(case.x, fmt, rule))(i)

    rounded = quantize.quantize_dequantize(case.x, fmt, rule)
    return replace(case, exact=Exact(rounded, case.w.values)), path, call


def fp8_line(case: Case, fmt: MXFormat) -> dict[str, Any]:
    """The FP8 path, with the activation quantized to `fmt` and aligned in the call."""
    w, x, rounding = case.w, case.x, (fmt, activation_rule(fmt))
    line = case.name("fp8") | {"activation": str(fmt)}
    copies = [(*to_bytes(planes), None) for planes in w.of("planes")]
    scaling = PlanarScaling(w.planes.lift, w.planes.top)
    if problem := gpu_linears.why_not_fp8(x, w.fmt, scaling, rounding):
        return line | {"failed": problem}

    def call(i: int) -> Tensor:
        return gpu_linears.fp8_linears(x, [copies[i % len(copies)]], w.fmt, scaling, rounding)[0]

    exact = Exact(reference.quantize_dequantize(x, *rounding), w.values)
    y = call(0)
    error, least = (exact.relative_error(result) for result in (y, exact.y.to(torch.bfloat16)))
    line |= {"error": float(f"{error:.3g}"), "rounding": float(f"{least:.3g}")}
    if error > _GROSS or not torch.equal(call(1), y):
        return line | {"failed": "wrong, or differs between calls"}
    align_us = microseconds(lambda _: align.align(x, rounding)[0], 20)
    return line | {"align_us": round(align_us, 2)} | case.times(call)


def time_beside(run: Run, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Other projects' kernels, each in a process that may crash or hang, with its share of the time that is left."""
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder) / "lines.jsonl"
        start = out.stat().st_size if out.exists() else 0
        for index, peer in enumerate(arguments.beside):
            seconds = (arguments.seconds - run.elapsed) / (len(arguments.beside) - index)
            if seconds <= 0:
                print(f"{peer}: no time left", flush=True)
                continue
            command = [sys.executable, gemm_peers.__file__, peer, "--seconds", f"{seconds:.0f}", "--out", str(out)]
            command += ["--formats", ",".join(map(str, arguments.formats)), "--shapes", ",".join(arguments.shapes)]
            command += ["--rows", ",".join(map(str, arguments.rows))]
            try:
                subprocess.run(command, timeout=seconds + _GRACE, check=False)
            except subprocess.TimeoutExpired:
                print(f"{peer}: stopped, it took too long", flush=True)
        return read(out, start) if out.exists() else []


def peers(text: str) -> list[str]:
    for name in names(text):
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PEERS)}")
    return names(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_case_options(parser)
    parser.add_argument("--beside", type=peers, default="", help=f"other projects, comma-separated: {','.join(PEERS)}")
    parser.add_argument("--activations", type=formats, default="", help="formats to quantize activations to, as well")
    parser.add_argument("--fp8", type=formats, default="", help="activation formats to time the FP8 path with, as well")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        print("gemm.py needs a CUDA GPU, and this machine has none")
        return 1
    command = " ".join(["python benchmarks/gemm.py", *sys.argv[1:]])
    run = Run(command, arguments.seconds / 2 if arguments.beside else arguments.seconds, arguments.out)
    stopped = False
    try:
        time_ours(run, arguments)
    except Exception as problem:  # other projects' kernels run in processes of their own
        print(f"mxcompile stopped: {reason(problem)}", flush=True)
        stopped = True
    print(*totals([*run.lines, *time_beside(run, arguments)]), sep="\n")
    return 1 if stopped or any("us" not in line for line in run.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
