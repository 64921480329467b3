"""The `mx::` operators, of which lowered graphs consist.

    mx::quantize(x, format, rule) -> (elements, scales)              explicit, one pair per value
    mx::dequantize(elements, scales, format, size, dtype, planes) -> values
    mx::quantize_dequantize(x, format, rule) -> values               the two above, fused
    mx::straight_through(gradient, x, format, rule) -> gradient of x, from that of the values
    mx::linear(x, elements, scales, bias, format, planes) -> y       dequantize + linear, fused
    mx::linears(x, elements, scales, biases, format, activation, rule, planes) -> ys
                                                                     the three above, for several weights of one input
    mx::cpu_linears(the same except planes)                          the same, in C++ for few tokens
    mx::rotate(x, block) -> runs of block channels times Hadamard    input of a matmul; see `hadamard.py`
    mx::multiply(x, multiplier, digest) -> x * multiplier            input of a matmul of a deployed module
                                           or T x for runs of channels (`block_transforms.py`)
    mx::attend(query, key, value, mask, scale) -> y                  single-token attention; see `fuse_attention.py`
    mx::norm(x, weight, bias, norm, format, rule) -> y               of rows, with the rounding after it
    mx::add_norm(x, residual, weight, bias, norm, format, rule) -> (x + residual, y)
    mx::gate_product(gate, up, function, format, rule) -> y          f(gate) * up, with the rounding after it
    mx::attend_next(query, key, value, keys, values, position, cos, sin, mask, scale, format, rule) -> y
                                                                     RoPE, write to the cache, `attend`, and rounding
    mx::attend_packed(query, keys, key_scales, values, value_scales, mask, scale, key_format, value_format, size) -> y
                                                                     of a few queries, over packed keys and values
    mx::cached_attention(query, key, value, mask, scale, is_causal, cache, prompt_length) -> y
                                                                     of whole texts, as a cache of that format gives it
    mx::attend_packed_next(query, key, value, keys, key_scales, values, value_scales, position, cos, sin, mask, scale,
                           key_format, key_rule, value_format, value_rule, format, rule) -> y
                                                                     RoPE, rounding and write to the cache, then that
    mx::read_cache(elements, scales, own, newest, first, held, position, format, block, window) -> states
                                                                     dequantized, some tokens in place of rounded ones
    mx::attend_packed_exact(query, turned, keys, key_scales, values, value_scales, own_key, own_value, newest_keys,
                            newest_values, first_keys, first_values, held, position, mask, scale, key_format,
                            value_format, window) -> y               `attend_packed` of such a cache
    mx::grouped_linear(x, experts, elements, scales, bias, format, planes) -> y
                                                                     rows of x times the experts chosen for them
    mx::experts(x, experts, weights, up, up_bias, down, down_bias, up_format, down_format, gate, activation, rule,
                up_planes, down_planes) -> y                         two of these and the gate between, fused

`format` is the text of an `MXFormat` ("mxint8", "mxfp4:64"), `rule` that of a `ScaleRule`. Elements are packed
(`packing.py`), uint8 `[..., blocks * block_bytes]`; scales are E8M0 bytes `[..., blocks]`; blocks run along the last
dimension, whose true length is `size`. With `planes`, which is its `PlanarScaling`, a 2-D weight has the planar layout
of the GPU kernels (`kernels/layout/planes.py`), in rows of bytes padded to whole K-steps.

The first two are the reference itself on every device. The fused operators run the fastest kernel that supports the
call (`kernels.dispatch`) and are defined as the composition of the first two with `aten.linear`. Compiled graphs
contain `cpu_linears` in place of `linears`: it is C++, because calling a small matmul through Python takes longer than
the matmul. It does not check sizes, which a compiled graph cannot get wrong.

Gradients pass `quantize_dequantize` unchanged, but not its saturated elements: `straight_through`, which is
`numerics/straight_through.py`. Those of `linear`, `grouped_linear`, `rotate` and `multiply` are exact. Packed weights
have none. No gradient passes the bytes between `quantize` and `dequantize`, or the operators that are only in finished
graphs (`linears`, `cpu_linears`, `attend`, `experts`): a graph to be trained has the others.

An expert is one of the weights `[out, in]` of a 3-D one (`numerics/experts.py`); none is decoded that no token chose.
`gate` is the text of a `Gate` (`numerics/gates.py`).

`digest` identifies the values of a multiplier. Weights that share an input each have their own multiplier tensor;
inside `torch.compile` only the digest shows that they are equal and one multiplication suffices.
"""

import torch

from mxcompile.ops import cached, exact_tokens, experts, gradients, linears, small

__all__ = ["cached", "exact_tokens", "experts", "gradients", "linears", "small"]

QUANTIZE = torch.ops.mx.quantize.default
DEQUANTIZE = torch.ops.mx.dequantize.default
QUANTIZE_DEQUANTIZE = torch.ops.mx.quantize_dequantize.default
LINEAR = torch.ops.mx.linear.default
LINEARS = torch.ops.mx.linears.default
CPU_LINEARS = torch.ops.mx.cpu_linears.default
GROUPED_LINEAR = torch.ops.mx.grouped_linear.default
EXPERTS = torch.ops.mx.experts.default
MULTIPLY = torch.ops.mx.multiply.default
ROTATE = torch.ops.mx.rotate.default
ATTEND = torch.ops.mx.attend.default
NORM = torch.ops.mx.norm.default
ADD_NORM = torch.ops.mx.add_norm.default
GATE_PRODUCT = torch.ops.mx.gate_product.default
ATTEND_NEXT = torch.ops.mx.attend_next.default
ATTEND_PACKED = torch.ops.mx.attend_packed.default
CACHED_ATTENTION = torch.ops.mx.cached_attention.default
ATTEND_PACKED_NEXT = torch.ops.mx.attend_packed_next.default
READ_CACHE = torch.ops.mx.read_cache.default
ATTEND_PACKED_EXACT = torch.ops.mx.attend_packed_exact.default
