"""Time of another project's GEMM with the same MX weights and bfloat16 activations, checked and timed as ours is.

    python benchmarks/gemm_peers.py humming --formats mxint4,mxfp4 --rows 1,64,2048 --seconds 300 --out gemm.jsonl

`gemm.py --beside humming,tinygemm` runs it, too. A peer repacks each weight once, before anything is timed. All shapes
of one number of tokens come before the next number, in the order of `--rows`. `error` is over our bound (float32
accumulation, rounded once): above 1 a peer rounds differently, and is timed nevertheless. A result that is off by more
than 2 % of its norm is not timed. A case that a peer does not support is printed and not recorded.

- tinygemm: `aten::_weight_int4pack_mm` of torch, groups of 32, scales in bfloat16: MXINT4.
- humming (humming-kernels): compiles its kernels for these shapes and tokens, with nvrtc or nvcc of a CUDA toolkit.
- gemlite: tunes itself for each shape and number of tokens, which takes half a minute each.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Protocol

import torch
from gemm_timing import Call, Case, Run, Weight, add_case_options, cases, in_a_line, reason, rotated, totals, warm_up
from torch import Tensor

from mxcompile.formats import MXFP4, MXFP8_E4M3, MXINT4, MXINT8, MXFormat
from mxcompile.numerics.packing import unpack
from mxcompile.numerics.reference import scale_values

GROSS = 0.02
_INNER_K_TILES = 8
Product = Callable[[Tensor], Call]
"""Takes an activation `[tokens, in]` and returns a call that multiplies it by copy i of the weight."""


class UnsupportedFormatError(Exception):
    """A peer has no kernel for a format."""


class Packed(Protocol):
    """A weight, or one of each expert, whose elements and scales are in rows."""

    @property
    def fmt(self) -> MXFormat: ...
    @property
    def k(self) -> int: ...
    @property
    def elements(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...


def stored(w: Packed) -> tuple[Tensor, Tensor]:
    """Codes `[..., out, in]`, integers with an offset (the smallest is 0), and the E8M0 bytes of their steps."""
    codes = unpack(w.elements, w.fmt)[..., : w.k]
    if not w.fmt.is_integer:
        return codes, w.scales
    return codes ^ (1 << (w.fmt.bits - 1)), w.scales - w.fmt.mantissa_bits


def in_a_row(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., in]` packed bit by bit, the lowest first: bytes `[..., in * bits / 8]`."""
    each = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (each.flatten(-2).unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)


