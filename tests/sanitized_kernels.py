"""Kernels of experts and of packed attention on their smallest shapes, without CUDA graphs, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitized_kernels.py

A graph needs the caching allocator, which hides accesses out of bounds. Each tool takes about 20 s a part, after the
kernels were compiled by a run without it. Results are checked, too. Without a GPU: TRITON_INTERPRET=1, all parts but
`sorted`.
"""

import argparse
from collections.abc import Callable
from typing import Any, Final

import torch
from grouped import Experts, choose, gated_over_bound, linear_over_bound, make_experts, sum_over_bound, tokens
from torch import Tensor

from mxcompile.formats import MXFP4, MXFP8_E4M3, MXINT4, MXINT6, MXINT8, MXFormat, activation_rule
from mxcompile.kernels.triton import expert_sums, grouped_planes
from mxcompile.kernels.triton.attention import packed_attention
from mxcompile.kernels.triton.expert_slices import Config
from mxcompile.numerics.exact_tokens import ExactTokens
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops import QUANTIZE

DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"
GPT_OSS: Final = Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)
COUNT: Final = 4
"""Experts of a layer."""


def config(**options: Any) -> Config:
    """On a GPU with launches that overlap."""
    return Config(**options, dependent=DEVICE == "cuda", early=DEVICE == "cuda")


def layer(fmt: MXFormat, out: int, size: int) -> Experts:
    return make_experts(fmt, COUNT, out, size, True, DEVICE)


def check(kernel: str, over_bound: float) -> None:
    print(f"{kernel}: {over_bound:.3f} of the largest error", flush=True)
    assert over_bound <= 1


def one_token() -> None:
    """Weights in registers and through shared memory; 16 outputs a program and 8; decoded ahead."""
    for gate, hidden, inner in ((Gate(), 512, 192), (GPT_OSS, 320, 320)):
        up, down = layer(MXFP4, 2 * inner, hidden), layer(MXFP4, hidden, inner)
        x, experts = 0.2 * tokens(1, hidden, DEVICE), choose(1, 3, COUNT, DEVICE)
        weights = torch.rand(1, 3, device=DEVICE).to(torch.bfloat16)
        h = x
        for options in ({"held": 2}, {"held": 0}):
            chosen = config(out=32, slices=2, **options)
            h = grouped_planes.gated_linear(x, experts, up.stack(grouped_planes), gate, None, chosen)
            check(f"gated_linear {options}", gated_over_bound(h, x, experts, up, gate))
        for options in (
            {"out": 16, "slices": 8, "parts": 2, "held": 2},
            {"out": 16, "slices": 8, "parts": 2, "held": 2, "decoded": True},
            {"out": 8, "slices": 4, "held": 2},
            {"out": 16, "slices": 8, "stages": 4},
        ):
            y = expert_sums.multiply_and_sum(h, experts, weights, down.stack(grouped_planes), config(**options))
            check(f"multiply_and_sum {options}", sum_over_bound(y, h, experts, weights, down))


def several_tokens() -> None:
    """Choices of the same expert in one program; formats of one, two and three words; a rounded gate."""
    x, experts = tokens(7, 320, DEVICE), choose(7, 2, COUNT, DEVICE)
    shared = config(choices=8, out=64, slices=2)
    y = x
    for fmt in (MXFP4, MXINT6, MXFP8_E4M3):
        weight = layer(fmt, 192, 320)
        y = grouped_planes.linear(x, experts, weight.stack(grouped_planes), shared)
        check(f"linear {fmt}", linear_over_bound(y, x, experts, weight))
    rounding = MXFP8_E4M3, activation_rule(MXFP8_E4M3)
    up = layer(MXFP4, 384, 320).stack(grouped_planes)
    grouped_planes.gated_linear(0.2 * x, experts, up, GPT_OSS, rounding, shared)
    weights = torch.rand(7, 2, device=DEVICE).to(torch.bfloat16)
    expert_sums.weighted_sum(y, weights, dependent=shared.dependent)


def sorted_tokens() -> None:
    """Choices sorted by expert, and the Gluon kernel."""
    from mxcompile.kernels.gluon import grouped_planes as gluon

    up, down = layer(MXFP4, 256, 256), layer(MXFP4, 256, 128)
    x, experts = tokens(100, 256, DEVICE), choose(100, 2, COUNT, DEVICE)
    y = gluon.grouped_linear(x, experts, up.stack(grouped_planes))
    check("sorted linear", linear_over_bound(y, x, experts, up))
    weights = torch.rand(100, 2, device=DEVICE)
    gluon.experts(x, experts, weights, up.stack(grouped_planes), down.stack(grouped_planes), Gate(), None)


def packed_attention_and_writes() -> None:
    """A token that attends over a packed cache, and the write of its keys and values."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    for fmt, size in ((MXINT8, 64), (MXINT4, 80), (MXFP4, 64), (MXINT6, 64)):
        rule = activation_rule(fmt)
        query, *states = random(1, 4, 1, size), random(1, 2, 70, size), random(1, 2, 70, size)
        parts = ([part.to(DEVICE) for part in QUANTIZE(side, str(fmt), str(rule))] for side in states)
        keys, values = (PackedStates(*part, fmt, size) for part in parts)
        y = packed_attention.attend(query.to(DEVICE), keys, values, None, 0.2).double().cpu()
        key, value = (side.values(torch.float32).double().cpu() for side in (keys, values))
        scores = 0.2 * query.double().unflatten(1, (2, 2)).squeeze(3) @ key.transpose(2, 3)
        exact = (scores.softmax(-1) @ value).reshape(y.shape)
        check(f"attend {fmt} {size}", ((y - exact).norm() / exact.norm()).item() / 2.0**-7)
        angles = 6 * torch.rand(1, 1, 1, size // 2, generator=generator).repeat(1, 1, 1, 2)
        rotation = (angles.cos().bfloat16().to(DEVICE), angles.sin().bfloat16().to(DEVICE))
        new = (random(1, 2, 1, size).to(DEVICE), random(1, 2, 1, size).to(DEVICE))
        place = torch.tensor([69], device=DEVICE)
        newest = [random(1, 2, 9, size).to(DEVICE) for _ in range(2)]
        held = torch.arange(60, 69, device=DEVICE).roll(60 % 9)
        exact_states = [ExactTokens(own, ring, ring[:, :, :3]) for own, ring in zip(new, newest, strict=True)]
        among = packed_attention.Exact(query.to(DEVICE), exact_states[0], exact_states[1], held, 5)
        packed_attention.attend(query.to(DEVICE), keys, values, None, 0.2, position=place, exact=among)
        token = packed_attention.Next(*new, (rule, rule), rotation)
        packed_attention.attend(query.to(DEVICE), keys, values, None, 0.2, position=place, new=token)


PARTS: Final[dict[str, Callable[[], None]]] = {
    "one": one_token,
    "several": several_tokens,
    "sorted": sorted_tokens,
    "packed": packed_attention_and_writes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="small calls of kernels, for compute-sanitizer")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none is named")
    with torch.no_grad():
        for name in parser.parse_args().parts or PARTS:
            PARTS[name]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
