"""us of an MX linear layer on a GPU, beside cuBLAS bf16 in the same run: formats x shapes of Llama-3-8B x tokens.

    python benchmarks/gemm.py --sweep --seconds 500 --out sweep.jsonl     time every candidate configuration
    python benchmarks/gemm.py --choose sweep.jsonl --out configs.jsonl    keep the fastest right one of each case
    python benchmarks/gemm.py --configs configs.jsonl --out gemm.jsonl    the table, with what was kept

A time is that of a call within the replay of a CUDA graph of many calls, over as many copies of the weight as exceed
the L2 cache several times; the median of five replays. It holds everything that the call does. `ratio` is over cuBLAS,
timed likewise. `floor_share` is the larger of bytes / 3.0 TB/s and operations / 795 TFLOP/s, over the time. Before it
is timed, each result is compared with float64 on random data: `error` is over the bound of a float32 sum and one
rounding (kernel_check.py), at most 1 passes; what does not pass is not timed, and is recorded with its error.
Rows with an activation format have a launch of the activation's quantize-dequantize in them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from gemm_candidates import candidates, dependents
from gemm_compile import compile_all
from torch import Tensor

from mxcompile import reference
from mxcompile.formats import FORMATS, MXFormat, ScaleRule, activation_rule
from mxcompile.kernels import triton_dequantize, triton_linear, triton_planes, triton_quantize
from mxcompile.kernels.planes import Planes, plane_layout, to_planes
from mxcompile.kernels.triton_planes import Config
from mxcompile.packing import pack

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BYTES_A_SECOND, OPERATIONS_A_SECOND = 3.0e12, 795e12
ROTATED_BYTES = 260e6
DEVICE = "cuda"
_REPLAYS = 5
Call = Callable[[int], Tensor]


@dataclass
class Weight:
    """One weight in every form that is timed; a form's copies are made when it is first asked for."""

    fmt: MXFormat
    n: int
    k: int
    elements: Tensor
    scales: Tensor
    planes: Planes
    values: Tensor
    copies: dict[str, list[Any]] = field(default_factory=dict)

    def of(self, form: str) -> list[Any]:
        """Copies of `planes`, `packed` or `values`, together larger than L2."""
        if form not in self.copies:
            parts = {
                "planes": (self.planes.words, self.planes.scales),
                "packed": (self.elements, self.scales),
                "values": (self.values,),
            }[form]
            count = max(2, -(-int(ROTATED_BYTES) // sum(p.numel() * p.element_size() for p in parts)))
            self.copies[form] = [self._copy(form, [p.clone() for p in parts]) for _ in range(count)]
        return self.copies[form]

    def _copy(self, form: str, parts: list[Tensor]) -> Any:
        if form == "planes":
            return Planes(*parts, self.fmt, self.n, self.k, self.planes.lift)
        return parts if form == "packed" else parts[0]


def make_weight(fmt: MXFormat, n: int, k: int) -> Weight:
    generator = torch.Generator(device=DEVICE).manual_seed(n + k)
    values = torch.randn(n, k, generator=generator, device=DEVICE) * 0.05
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    elements = pack(codes, fmt)
    dense = reference.dequantize(codes, scales, fmt, k, torch.bfloat16)
    return Weight(fmt, n, k, elements, scales, to_planes(elements, scales, fmt, k), dense)


class Exact:
    """A product in float64, and how far from it a float32 sum rounded to bfloat16 may be."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        x64, w64 = x.double(), weight.double()
        n_u = (x.shape[-1] + 1) * 2.0**-23
        self.y = x64 @ w64.T
        error = n_u / (1 - n_u) * (x64.abs() @ w64.abs().T)
        info = torch.finfo(torch.bfloat16)
        self.bound = error + info.eps / 2 * (self.y.abs() + error) + info.smallest_normal * info.eps / 2

    def error(self, y: Tensor) -> float:
        return ((y.double() - self.y).abs() / self.bound).nan_to_num(nan=torch.inf).max().item()


def microseconds(call: Call, expected: float) -> float:
    """Median time of a call, `call(i)` using copy i; `expected` us decide how many calls a graph holds."""
    calls = max(8, min(60, int(3000 / expected)))
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    times: list[float] = []
    for i in range(_REPLAYS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i:
            times.append(start.elapsed_time(end) * 1000 / calls)
    return sorted(times)[_REPLAYS // 2]


def floor(fmt: MXFormat, n: int, k: int, m: int) -> float:
    """us below which no kernel that sums bfloat16 products can go."""
    size = fmt.storage_bytes(n, k) + 2 * m * (n + k)
    return max(size / BYTES_A_SECOND, 2 * m * n * k / OPERATIONS_A_SECOND) * 1e6


def planes_call(w: Weight, x: Tensor, config: Config, counters: Tensor) -> Call:
    copies = w.of("planes")
    return lambda i: triton_planes.linear(x, copies[i % len(copies)], None, config, counters)


def cublas_call(w: Weight, x: Tensor) -> Call:
    copies = w.of("values")
    return lambda i: torch.nn.functional.linear(x, copies[i % len(copies)])


def plain_call(w: Weight, x: Tensor) -> Call:
    copies = w.of("packed")
    return lambda i: triton_linear.linear(x, *copies[i % len(copies)], None, w.fmt)


def dequantized_call(w: Weight, x: Tensor, slabs: int, warps: int, chunk: int) -> Call:
    """Dequantize to bfloat16 and multiply with cuBLAS, `chunk` rows at a time through one buffer that L2 can hold."""
    copies, rows = w.of("planes"), min(chunk, w.n)
    buffer = torch.empty(rows, w.k, dtype=torch.bfloat16, device=DEVICE)

    def call(i: int) -> Tensor:
        planes: Planes = copies[i % len(copies)]
        y = torch.empty(x.shape[0], w.n, dtype=x.dtype, device=x.device)
        for first in range(0, w.n, rows):
            tiles = slice(first // 64, -(-min(first + rows, w.n) // 64))
            out = min(rows, w.n - first)
            part = Planes(planes.words[tiles], planes.scales[tiles], w.fmt, out, w.k, planes.lift)
            values = triton_dequantize.dequantize(part, buffer[:out], slabs, warps)
            torch.mm(x, values.T, out=y[:, first : first + out])
        return y

    return call


def quantizing(call: Callable[[Tensor], Call], x: Tensor, fmt: MXFormat) -> Call:
    """A call that quantizes and dequantizes its activation first, each time."""
    rule = activation_rule(fmt)

    def both(i: int) -> Tensor:
        return call(triton_quantize.quantize_dequantize(x, fmt, rule))(i)

    return both


def tokens(m: int, k: int) -> Tensor:
    generator = torch.Generator(device=DEVICE).manual_seed(m)
    return torch.randn(m, k, generator=generator, device=DEVICE).to(torch.bfloat16)


@dataclass
class Run:
    """What is common to all lines of a file, and the lines."""

    command: str
    seconds: float
    lines: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() - self.start > self.seconds

    def add(self, w: Weight, m: int, path: str, call: Call, exact: Exact, cublas: float, **more: Any) -> float | None:
        """Check and time one call; its us, or None if it is wrong or cannot run."""
        line: dict[str, Any] = {"weight": str(w.fmt), "activation": "bf16", "path": path, "n": w.n, "k": w.k, "m": m}
        line |= more
        us = None
        try:
            errors = [exact.error(call(i)) for i in range(2)]
            line["error"] = max(errors)
            if max(errors) <= 1:
                us = microseconds(call, cublas)
                shares = {"ratio": round(cublas / us, 3), "floor_share": round(floor(w.fmt, w.n, w.k, m) / us, 3)}
                line |= {"us": round(us, 2), "cublas_bf16_us": round(cublas, 2), **shares}
        except (triton.errors.TritonError, RuntimeError) as error:
            torch.cuda.synchronize()  # raises again where the GPU is lost to this process
            line["failed"] = str(error).strip().splitlines()[0][:200]
        self.lines.append(line)
        return us

    def write(self, out: Path | None) -> None:
        if out is None:
            return
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        out.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({**about, "command": self.command})
        out.write_text("\n".join([head, *map(json.dumps, self.lines)]) + "\n")


def warm_up(seconds: float = 1.0) -> None:
    """Let the clocks rise before anything is timed."""
    a = torch.randn(4096, 4096, device=DEVICE).to(torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.mm(a, a)
        torch.cuda.synchronize()


def sweep(
    run: Run, formats: list[MXFormat], rows: list[int], shapes: dict[str, tuple[int, int]], out: Path | None
) -> None:
    """Time every candidate; where time runs out, what comes last is missing."""
    jobs = {
        (str(fmt), config)
        for fmt, m, (n, _) in product(formats, rows, shapes.values())
        for config in candidates(m, n, plane_layout(fmt).columns)
    }
    print(f"compiling {len(jobs)} kernels", flush=True)
    compile_all(sorted(jobs, key=str), sorted({k for _, k in shapes.values()}))
    print(f"compiled after {time.monotonic() - run.start:.0f} s", flush=True)
    counters = torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE)
    warm_up()
    for fmt, (name, (n, k)) in product(formats, shapes.items()):
        if run.out_of_time:
            print(f"out of time before {fmt} {name}")
            return
        w = make_weight(fmt, n, k)
        for m in rows:
            _sweep_case(run, w, m, counters)
            run.write(out)
            best = min(_right(run.lines, w, m), key=lambda line: line["us"], default=None)
            print(fmt, name, m, best and (best["us"], best["ratio"], best["floor_share"], best["config"]), flush=True)
        del w


def _sweep_case(run: Run, w: Weight, m: int, counters: Tensor) -> None:
    x = tokens(m, w.k)
    exact = Exact(x, w.values)
    cublas = microseconds(cublas_call(w, x), 2 * floor(w.fmt, w.n, w.k, m))
    timed: list[tuple[float, Config]] = []

    def measure(config: Config) -> None:
        counters.zero_()
        us = run.add(w, m, "planes", planes_call(w, x, config, counters), exact, cublas, config=asdict(config))
        if us is not None:
            timed.append((us, config))

    for config in candidates(m, w.n, plane_layout(w.fmt).columns):
        measure(config)
    if m < 1024:
        for _, best in sorted(timed, key=lambda pair: pair[0])[:2]:
            for config in dependents(best):
                measure(config)
    else:
        for slabs, warps, chunk in ((1, 4, w.n), (2, 4, w.n), (4, 8, w.n), (2, 4, 4096), (2, 4, 8192)):
            call = dequantized_call(w, x, slabs, warps, chunk)
            config = {"slabs": slabs, "warps": warps, "chunk": chunk}
            run.add(w, m, "dequantize+cublas", call, exact, cublas, config=config)


def _right(lines: Iterable[dict[str, Any]], w: Weight, m: int) -> list[dict[str, Any]]:
    key = (str(w.fmt), w.n, w.k, m)
    return [line for line in lines if "us" in line and (line["weight"], line["n"], line["k"], line["m"]) == key]


def choose(lines: Iterable[dict[str, Any]], dependent: bool) -> list[dict[str, Any]]:
    """The fastest line of each format, shape and number of tokens; with or without dependent launch."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        if "us" not in line or (line["config"].get("dependent", False) and not dependent):
            continue
        key = tuple(line[name] for name in ("weight", "n", "k", "m"))
        if key not in best or line["us"] < best[key]["us"]:
            best[key] = line
    return list(best.values())


def write_cuts(chosen: list[dict[str, Any]], path: Path) -> None:
    """What `mxcompile/kernels/planes_configs.py` reads."""
    lines = [{name: line[name] for name in ("weight", "n", "k", "m", "path", "config")} for line in chosen]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def table(run: Run, chosen: list[dict[str, Any]], activations: list[str]) -> None:
    """Time the chosen configurations, the plain kernel, and the same with activations quantized on the way."""
    counters = torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE)
    warm_up()
    cases = sorted({(line["weight"], line["n"], line["k"]) for line in chosen})
    for name, n, k in cases:
        w = make_weight(FORMATS[name], n, k)
        for line in (c for c in chosen if (c["weight"], c["n"], c["k"]) == (name, n, k)):
            if run.out_of_time:
                return
            _table_case(run, w, line, activations, counters)
        del w


def _table_case(run: Run, w: Weight, line: dict[str, Any], activations: list[str], counters: Tensor) -> None:
    m, config = line["m"], line["config"]
    x = tokens(m, w.k)
    exact = Exact(x, w.values)
    cublas = microseconds(cublas_call(w, x), 2 * line["us"])

    def chosen(x: Tensor) -> Call:
        if line["path"] != "planes":
            return dequantized_call(w, x, **config)
        return planes_call(w, x, Config(**config), counters)

    run.add(w, m, line["path"], chosen(x), exact, cublas, config=config)
    run.add(w, m, "plain", plain_call(w, x), exact, cublas)
    for activation in activations:
        fmt = FORMATS[activation]
        rounded = triton_quantize.quantize_dequantize(x, fmt, activation_rule(fmt))
        call = quantizing(chosen, x, fmt)
        run.add(w, m, line["path"], call, Exact(rounded, w.values), cublas, config=config, activation=activation)


def totals(lines: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Layer totals of what was timed for all four shapes."""
    groups: dict[tuple[Any, ...], dict[tuple[int, int], dict[str, Any]]] = {}
    for line in lines:
        if "us" in line:
            key = line["weight"], line["activation"], "plain" if line["path"] == "plain" else "best", line["m"]
            groups.setdefault(key, {})[line["n"], line["k"]] = line
    for (weight, activation, path, m), shapes in sorted(groups.items(), key=str):
        if len(shapes) == len(SHAPES):
            us, cublas = (sum(line[name] for line in shapes.values()) for name in ("us", "cublas_bf16_us"))
            worst = min(line["ratio"] for line in shapes.values())
            yield f"{weight:11} {activation:11} {path:6} {m:5} {us:8.1f} us  {cublas / us:5.2f}x  worst {worst:5.2f}x"


def read(path: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if "weight" in line]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here, one JSON object a line")
    parser.add_argument("--sweep", action="store_true", help="time every candidate configuration")
    parser.add_argument("--choose", type=Path, help="keep the fastest line of each case of this file; needs no GPU")
    parser.add_argument("--configs", type=Path, help="time the configurations of this file (from --choose)")
    parser.add_argument("--cuts", type=Path, help="--choose: write the table of cuts that the product reads")
    parser.add_argument("--dependent", action="store_true", help="--choose: allow dependent launch")
    parser.add_argument("--formats", default="mxint4,mxfp4", help="comma-separated")
    parser.add_argument("--activations", default="mxint8", help="--configs: formats, comma-separated, or empty")
    parser.add_argument("--rows", default="1,16,64,256,2048", help="M, comma-separated")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=500.0, help="start nothing new after so many")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    run = Run(" ".join(["python benchmarks/gemm.py", *sys.argv[1:]]), arguments.seconds)
    if arguments.choose:
        chosen = choose(read(arguments.choose), arguments.dependent)
        print(*totals(chosen), sep="\n")
        if arguments.out:
            arguments.out.write_text("".join(json.dumps(line) + "\n" for line in chosen))
        if arguments.cuts:
            write_cuts(chosen, arguments.cuts)
        return 0
    if not torch.cuda.is_available():
        print("gemm: no CUDA GPU here, nothing was timed")
        return 0
    try:
        if arguments.sweep:
            rows = [int(m) for m in arguments.rows.split(",")]
            shapes = {name: SHAPES[name] for name in arguments.shapes.split(",")}
            sweep(run, [FORMATS[name] for name in arguments.formats.split(",")], rows, shapes, arguments.out)
            print(*totals(choose(run.lines, dependent=False)), "with dependent launch:", sep="\n")
            print(*totals(choose(run.lines, dependent=True)), sep="\n")
        elif arguments.configs:
            table(run, read(arguments.configs), [a for a in arguments.activations.split(",") if a])
            print(*totals(run.lines), sep="\n")
    finally:
        run.write(arguments.out)
    return 1 if any(line.get("error", 0) > 1 for line in run.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
