"""attention(q, repeat(dequantize(k, ...)), repeat(dequantize(v, ...)), mask) with one query per head, on the CPU ->
p = softmax(sum(q * k) * scale + mask); sum(p * v), with k and v decoded where they are summed.

A decode step with an MXCache. Blocks are taken in runs of neighbouring elements whose bits lie in the same place of
neighbouring bytes, and 16 floats wide at most: Inductor then makes vectors of them, with one shift and one mask, and
reads every byte once for a query head. A cache that rotates keys has `rotate(dequantize(k))`; a rotation of the query
gives the same scores. Where a growing cache writes exact tokens over decoded ones, their scores take the place of those
of packed keys. Scales of 2**-127 count as zero, as in the kernel for GPUs: multiplying by subnormal numbers is slow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, Node

from mxcompile.formats import SCALE_BIAS, SCALE_NAN, MXFormat, parse_format
from mxcompile.graph.dataflow import shapes_are_equal
from mxcompile.graph.edit import create_call
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

aten = torch.ops.aten
_TOKENS: Final = 2
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


@dataclass(frozen=True)
class _Written:
    """Exact states `[batch, kv heads, some tokens, size]` that are written over packed ones from a place on."""

    states: Tensor
    start: Tensor

    def covers(self, places: Tensor) -> Tensor:
        """Which places it is written to."""
        return (places >= self.start) & (places < self.start + self.states.shape[_TOKENS])

    @property
    def places(self) -> Tensor:
        """Those it is written to."""
        return torch.arange(self.states.shape[_TOKENS], device=self.states.device) + self.start


def _rewrite(graph: Graph, node: Node) -> bool:
    args: Any = node.args
    query, mask = args[0], mask_of(node)
    (key, new_keys), (value, new_values) = (_overwritten(unrepeated(part)) for part in args[1:3])
    (block, factor), key = unrotated(key)
    if not is_packed(key) or not is_packed(value) or not shapes_are_equal(shape_of(key)[:3], shape_of(value)[:3]):
        return False
    if [start for _, start in new_keys] != [start for _, start in new_values]:
        return False
    formats = [parse_format(str(part.args[2])) for part in (key, value)]
    if any(_run(fmt) < _LEAST_RUN or fmt.block_size > _MOST_RUNS * _run(fmt) for fmt in formats):
        return False
    options: Any = node.kwargs
    scale = shape_of(query)[3] ** -0.5 if options.get("scale") is None else options["scale"]
    size, count = shape_of(value)[3], len(new_keys)

    def attention(query: Tensor, *parts: Tensor) -> Tensor:
        rotated = query if block == 1 else ROTATE(query, block) * factor
        packed = [_packed(parts[2 * at], parts[2 * at + 1], fmt) for at, fmt in enumerate(formats)]
        new, starts, masks = parts[4 : 4 + 2 * count], parts[4 + 2 * count : 4 + 3 * count], parts[4 + 3 * count :]
        exact = [[_Written(*part) for part in zip(new[at::2], starts, strict=True)] for at in (0, 1)]
        rows = (rotated, query)
        return _attend(rows, packed[0], packed[1], exact[0], exact[1], masks[0] if masks else None, scale, size)

    with query.meta["val"].fake_mode, graph.inserting_before(node):
        starts = [create_call(graph, aten.full.default, [], start, dtype=torch.int64) for _, start in new_keys]
    pairs = [part for pair in zip(new_keys, new_values, strict=True) for part, _ in pair]
    sources = [query, *key.args[:2], *value.args[:2], *pairs, *starts, *([] if mask is None else [mask])]
    unread = [part for part in node.all_input_nodes if part is not query]
    replace_output(graph, node, insert_traced(graph, node, attention, sources))
    for part in unread:
        erase_unread(graph, part)
    return True


def _overwritten(node: Any) -> tuple[Any, list[tuple[Node, Any]]]:
    """States, and what is written over them: (states of some tokens, the first place), in order of writing."""
    written: list[tuple[Node, Any]] = []
    while node.target is aten.slice_scatter.default and len(node.args) == 5 and node.args[2] == _TOKENS:
        new = node.args[1]
        if new.target is aten.copy.default and shapes_are_equal(shape_of(new), shape_of(new.args[1])):
            new = new.args[1]
        written.insert(0, (new, node.args[3]))
        node = node.args[0]
    return node, written


def _packed(elements: Tensor, scales: Tensor, fmt: MXFormat) -> _Packed:
    return _Packed(elements.unflatten(-1, (-1, fmt.block_bytes)).unsqueeze(2), scales[:, :, None, ..., None], fmt)


def _attend(
    queries: tuple[Tensor, Tensor],
    keys: _Packed,
    values: _Packed,
    new_keys: Sequence[_Written],
    new_values: Sequence[_Written],
    mask: Tensor | None,
    scale: float,
    size: int,
) -> Tensor:
    """Queries `[batch, heads, 1, head_dim]`, for packed and for exact keys, to results `[batch, heads, 1, size]`."""
    batch, heads, _, width = queries[0].shape
    _, kv_heads, _, tokens, blocks, _ = keys.elements.shape
    shape = (batch, kv_heads, heads // kv_heads, 1)
    if mask is not None and mask.dim() > 2 and mask.shape[1] == heads != 1:
        mask = mask.reshape(-1, kv_heads, heads // kv_heads, mask.shape[-1])
    rows = queries[0].float() * (scale * keys.unit)
    rows = torch.nn.functional.pad(rows, (0, blocks * keys.fmt.block_size - width))
    rows = rows.reshape(*shape, blocks, keys.fmt.block_size)
    products = reduce(add, (rows[..., part] * numbers for part, numbers in keys.runs()))
    places = torch.arange(tokens, device=rows.device)
    rounded = _left((products * keys.powers).sum((-1, -2)), places, new_keys)
    scores = [rounded if mask is None else rounded + mask]
    row = (queries[1].float() * scale).reshape(*shape, width)
    for index, part in enumerate(new_keys):
        exact = _left((row * part.states.float().unsqueeze(2)).sum(-1), part.places, new_keys[index + 1 :])
        scores.append(exact if mask is None else exact + mask.index_select(-1, part.places))
    most = reduce(torch.maximum, (part.amax(-1, keepdim=True) for part in scores))
    shares = [(part - most.clamp_min(torch.finfo(torch.float32).min)).exp() for part in scores]
    total = reduce(add, (part.sum(-1, keepdim=True) for part in shares)).clamp_min(torch.finfo(torch.float32).tiny)
    weights = shares[0][..., None, None] * values.powers
    result = torch.cat([(weights * numbers).sum(-3) for _, numbers in values.runs()], -1)
    result = result.flatten(-2)[..., :size] * values.unit
    for share, part in zip(shares[1:], new_values, strict=True):
        result = result + (share.unsqueeze(-1) * part.states.float().unsqueeze(2)).sum(-2)
    return (result / total).reshape(batch, heads, 1, size).to(queries[0].dtype)


def _left(scores: Tensor, places: Tensor, written: Sequence[_Written]) -> Tensor:
    """Scores of keys at places, without those that are written over."""
    for part in written:
        scores = torch.where(part.covers(places), -torch.inf, scores)
    return scores


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