def tinygemm_parts(codes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Input of `_convert_weight_to_int4pack`, two codes a byte, the first one high; scales and zeros by group.

    The kernel multiplies (code - 8) * scale + zero, so that all zeros are 0.
    """
    nibbles = (codes[:, ::2] << 4) | codes[:, 1::2]
    scales = scale_values(steps).to(torch.bfloat16)
    return nibbles, torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).contiguous()


def tinygemm(w: Weight, rows: list[int]) -> Product:
    del rows
    if w.fmt != MXINT4:
        raise UnsupportedFormatError("supports mxint4 alone")
    nibbles, scales_and_zeros = tinygemm_parts(*stored(w))
    words = torch.ops.aten._convert_weight_to_int4pack(nibbles, _INNER_K_TILES)
    copies, multiply = rotated([words, scales_and_zeros]), torch.ops.aten._weight_int4pack_mm

    def product(x: Tensor) -> Call:
        def call(i: int) -> Tensor:
            words, scales = copies[i % len(copies)]
            return multiply(x, words, w.fmt.block_size, scales)

        return call

    return product


def humming_dtype(fmt: MXFormat) -> str:
    return f"uint{fmt.bits}" if fmt.is_integer else f"float{fmt.bits}e{fmt.exponent_bits}m{fmt.mantissa_bits}"


def humming_configs(config: Any, rows: list[int], **options: Any) -> list[list[Any]]:
    """Its own choice for each number of rows, in ranges from 0 on; by default it compiles about 90 kernels."""
    from humming.tune import get_heuristics_config

    ends = sorted(set(rows))
    return [[start, m, get_heuristics_config(config, m, **options)] for start, m in zip([0, *ends], ends, strict=False)]


def humming(w: Weight, rows: list[int]) -> Product:
    from humming.forward import humming_forward
    from humming.layer import HummingLayer

    codes, steps = stored(w)
    kinds = {"dtype": humming_dtype(w.fmt), "scale_dtype": "float8e8m0", "group_size": w.fmt.block_size}
    layer = HummingLayer(w.n, w.k, kinds, torch_dtype=torch.bfloat16).to(codes.device)
    words, scales = in_a_row(codes, w.fmt.bits).view(torch.int32), steps.view(torch.float8_e8m0fnu)
    layer.load_from_tensors({"weight": words, "weight_scale": scales})
    layer.transform()
    configs = humming_configs(layer.humming_config, rows)
    parts = dict(layer.named_parameters()) | {"locks": layer.locks}
    copies = [dict(zip(parts, copy, strict=True)) for copy in rotated(list(parts.values()))]

    def product(x: Tensor) -> Call:
        return lambda i: humming_forward(layer.humming_config, x, **copies[i % len(copies)], tuning_config=configs)

    return product


def gemlite(w: Weight, rows: list[int]) -> Product:
    del rows
    from gemlite import forward_functional, helper

    (codes, steps), options = stored(w), {"device": str(w.values.device), "dtype": torch.bfloat16}
    if w.fmt in (MXINT4, MXINT8):
        kind = helper.A16W4_HQQ_INT if w.fmt == MXINT4 else helper.A16W8_HQQ_INT
        scales = scale_values(steps).to(torch.bfloat16)
        layer = kind(**options).from_weights(codes, scales, torch.full_like(scales, 2 ** (w.fmt.bits - 1)))
    elif w.fmt in (MXFP4, MXFP8_E4M3):
        kind = helper.A16W4_MXFP if w.fmt == MXFP4 else helper.A16W8_MXFP
        elements = codes if w.fmt == MXFP4 else codes.view(torch.float8_e4m3fn)
        layer = kind(**options).from_weights(elements, steps.view(torch.float8_e8m0fnu))
    else:
        raise UnsupportedFormatError(f"does not support {w.fmt}")
    copies, about = rotated(layer.get_tensor_args()), layer.get_meta_args()

    def product(x: Tensor) -> Call:
        return lambda i: forward_functional(x, None, copies[i % len(copies)], about)

    return product


PEERS: dict[str, tuple[str, Callable[[Weight, list[int]], Product]]] = {
    "humming": ("humming-kernels", humming),
    "tinygemm": ("torch", tinygemm),
    "gemlite": ("gemlite", gemlite),
}
"""By name: the package whose version is recorded, and a function of a weight and the numbers of tokens."""


def compare(case: Case, path: str, product: Product) -> dict[str, Any]:
    """The record of a case, checked and timed; ValueError if the result is grossly wrong."""
    call = product(case.x)
    results = [call(i) for i in range(2)]
    relative = max(case.exact.relative_error(y) for y in results)
    if not relative <= GROSS:
        raise ValueError(f"wrong by {relative:.1%} of the result's norm")
    error = max(case.exact.error(y) for y in results)
    return case.name(path) | {"error": round(error, 3)} | case.times(call)


def time_peer(run: Run, name: str, arguments: argparse.Namespace) -> None:
    """Time every case that it supports, and print the others."""
    package, make = PEERS[name]
    path = f"{name} {version(package)}"
    made: dict[tuple[str, int, int], Product | None] = {}
    for case in cases(run, arguments):
        w, where = case.w, f"{path}, {case.w.fmt} {case.w.n} x {case.w.k}"
        key = str(w.fmt), w.n, w.k
        try:
            if key not in made:
                made[key] = None  # stays None if it cannot be made
                made[key] = make(w, arguments.rows)
            product = made[key]
            if product is not None:
                run.keep(compare(case, path, product))
                print(in_a_line(run.lines[-1]), flush=True)
        except UnsupportedFormatError as problem:
            print(f"{where}: {problem}", flush=True)
        except Exception as problem:  # whatever it is, the next case runs
            print(f"{where}, {len(case.x)} tokens: {reason(problem)}", flush=True)
            torch.cuda.synchronize()  # raises again where the GPU is lost to this process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    add_case_options(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gemm_peers.py needs a CUDA GPU, and this machine has none")
        return 1
    run = Run(" ".join(["python benchmarks/gemm_peers.py", *sys.argv[1:]]), arguments.seconds, arguments.out)
    try:
        warm_up()
        with torch.no_grad():
            time_peer(run, arguments.peer, arguments)
    except Exception as problem:  # not installed, or the GPU is lost to this process
        print(f"{arguments.peer}: {reason(problem)}", flush=True)
        return 1
    print(*totals(run.lines), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
