"""us of an MX linear layer on a GPU, beside cuBLAS bf16 in the same run: formats x shapes of Llama-3-8B x tokens.

    python benchmarks/gemm.py --product --rows 1,64,2048 --out gemm.jsonl   what the product calls: the table
    python benchmarks/gemm.py --product --beside humming,tinygemm           then other projects' kernels
    python benchmarks/gemm.py --sweep --seconds 500 --out sweep.jsonl       time every candidate configuration
    python benchmarks/gemm.py --choose sweep.jsonl --out configs.jsonl      keep the fastest right one of each case

A time is that of a call within the replay of a CUDA graph of many calls, over as many copies of the weight as exceed
the L2 cache several times; the median of five replays. It holds everything that the call does. `ratio` is over cuBLAS,
timed likewise, the two in turns. `floor_share` is the larger of bytes / 3.0 TB/s and operations / 795 TFLOP/s, over the
time. Before it is timed, each result is compared with float64 on random data: `error` is over the bound of a float32
sum and one rounding (kernel_check.py), at most 1 passes; what does not pass is not timed, and is recorded with its
error.
Rows with an activation format have a launch of the activation's quantize-dequantize in them. Others' kernels run in
processes of their own after ours, which have half of the time at most; gemm_peers.py says how they are checked.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import gemm_peers
import torch
from gemm_compile import compile_all
from gemm_peers import PEERS
from gemm_sweep import sweep
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
    names,
    read,
    reason,
    totals,
    warm_up,
)
from torch import Tensor

from mxcompile.formats import MXFormat, activation_rule
from mxcompile.kernels import gpu_linears
from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.layout.planes import Scaling, to_bytes
from mxcompile.kernels.triton import quantize
from mxcompile.kernels.tuned_configs import DEQUANTIZED, GLUON, TRITON, Config, config_for

_GRACE = 60
"""Seconds that a peer may be late: what it has begun when its time is over, it ends."""


def product_call(w: Weight, x: Tensor) -> Call:
    """What a fused operation of a deployed model calls."""
    copies = [(*to_bytes(planes), None) for planes in w.of("planes")]
    return lambda i: gpu_linears.linears(x, [copies[i % len(copies)]], w.fmt, Scaling(w.planes.lift, w.planes.top))[0]


def path_of(case: Case) -> tuple[str, Config | None]:
    """Which kernel that is, and how it is cut."""
    gluon = gluon_planes.supports(case.x) is None
    config = config_for(case.w.fmt, case.w.n, case.w.k, len(case.x), case.x.device, gluon)
    if config is None:
        return DEQUANTIZED, None
    return (GLUON if isinstance(config, gluon_planes.Config) else TRITON), config


def time_product(run: Run, arguments: argparse.Namespace) -> None:
    """The table: what the product calls, then the same with activations that are quantized on the way."""
    shapes = [SHAPES[shape] for shape in arguments.shapes]
    jobs = {
        (str(fmt), config_for(fmt, n, k, m, torch.device("cuda")))
        for fmt, m, (n, k) in product(arguments.formats, arguments.rows, shapes)
    }
    try:
        compile_all(sorted(jobs, key=str), sorted({k for _, k in shapes}))
        print(f"{len(jobs)} kernels compiled after {run.elapsed:.0f} s", flush=True)
    except Exception as problem:  # then each is compiled when it is called
        print(f"not compiled ahead: {reason(problem)}", flush=True)
    warm_up()
    for case in cases(run, arguments):
        path, config = path_of(case)
        more = {"config": asdict(config)} if config is not None else {}
        run.add(case, path, product_call(case.w, case.x), **more)
        print(in_a_line(run.lines[-1]), flush=True)
        for fmt in arguments.activations:
            run.add(*quantized(case, path, fmt), activation=str(fmt), **more)
            print(in_a_line(run.lines[-1]), flush=True)


def quantized(case: Case, path: str, fmt: MXFormat) -> tuple[Case, str, Call]:
    """The same, its activation quantized and dequantized first, each time."""
    rule = activation_rule(fmt)

    def call(i: int) -> Tensor:
        return product_call(case.w, quantize.quantize_dequantize(case.x, fmt, rule))(i)

    rounded = quantize.quantize_dequantize(case.x, fmt, rule)
    return replace(case, exact=Exact(rounded, case.w.values)), path, call


def time_beside(run: Run, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Others' kernels, each in a process that may crash or hang, with its share of the time that is left."""
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


