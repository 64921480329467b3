"""What experts.py and experts_peers.py share: experts layers, choices of experts, the check against float64, the floor.

A call in a CUDA graph uses the experts that were not used for the longest time. So its weights come from memory, not
from L2, without copies of them.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gemm_timing
import torch
from gemm_timing import Call, Run, formats, names, reason
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule, activation_rule
from mxcompile.numerics import reference
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.packing import pack

OURS, MATMULS, BF16 = "mxcompile", "two grouped_mm", "bf16"
PEERS = ("marlin", "humming", "triton_kernels")
TURNS = 16
"""Different choices of experts, one call after the other."""
SAMPLE = 8
"""Tokens that are compared with float64."""
GROSS = 0.02
"""Error of a token, relative to its norm, beyond which a result of another project is wrong and not timed."""
_LARGEST_ERROR = 2.0
_UNIT = 2.0**-9


@dataclass(frozen=True)
class Shape:
    """One experts layer; `family` is the model in transformers whose experts have this gate and weight layout."""

    experts: int
    choices: int
    hidden: int
    inner: int
    family: Literal["qwen3_moe", "gpt_oss"] = "qwen3_moe"

    @property
    def gate(self) -> Gate:
        return Gate() if self.family == "qwen3_moe" else Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)

    @property
    def biases(self) -> bool:
        return self.family == "gpt_oss"

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(out, in) of the weights before and after the gate."""
        return (2 * self.inner, self.hidden), (self.hidden, self.inner)


SHAPES = {
    "qwen3-moe": Shape(128, 8, 2048, 768),
    "gpt-oss": Shape(32, 4, 2880, 2880, "gpt_oss"),
    "small": Shape(8, 2, 128, 64),
    "small-gpt-oss": Shape(4, 2, 192, 192, "gpt_oss"),
}
"""By name; the small ones are for trying the script."""


@dataclass(frozen=True, eq=False)
class Stack:
    """The weights of all experts for one of the two matmuls: elements and scales in rows, their values, a bias."""

    fmt: MXFormat
    elements: Tensor
    scales: Tensor
    values: Tensor
    bias: Tensor | None

    @property
    def k(self) -> int:
        """Input channels."""
        return self.values.shape[2]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: elements, scales and bias."""
        out, size = self.values.shape[1:]
        return self.fmt.storage_bytes(out, size) + (2 * out if self.bias is not None else 0)


@dataclass(frozen=True, eq=False)
class Layer:
    """The experts of one layer in one format."""

    shape: Shape
    up: Stack
    down: Stack

    @property
    def fmt(self) -> MXFormat:
        return self.up.fmt


def make_layer(shape: Shape, fmt: MXFormat, device: str) -> Layer:
    """Normal weights, quantized to `fmt`."""
    up, down = (_make_stack(shape, fmt, out, size, device) for out, size in shape.sizes)
    return Layer(shape, up, down)


def _make_stack(shape: Shape, fmt: MXFormat, out: int, size: int, device: str) -> Stack:
    generator = torch.Generator(device=device).manual_seed(out + size)
    options: dict[str, Any] = {"generator": generator, "device": device}
    values = torch.randn(shape.experts, out, size, **options) * 0.05
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    values = reference.dequantize(codes, scales, fmt, size, torch.bfloat16).contiguous()
    bias = torch.randn(shape.experts, out, **options).to(torch.bfloat16) if shape.biases else None
    return Stack(fmt, pack(codes, fmt), scales, values, bias)


@dataclass(frozen=True)
class Routes:
    """Experts int64 and weights bfloat16, each `[tokens, k]`, one pair for each of the turns."""

    experts: list[Tensor]
    weights: list[Tensor]

    @property
    def distinct(self) -> float:
        """Experts that a call uses, on average over the turns."""
        return sum(len(experts.unique()) for experts in self.experts) / len(self.experts)


def make_routes(shape: Shape, tokens: int, device: str, turns: int = TURNS) -> Routes:
    """Random experts without repetition within a token; each turn takes those that were not used for the longest."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.randperm(shape.experts, generator=generator)
    experts: list[Tensor] = []
    for _ in range(turns):
        numbers = torch.rand(tokens, shape.experts, generator=generator).argsort(dim=1)[:, : shape.choices]
        used = numbers.unique()
        oldest = order[: len(used)]
        names = torch.zeros(shape.experts, dtype=torch.int64)
        names[used] = oldest
        experts.append(names[numbers].to(device))
        order = torch.cat([order[len(used) :], oldest])
    weights = torch.randn(turns, tokens, shape.choices, generator=generator).softmax(-1).to(device, torch.bfloat16)
    return Routes(experts, list(weights))


