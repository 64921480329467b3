"""Compile the planes kernel for Hopper without a GPU, and read what came out: registers, spills, waits, instructions.

    python benchmarks/kernel_sass.py --formats mxint4,mxfp4 --config rows=8,out=64,warps=2,joined=0

`attention_report` does the same for the kernel of attention.

`loop` is the number of instructions of the main loop, which one warp issues for a slab; `elements` how many weights a
multiprocessor can decode and multiply per clock at most, if it issues one instruction a clock in each of its four
parts. An H100 at 3.0 TB/s delivers 24 elements a clock at 4.25 bits, 16.6 at 6.25 and 12.6 at 8.25. `serialized` is
ptxas' own complaint that wgmma instructions wait for each other.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxcompile.formats import MXFormat, parse_format
from mxcompile.kernels.layout.planes import plane_layout
from mxcompile.kernels.triton import attention, planes_linear
from mxcompile.kernels.triton.planes_linear import Config

_POINTERS = {"x": "*bf16", "words": "*i16", "scales": "*i32", "counters": "*i32"}
_MULTIPLES = ("k_size", "slabs", "x_stride")
_INTEGERS = ("m_size", *_MULTIPLES)
_TUPLES = {"biases": "*bf16", "ys": "*bf16", "outs": "i32"}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What ptxas made of one kernel; `waits` counts the waits for wgmma in the main loop, `products` HGMMA or HMMA."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: bool
    loop: int
    products: int
    waits: int
    elements: float


def compile_kernel(fmt: MXFormat, config: Config) -> Any:
    """The kernel as it is launched on a GPU: one weight, no bias, sizes that are multiples of 16."""
    kernel = planes_linear._planes_kernel
    given = planes_linear.constants(fmt, config) | {"HAS_BIAS": False, "PADDED": False, "INTERPRETED": False}
    signature = dict.fromkeys(given, "constexpr") | dict.fromkeys(_INTEGERS, "i32") | _POINTERS
    signature |= {"partial": "*bf16" if config.split == 1 else "*fp32", "lift": "fp32"}
    signature |= {name: (kind,) for name, kind in _TUPLES.items()}
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*_POINTERS, "partial", *_MULTIPLES)}
    aligned |= {(names.index(name), 0): [["tt.divisibility", 16]] for name in _TUPLES}
    constants = {(names.index(name),): value for name, value in given.items()}
    source = ASTSource(kernel, {name: signature[name] for name in names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=planes_linear.options(config))


def report(fmt: MXFormat, config: Config) -> Report:
    compiled = compile_kernel(fmt, config)
    facts, sass = examine(compiled)
    body = max(loops(sass), key=len, default=[])
    weights = config.out * plane_layout(fmt).columns
    return Report(
        **facts,
        loop=len(body),
        products=sum("HGMMA" in line or "HMMA" in line for line in body),
        waits=sum("WARPGROUP.DEPBAR" in line for line in body),
        elements=round(4 * weights / max(1, len(body) * config.warps), 1),
    )


@dataclass(frozen=True)
class AttentionReport:
    """`copies` counts the instructions that bring keys and values to shared memory, `block` keys at a time."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: bool
    copies: int
    block: int


def compile_attention(dtype: str, size: int, group: int, cut: attention.Cut) -> Any:
    """The kernel as it is launched on a GPU for 8 heads of a cache, the same mask for all heads of queries."""
    kernel = attention._attend_kernel
    given = attention.constants(size, size, 8, group, cut)
    given |= {"MASK": "float", "MASK_OF_HEADS": False, "INTERPRETED": False}
    pointers = {**dict.fromkeys(("query", "key", "value", "mask", "result"), f"*{dtype}"), "scratch": "*fp32"}
    strides = {"query_strides": 2, "key_strides": 3, "value_strides": 3}
    signature = dict.fromkeys(given, "constexpr") | pointers | {"counts": "*i32", "scale": "fp32"}
    signature |= {"keys": "i32", "each": "i32", "mask_strides": ("i32", "i32", "constexpr")}
    signature |= {name: ("i32",) * count for name, count in strides.items()}
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "counts")}
    for name, count in {**strides, "mask_strides": 2}.items():
        aligned |= {(names.index(name), i): [["tt.divisibility", 16]] for i in range(count)}
    constants = {(names.index(name),): value for name, value in given.items()} | {(names.index("mask_strides"), 2): 1}
    source = ASTSource(kernel, {name: signature[name] for name in names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=attention.options(cut))


def attention_report(dtype: str, size: int, group: int) -> AttentionReport:
    key = torch.empty(0, 8, 2048, size, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    cut = attention.cut_for(key, 8)
    facts, sass = examine(compile_attention(dtype, size, group, cut))
    start = sass[: sass.index("MMA")]
    return AttentionReport(**facts, copies=start.count("LDGSTS"), block=cut.block)


def examine(compiled: Any) -> tuple[dict[str, Any], str]:
    """What ptxas says of a kernel (registers, spilled_bytes, shared_bytes, serialized), and its SASS."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        notes = _assemble(ptx, cubin)
        sass = _tool("nvdisasm", "-c", str(cubin))
    facts = {
        "registers": int(re.findall(r"Used (\d+) registers", notes)[0]),
        "spilled_bytes": int(re.findall(r"(\d+) bytes spill stores", notes)[0]),
        "shared_bytes": compiled.metadata.shared,
        "serialized": "are serialized" in notes,
    }
    return facts, sass


def loops(sass: str) -> Iterator[list[str]]:
    """The instructions of every run of lines from a label to a branch back to it that multiplies."""
    lines, labels = sass.splitlines(), {}
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = i
        branch = re.search(r"BRA `\((\.L_x_\d+)\)", line)
        body = lines[labels.get(branch[1], i) : i + 1] if branch else []
        if any("MMA" in other for other in body):
            yield [other for other in body if re.search(r"/\*[0-9a-f]{4,}\*/ +\S", other)]


def _assemble(ptx: Path, cubin: Path) -> str:
    """ptxas' messages; newer versions of Triton write PTX for the newer of the two that they bring."""
    arguments = ("-v", "-arch=sm_90a", str(ptx), "-o", str(cubin))
    try:
        return _tool("ptxas", *arguments)
    except subprocess.CalledProcessError:
        return _tool("ptxas-blackwell", *arguments)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_BIN / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def parse_config(text: str) -> Config:
    fields = dict(item.split("=") for item in text.split(","))
    flags = {"joined", "dependent"}
    return Config(**{name: bool(int(v)) if name in flags else int(v) for name, v in fields.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="mxint4,mxfp4", help="comma-separated")
    parser.add_argument("--config", action="append", required=True, help="rows=8,out=64,...; may be repeated")
    arguments = parser.parse_args()
    for name in arguments.formats.split(","):
        for config in map(parse_config, arguments.config):
            print(name, config, report(parse_format(name), config), sep="\n    ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
