"""Time of another project's experts with the same MX weights and bfloat16 activations, in turns with ours.

    python benchmarks/experts_peers.py humming --formats mxfp4,mxint4 --tokens 1,64,2048 --out experts.jsonl

`experts.py --beside marlin,humming,triton_kernels` runs it, too. Weights are repacked once, before anything is timed.
A call is what the project launches from the numbers of the experts on: sorting, both matmuls, the gate, the weighted
sum. `mxcompile_us` is our time for the same call, `times_ours` theirs over ours: below 1 ours is slower. A result that
is off by more than 2 % of a token's norm is not timed; a case that a project does not support is printed.

- marlin: vLLM's `moe_wna16_marlin_gemm`, as `fused_marlin_moe` calls it, MXFP4 and MXINT4 (weights of uint4 with
  bfloat16 scales). vLLM pads gpt-oss' 2880 channels to 3072 and 2944, and so do we, the tokens before the call.
- humming (humming-kernels): its indexed GEMM as vLLM calls it, sorted by vLLM's `moe_align_block_size`.
- triton_kernels (in vLLM's third_party): `matmul_ogs` with Hopper's MXFP4 layout; its top-k comes before the call.

vLLM 0.26 has Marlin's kernels as PTX of sm_80, which the driver compiles at the first call, in about 15 s. Gates and
sums that none of their kernels has in one launch are compiled by torch.compile. marlin and humming need
only `_moe_C_stable_libtorch`, `scalar_type.py` and triton_kernels `third_party/triton_kernels` of vLLM's wheel.
"""

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from experts_calls import our_call
from experts_timing import (
    OURS,
    PEERS,
    SHAPES,
    TURNS,
    Case,
    Exact,
    Layer,
    Routes,
    Stack,
    add_case_options,
    line_of,
    make_layer,
    make_routes,
    measure_rates,
    tokens_of,
)
from gemm_peers import UnsupportedFormatError, humming_configs, humming_dtype, in_a_row, stored
from gemm_timing import Call, Run, reason, warm_up
from torch import Tensor

from mxcompile.formats import MXFP4, MXINT4
from mxcompile.numerics.reference import scale_values

Product = Callable[[Tensor, Routes], Call]
"""Takes tokens and their experts and returns a call for each turn."""
_WARPS = 8
_BLOCK_ROWS = (8, 16, 32, 48, 64)
_FULLEST = 0.9


