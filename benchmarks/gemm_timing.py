"""What gemm.py, gemm_peers.py and tuning/ share: weights, the check against float64, timing, records."""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule, parse_format
from mxcompile.kernels.layout.planes import PlanarWeight, to_planes
from mxcompile.kernels.tuned_configs import DEQUANTIZED, GLUON, HELD, TRITON
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BYTES_A_SECOND = {"H200": 4.27e12, "": 3.0e12}
"""What a copy was measured to move on a GPU whose name contains that; the last is an H100's."""
OPERATIONS_A_SECOND = 795e12
ROTATED_BYTES = 260e6
DEVICE = "cuda"
OURS = (TRITON, HELD, GLUON, DEQUANTIZED)
"""Paths of our kernels with float activations."""
_REPLAYS = 5
Call = Callable[[int], Tensor]


def rotated(parts: Sequence[Tensor]) -> list[list[Tensor]]:
    """Copies of the tensors that a call reads, together larger than L2."""
    count = max(2, -(-int(ROTATED_BYTES) // sum(part.numel() * part.element_size() for part in parts)))
    return [[part.detach().clone() for part in parts] for _ in range(count)]


@dataclass
class Weight:
    """One weight in every form that is timed; the copies of a form are made on first use."""

    fmt: MXFormat
    n: int
    k: int
    elements: Tensor
    scales: Tensor
    planes: PlanarWeight
    values: Tensor
    copies: dict[str, list[Any]] = field(default_factory=dict)

    def of(self, form: str) -> list[Any]:
        """Copies of `planes` or `values`, together larger than L2."""
        if form not in self.copies:
            parts = [self.planes.words, self.planes.scales] if form == "planes" else [self.values]
            self.copies[form] = [self._copy(form, copy) for copy in rotated(parts)]
        return self.copies[form]

    def _copy(self, form: str, parts: list[Tensor]) -> Any:
        return (
            PlanarWeight(*parts, self.fmt, self.n, self.k, self.planes.lift, self.planes.top)
            if form == "planes"
            else parts[0]
        )


def make_weight(fmt: MXFormat, n: int, k: int) -> Weight:
    generator = torch.Generator(device=DEVICE).manual_seed(n + k)
    values = torch.randn(n, k, generator=generator, device=DEVICE) * 0.05
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    elements = pack(codes, fmt)
    dense = reference.dequantize(codes, scales, fmt, k, torch.bfloat16)
    return Weight(fmt, n, k, elements, scales, to_planes(elements, scales, fmt, k), dense)


def tokens(m: int, k: int) -> Tensor:
    generator = torch.Generator(device=DEVICE).manual_seed(m)
    return torch.randn(m, k, generator=generator, device=DEVICE).to(torch.bfloat16)


class Exact:
    """A matmul in float64, and how far from it float32 accumulation rounded to bfloat16 may be."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        x64, w64 = x.double(), weight.double()
        n_u = (x.shape[-1] + 1) * 2.0**-23
        self.y = x64 @ w64.T
        error = n_u / (1 - n_u) * (x64.abs() @ w64.abs().T)
        info = torch.finfo(torch.bfloat16)
        self.bound = error + info.eps / 2 * (self.y.abs() + error) + info.smallest_normal * info.eps / 2

    def error(self, y: Tensor) -> float:
        """The largest error over the bound: at most 1 is correct."""
        return ((y.double() - self.y).abs() / self.bound).nan_to_num(nan=torch.inf).max().item()

    def relative_error(self, y: Tensor) -> float:
        """Norm of the error over that of the result."""
        return ((y.double() - self.y).norm() / self.y.norm()).nan_to_num(nan=torch.inf).item()


def microseconds(call: Call, expected: float, replays: int = _REPLAYS) -> float:
    """Median us of a call, `call(i)` using copy i; `expected` us decides how many calls a CUDA graph holds."""
    return in_turns([call], expected, replays)[0]


def in_turns(calls: Sequence[Call], expected: float, replays: int = _REPLAYS) -> list[float]:
    """The same of several calls, whose replays alternate: clocks that fall as a GPU warms up slow down all of them."""
    count = max(8, min(60, int(3000 / expected)))
    graphs = [_captured(call, count) for call in calls]
    times: list[list[float]] = []
    for _ in range(replays + 1):
        times.append([_replay(graph) * 1000 / count for graph in graphs])
    return [sorted(turns)[replays // 2] for turns in zip(*times[1:], strict=True)]


def _captured(call: Call, count: int) -> torch.cuda.CUDAGraph:
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """In milliseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def floor(fmt: MXFormat, n: int, k: int, m: int) -> float:
    """The least us that a bfloat16 matmul can take."""
    size = fmt.storage_bytes(n, k) + 2 * m * (n + k)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    rate = next(rate for part, rate in BYTES_A_SECOND.items() if part in name)
    return max(size / rate, 2 * m * n * k / OPERATIONS_A_SECOND) * 1e6


def cublas_call(w: Weight, x: Tensor) -> Call:
    copies = w.of("values")
    return lambda i: torch.nn.functional.linear(x, copies[i % len(copies)])


def warm_up(seconds: float = 1.0) -> None:
    """Let the clocks rise before anything is timed."""
    a = torch.randn(4096, 4096, device=DEVICE).to(torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.mm(a, a)
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Case:
    """One weight and number of tokens, the exact result, and cuBLAS's us for it."""

    w: Weight
    x: Tensor
    exact: Exact
    cublas: float

    def name(self, path: str) -> dict[str, Any]:
        """The fields of a record that say what was timed."""
        line = {"weight": str(self.w.fmt), "activation": "bf16", "path": path}
        return line | {"n": self.w.n, "k": self.w.k, "m": len(self.x)}

    def times(self, call: Call) -> dict[str, Any]:
        """Those that say how long it took, alternating with cuBLAS."""
        us, cublas = in_turns([call, cublas_call(self.w, self.x)], self.cublas)
        fastest = floor(self.w.fmt, self.w.n, self.w.k, len(self.x))
        line = {"us": round(us, 2), "cublas_bf16_us": round(cublas, 2)}
        return line | {"ratio": round(cublas / us, 3), "floor_share": round(fastest / us, 3)}


def make_case(w: Weight, m: int) -> Case:
    x = tokens(m, w.k)
    cublas = microseconds(cublas_call(w, x), 2 * floor(w.fmt, w.n, w.k, m))
    return Case(w, x, Exact(x, w.values), cublas)


@dataclass
class Run:
    """The records of a run, each appended to a file at once, after one with the device and the command."""

    command: str
    seconds: float
    out: Path | None
    lines: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def out_of_time(self) -> bool:
        return self.elapsed > self.seconds

    def add(self, case: Case, path: str, call: Call, **more: Any) -> float | None:
        """Check, time and record one call of ours; its us, or None if it is wrong or cannot run."""
        return self._add(case, path, call, lambda: case.times(call), more).get("us")

    def add_quickly(self, case: Case, path: str, call: Call, **more: Any) -> float | None:
        """The same, without cuBLAS beside it, and recorded as `quick_us`."""
        return self._add(
            case, path, call, lambda: {"quick_us": round(microseconds(call, case.cublas, 2), 2)}, more
        ).get("quick_us")

    def _add(
        self, case: Case, path: str, call: Call, times: Callable[[], dict[str, Any]], more: dict[str, Any]
    ) -> dict[str, Any]:
        line = case.name(path) | more
        try:
            results = [call(i) for i in range(3)]
            error = case.exact.error(results[0])
            line["error"] = round(error, 3)
            if not all(torch.equal(results[0], y) for y in results):
                line["failed"] = "results differ between calls"
            elif error <= 1:
                line |= times()
        except Exception as problem:  # whatever it is, the next call runs
            line["failed"] = reason(problem)
            torch.cuda.synchronize()  # raises again where the GPU is lost to this process
        finally:
            self.keep(line)
        return line

    def keep(self, line: dict[str, Any]) -> None:
        if not self.lines:
            versions = {"torch": torch.__version__, "triton": triton.__version__}
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            self._write({"device": device, **versions, "command": self.command})
        self.lines.append(line)
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                print(json.dumps(line), file=file)


def reason(problem: Exception) -> str:
    """The problem in one line."""
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0][:200]}" if text else type(problem).__name__


def in_a_line(line: dict[str, Any]) -> str:
    """A record to read while the rest is timed."""
    case = f"{line['weight']} {line['activation']} {line['path']}, {line['n']} x {line['k']}, {line['m']} tokens: "
    if "us" in line:
        return case + f"{line['us']} us, {line['ratio']}x, error {line['error']}"
    return case + str(line.get("failed", f"wrong, error {line.get('error')}"))


def read(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """The records of a file, from byte `start` on."""
    text = path.read_bytes()[start:].decode()
    return [line for line in map(json.loads, text.splitlines()) if "weight" in line]


def totals(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Totals of a layer, where all four shapes were timed; our kernels with float activations count as one path."""
    groups: dict[tuple[Any, ...], dict[tuple[int, int], dict[str, Any]]] = {}
    for line in lines:
        if "us" in line:
            path = "mxcompile" if line["path"] in OURS else line["path"]
            group = groups.setdefault((line["weight"], line["activation"], line["m"], path), {})
            group[line["n"], line["k"]] = line
    yield f"{'weight':11} {'activation':11} {'M':>5} {'path':28} {'layer us':>9} {'ratio':>6} {'worst':>6}"
    for (weight, activation, m, path), shapes in sorted(groups.items()):
        if len(shapes) == len(SHAPES):
            us, cublas = (sum(line[name] for line in shapes.values()) for name in ("us", "cublas_bf16_us"))
            worst = min(line["ratio"] for line in shapes.values())
            yield f"{weight:11} {activation:11} {m:5} {path:28} {us:9.1f} {cublas / us:5.2f}x {worst:5.2f}x"


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def formats(text: str) -> list[MXFormat]:
    return [parse_format(name) for name in names(text)]


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """Options for the cases, the time and the output file."""

    def option(name: str, kind: Callable[[str], Any], default: str, content: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=f"{content}, comma-separated: %(default)s")

    option("--formats", formats, "mxint4,mxfp4", "weight formats")
    option("--rows", lambda text: list(map(int, names(text))), "1,16,64,256,2048", "numbers of tokens")
    option("--shapes", names, ",".join(SHAPES), "shapes")
    parser.add_argument("--seconds", type=float, default=500.0, help="start no new case after that: %(default)s")
    parser.add_argument("--kernels", type=Path, help="a folder of compiled kernels (tuning/carried_cache.py)")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON object a line")


def cases(run: Run, arguments: argparse.Namespace) -> Iterator[Case]:
    """All shapes for one number of tokens, then the next; the last cases are missing if time runs out."""
    for fmt in arguments.formats:
        weights = [make_weight(fmt, *SHAPES[shape]) for shape in arguments.shapes]
        for m, w in product(arguments.rows, weights):
            if run.out_of_time:
                print(f"out of time before {fmt} {w.n} x {w.k}, {m} tokens", flush=True)
                return
            yield make_case(w, m)
