"""A decode step's decoder layers, kernel after kernel in a CUDA graph, with and without programmatic dependent launch.

    python benchmarks/layer_chain.py --out benchmarks/results/layer-chain-h200.jsonl

Layers of Llama-3-8B's shape with random MXINT4 weights and MXINT8 inputs, `--layers` of them, each with weights and a
cache of 1900 tokens of its own: norm, q/k/v, attention, o, norm, gate/up, gated product, down. `layer_us` is the time
of one layer, the median of replays of all variants in turn. `early` names the kernels that are launched early: "small"
(norms, gated products), "matmuls", or both; with `changed` one matmul has another config. Attention is always launched
early. Every variant must give the bits of the first one, which launches nothing else early, on every replay.
"integers": matmuls of one token in integers, in place of weights decoded to bfloat16, with the configs of the table
unless `changed`; the same up to the order of sums.
"""

# pyright: basic

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mxcompile.formats import MXINT4, MXINT8, ScaleRule
from mxcompile.kernels.layout.planes import PlanarWeight, to_planes
from mxcompile.kernels.triton import gate_product, held_planes, integer_planes, norm, planes_linear, split_k_counters
from mxcompile.kernels.triton.attention import one_token
from mxcompile.kernels.tuned_configs import config_for, integer_config_for
from mxcompile.numerics import packing, reference
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.norms import Norm

DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING: Final = (MXINT8, ScaleRule.FLOOR)
RMS: Final = Norm(1e-6, narrowed=True)
REPLAYS: Final = 40
Held, Integers = held_planes.Config, integer_planes.Config


@dataclass(frozen=True)
class Shape:
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    shared: int = 8
    size: int = 128
    keys: int = 1900

    def qkv(self) -> list[int]:
        """Outputs of the weights of query, key and value."""
        return [self.heads * self.size, self.shared * self.size, self.shared * self.size]

    def matmuls(self) -> dict[str, tuple[list[int], int]]:
        """(outputs of each weight, inputs) of the launches of a layer."""
        return {
            "qkv": (self.qkv(), self.hidden),
            "o": ([self.hidden], self.heads * self.size),
            "gate_up": ([self.inner] * 2, self.hidden),
            "down": ([self.hidden], self.inner),
        }


@dataclass(frozen=True)
class Variant:
    early: tuple[str, ...] = ()
    changed: dict[str, Any] = field(default_factory=dict)


BOTH: Final = ("small", "matmuls")
INTEGERS: Final = (*BOTH, "integers")
BEFORE: Final = {
    "qkv": Held(warps=4, held=2),
    "o": Held(warps=4, held=3),
    "gate_up": Held(warps=4, held=2),
    "down": Held(warps=8, held=2),
}
"""The configs of an H200 that were the fastest for each matmul alone, without early launch."""
INTEGER_CHANGES: Final = {
    "qkv": [Integers(32, 8, 2), Integers(16, 4, 4)],
    "o": [Integers(32, 8, 2), Integers(32, 16, 1)],
    "gate_up": [Integers(32, 4, 2, 128), Integers(64, 8, 1, 128)],
    "down": [Integers(32, 8, 3), Integers(32, 16, 2)],
}
CHANGES: Final = {
    "qkv": [Held(warps=4, held=4), Held(warps=16, held=2)],
    "o": [Held(warps=8, held=4)],
    "gate_up": [Held(warps=4, held=3)],
    "down": [Held(warps=8, held=3), Held(warps=8, held=6)],
}


def variants(rows: int) -> list[Variant]:
    plain = [Variant(early) for early in ((), ("small",), ("matmuls",), BOTH)]
    if rows > 1:
        return plain
    plain += [Variant((), BEFORE), Variant(BOTH, BEFORE), Variant(INTEGERS)]
    return plain + [
        Variant(early, {role: config})
        for early, changes in ((BOTH, CHANGES), (INTEGERS, INTEGER_CHANGES))
        for role, configs in changes.items()
        for config in configs
    ]