def tokens_of(shape: Shape, tokens: int, device: str) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(tokens)
    return torch.randn(tokens, shape.hidden, generator=generator, device=device).to(torch.bfloat16)


class Exact:
    """A sample of tokens in float64, and what the composition of single ops, each rounded to bfloat16, gives for it."""

    def __init__(self, layer: Layer, x: Tensor, experts: Tensor, weights: Tensor, activation: MXFormat | None) -> None:
        self.rows = torch.linspace(0, len(x) - 1, min(SAMPLE, len(x)), device=x.device).round().long()
        chosen = (x[self.rows], experts[self.rows], weights[self.rows])
        self.y = composition(layer, *chosen, activation, torch.float64)
        self.rounding = self.error_of(composition(layer, *chosen, activation, torch.bfloat16))

    def error(self, y: Tensor) -> float:
        """The largest |y - y64| / |y64| (Euclidean norms) of a token."""
        return self.error_of(y[self.rows])

    def error_of(self, y: Tensor) -> float:
        errors = (y.double() - self.y).norm(dim=-1) / self.y.norm(dim=-1)
        return errors.nan_to_num(nan=torch.inf).max().item()

    @property
    def largest_error(self) -> float:
        """A kernel rounds at most as often as the composition; which values round up differs."""
        return _LARGEST_ERROR * self.rounding + _UNIT


def composition(
    layer: Layer, x: Tensor, experts: Tensor, weights: Tensor, activation: MXFormat | None, dtype: torch.dtype
) -> Tensor:
    """The layer, one token and op after the other, in `dtype`: x `[tokens, hidden]`, experts, weights `[tokens, k]`."""
    rows: list[Tensor] = []
    for token, numbers, factors in zip(x, experts, weights, strict=True):
        inner = layer.shape.gate(_multiply(layer.up, numbers, token.expand(len(numbers), -1), dtype))
        if activation is not None:
            narrow = inner if dtype == torch.bfloat16 else inner.float()
            inner = reference.quantize_dequantize(narrow, activation, activation_rule(activation))
        y = _multiply(layer.down, numbers, inner, dtype)
        rows.append((y * factors.to(dtype)[:, None]).sum(0))
    return torch.stack(rows)