def padded_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def marlin_words(codes: Tensor) -> Tensor:
    """4-bit codes `[E, out, in]` in the order of `gptq_marlin_repack`: int32 `[E, in / 16, 2 * out]`."""
    count, out, size = codes.shape
    tiles = codes.mT.reshape(count, size // 16, 16, out // 16, 16).transpose(2, 3).reshape(-1, 1024)
    nibbles = tiles[:, marlin_order().to(codes.device)].view(-1, 8).int()
    words = nibbles[:, 0].clone()
    for i in range(1, 8):
        words |= nibbles[:, i] << (4 * i)
    return words.view(count, size // 16, 2 * out)


@cache
def marlin_order() -> Tensor:
    """Which of 16 x 64 codes, in rows of tiles of 16 x 16, comes at each place (vLLM's `get_weight_perm`)."""
    places: list[int] = []
    for lane in range(32):
        rows = [2 * (lane % 4) + i for i in (0, 1, 8, 9)]
        fragment = [16 * row + lane // 4 + 8 * block for block in (0, 1) for row in rows]
        places += [place + 256 * tile for tile in range(4) for place in fragment]
    return torch.tensor(places).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()


def marlin_scales(scales: Tensor) -> Tensor:
    """Scales `[E, out, groups]` in the order of `marlin_permute_scales`: `[E, groups, out]`."""
    order = [i + 8 * j for i in range(8) for j in range(8)]
    rows = scales.mT.contiguous()
    return rows.view(-1, 64)[:, order].view(rows.shape)


def marlin_parts(stack: Stack, out: int, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words, scales and bias, padded to `[out, size]` with zero weights."""
    codes, steps = stored(stack)
    more = (0, size - codes.shape[2], 0, out - codes.shape[1])
    zero = 8 if stack.fmt.is_integer else 0
    codes = torch.nn.functional.pad(codes, more, value=zero)
    steps = torch.nn.functional.pad(steps, (0, more[1] // stack.fmt.block_size, 0, more[3]), value=127)
    if stack.fmt.is_integer:
        scales = marlin_scales(scale_values(steps).to(torch.bfloat16))
    else:
        scales = marlin_scales(steps)
        scales = scales.view(-1, 4)[:, [0, 2, 1, 3]].view(scales.shape).view(torch.float8_e8m0fnu)
    if stack.bias is None:
        return marlin_words(codes), scales, None
    order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    bias = torch.nn.functional.pad(stack.bias, (0, more[3]))
    return marlin_words(codes), scales, bias.view(-1, 32)[:, order].reshape(bias.shape)


def aligned(experts: Tensor, block: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM's `moe_align_block_size` of experts int32 `[tokens, k]`: sorted choices, each block's expert, the number of
    choices with padding."""
    longest = experts.numel() + count * (block - 1)
    if experts.numel() < count:
        longest = min(experts.numel() * block, longest)
    options: dict[str, Any] = {"dtype": torch.int32, "device": experts.device}
    parts = torch.empty(longest, **options), torch.empty(-(-longest // block), **options), torch.empty(1, **options)
    torch.ops._moe_C.moe_align_block_size(experts, count, block, *parts, None)
    return parts


def marlin(layer: Layer, tokens: list[int]) -> Product:
    del tokens
    if layer.fmt not in (MXFP4, MXINT4):
        raise UnsupportedFormatError(f"does not support {layer.fmt}")
    importlib.import_module("vllm._moe_C_stable_libtorch")
    types = importlib.import_module("vllm.scalar_type").scalar_types
    kind = (types.uint4b8 if layer.fmt == MXINT4 else types.float4_e2m1f).id
    shape, gate = layer.shape, torch.compile(layer.shape.gate, dynamic=True)
    hidden, inner = padded_to(shape.hidden, 256), padded_to(shape.inner, 128)
    up, down = marlin_parts(layer.up, 2 * inner, hidden), marlin_parts(layer.down, hidden, inner)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = torch.zeros(4 * processors, dtype=torch.int32, device="cuda")

    def multiply(x: Tensor, parts: tuple[Tensor, Tensor, Tensor | None], weights: Tensor, block: int,
                 blocks: tuple[Tensor, ...], k: int, *, weighted: bool) -> Tensor:  # fmt: skip
        words, scales, bias = parts
        out = words.shape[2] // 2
        y = x.new_empty(len(x) * k, out)
        before = (
            x,
            y,
            words,
            bias,
            scales,
            None,
            None,
            None,
            None,
            None,
            workspace,
            *blocks,
            weights,
            block,
            k,
            weighted,
        )
        sizes, ends = (len(x), out, x.shape[1]), (True, False, True, False, -1, -1, -1)
        return torch.ops._moe_C.moe_wna16_marlin_gemm(*before, kind, *sizes, *ends)

    def product(x: Tensor, routes: Routes) -> Call:
        rows = len(x) * shape.choices / shape.experts
        block = next((rows_ for rows_ in _BLOCK_ROWS if rows / rows_ < _FULLEST), _BLOCK_ROWS[-1])
        padded = torch.nn.functional.pad(x, (0, hidden - shape.hidden))
        turns = [(e.int(), w.float()) for e, w in zip(routes.experts, routes.weights, strict=True)]

        def call(i: int) -> Tensor:
            experts, weights = turns[i % TURNS]
            blocks = aligned(experts, block, shape.experts)
            h = gate(multiply(padded, up, weights, block, blocks, shape.choices, weighted=False))
            y = multiply(h, down, weights, block, blocks, 1, weighted=True)
            return y.view(len(x), shape.choices, hidden).sum(1)[:, : shape.hidden]

        return call

    return product


def humming(layer: Layer, tokens: list[int]) -> Product:
    importlib.import_module("vllm._moe_C_stable_libtorch")  # sorts
    from humming.forward import humming_forward
    from humming.layer import HummingLayer

    shape, indexed = layer.shape, json.dumps({"gemm_type": "indexed"})
    parts: list[tuple[Any, dict[str, Tensor], list[list[Any]]]] = []
    for stack in (layer.up, layer.down):
        codes, steps = stored(stack)
        kinds = {"dtype": humming_dtype(stack.fmt), "scale_dtype": "float8e8m0", "group_size": stack.fmt.block_size}
        options: dict[str, Any] = {"num_experts": shape.experts, "has_bias": stack.bias is not None}
        options |= {"pad_n_to_multiple": 256, "pad_k_to_multiple": 128}  # as vLLM does
        made = HummingLayer(*codes.shape[1:], kinds, torch_dtype=torch.bfloat16, **options).to(codes.device)
        words, scales = in_a_row(codes, stack.fmt.bits).view(torch.int32), steps.view(torch.float8_e8m0fnu)
        bias = {} if stack.bias is None else {"bias": stack.bias}
        made.load_from_tensors({"weight": words, "weight_scale": scales} | bias)
        made.transform()
        configs = humming_configs(made.humming_config, [m * shape.choices for m in tokens], gemm_type="indexed")
        parts.append((made.humming_config, dict(made.named_parameters()) | {"locks": made.locks}, configs))
    gate, total = torch.compile(shape.gate, dynamic=True), torch.compile(_weighted_sum, dynamic=True)

    def product(x: Tensor, routes: Routes) -> Call:
        choices = len(x) * shape.choices
        experts = [each.int() for each in routes.experts]

        def multiply(x: Tensor, part: int, blocks: dict[int, tuple[Tensor, ...]], numbers: Tensor, k: int) -> Tensor:
            config, tensors, configs = parts[part]
            block = next(chosen["block_shape"][0] for _, end, chosen in configs if end == choices)
            if block not in blocks:
                blocks[block] = aligned(numbers, block, shape.experts)
            order = dict(zip(("sorted_ids", "expert_ids", "num_tokens_padded"), blocks[block], strict=True))
            options = {"top_k": k, "valid_shape_m": choices, "compute_config": indexed, "tuning_config": configs}
            return humming_forward(config, x, **tensors, **order, **options)

        def call(i: int) -> Tensor:
            numbers, blocks = experts[i % TURNS], dict[int, tuple[Tensor, ...]]()
            h = gate(multiply(x, 0, blocks, numbers, shape.choices))
            return total(multiply(h, 1, blocks, numbers, 1), routes.weights[i % TURNS])

        return call

    return product


def _weighted_sum(y: Tensor, weights: Tensor) -> Tensor:
    return (y.view(*weights.shape, -1) * weights[..., None]).sum(1)


def triton_kernels(layer: Layer, tokens: list[int]) -> Product:
    del tokens
    if layer.fmt != MXFP4:
        raise UnsupportedFormatError("supports mxfp4 alone")
    if importlib.util.find_spec("triton_kernels") is None:
        sys.path.append(str(Path(next(iter(importlib.import_module("vllm").__path__))) / "third_party"))
    from triton_kernels import matmul_ogs as matmul
    from triton_kernels.routing import routing_from_bitmatrix
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor import Bitmatrix
    from triton_kernels.topk import topk

    shape, gate = layer.shape, torch.compile(layer.shape.gate, dynamic=True)
    matmul.update_opt_flags_constraints({"split_k": 1})  # as vLLM does for Hopper
    up, down = (_swizzled(stack) for stack in (layer.up, layer.down))
    fused: dict[str, Any] = {}
    if shape.gate.interleaved:
        specs = matmul.FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"))
        fused["fused_activation"] = matmul.FusedActivation(specs, (shape.gate.alpha, shape.gate.limit), 2)

    def product(x: Tensor, routes: Routes) -> Call:
        turns: list[tuple[Tensor, Tensor, Any]] = []
        for experts, weights in zip(routes.experts, routes.weights, strict=True):
            logits = torch.full((len(x), shape.experts), -1e4, device=x.device)
            turns.append(topk(logits.scatter(1, experts, weights.float().log()), shape.choices, apply_softmax=True))

        def call(i: int) -> Tensor:
            weights, numbers, bits = turns[i % TURNS]
            bits = Bitmatrix(bits.storage, shape=list(bits.shape), shape_max=[len(x), None])
            data, gather, scatter = routing_from_bitmatrix(bits, weights, numbers, shape.experts, shape.choices)
            h = matmul.matmul_ogs(x, *up[:2], data, gather_indx=gather, precision_config=up[2], **fused)
            h = h if fused else gate(h)
            options = {"scatter_indx": scatter, "precision_config": down[2], "gammas": data.gate_scal}
            return matmul.matmul_ogs(h, *down[:2], data, **options)

        return call

    return product


def _swizzled(stack: Stack) -> tuple[Any, Tensor | None, Any]:
    """Weight, bias and PrecisionConfig of matmul_ogs, as vLLM's `_swizzle_mxfp4` makes them."""
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from triton_kernels.numerics import InFlexData
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    codes, scales = stored(stack)
    scales = torch.nn.functional.pad(scales, (0, -scales.shape[2] % 4)).mT
    value, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=_WARPS)
    words = convert_layout(wrap_torch_tensor(in_a_row(codes, 4).mT, dtype=FP4), value, **value_options)
    scales = convert_layout(wrap_torch_tensor(scales), scale, **scale_options)
    precision = PrecisionConfig(weight_scale=scales, flex_ctx=FlexCtx(rhs_data=InFlexData()))
    return words, None if stack.bias is None else stack.bias.float(), precision


MAKERS: dict[str, Callable[[Layer, list[int]], Product]] = dict(
    zip(PEERS, (marlin, humming, triton_kernels), strict=True)
)
_PACKAGES = {"marlin": "vllm", "humming": "humming-kernels", "triton_kernels": "vllm"}


def named_with_version(peer: str) -> str:
    try:
        return f"{peer} {version(_PACKAGES[peer])}"
    except PackageNotFoundError:  # parts of a wheel
        return peer


def time_peer(run: Run, peer: str, arguments: argparse.Namespace) -> None:
    """Time every case that it supports, and print the others."""
    path, rates = named_with_version(peer), measure_rates("cuda")
    for name in arguments.shapes:
        for fmt in arguments.formats:
            layer = make_layer(SHAPES[name], fmt, "cuda")
            try:
                product = MAKERS[peer](layer, arguments.tokens)
            except Exception as problem:  # whatever it is, the next weight is tried
                print(f"{path}, {name}, {fmt}: {reason(problem)}", flush=True)
                continue
            print(f"{path}, {name}, {fmt}: repacked after {run.elapsed:.0f} s", flush=True)
            for tokens in arguments.tokens:
                if run.out_of_time:
                    print(f"{path}: out of time before {name}, {fmt}, {tokens} tokens", flush=True)
                    return
                x, routes = tokens_of(layer.shape, tokens, "cuda"), make_routes(layer.shape, tokens, "cuda")
                exact = Exact(layer, x, routes.experts[0], routes.weights[0], None)
                floor, case = rates.floor(layer, routes, tokens), Case(run, record_ours=False)
                case.add(line_of(layer, OURS, tokens, None), partial(our_call, layer, x, routes, None), exact, floor)
                case.add(line_of(layer, path, tokens, None), partial(product, x, routes), exact, floor)
                case.finish()
            del product


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    add_case_options(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("experts_peers.py needs a CUDA GPU, and this machine has none")
        return 1
    run = Run(" ".join(["python benchmarks/experts_peers.py", *sys.argv[1:]]), arguments.seconds, arguments.out)
    try:
        warm_up()
        with torch.no_grad():
            time_peer(run, arguments.peer, arguments)
    except Exception as problem:  # not installed, or the GPU is lost to this process
        print(f"{arguments.peer}: {reason(problem)}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
