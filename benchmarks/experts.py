"""Time of an experts layer beside transformers' bf16 experts in the same run: formats x shapes x tokens.

    python benchmarks/experts.py --out experts.jsonl                  on a GPU
    python benchmarks/experts.py --activations mxint8,mxfp8_e4m3      then with the value after the gate quantized, too
    python benchmarks/experts.py --beside marlin,humming,triton_kernels     then other projects' kernels
    python benchmarks/experts.py --device cpu --shapes small --tokens 1,8   tries the script

"mxcompile" is `mx::experts`, as a deployed model calls it, on weights in the planar layout (in rows on a CPU).
"batched_mm" and "grouped_mm" are transformers' experts in bfloat16, "compiled" with torch.compile, "two grouped_mm" its
two matmuls alone, on tokens sorted before the call. All are replayed as CUDA graphs of many calls, in turns, the median
of five replays; random experts, those of a call not used for the longest time (experts_timing.py says how).

`floor_us` is the larger of the bytes of the distinct experts of a call and of its tokens, at the rate of a copy in this
run, and the operations at the rate of a bf16 matmul in this run; `floor_share` is that over `us`. `ratio` is the
fastest whole layer in bf16 over `us`. With `--activations`, x is quantized before the call, as it is by the op before
in a compiled model.

Results are first compared with float64 on a sample of tokens: `error` is the largest |y - y64| / |y64| of a token
(Euclidean norms), `rounding` that of the composition of single bfloat16 ops. A result of ours that is off by more than
twice that or differs between two calls is recorded as failed, and not timed.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from experts_calls import float_call, float_experts, float_paths, grouped_matmuls, our_call
from experts_timing import (
    BF16,
    MATMULS,
    OURS,
    PEERS,
    SHAPES,
    Case,
    Exact,
    Layer,
    Rates,
    add_case_options,
    line_of,
    make_layer,
    make_routes,
    measure_rates,
    tokens_of,
)
from gemm_timing import Run, formats, names, reason, warm_up
from torch import Tensor, nn

from mxcompile.formats import MXFormat, activation_rule
from mxcompile.numerics import reference

_GRACE = 60
"""Seconds that a peer may exceed its time by, to finish the case that it has begun."""


def time_case(
    run: Run, rates: Rates, layers: list[Layer], module: nn.Module, tokens: int, arguments: argparse.Namespace
) -> None:
    """Ours in every format and the bf16 experts, for one shape and number of tokens; the module has the weights of the
    first layer."""
    first = layers[0]
    x, routes = (make(first.shape, tokens, arguments.device) for make in (tokens_of, make_routes))
    case, chosen = Case(run), (routes.experts[0], routes.weights[0])
    for layer in layers:
        floor = rates.floor(layer, routes, tokens)
        for activation in (None, *arguments.activations):
            rounded = x if activation is None else rounded_to(x, activation)
            exact = Exact(layer, rounded, *chosen, activation)
            line = line_of(layer, OURS, tokens, activation)
            case.add(line, partial(our_call, layer, rounded, routes, activation), exact, floor)
    exact, floor = Exact(first, x, *chosen, None), rates.floor(first, routes, tokens, bf16=True)
    for path in float_paths(first.shape, tokens, arguments.compiled):
        line = line_of(first, path, tokens, None, weight=BF16)
        case.add(line, partial(float_call, path, module, x, routes), exact, floor)
    matmuls = line_of(first, MATMULS, tokens, None, weight=BF16)
    case.add(matmuls, partial(grouped_matmuls, module, first, x, routes), None, floor)
    case.finish()


def rounded_to(x: Tensor, fmt: MXFormat) -> Tensor:
    return reference.quantize_dequantize(x, fmt, activation_rule(fmt))


def time_all(run: Run, arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        warm_up()
    rates = measure_rates(arguments.device)
    print(f"copy {rates.copy / 1e12:.2f} TB/s, bf16 matmul {rates.matmul / 1e12:.0f} TFLOP/s", flush=True)
    for name in arguments.shapes:
        layers = [make_layer(SHAPES[name], fmt, arguments.device) for fmt in arguments.formats]
        module = float_experts(layers[0])
        for tokens in arguments.tokens:
            if run.out_of_time:
                print(f"out of time before {name}, {tokens} tokens", flush=True)
                return
            time_case(run, rates, layers, module, tokens, arguments)


def time_beside(run: Run, arguments: argparse.Namespace) -> None:
    """Other projects' kernels, each in a process that may crash or hang, with its share of the time that is left."""
    for index, peer in enumerate(arguments.beside):
        seconds = (arguments.seconds - run.elapsed) / (len(arguments.beside) - index)
        command = [
            sys.executable,
            str(Path(__file__).with_name("experts_peers.py")),
            peer,
            "--seconds",
            f"{seconds:.0f}",
        ]
        command += ["--formats", ",".join(map(str, arguments.formats)), "--shapes", ",".join(arguments.shapes)]
        command += ["--tokens", ",".join(map(str, arguments.tokens))]
        command += ["--out", str(arguments.out)] if arguments.out else []
        try:
            subprocess.run(command, timeout=max(seconds, 0) + _GRACE, check=False)
        except subprocess.TimeoutExpired:
            print(f"{peer}: stopped, it took too long", flush=True)


def peers(text: str) -> list[str]:
    for name in names(text):
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PEERS)}")
    return names(text)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_case_options(parser)
    parser.add_argument(
        "--activations", type=formats, default="", help="formats to quantize the gated value to, as well"
    )
    parser.add_argument("--compiled", type=names, default="batched_mm,grouped_mm", help="bf16 experts to compile, too")
    parser.add_argument("--beside", type=peers, default="", help=f"other projects, comma-separated: {','.join(PEERS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("experts.py needs a CUDA GPU, and this machine has none: --device cpu tries the script")
        return 1
    command = " ".join(["python benchmarks/experts.py", *(sys.argv[1:] if words is None else words)])
    run = Run(command, arguments.seconds / 2 if arguments.beside else arguments.seconds, arguments.out)
    stopped = False
    try:
        with torch.no_grad():
            time_all(run, arguments)
    except Exception as problem:  # other projects' kernels run in processes of their own
        print(f"mxcompile stopped: {reason(problem)}", flush=True)
        stopped = True
    time_beside(run, arguments)
    return 1 if stopped or any("us" not in line for line in run.lines if line["path"] == OURS) else 0


if __name__ == "__main__":
    sys.exit(main())
