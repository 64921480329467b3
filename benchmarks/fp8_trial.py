"""us of the products at the rate of 8 bits beside cuBLAS bf16, and their errors, for Llama-3-8B's shapes.

    python benchmarks/fp8_trial.py --seconds 200 --out fp8.jsonl
    python benchmarks/fp8_trial.py --sass          compiles for Hopper; needs no GPU

Activations are rounded to `--activation` and aligned to one power of two a token in one launch (`align_us`), which is
part of `us`; mxfp8_e4m3 is aligned as `lower-mx{align=true}` says. `error` is |y - y64| over |y64| (root of the sums of
squares), `rounding` that of y64 rounded to bfloat16.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from gemm_timing import SHAPES, cublas_call, floor, in_turns, make_weight, microseconds, tokens, warm_up
from kernel_sass import Report, examine, loops
from triton.backends.compiler import GPUTarget

from mxcompile.formats import FORMATS, MXFP8_E4M3, MXFormat, activation_rule
from mxcompile.kernels.gluon import fp8_linear
from mxcompile.kernels.gluon.fp8_linear import Config
from mxcompile.kernels.triton import align, quantize
from mxcompile.numerics import reference

CONFIGS = (Config(),)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="mxint4,mxfp4", type=lambda t: [FORMATS[name] for name in t.split(",")])
    parser.add_argument("--activation", default="mxfp4", type=lambda name: FORMATS[name])
    parser.add_argument("--rows", default="2048,512,256", type=lambda t: [int(m) for m in t.split(",")])
    parser.add_argument("--seconds", type=float, default=200.0, help="start nothing new after so many")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--sass", action="store_true", help="compile and report; needs no GPU")
    arguments = parser.parse_args()
    if arguments.sass:
        for fmt in arguments.formats:
            print(fmt, report(fmt, Config()), sep="\n    ")
        return 0
    if not torch.cuda.is_available():
        print("fp8_trial: no CUDA GPU here, nothing was timed")
        return 0
    start = time.monotonic()
    warm_up()
    for fmt, shape in product(arguments.formats, SHAPES):
        weight = make_weight(fmt, *SHAPES[shape])
        for m in arguments.rows:
            if time.monotonic() - start > arguments.seconds:
                print(f"out of time before {fmt} {shape} {m}")
                return 0
            for line in case(weight, m, arguments.activation):
                print(json.dumps(line), flush=True)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        print(json.dumps(line), file=file)
    return 0


def compile_kernel(fmt: MXFormat, config: Config, in_pieces: bool, has_bias: bool = False) -> Any:
    """The kernel as it is launched on Hopper."""
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = fp8_linear._fp8_kernel
    names = kernel.arg_names
    given = fp8_linear.constants(fmt, config, in_pieces, has_bias)
    pointers = {"bias": "*bf16", "powers": "*fp32", "scratch": "*fp32"}
    signature = dict.fromkeys(given, "constexpr") | pointers | {"power": "fp32"}
    signature |= dict.fromkeys(("first_offset", "second_offset", "m_size", "n_size", "slabs", "pieces"), "i32")
    for name, dtype in {"x": "fp8e4nv", "words": "i16", "scales": "i32", "y": "bf16"}.items():
        shape, layout = fp8_linear.block(name, config)
        signature[name] = f"tensordesc<{dtype}{shape},{layout!r}>"
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    constants = {(names.index(name),): value for name, value in given.items()}
    source = GluonASTSource(kernel, {name: signature[name] for name in names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=fp8_linear.options())


def report(fmt: MXFormat, config: Config, in_pieces: bool = False, has_bias: bool = False) -> Report:
    """What ptxas made of it; `elements`: weights that a multiprocessor can decode a clock, one instruction a clock each
    of its four parts."""
    facts, sass = examine(compile_kernel(fmt, config, in_pieces, has_bias))
    body = min(loops(sass), key=len)
    products = sum("GMMA" in line for line in body)
    waits = sum("WARPGROUP.DEPBAR" in line for line in body)
    elements = round(4 * 64 * 32 * products / (4 * len(body)), 1)
    return Report(**facts, loop=len(body), products=products, waits=waits, elements=elements)


def case(weight: Any, m: int, activation: Any) -> list[dict[str, Any]]:
    rule = activation_rule(activation)
    x = tokens(m, weight.k)
    rounded = quantize.quantize_dequantize(x, activation, rule)
    if activation == MXFP8_E4M3:
        rounded = reference.align(rounded)
    exact = rounded.double() @ weight.values.double().T
    cublas = microseconds(cublas_call(weight, x), 2 * floor(weight.fmt, weight.n, weight.k, m))
    align_us = microseconds(lambda _: align.align(x, (activation, rule))[0], 20)
    copies = weight.of("planes")
    lines: list[dict[str, Any]] = []
    for config in CONFIGS:
        line: dict[str, Any] = {"weight": str(weight.fmt), "activation": str(activation), "path": "fp8", "n": weight.n}
        line |= {"k": weight.k, "m": m, "config": asdict(config)}

        def call(i: int, config: Config = config) -> Any:
            aligned, powers = align.align(x, (activation, rule))
            return fp8_linear.linear(aligned, powers, copies[i % len(copies)], None, activation, config)

        try:
            y = call(0)
            line["error"] = relative(y, exact)
            line["rounding"] = relative(exact.to(torch.bfloat16), exact)
            line["equal"] = all(torch.equal(call(0), y) for _ in range(3))
            if line["error"] < 0.02:
                us, cublas = in_turns([call, cublas_call(weight, x)], cublas)
                line |= {"us": round(us, 2), "align_us": round(align_us, 2), "cublas_bf16_us": round(cublas, 2)}
                line["ratio"] = round(cublas / us, 3)
        except Exception as problem:  # whatever it is, the next configuration is to run
            line["failed"] = f"{type(problem).__name__}: {str(problem).strip()[-300:]}"
        lines.append(line)
    return lines


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float(f"{((y.double() - exact).norm() / exact.norm()).item():.3g}")


if __name__ == "__main__":
    sys.exit(main())
