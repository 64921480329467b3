"""Emulate the PTX instructions that decode elements (triton/decode_planes.py, triton/attention/packed_states.py,
gluon/decode_to_e4m3.py), on tensors of registers, and those of triton/integer_planes.py: there, `[threads]`."""

import operator
import re
from collections.abc import Callable

import torch
from torch import Tensor

_INTEGER = {
    "and": operator.and_,
    "xor": operator.xor,
    "shr": operator.rshift,
    "shl": operator.lshift,
    "add": operator.add,
}
Register = int | Tensor
"""32 bits, as int64."""


def pairs(register: Tensor, dtype: torch.dtype) -> Tensor:
    """The two 16-bit numbers `[..., 2]` of a register."""
    return torch.stack((register & 0xFFFF, register >> 16), -1).to(torch.int32).to(torch.int16).view(dtype)


def join(numbers: Tensor, bits: int) -> Tensor:
    """Pack numbers `[..., n]` into a register, the first one lowest."""
    fields = numbers.to(torch.int64) & (2**bits - 1)
    return sum((fields[..., i] << (bits * i) for i in range(fields.shape[-1])), torch.tensor(0))


def execute(ptx: str, registers: dict[str, Register]) -> Tensor:
    """Run the PTX text; returns $0."""
    return executed(ptx, registers)["$0"]


def executed(ptx: str, registers: dict[str, Register]) -> dict[str, Tensor]:
    """Run the PTX text; returns all registers."""
    values = {name: torch.as_tensor(value, dtype=torch.int64) for name, value in registers.items()}

    def value(name: str) -> Tensor:
        if name in values:
            return values[name]
        return torch.tensor(int(name[2:], 16) if name.startswith("0f") else int(name, 0))

    for name, text in re.findall(r" ([a-z][\w.:]+) ([^;]*);", f" {ptx}"):
        target, *names = re.findall(r"\{[^}]*\}|[^\s,]+", text)
        if name == "mov.b32" and names[0].startswith("{"):
            low, high = (value(part) for part in names[0].strip("{}").split(", "))
            values[target] = low | (high << 16)
        elif name == "mov.b32" and target.startswith("{"):
            low, high = target.strip("{}").split(", ")
            values |= {low: value(names[0]) & 0xFFFF, high: value(names[0]) >> 16}
        else:
            values[target] = _result(name, [value(n) for n in names])
    return values


def _result(name: str, operands: list[Tensor]) -> Tensor:
    if name in _OF_THREADS:
        return _OF_THREADS[name](*operands) & 0xFFFFFFFF
    a, b, c, table = [*operands, *[torch.tensor(0)] * 3][:4]
    match name:
        case "mov.b32":
            result = a
        case "shf.l.wrap.b32":
            result = ((b << (c & 31)) | (a >> (32 - (c & 31)))) & 0xFFFFFFFF
        case "and.b32" | "xor.b32" | "shr.b32" | "shl.b32" | "add.u32":
            result = _INTEGER[name.partition(".")[0]](a, b)
        case "lop3.b32":
            result = {0xEA: (a & b) | c, 0x6A: (a & b) ^ c, 0xE2: (a & b) | (c & ~b)}[int(table)]
        case "prmt.b32":
            result = _permuted(a, b, c)
        case "fma.rn.bf16x2":
            result = _multiplied(a, b, c, torch.bfloat16)
        case "fma.rn.f16x2":
            result = _multiplied(a, b, c, torch.float16)
        case "cvt.rn.bf16x2.f32":
            high, low = (x.to(torch.int32).view(torch.float32).bfloat16() for x in torch.broadcast_tensors(a, b))
            result = join(torch.stack((low, high), -1).view(torch.int16), 16)
        case "cvt.rn.satfinite.e4m3x2.f16x2":
            numbers = pairs(a, torch.float16).float().clamp(-448, 448)
            result = join(numbers.to(torch.float8_e4m3fn).view(torch.uint8), 8)
        case _:
            raise AssertionError(f"PTX instruction {name} is not emulated")
    return result & 0xFFFFFFFF


def _permuted(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    data = [(register >> (8 * i)) & 0xFF for register in (a, b) for i in range(4)]
    chosen = [(selector >> (4 * i)) & 0xF for i in range(4)]
    assert all((index < 8).all() for index in chosen), "sign replication is not emulated"
    *bytes_, _ = torch.broadcast_tensors(*data, selector)
    indices = torch.stack([index.expand_as(bytes_[0]) for index in chosen], -1)
    return join(torch.stack(bytes_, -1).gather(-1, indices), 8)


def _multiplied(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    x, y, z = (pairs(register, dtype).double() for register in torch.broadcast_tensors(a, b, c))
    return join((x * y + z).to(dtype).view(torch.int16), 16)


def _float(register: Tensor) -> Tensor:
    return register.to(torch.int32).view(torch.float32)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).to(torch.int64)


def _from_lanes(register: Tensor, lane: Tensor) -> Tensor:
    """The values that other threads of the same warp have."""
    return register[torch.arange(len(register)) // 32 * 32 + lane]


def _chosen(choose: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Of two pairs of bfloat16 numbers."""
    return lambda a, b: join(
        choose(*(pairs(register, torch.bfloat16).float() for register in (a, b))).bfloat16().view(torch.int16), 16
    )


_OF_THREADS = {
    "mov.f32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "max.u32": torch.maximum,
    "max.u16x2": lambda a, b: torch.maximum(a & 0xFFFF, b & 0xFFFF) | torch.maximum(a >> 16, b >> 16) << 16,
    "min.bf16x2": _chosen(torch.fmin),
    "max.bf16x2": _chosen(torch.fmax),
    "mul.f32": lambda a, b: _bits(_float(a) * _float(b)),
    "fma.rn.f32": lambda a, b, c: _bits((_float(a).double() * _float(b).double() + _float(c).double()).float()),
    "shfl.sync.bfly.b32": lambda a, b, *_: _from_lanes(a, (torch.arange(len(a)) ^ b) % 32),
    "shfl.sync.idx.b32": lambda a, b, *_: _from_lanes(a, b % 32),
}
"""What the registers of threads, `[threads]`, need in addition."""
