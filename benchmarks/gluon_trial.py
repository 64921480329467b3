"""us of the Gluon kernel for many tokens beside cuBLAS bf16, checked against float64 first; or what ptxas made of it.

    python benchmarks/gluon_trial.py --seconds 300
    python benchmarks/gluon_trial.py --formats mxfp4 --rows 2048 --config rows=256,out=128,stages=3 --out trial.jsonl
    python benchmarks/gluon_trial.py --sass          compiles for Hopper; needs no GPU

A case that fails prints its error and the next one runs. Times and lines are gemm.py's, for its `--choose`. `--sass`
prints, for each configuration: registers a thread at launch, spilled bytes, shared bytes, whether ptxas serialized
wgmma, and of the loop over slabs of one warpgroup the instructions, products (HGMMA), waits for them, and the
instructions that decode (LOP3, HFMA2, shifts) between the first product after a wait and the next wait, over all that
decode.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from gemm_compile import compile_all
from kernel_sass import examine, loops
from triton.backends.compiler import GPUTarget

from mxcompile.formats import FORMATS, MXFormat
from mxcompile.kernels.gluon import planes_kernel, planes_linear
from mxcompile.kernels.gluon.planes_linear import Config
from mxcompile.kernels.layout.planes import plane_layout

LIMIT = 232448
_DECODE = r"LOP3|SHF|PRMT|HFMA2|HMUL2|IMAD R"


@dataclass(frozen=True)
class Report:
    """What ptxas made of one kernel; see the module's docstring."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: bool
    loop: int
    products: int
    waits: int
    overlapped: str


