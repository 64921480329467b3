"""attention(q, repeat(dequantize(k, ...)), repeat(dequantize(v, ...)), mask) with one query per head, on the CPU ->
p = softmax(sum(q * k) * scale + mask); sum(p * v), with k and v decoded where they are summed.

A decode step with an MXCache. Blocks are taken in runs of neighbouring elements whose bits lie in the same place of
neighbouring bytes, and 16 floats wide at most: Inductor then makes vectors of them, with one shift and one mask, and
reads every byte once for a query head. A cache that rotates keys has `rotate(dequantize(k))`; a rotation of the query
gives the same scores. Scales of 2**-127 count as zero, as in the kernel for GPUs: multiplying by subnormal numbers is
slow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, Node

from mxcompile.formats import SCALE_BIAS, SCALE_NAN, MXFormat, parse_format
from mxcompile.graph.dataflow import shapes_are_equal
from mxcompile.inductor.rewrites.decompose_attention import (
    SINGLE_QUERY,
    erase_unread,
    has_one_query,
    mask_of,
    replace_output,
)
from mxcompile.inductor.rewrites.decompose_packing import insert_traced
from mxcompile.inductor.rewrites.fuse_attention import shape_of, unrepeated
from mxcompile.inductor.rewrites.fuse_packed_attention import is_packed, unrotated
from mxcompile.numerics.packing import fields
from mxcompile.ops import ROTATE

_FRACTION_BITS: Final = 23  # of a float32
_LEAST_RUN, _MOST_RUNS = 8, 8
_RUN: Final = 16


def decompose_packed_attention(graph: Graph) -> int:
    """Decompose all single-token attention over packed keys and values, in place. Returns the number of rewrites."""
    nodes = graph.find_nodes(op="call_function", target=SINGLE_QUERY)
    return sum(_rewrite(graph, node) for node in nodes if has_one_query(node))


@dataclass(frozen=True)
class _Packed:
    """Keys or values: elements `[batch, kv heads, 1, tokens, blocks, block_bytes]` and scales, likewise `[..., blocks,
    1]`, with an empty dimension for the query heads that share them."""

    elements: Tensor
    scales: Tensor
    fmt: MXFormat

    @property
    def unit(self) -> float:
        """What the numbers of `runs` are to be multiplied by."""
        return 2.0**-self.fmt.mantissa_bits if self.fmt.is_integer else 1.0

    def runs(self) -> Iterator[tuple[slice, Tensor]]:
        """(which elements of a block, their numbers `[..., tokens, blocks, run]`), for all runs."""
        width = _run(self.fmt)
        for start in range(0, self.fmt.block_size, width):
            yield slice(start, start + width), _numbers(_codes(self.elements, self.fmt, start, width), self.fmt)

    @property
    def powers(self) -> Tensor:
        """The scales as float32."""
        bytes = self.scales.to(torch.int32)
        return torch.where(bytes == SCALE_NAN, torch.nan, (bytes << _FRACTION_BITS).view(torch.float32))


def _rewrite(graph: Graph, node: Node) -> bool:
    args: Any = node.args
    query, (key, value), mask = args[0], map(unrepeated, args[1:3]), mask_of(node)
    (block, factor), key = unrotated(key)
    if not is_packed(key) or not is_packed(value) or not shapes_are_equal(shape_of(key)[:3], shape_of(value)[:3]):
        return False
    formats = [parse_format(str(part.args[2])) for part in (key, value)]
    if any(_run(fmt) < _LEAST_RUN or fmt.block_size > _MOST_RUNS * _run(fmt) for fmt in formats):
        return False
    scale = node.kwargs.get("scale") or shape_of(query)[3] ** -0.5
    size = shape_of(value)[3]

    def attention(query: Tensor, *parts: Tensor) -> Tensor:
        rotated = query if block == 1 else ROTATE(query, block) * factor
        packed = [_packed(*parts[2 * at : 2 * at + 2], fmt) for at, fmt in enumerate(formats)]
        return _attend(rotated, packed[0], packed[1], parts[4] if len(parts) > 4 else None, scale, size)

    sources = [query, *key.args[:2], *value.args[:2], *([] if mask is None else [mask])]
    unread = [part for part in node.all_input_nodes if part is not query]
    replace_output(graph, node, insert_traced(graph, node, attention, sources))
    for part in unread:
        erase_unread(graph, part)
    return True


def _packed(elements: Tensor, scales: Tensor, fmt: MXFormat) -> _Packed:
    return _Packed(elements.unflatten(-1, (-1, fmt.block_bytes)).unsqueeze(2), scales[:, :, None, ..., None], fmt)


def _attend(query: Tensor, keys: _Packed, values: _Packed, mask: Tensor | None, scale: float, size: int) -> Tensor:
    """Query `[batch, heads, 1, head_dim]` to results `[batch, heads, 1, size]`."""
    batch, heads, _, width = query.shape
    kv_heads, blocks = keys.elements.shape[1], keys.elements.shape[-2]
    rows = query.float() * (scale * keys.unit)
    rows = torch.nn.functional.pad(rows, (0, blocks * keys.fmt.block_size - width))
    rows = rows.reshape(batch, kv_heads, heads // kv_heads, 1, blocks, keys.fmt.block_size)
    products = reduce(add, (rows[..., part] * numbers for part, numbers in keys.runs()))
    scores = (products * keys.powers).sum((-1, -2))
    if mask is not None:
        is_by_head = mask.dim() > 2 and mask.shape[1] == heads != 1
        scores = scores + (mask.reshape(-1, kv_heads, heads // kv_heads, mask.shape[-1]) if is_by_head else mask)
    most = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    shares = (scores - most).exp()
    total = shares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    weights = shares[..., None, None] * values.powers
    result = torch.cat([(weights * numbers).sum(-3) for _, numbers in values.runs()], -1)
    result = result.flatten(-2)[..., :size] * (values.unit / total)
    return result.reshape(batch, heads, 1, size).to(query.dtype)


def _run(fmt: MXFormat) -> int:
    """Elements of a block, from any multiple of this on, whose bits lie in the same places of neighbouring bytes."""
    return min(_RUN, *(fmt.block_size * width // 8 for _, width in fields(fmt.bits)))


def _codes(elements: Tensor, fmt: MXFormat, start: int, count: int) -> Tensor:
    """The codes of `count` elements of each block `[..., block_bytes]`, from `start` on: int32 `[..., count]`."""
    codes, offset = [], 0
    for low, width in fields(fmt.bits):
        length = fmt.block_size * width // 8
        part, at = divmod(start, length)
        field = elements[..., offset + at : offset + at + count].to(torch.int32)
        field = field >> (part * width) if part else field
        field = field & ((1 << width) - 1) if (part + 1) * width < 8 else field
        codes.append(field << low if low else field)
        offset += length
    return reduce(torch.bitwise_or, codes)


def _numbers(codes: Tensor, fmt: MXFormat) -> Tensor:
    """Codes (int32) to elements in float32, integers in steps of one."""
    sign = 1 << (fmt.bits - 1)
    if fmt.is_integer:
        return ((codes ^ sign) - sign).float()
    magnitude, least = codes & (sign - 1), fmt.emin - fmt.mantissa_bits
    shift = _FRACTION_BITS - fmt.mantissa_bits
    normal = ((magnitude << shift) + ((SCALE_BIAS - 1 + fmt.emin) << _FRACTION_BITS)).view(torch.float32)
    values = torch.where(magnitude < 1 << fmt.mantissa_bits, magnitude.float() * 2.0**least, normal)
    if fmt.max_code < sign - 1:  # the last codes of E4M3 and E5M2 are no numbers
        values = torch.where(magnitude > fmt.max_code, torch.nan, values)
    return torch.where(codes >= sign, -values, values)
