"""Kernels compiled for Hopper on a machine without a GPU, and what ptxas and nvdisasm say of them.

    planes_report(MXINT4, Config(rows=64, out=128, warps=8, stages=3))

compiles as for a launch on an H100 (bfloat16, sizes that are multiples of 16) and reads the SASS: registers, spills,
shared memory, and the instructions of the main loop over K.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxcompile.formats import MXINT8, MXFormat, ScaleRule
from mxcompile.kernels.gluon import fp8_linear, planes_kernel
from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.layout.planes import PlanarWeight, plane_layout
from mxcompile.kernels.triton import (
    expert_slices,
    expert_sums,
    grouped_planes,
    held_planes,
    integer_planes,
    quantize,
)
from mxcompile.kernels.triton import planes_linear as triton_planes
from mxcompile.kernels.triton.attention import append_packed, one_token, packed_attention
from mxcompile.kernels.triton.gates import gate_constants
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.packed_attention import PackedStates

SHARED_BYTES: Final = 232448
"""Shared memory that one program may have on an H100."""
_HOPPER: Final = GPUTarget("cuda", 90, 32)
_BIN: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MULTIPLE_OF_16: Final = [["tt.divisibility", 16]]
_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DECODE: Final = r"LOP3|SHF|PRMT|HFMA2|HMUL2|IMAD R"


@dataclass(frozen=True)
class Report:
    """What ptxas made of a kernel. serialized: ptxas complains that wgmma instructions wait for each other. loop: the
    instructions of the main loop of one warp."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: bool
    sass: str
    loop: tuple[str, ...] = ()

    def count(self, instruction: str) -> int:
        """How many instructions of the loop contain that name."""
        return sum(instruction in line for line in self.loop)

    @property
    def waits(self) -> int:
        """Waits for wgmma in the loop."""
        return self.count("WARPGROUP.DEPBAR")

    @property
    def overwritten(self) -> list[str]:
        """Instructions of the loop, run twice, that write a register which a wgmma that still runs reads as its left
        operand. PTX forbids it: a wgmma may read such registers until a wait."""
        running: list[set[int]] = []
        problems: list[str] = []
        for line in self.loop * 2:
            text = re.sub(r"^.*?\*/ +(@!?U?P\d+ )?", "", line)
            name, _, operands = text.partition(" ")
            numbers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
            if name.startswith("HGMMA"):
                left = re.match(r"R\d+, R(\d+)", operands)
                running.append(set(range(int(left[1]), int(left[1]) + 4)) if left else set())
            elif wait := re.match(r"WARPGROUP.DEPBAR.LE gsb0, 0x([0-9a-f]+)", text):
                running = running[max(0, len(running) - int(wait[1], 16)) :]
            elif re.match(r"R\d", operands):
                width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
                written = set(range(numbers[0], numbers[0] + width))
                problems += [text] if any(written & registers for registers in running) else []
        return problems

    @property
    def decoding(self) -> tuple[int, int]:
        """(instructions of the loop that decode while wgmma runs, all that decode)."""
        decode, overlapped, running = 0, 0, False
        for line in self.loop:
            running = (running or "HGMMA" in line) and "WARPGROUP.DEPBAR" not in line
            if re.search(rf"\*/ +(@!?P\d )?({_DECODE})", line):
                decode, overlapped = decode + 1, overlapped + running
        return overlapped, decode


def planes_report(fmt: MXFormat, config: triton_planes.Config) -> Report:
    """triton/planes_linear.py: one weight, no bias."""
    constants = triton_planes.constants(fmt, config) | {"HAS_BIAS": False, "PADDED": False, "INTERPRETED": False}
    types: dict[str, Any] = {"x": "*bf16", "words": "*i16", "scales": "*i32", "counters": "*i32", "lift": "fp32"}
    types |= {"partial": "*bf16" if config.split == 1 else "*fp32"}
    types |= {"biases": ("*bf16",), "ys": ("*bf16",), "outs": ("i32",)}
    kernel, options = triton_planes._planes_kernel, triton_planes.options(config)
    compiled = _compiled(kernel, constants, types, options, other_than_16={"m_size", "early"})
    return _report(compiled, lambda loops: max(loops, key=len, default=[]))


