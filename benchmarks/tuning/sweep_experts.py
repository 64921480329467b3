"""Times configs of the kernels for few choices of experts, for each shape, weight format and number of tokens.

    python -m tuning.sweep_experts --out sweep.jsonl                             in benchmarks/, on the GPU
    TRITON_INTERPRET=1 python -m tuning.sweep_experts --device cpu --shapes small --tokens 1 --limit 1      tries it

"gate" is the matmul before the gate with it, "sum" the one after it with the weighted sum of single choices, "linear"
the same matmul of choices that share programs, without the sum. A result is compared with float64 first and must be
equal bit for bit when it is computed again; one that fails is recorded and not timed. The fastest ones are written into
`mxcompile/kernels/expert_configs.py` by hand. `experts_timing.py` says what a time is.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from experts_timing import SHAPES as SHAPES_BY_NAME
from experts_timing import TURNS, Layer, Routes, add_case_options, in_turns, make_layer, make_routes, tokens_of
from gemm_timing import Call, Run, reason, warm_up
from torch import Tensor

from mxcompile.kernels.layout.planes import to_planes
from mxcompile.kernels.triton import expert_sums, grouped_planes
from mxcompile.kernels.triton.expert_slices import Config, Stack

_GROSS = 2.0**-6
"""Error relative to the norm beyond which a result is wrong; rounding to bfloat16 is a tenth of it."""


@dataclass(frozen=True)
class Inputs:
    """What all calls of a case read; h is the exact gate, rounded to bfloat16, of the first choices."""

    layer: Layer
    stacks: tuple[Stack, Stack]
    routes: Routes
    x: Tensor
    h: Tensor

    def call(self, kind: str, config: Config) -> Call:
        shape, (up, down) = self.layer.shape, self.stacks

        def run(i: int) -> Tensor:
            experts, weights = self.routes.experts[i % TURNS], self.routes.weights[i % TURNS]
            if kind == "gate":
                return grouped_planes.gated_linear(self.x, experts, up, shape.gate, None, config)
            if kind == "sum":
                return expert_sums.multiply_and_sum(self.h, experts, weights, down, config)
            return grouped_planes.linear(self.h, experts.reshape(-1, 1), down, config)

        return run

    def exact(self, kind: str) -> Tensor:
        """The result of the first turn in float64."""
        experts, weights = self.routes.experts[0], self.routes.weights[0].double()
        if kind == "gate":
            return exact_gate(self.layer, self.x, experts)
        rows = exact_products(self.layer.down.values, self.layer.down.bias, self.h, experts.flatten())
        return rows if kind == "linear" else (rows.unflatten(0, experts.shape) * weights[..., None]).sum(1)


def exact_products(values: Tensor, bias: Tensor | None, x: Tensor, experts: Tensor) -> Tensor:
    """values `[E, out, in]`, x `[choices, in]`, experts `[choices]`: one product after the other, in float64."""
    products = torch.stack([values[e].double() @ row.double() for e, row in zip(experts, x, strict=True)])
    return products if bias is None else products + bias[experts].double()


def exact_gate(layer: Layer, x: Tensor, experts: Tensor) -> Tensor:
    rows = x.repeat_interleave(experts.shape[1], 0)
    return layer.shape.gate(exact_products(layer.up.values, layer.up.bias, rows, experts.flatten()))


def candidates(kind: str, slots: int, dependent: bool) -> Iterator[Config]:
    """Every config that is worth a try."""
    columns = [1] if kind == "sum" else [1, 8, 16]
    for choices, out, slices, stages in product(columns, (16, 32, 64, 128), (1, 2, 4, 8), (2, 3, 4, 5)):
        if kind == "gate" and out < 32:
            continue
        parts = max(1, slices // 2 ** (slots - 1).bit_length()) if kind == "sum" else 1
        yield Config(choices, out, slices, parts, stages, dependent=dependent)


def make_inputs(layer: Layer, tokens: int, device: str) -> Inputs:
    stacks: list[Stack] = []
    for stack in (layer.up, layer.down):
        count, _, size = stack.values.shape
        planes = to_planes(stack.elements.flatten(0, 1), stack.scales.flatten(0, 1), stack.fmt, size)
        stacks.append(Stack(planes, count, stack.bias))
    x, routes = tokens_of(layer.shape, tokens, device), make_routes(layer.shape, tokens, device)
    h = exact_gate(layer, x, routes.experts[0]).to(torch.bfloat16)
    return Inputs(layer, (stacks[0], stacks[1]), routes, x, h)


def time_config(inputs: Inputs, kind: str, config: Config, exact: Tensor) -> dict[str, Any]:
    """Its error and us, or why it has none."""
    call = inputs.call(kind, config)
    try:
        y = call(0)
        error = ((y.double() - exact).norm() / exact.norm()).nan_to_num(nan=torch.inf).item()
        if error > _GROSS or not all(torch.equal(call(0), y) for _ in range(3)):
            return {"failed": f"wrong, or differs between calls: error {error:.2%}"}
        return {"error": float(f"{error:.3g}"), "us": round(in_turns([call], 20)[0], 2)}
    except Exception as problem:  # a config that does not compile or fit
        return {"failed": reason(problem)}


def sweep(run: Run, arguments: argparse.Namespace) -> None:
    """All kinds and configs for each case; the lines of a case end with its fastest configs."""
    for name, fmt, tokens in product(arguments.shapes, arguments.formats, arguments.tokens):
        inputs = make_inputs(make_layer(SHAPES_BY_NAME[name], fmt, arguments.device), tokens, arguments.device)
        for kind in ("gate", "sum", "linear"):
            exact = inputs.exact(kind)
            lines: list[dict[str, Any]] = []
            configs = list(candidates(kind, inputs.layer.shape.choices, arguments.device == "cuda"))
            for config in configs[: arguments.limit]:
                if run.out_of_time:
                    return
                line = {"weight": str(fmt), "shape": name, "tokens": tokens, "kind": kind, "config": asdict(config)}
                lines.append(line | time_config(inputs, kind, config, exact))
                run.keep(lines[-1])
            fastest = sorted((line for line in lines if "us" in line), key=lambda line: line["us"])[:3]
            for line in fastest or lines[:1]:
                print({key: value for key, value in line.items() if key != "weight"}, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_case_options(parser)
    parser.set_defaults(tokens=[1, 4, 32])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="%(default)s")
    parser.add_argument("--limit", type=int, help="only so many configs of each kind")
    arguments = parser.parse_args()
    run = Run(" ".join(["python -m tuning.sweep_experts", *sys.argv[1:]]), arguments.seconds, arguments.out)
    if arguments.device == "cuda":
        warm_up()
    sweep(run, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