def _multiply(stack: Stack, experts: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[k, in]`, each row by its expert: `[k, out]`."""
    y = torch.bmm(stack.values[experts].to(dtype), x.to(dtype).unsqueeze(-1)).squeeze(-1)
    return y if stack.bias is None else y + stack.bias[experts].to(dtype)


@dataclass(frozen=True)
class Rates:
    """What this run measured: bytes read and written a second by a copy, operations a second of a bfloat16 matmul."""

    copy: float
    matmul: float

    def floor(self, layer: Layer, routes: Routes, tokens: int, *, bf16: bool = False) -> float:
        """The least us for a call: bytes of the experts it uses and of the tokens, or operations, at these rates."""
        shape = layer.shape
        stacks = (layer.up, layer.down)
        expert = sum(2 * stack.values[0].numel() if bf16 else stack.expert_bytes for stack in stacks)
        size = routes.distinct * expert + 4 * tokens * shape.hidden
        operations = 2 * tokens * shape.choices * sum(out * size for out, size in shape.sizes)
        return max(size / self.copy, operations / self.matmul) * 1e6


def measure_rates(device: str) -> Rates:
    """Of a kernel that copies 4 GB (`copy_` in a CUDA graph has two thirds of its rate), and of a matmul."""
    size, width = (1 << 30, 8192) if device == "cuda" else (1 << 24, 512)
    source = torch.zeros(size, dtype=torch.int32, device=device)
    target, matrix = torch.empty_like(source), torch.randn(width, width, device=device).to(torch.bfloat16)
    product = torch.empty_like(matrix)
    copy = _seconds(lambda: torch.add(source, 0, out=target))
    return Rates(8 * size / copy, 2 * width**3 / _seconds(lambda: torch.mm(matrix, matrix, out=product)))


def _seconds(call: Callable[[], Tensor]) -> float:
    """Of one of ten calls in a row, after three; on a CPU of one."""
    for _ in range(3):
        call()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e4


def in_turns(calls: Sequence[Call], expected: float) -> list[float]:
    """`gemm_timing.in_turns`, and without a GPU the median us of five rounds of single calls."""
    if torch.cuda.is_available():
        return gemm_timing.in_turns(calls, expected)
    times: list[list[float]] = []
    for round in range(6):
        times.append([])
        for call in calls:
            began = time.perf_counter()
            call(round)
            times[-1].append((time.perf_counter() - began) * 1e6)
    return [sorted(turns)[2] for turns in zip(*times[1:], strict=True)]


def line_of(layer: Layer, path: str, tokens: int, activation: MXFormat | None, *, weight: str = "") -> dict[str, Any]:
    """The fields of a record that say what was timed."""
    name = next(name for name, shape in SHAPES.items() if shape == layer.shape)
    line = {"weight": weight or str(layer.fmt), "activation": str(activation) if activation is not None else BF16}
    return line | {"path": path, "shape": name, "tokens": tokens}


def in_a_line(line: dict[str, Any]) -> str:
    """A record to read while the rest is timed."""
    case = f"{line['shape']} {line['tokens']:5} tokens  {line['weight']:11} {line['activation']:11} {line['path']:22} "
    if "us" not in line:
        return case + str(line.get("failed"))
    numbers = f"{line['us']:9.2f} us, floor {line['floor_us']:8.2f} ({line['floor_share']:.0%} of its speed)"
    ratio = f", {line['ratio']:.2f}x bf16" if "ratio" in line else ""
    ratio += f", {line['times_ours']:.2f} times our {line['mxcompile_us']:.2f}" if "times_ours" in line else ""
    error = f", error {line['error']:.2%}" if "error" in line else ""
    return case + numbers + ratio + error


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """Options for the cases, the time and the output file."""

    def option(name: str, kind: Callable[[str], Any], default: str, content: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=f"{content}, comma-separated: %(default)s")

    option("--formats", formats, "mxfp4,mxint4", "weight formats")
    option("--tokens", lambda text: list(map(int, names(text))), "1,4,16,64,256,2048", "numbers of tokens")
    option("--shapes", names, "qwen3-moe,gpt-oss", f"shapes, of {', '.join(SHAPES)}")
    parser.add_argument("--seconds", type=float, default=300.0, help="start no new case after that: %(default)s")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")


class Case:
    """Everything that is timed in turns for one shape and number of tokens."""

    def __init__(self, run: Run, *, record_ours: bool = True) -> None:
        self.run, self.record_ours = run, record_ours
        self.timed: list[tuple[dict[str, Any], Call]] = []

    def add(self, line: dict[str, Any], make: Callable[[], Call], exact: Exact | None, floor: float) -> None:
        """Check a call, and time it alone, so that one that cannot be captured stops no other."""
        line |= {"floor_us": round(floor, 2)}
        try:
            call = make()
            line |= checked(call, exact, line["path"] == OURS)
            if "failed" not in line:
                line["us"] = in_turns([call], 4 * floor + 10)[0]
                self.timed.append((line, call))
                return
        except Exception as problem:  # whatever it is, the next call runs
            line["failed"] = reason(problem)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises again where the GPU is lost to this process
        self.keep(line)

    def finish(self) -> None:
        """Time the calls in turns, and record them."""
        if not self.timed:
            return
        times = in_turns([call for _, call in self.timed], max(line["us"] for line, _ in self.timed))
        for (line, _), us in zip(self.timed, times, strict=True):
            line |= {"us": round(us, 2), "floor_share": round(line["floor_us"] / us, 3)}
        lines = [line for line, _ in self.timed]
        ours = {(line["weight"], line["activation"]): line["us"] for line in lines if line["path"] == OURS}
        layers = [line["us"] for line in lines if line["weight"] == BF16 and line["path"] != MATMULS]
        for line in lines:
            if layers:
                line.update(bf16_us=min(layers), ratio=round(min(layers) / line["us"], 3))
            us = ours.get((line["weight"], line["activation"]))
            if us is not None and line["path"] != OURS:
                line.update(mxcompile_us=us, times_ours=round(line["us"] / us, 3))
            self.keep(line)

    def keep(self, line: dict[str, Any]) -> None:
        if self.record_ours or line["path"] != OURS:
            self.run.keep(line)
        print(in_a_line(line), flush=True)


def checked(call: Call, exact: Exact | None, ours: bool) -> dict[str, Any]:
    """Error and rounding, and why the result is wrong, if it is."""
    y = call(0)
    if exact is None:
        return {}
    error = exact.error(y)
    line: dict[str, Any] = {"error": float(f"{error:.3g}"), "rounding": float(f"{exact.rounding:.3g}")}
    if error > (exact.largest_error if ours else GROSS):
        line["failed"] = f"wrong by {error:.2%} of a token's norm"
    elif ours and not torch.equal(call(0), y):
        line["failed"] = "results differ between calls"
    return line