def held_report(fmt: MXFormat, size: int, config: held_planes.Config) -> Report:
    """triton/held_planes.py: one weight of `size` columns, no bias."""
    layout = plane_layout(fmt)
    words = torch.empty(1, -(-size // layout.columns), layout.words, 64, 32, dtype=torch.int16)
    constants = held_planes.constants(PlanarWeight(words, words, fmt, 64, size, 0), config)
    constants |= {"HAS_BIAS": False, "ORDERED": True, "INTERPRETED": False}
    types: dict[str, Any] = {"x": "*bf16", "words": "*i16", "scales": "*i32", "lift": "fp32"}
    types |= {"biases": ("*bf16",), "ys": ("*bf16",), "outs": ("i32",)}
    kernel, options = held_planes._held_kernel, held_planes.options(config)
    compiled = _compiled(kernel, constants, types, options, other_than_16={"m_size", "early"})
    return _report(compiled, lambda loops: max(loops, key=len, default=[]))


def integers_report(size: int, config: integer_planes.Config) -> Report:
    """triton/integer_planes.py: one weight of `size` columns, MXINT8 inputs, no bias."""
    constants = integer_planes.constants(size, 8, config) | {"HAS_BIAS": False, "INTERPRETED": False}
    types: dict[str, Any] = {"x": "*bf16", "words": "*i16", "scales": "*i32", "unit": "fp32"}
    types |= {"biases": ("*bf16",), "ys": ("*bf16",), "outs": ("i32",)}
    kernel, options = integer_planes._integers_kernel, integer_planes.options(config)
    return _report(_compiled(kernel, constants, types, options, other_than_16={"groups", "early"}), lambda _: [])


def gluon_report(
    fmt: MXFormat,
    config: gluon_planes.Config,
    has_bias: bool = False,
    grouped: bool = False,
    gate: Gate | None = None,
    rounding: tuple[MXFormat, ScaleRule] | None = None,
) -> Report:
    """gluon/planes_linear.py, or gluon/grouped_planes.py."""
    constants = {**gluon_planes.constants(fmt, config, has_bias), "y1": None, "y2": None}
    constants |= {**gate_constants(gate), **grouped_planes.rounding_constants(rounding)}
    types = {"bias": "*bf16", "partial": "*fp32", "counters": "*i32", "lift": "fp32"}
    if grouped:
        types |= dict.fromkeys(("block_experts", "block_tokens", "used"), "*i32")
    else:
        constants |= dict.fromkeys(("block_experts", "block_tokens", "used"))
    for name, dtype in {"x": "bf16", "words": "i16", "scales": "i32", "y0": "bf16"}.items():
        block = name[0] if name == "y0" else name
        if gate is not None:
            block = {"y0": "gated", "x": "x"}.get(name, name if gate.interleaved else f"paired_{name}")
        types[name] = _descriptor(dtype, *gluon_planes.block(block, config))
    compiled = _compiled(planes_kernel._planes_kernel, constants, types, gluon_planes.options(config), gluon=True)
    fewest = 8 * plane_layout(fmt).planes // 4 * config.out // config.consumers // 64

    def main_loop(loops: list[list[str]]) -> list[str]:
        return min((loop for loop in loops if sum("HGMMA" in line for line in loop) >= fewest), key=len)

    return _report(compiled, main_loop)


def fp8_report(fmt: MXFormat, config: fp8_linear.Config, k_chunked: bool = False, has_bias: bool = False) -> Report:
    """gluon/fp8_linear.py."""
    types = {"bias": "*bf16", "powers": "*fp32", "scratch": "*fp32", "power": "fp32"}
    for name, dtype in {"x": "fp8e4nv", "words": "i16", "scales": "i32", "y": "bf16"}.items():
        types[name] = _descriptor(dtype, *fp8_linear.block(name, config))
    constants = fp8_linear.constants(fmt, config, k_chunked, has_bias)
    compiled = _compiled(fp8_linear._fp8_kernel, constants, types, fp8_linear.options(), gluon=True)
    return _report(compiled, lambda loops: min(loops, key=len))


def attention_report(dtype: str, size: int, group: int, next_token: bool = False) -> tuple[Report, one_token.Config]:
    """attention/one_token.py for 8 heads and 2048 tokens, `group` heads of queries each, and one mask for all;
    with the config that it chooses. next_token: with RoPE, a write to the cache, and rounding."""
    config = one_token.config_for(torch.empty(0, 8, 2048, size, dtype=_DTYPES[dtype]), 8, next_token)
    constants = one_token.constants(size, size, 8, group, config)
    constants |= {"MASK": "float", "MASK_OF_HEADS": False, "APPEND": next_token, "ROTATE": next_token}
    rounding = (MXINT8, ScaleRule.FLOOR) if next_token else None
    constants |= {"DEPENDENT": config.dependent, "INTERPRETED": False}
    constants |= quantize.rounding_constants(rounding, _DTYPES[dtype])
    types: dict[str, Any] = dict.fromkeys(("query", "mask", "result"), f"*{dtype}")
    types |= {**dict.fromkeys(("cache", "new", "rotation"), (f"*{dtype}",) * 2), "position": "*i64"}
    types |= {"new_strides": ("i32",) * 6, "cache_strides": ("i32",) * 6}
    types |= {"scratch": "*fp32", "counters": "*i32", "scale": "fp32", "mask_strides": ("i32", "i32", "constexpr")}
    types |= {"query_strides": ("i32",) * 2}
    compiled = _compiled(one_token.attend_kernel, constants, types, one_token.options(config))
    return _report(compiled, lambda _: []), config


def packed_attention_report(
    fmt: MXFormat, exact: tuple[int, int, int, int, bool] | None = None, next_token: bool = False
) -> tuple[Report, one_token.Config]:
    """triton/attention/packed_attention.py for Llama-3-8B's heads and 32768 tokens, with a mask, and its own config.

    exact: `EXACT` of the kernel. next_token: with RoPE, the writes to the cache, and rounding of the result."""
    sizes = (fmt.blocks(128) * fmt.block_bytes, fmt.blocks(128))
    parts = [torch.empty(0, 8, 32768, size, dtype=torch.uint8) for size in sizes]
    states = PackedStates(*parts, fmt, 128)
    config = packed_attention.config_for(32768, 8, states, states, True)
    constants = packed_attention.constants(fmt, fmt, (128, 128), (8, 4, 1), config, (True, True))
    constants |= {"MASK": "bool", "MASK_OF_ROWS": False, "UP_TO_POSITION": True, "INTERPRETED": False}
    written = append_packed.append_constants(fmt, 128, ScaleRule.FLOOR, torch.bfloat16)
    constants |= {"EXACT": exact, "ROTATE": next_token, "NEW": (written, written) if next_token else None}
    constants |= quantize.rounding_constants((MXINT8, ScaleRule.FLOOR) if next_token else None, torch.bfloat16)
    types: dict[str, Any] = {
        "query": "*bf16",
        "result": "*bf16",
        "mask": "*u8",
        "scratch": "*fp32",
        "counters": "*i32",
        "position": "*i64",
    }
    types |= {"states": ("*i16", "*i32", "*i16", "*i32"), "scale": "fp32", "query_strides": ("i32",) * 3}
    types |= {"new": ("*bf16",) * 4, "new_strides": ("i32",) * 6}
    types |= {"exact": (*("*bf16",) * 7, "*i64"), "exact_strides": ("i32",) * 21}
    types |= {"strides": ("i32",) * 8 + ("i32", "constexpr") * 2, "mask_strides": ("i32", "i32", "i32", "constexpr")}
    compiled = _compiled(packed_attention.attend_packed_kernel, constants, types, one_token.options(config))
    return _report(compiled, lambda loops: max(loops, key=len, default=[])), config


def grouped_report(
    planes: PlanarWeight,
    config: expert_slices.Config,
    gate: Gate | None,
    rounding: tuple[MXFormat, ScaleRule] | None = None,
    has_bias: bool = False,
) -> Report:
    """triton/grouped_planes.py: choices of an expert, ranked if there are several."""
    constants = expert_slices.constants(planes, config, config.slices) | grouped_planes.rounding_constants(rounding)
    constants |= {**gate_constants(gate), "INTERPRETED": False}
    constants |= {"MODE": "leader" if config.choices > 1 else "single", "RANKED": 256, "HAS_BIAS": has_bias}
    types = dict.fromkeys(("x", "bias", "y"), "*bf16") | {"words": "*i16"}
    types |= {"scales": "*i32", "experts": "*i64", "table_choices": "*i32", "table_experts": "*i32", "lift": "fp32"}
    kernel, options = grouped_planes._grouped_kernel, expert_slices.options(config)
    compiled = _compiled(kernel, constants, types, options, other_than_16={"choices", "slots", "k_steps"})
    return _report(compiled, lambda loops: max(loops, key=len, default=[]))


def sum_report(planes: PlanarWeight, config: expert_slices.Config, has_bias: bool = False) -> Report:
    """triton/expert_sums.py: matmul and weighted sum of as many choices as a round takes."""
    constants = expert_slices.constants(planes, config, config.parts)
    constants |= {"PARTS": config.parts, "ROUNDS": 1, "HALVES": config.halves}
    constants |= {"HAS_BIAS": has_bias, "DECODED": config.decoded, "INTERPRETED": False}
    types = dict.fromkeys(("x", "bias", "y", "weights"), "*bf16") | {"words": "*i16", "scales": "*i32"}
    types |= {"experts": "*i64", "lift": "fp32"}
    kernel, options = expert_sums._multiply_and_sum_kernel, expert_slices.options(config)
    compiled = _compiled(kernel, constants, types, options, other_than_16={"slots", "k_steps"})
    return _report(compiled, lambda loops: max(loops, key=len, default=[]))


def _descriptor(dtype: str, shape: list[int], layout: Any) -> str:
    return f"tensordesc<{dtype}{shape},{layout!r}>"


def _compiled(
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, Any],
    options: dict[str, Any],
    other_than_16: set[str] | None = None,
    gluon: bool = False,
) -> Any:
    """A kernel compiled for Hopper. Arguments without a type are int32: multiples of 16 if `other_than_16` is given,
    for all that it does not name."""
    signature, fixed, hints = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = kind = "constexpr" if name in constants else types.get(name, "i32")
        if name in constants:
            fixed[index,] = constants[name]
        elif isinstance(kind, tuple):
            hints |= {(index, i): _MULTIPLE_OF_16 for i, one in enumerate(kind) if one != "constexpr"}
            fixed |= {(index, i): 1 for i, one in enumerate(kind) if one == "constexpr"}
        elif kind.startswith("*") or (kind == "i32" and other_than_16 is not None and name not in other_than_16):
            hints[index,] = _MULTIPLE_OF_16
    source: Any = ASTSource
    if gluon:
        source = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    return triton.compile(source(kernel, signature, fixed, hints), target=_HOPPER, options=options)


def _report(compiled: Any, main_loop: Any) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        messages = _assemble(ptx, cubin)
        sass = _tool("nvdisasm", "-c", str(cubin))
    return Report(
        registers=int(re.findall(r"Used (\d+) registers", messages)[0]),
        spilled_bytes=int(re.findall(r"(\d+) bytes spill stores", messages)[0]),
        shared_bytes=compiled.metadata.shared,
        serialized="are serialized" in messages,
        sass=sass,
        loop=tuple(main_loop(list(_loops(sass)))),
    )


def _loops(sass: str) -> Iterator[list[str]]:
    """The instructions of every run of lines from a label to a branch back to it that multiplies matrices."""
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