class Layers:
    """Layers with equal weights in memory of their own, and a token's state."""

    def __init__(self, shape: Shape, layers: int, rows: int, usual: dict[str, Any], integers: dict[str, Any]) -> None:
        self.shape, self.usual, self.integers = shape, usual, integers
        made = {role: random_planes(sum(outs), size) for role, (outs, size) in shape.matmuls().items()}
        self.weights = [{role: copied(planes) for role, planes in made.items()} for _ in range(layers)]
        self.scale = random(shape.hidden)
        room = (rows, shape.shared, shape.keys, shape.size)
        self.caches = [(random(*room), random(*room)) for _ in range(layers)]
        angles = 6 * torch.rand(1, 1, 1, shape.size // 2, device=DEVICE).repeat(1, 1, 1, 2)
        self.turns = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.place = torch.tensor([shape.keys - 2], device=DEVICE)
        self.mask = (torch.arange(shape.keys, device=DEVICE) <= self.place).expand(rows, 1, 1, -1).contiguous()
        self.x, self.residual = random(rows, 1, shape.hidden), random(rows, 1, shape.hidden)

    def run(self, variant: Variant) -> Tensor:
        """All layers, from the same token; returns the last one's sum of outputs and residual."""
        small = "small" in variant.early
        x, total = self.x, self.residual
        for number, weights in enumerate(self.weights):
            total, y = norm.add_norm(x, total, self.scale, None, RMS, ROUNDING, None, small)
            y = self.attend(number, *self.multiply("qkv", y, weights, variant))
            (x,) = self.multiply("o", y, weights, variant)
            total, y = norm.add_norm(x, total, self.scale, None, RMS, ROUNDING, None, small)
            gate, up = self.multiply("gate_up", y, weights, variant)
            y = gate_product.multiply_and_round(gate, up, Gate(), ROUNDING, None, small)
            (x,) = self.multiply("down", y, weights, variant)
        return norm.add_norm(x, total, self.scale, None, RMS, ROUNDING, None, small)[1]

    def attend(self, layer: int, *qkv: Tensor) -> Tensor:
        q, k, v = (part.view(len(part), 1, -1, self.shape.size).transpose(1, 2) for part in qkv)
        new = one_token.NewToken(k, v, self.place, *self.turns)
        y = one_token.attend(q, *self.caches[layer], self.mask, self.shape.size**-0.5, None, new, ROUNDING)
        return y.view(len(y), 1, -1)

    def configs(self, variant: Variant) -> dict[str, Any]:
        """The configs of all matmuls, but for whether they are launched early."""
        return (self.integers if "integers" in variant.early else self.usual) | variant.changed

    def multiply(self, role: str, x: Tensor, weights: dict[str, PlanarWeight], variant: Variant) -> list[Tensor]:
        outs = self.shape.matmuls()[role][0]
        config = replace(self.configs(variant)[role], dependent="matmuls" in variant.early)
        if isinstance(config, Integers):
            return integer_planes.linears(x, weights[role], outs, [None] * len(outs), ROUNDING[0].bits, config)
        if isinstance(config, Held):
            return held_planes.linears(x, weights[role], outs, [None] * len(outs), config)
        needed = planes_linear.counters_needed(len(x), weights[role], config)
        counters = split_k_counters.stream_counters(x.device, needed) if config.split > 1 else None
        return planes_linear.linears(x, weights[role], outs, [None] * len(outs), config, counters)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def random_planes(n: int, k: int) -> PlanarWeight:
    codes, scales = reference.quantize(torch.randn(n, k, device=DEVICE) / k**0.5, MXINT4, ScaleRule.FLOOR)
    return to_planes(packing.pack(codes, MXINT4), scales, MXINT4, k)


def copied(planes: PlanarWeight) -> PlanarWeight:
    return replace(planes, words=planes.words.clone(), scales=planes.scales.clone())


def usual_configs(shape: Shape, rows: int) -> dict[str, Any]:
    """The configs that a model runs."""
    if DEVICE == "cpu":
        return {role: Held(rows=rows, warps=2, held=2) for role in shape.matmuls()}
    device = torch.device(DEVICE, torch.cuda.current_device())
    return {role: config_for(MXINT4, sum(n), k, rows, device) for role, (n, k) in shape.matmuls().items()}


def integer_configs(shape: Shape, rows: int) -> dict[str, Any]:
    """The configs of matmuls in integers that a model runs."""
    if DEVICE == "cpu" or rows > 1:
        return {}
    device = torch.device(DEVICE, torch.cuda.current_device())
    return {role: integer_config_for(MXINT4, sum(n), k, device) for role, (n, k) in shape.matmuls().items()}


def compile_ahead(job: tuple[str, Any, bool]) -> str | None:
    """Run one kernel on a small weight, in a process of its own, so that it is in Triton's cache.

    job: kernel, config of a matmul, whether it is launched early.
    """
    role, config, early = job
    shape, rows = Shape(), getattr(config, "rows", 1)
    try:
        if role == "norm":
            x = random(rows, 1, shape.hidden)
            norm.add_norm(x, x, random(shape.hidden), None, RMS, ROUNDING, None, early)
        elif role == "attention":
            Layers(replace(shape, hidden=64, inner=64), 1, rows, {}, {}).attend(
                0, *(random(rows, 1, n) for n in shape.qkv())
            )
        elif role == "gate":
            x = random(rows, 1, shape.inner)
            gate_product.multiply_and_round(x, x, Gate(), ROUNDING, None, early)
        else:
            outs, size = shape.matmuls()[role]
            planes = random_planes(128 * len(outs), size)
            x, outs, config = random(rows, 1, size), [128] * len(outs), replace(config, dependent=early)
            if isinstance(config, Integers):
                integer_planes.linears(x, planes, outs, [None] * len(outs), ROUNDING[0].bits, config)
            else:
                held_planes.linears(x, planes, outs, [None] * len(outs), config)
        torch.cuda.synchronize()
    except Exception as error:  # it fails again, with its traceback, where it is timed
        return f"{job}: {' '.join(str(error).split())[:200]}"
    return None


def kernels(rows: int) -> list[tuple[str, Any, bool]]:
    """What `compile_ahead` gets for one number of tokens."""
    usual = [(role, config) for role, config in usual_configs(Shape(), rows).items() if isinstance(config, Held)]
    jobs = [(role, config, early) for role, config in usual for early in (False, True)]
    jobs += [(name, None, early) for name in ("norm", "gate") for early in (False, True)] + [("attention", None, True)]
    if rows > 1:
        return jobs
    jobs += [(role, config, True) for role, config in integer_configs(Shape(), rows).items()]
    for changes in (CHANGES, INTEGER_CHANGES):
        jobs += [(role, config, True) for role, configs in changes.items() for config in configs]
    return jobs + [(role, config, False) for role, config in BEFORE.items()]


def captured(layers: Layers, variant: Variant) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    for _ in range(2):
        layers.run(variant)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers.run(variant)
    return graph, y


def measured(shape: Shape, count: int, rows: int) -> list[dict[str, Any]]:
    layers = Layers(shape, count, rows, usual_configs(shape, rows), integer_configs(shape, rows))
    chosen = variants(rows)
    graphs = [captured(layers, variant) for variant in chosen]
    times: list[list[float]] = [[] for _ in graphs]
    wrong: set[int] = set()
    for _ in range(REPLAYS):
        expected = None
        for number, (graph, y) in enumerate(graphs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            y.fill_(torch.nan)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[number].append(begin.elapsed_time(end) * 1e3 / count)
            expected = y.clone() if expected is None else expected
            is_same = not chosen[number].changed and "integers" not in chosen[number].early
            if is_same and not torch.equal(y, expected):
                wrong.add(number)
            if not (y.double() - expected.double()).norm() <= 0.02 * expected.double().norm():
                wrong.add(number)
    size = sum(p.words.numel() * 2 + p.scales.numel() * 4 for p in layers.weights[0].values())
    size += 4 * rows * shape.shared * shape.keys * shape.size
    return [
        {"weight": str(MXINT4), "rows": rows, "early": " ".join(variant.early), "changed": " ".join(variant.changed)}
        | {"layers": count}
        | {"configs": {role: vars(config) for role, config in layers.configs(variant).items()}}
        | {"layer_us": round(sorted(turns)[len(turns) // 2], 2), "least_us": round(min(turns), 2)}
        | {"right": number not in wrong, "megabytes": round(size / 1e6, 1)}
        for number, (variant, turns) in enumerate(zip(chosen, times, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="tokens of a step")
    parser.add_argument("--processes", type=int, default=8, help="that compile")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")
    arguments = parser.parse_args()
    if DEVICE == "cpu":
        try_on_cpu()
        return
    began, shape = time.perf_counter(), Shape()
    jobs = [job for rows in arguments.rows for job in kernels(rows)]
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for problem in filter(None, pool.map(compile_ahead, jobs)):
            print(problem, flush=True)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    split_k_counters.device_counters(torch.device("cuda", torch.cuda.current_device()))
    with torch.no_grad():
        for rows in arguments.rows:
            for row in measured(shape, arguments.layers, rows):
                row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
                print(json.dumps(row), flush=True)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def try_on_cpu() -> None:
    """Two small layers in Triton's interpreter (TRITON_INTERPRET=1), which knows no dependent launch."""
    shape = Shape(256, 512, 4, 2, 64, 70)
    y = Layers(shape, 2, 1, usual_configs(shape, 1), {}).run(Variant())
    print(f"{[*y.shape]}, all finite: {bool(y.isfinite().all())}")


if __name__ == "__main__":
    main()