def compile_kernel(fmt: MXFormat, config: Config, has_bias: bool = False) -> Any:
    """The kernel as it is launched on Hopper."""
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = planes_kernel._planes_kernel
    names = kernel.arg_names
    types = {"x": "bf16", "words": "i16", "scales": "i32", "y0": "bf16"}
    given = {**planes_linear.constants(fmt, config, has_bias), "y1": None, "y2": None}
    pointers = {"bias": "*bf16", "partial": "*fp32", "counters": "*i32"}
    signature = dict.fromkeys(given, "constexpr") | pointers | {"lift": "fp32"}
    signature |= dict.fromkeys(("m_size", "n_size", "slabs", "second", "third"), "i32")
    for name, dtype in types.items():
        shape, layout = planes_linear.block(name[0] if name == "y0" else name, config)
        signature[name] = f"tensordesc<{dtype}{shape},{layout!r}>"
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    constants = {(names.index(name),): value for name, value in given.items()}
    source = GluonASTSource(kernel, {name: signature[name] for name in names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=planes_linear.options(config))


def report(fmt: MXFormat, config: Config, has_bias: bool = False) -> Report:
    facts, sass = examine(compile_kernel(fmt, config, has_bias))
    products = 8 * plane_layout(fmt).planes // 4 * config.out // config.consumers // 64
    body = min((loop for loop in loops(sass) if sum("HGMMA" in line for line in loop) >= products), key=len)
    decode, hidden, running = 0, 0, False
    for line in body:
        running = (running or "HGMMA" in line) and "WARPGROUP.DEPBAR" not in line
        if re.search(rf"\*/ +(@!?P\d )?({_DECODE})", line):
            decode, hidden = decode + 1, hidden + running
    return Report(
        **facts,
        loop=len(body),
        products=sum("HGMMA" in line for line in body),
        waits=sum("WARPGROUP.DEPBAR" in line for line in body),
        overlapped=f"{hidden}/{decode}",
    )


def default_configs(fmt: MXFormat, n: int, m: int) -> list[Config]:
    """The cuts that fit into shared memory, K in as many parts as fill a GPU of 132 multiprocessors once or twice."""
    rows = {16: (16,), 32: (32,), 64: (64,), 128: (64, 128), 256: (64, 128, 256), 512: (128, 256)}
    cuts = [
        (rows, out)
        for rows, out in product(rows.get(m, (128, 256)), (256, 128, 64))
        if rows * out <= (128 * 64 if out == 64 else 256 * 128)
    ]
    configs: list[Config] = []
    for (rows, out), group in product(cuts, (8,) if m <= 1024 else (4, 8, 16)):
        tiles = -(-n // out) * -(-m // rows)
        for split in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16) if m <= 1024 else (1,):
            resident = 132 * (2 if out == 64 else 1)
            if (split == 1 and tiles > resident // 2) or 0.7 * resident <= tiles * split <= 1.6 * resident:
                configs.append(Config(rows, out, deepest(fmt, rows, out), group, True, split))
    return configs


def deepest(fmt: MXFormat, rows: int, out: int) -> int:
    """As many stages as fit into shared memory, up to 8."""
    limit = LIMIT if out > 64 else 115000
    return min(8, (limit - 256) // (rows * 256 + out * (64 * min(plane_layout(fmt).words, 2) + 4) + 16))


def trial(arguments: argparse.Namespace) -> int:
    """Run every case; how many were wrong or failed."""
    from gemm_timing import SHAPES, Exact, cublas_call, floor, make_weight, microseconds, tokens, warm_up

    start, wrong = time.monotonic(), 0
    shapes = [(name, *SHAPES[name]) for name in arguments.shapes.split(",")]
    given = arguments.config
    jobs = {
        (str(fmt), config)
        for fmt, (_, n, _), m in product(arguments.formats, shapes, arguments.rows)
        for config in given or default_configs(fmt, n, m)
    }
    compile_all(sorted(jobs, key=str), sorted({k for _, _, k in shapes}))
    print(f"{len(jobs)} kernels compiled after {time.monotonic() - start:.0f} s", flush=True)
    warm_up()
    for fmt, (name, n, k) in product(arguments.formats, shapes):
        weight = make_weight(fmt, n, k)
        for m in arguments.rows:
            x = tokens(m, k)
            exact = Exact(x, weight.values) if m <= 2048 or not arguments.unchecked else None
            cublas = microseconds(cublas_call(weight, x), 2 * floor(fmt, n, k, m))
            for config in given or default_configs(fmt, n, m):
                if time.monotonic() - start > arguments.seconds:
                    print(f"out of time before {fmt} {name} {m} {config}")
                    return wrong
                line: dict[str, Any] = {"weight": str(fmt), "activation": "bf16", "path": "gluon", "n": n, "k": k}
                line |= {"m": m, "config": asdict(config)}
                try:
                    line |= measure(weight, x, exact, config, cublas)
                except Exception as problem:  # whatever it is, the next configuration is to run
                    line["failed"] = f"{type(problem).__name__}: {str(problem).strip()[-300:]}"
                wrong += "us" not in line
                print(json.dumps(line), flush=True)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        print(json.dumps(line), file=file)
    return wrong


def measure(weight: Any, x: Any, exact: Any, config: Config, cublas: float) -> dict[str, Any]:
    """One configuration: its error over the bound, whether it repeats bit for bit, and if it is right, its time."""
    from gemm_timing import cublas_call, floor, in_turns

    if reason := planes_linear.supports(x):
        return {"failed": reason}
    copies, counters = weight.of("planes"), torch.zeros(1 << 16, dtype=torch.int32, device=x.device)

    def call(i: int) -> Any:
        return planes_linear.linear(x, copies[i % len(copies)], None, config, counters)

    results = [call(i) for i in range(3)]
    error = exact.error(results[0]) if exact else 0.0
    equal = all(torch.equal(results[0], other) for other in results[1:])
    line: dict[str, Any] = {"error": round(error, 3), "equal": equal}
    if error <= 1 and equal:
        us, cublas = in_turns([call, cublas_call(weight, x)], cublas)
        share = floor(weight.fmt, weight.n, weight.k, x.shape[0]) / us
        line |= {"us": round(us, 2), "cublas_bf16_us": round(cublas, 2)}
        line |= {"ratio": round(cublas / us, 3), "floor_share": round(share, 3)}
    return line


def parse_config(text: str) -> Config:
    fields = {name: int(value) for name, value in (item.split("=") for item in text.split(","))}
    return Config(**{name: bool(value) if name == "persistent" else value for name, value in fields.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="mxint4,mxfp4", type=lambda t: [FORMATS[name] for name in t.split(",")])
    parser.add_argument("--rows", default="256,2048", type=lambda t: [int(m) for m in t.split(",")])
    parser.add_argument("--shapes", default="qkv,o,gate_up,down", help="comma-separated")
    parser.add_argument("--config", type=parse_config, action="append", help="rows=256,out=128,...; may be repeated")
    parser.add_argument("--seconds", type=float, default=300.0, help="start nothing new after so many")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--unchecked", action="store_true", help="do not compare with float64 above 2048 tokens")
    parser.add_argument("--sass", action="store_true", help="compile and report; needs no GPU")
    arguments = parser.parse_args()
    if arguments.sass:
        for fmt in arguments.formats:
            for config in arguments.config or default_configs(fmt, 4096, 256):
                print(fmt, config, report(fmt, config), sep="\n    ", flush=True)
        return 0
    if not torch.cuda.is_available():
        print("gluon_trial: no CUDA GPU here, nothing was timed")
        return 0
    return 1 if trial(arguments) else 0


if __name__ == "__main__":
    sys.exit(main())