def choose(lines: Iterable[dict[str, Any]], dependent: bool) -> list[dict[str, Any]]:
    """The fastest line of each format, shape and number of tokens; with or without dependent launch."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        if "us" not in line or "config" not in line or (line["config"].get("dependent", False) and not dependent):
            continue
        key = _key(line)
        if key not in best or line["us"] < best[key]["us"]:
            best[key] = line
    return list(best.values())


def cuts(lines: Sequence[dict[str, Any]], dependent: bool) -> list[dict[str, Any]]:
    """What `mxcompile/kernels/tuned_configs.py` reads: the fastest lines, each in Gluon before the fastest other."""
    others = {_key(line): line for line in choose((line for line in lines if line["path"] != GLUON), dependent)}
    chosen: list[dict[str, Any]] = []
    for line in choose(lines, dependent):
        chosen += [line, *([others[_key(line)]] if line["path"] == GLUON and _key(line) in others else [])]
    return [{name: line[name] for name in ("weight", "n", "k", "m", "path", "config")} for line in chosen]


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("weight", "n", "k", "m"))


def peers(text: str) -> list[str]:
    for name in names(text):
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PEERS)}")
    return names(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--product", action="store_true", help="time what the product calls")
    what.add_argument("--sweep", action="store_true", help="time every candidate configuration")
    what.add_argument("--choose", type=Path, help="keep the fastest line of each case of this file; needs no GPU")
    add_case_options(parser)
    table = parser.add_argument_group("--product")
    table.add_argument("--beside", type=peers, default="", help=f"other projects, comma-separated: {','.join(PEERS)}")
    table.add_argument("--activations", type=formats, default="", help="quantize them to these formats, too")
    chosen = parser.add_argument_group("--choose")
    chosen.add_argument("--cuts", type=Path, help="write the table of cuts that the product reads")
    chosen.add_argument("--dependent", action="store_true", help="allow dependent launch")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.choose:
        lines = read(arguments.choose)
        chosen = choose(lines, arguments.dependent)
        print(*totals(chosen), sep="\n")
        if arguments.out:
            arguments.out.write_text("".join(json.dumps(line) + "\n" for line in chosen))
        if arguments.cuts:
            lines = cuts(lines, arguments.dependent)
            arguments.cuts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0
    if not torch.cuda.is_available():
        print("gemm: no CUDA GPU here, nothing was timed")
        return 0
    command = " ".join(["python benchmarks/gemm.py", *sys.argv[1:]])
    run = Run(command, arguments.seconds / 2 if arguments.beside else arguments.seconds, arguments.out)
    return time_sweep(run, arguments) if arguments.sweep else time_table(run, arguments)


def time_sweep(run: Run, arguments: argparse.Namespace) -> int:
    sweep(run, arguments.formats, arguments.rows, {shape: SHAPES[shape] for shape in arguments.shapes})
    print(*totals(choose(run.lines, dependent=False)), "with dependent launch:", sep="\n")
    print(*totals(choose(run.lines, dependent=True)), sep="\n")
    return 1 if any(line.get("error", 0) > 1 for line in run.lines) else 0


def time_table(run: Run, arguments: argparse.Namespace) -> int:
    lost = False
    try:
        time_product(run, arguments)
    except Exception as problem:  # others have processes, and a GPU, of their own
        print(f"the product stopped: {reason(problem)}", flush=True)
        lost = True
    print(*totals([*run.lines, *time_beside(run, arguments)]), sep="\n")
    return 1 if lost or any("us" not in line for line in run.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
