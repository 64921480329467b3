"""attention(q, repeat(dequantize(k, ...)), repeat(dequantize(v, ...)), mask) with one query per head, on the CPU ->
p = softmax(sum(q * k) * scale + mask); sum(p * v), with k and v decoded where they are summed.

A decode step with an MXCache. Blocks are taken in runs of neighbouring elements whose bits lie in the same place of
neighbouring bytes, and 16 floats wide at most: Inductor then makes vectors of them, with one shift and one mask, and
reads every byte once for a query head. A cache that rotates keys has `rotate(dequantize(k))`; a rotation of the query
gives the same scores. Where some tokens are exact (`mx::read_cache`), their scores take the place of those of packed
keys. Scales of 2**-127 count as zero, as in the kernel for GPUs: multiplying by subnormal numbers is slow.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Final, Self

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
from mxcompile.numerics.exact_tokens import ExactPart, ExactTokens, exact_parts
from mxcompile.numerics.packing import fields
from mxcompile.ops import READ_CACHE, ROTATE
from mxcompile.ops.exact_tokens import factor_of

aten = torch.ops.aten
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
class _Source:
    """What a graph decodes keys or values from. rotation: block and factor of `rotate(x, block) * factor`.

    exact: the operands of `mx::read_cache` from its own states to the position, and its window, if it is one.
    """

    elements: Node
    scales: Node
    fmt: MXFormat
    rotation: tuple[int, int]
    exact: tuple[Any, ...] = ()

    @classmethod
    def of(cls, node: Node) -> Self | None:
        """None if these are other states."""
        if node.target is READ_CACHE:
            read: Any = node.args
            rotation, exact = (read[8], factor_of(read[8])), (*read[2:7], read[9])
            return cls(read[0], read[1], parse_format(read[7]), rotation, exact)
        rotation, packed = unrotated(node)
        args: Any = packed.args
        return cls(args[0], args[1], parse_format(str(args[2])), rotation) if is_packed(packed) else None


def _rewrite(graph: Graph, node: Node) -> bool:
    args: Any = node.args
    query, mask = args[0], mask_of(node)
    states = [unrepeated(part) for part in args[1:3]]
    key, value = (_Source.of(part) for part in states)
    if key is None or value is None or not shapes_are_equal(*(shape_of(part)[:3] for part in states)):
        return False
    # held, position and window: what one layer of a cache has read
    if value.rotation[0] > 1 or key.exact[3:] != value.exact[3:]:
        return False
    if any(_run(fmt) < _LEAST_RUN or fmt.block_size > _MOST_RUNS * _run(fmt) for fmt in (key.fmt, value.fmt)):
        return False
    options: Any = node.kwargs
    scale = shape_of(query)[3] ** -0.5 if options.get("scale") is None else options["scale"]
    size, (block, factor) = shape_of(states[1])[3], key.rotation
    exact = [*key.exact[:3], *value.exact[:3], *key.exact[3:5]]
    window = key.exact[5] if key.exact else 0

    def attention(query: Tensor, *rest: Tensor) -> Tensor:
        rotated, given = query if block == 1 else ROTATE(query, block) * factor, iter(rest)
        keys, values = (_packed(next(given), next(given), part.fmt) for part in (key, value))
        row = None if mask is None else next(given)
        parts, are_exact = _exact([None if part is None else next(given) for part in exact], window)
        return _attend((rotated, query), keys, values, parts, are_exact, row, scale, size)

    sources = [query, key.elements, key.scales, value.elements, value.scales, mask, *exact]
    result = insert_traced(graph, node, attention, [part for part in sources if part is not None])
    unread = [part for part in node.all_input_nodes if part is not query]
    replace_output(graph, node, result)
    for part in unread:
        erase_unread(graph, part)
    return True


def _packed(elements: Tensor, scales: Tensor, fmt: MXFormat) -> _Packed:
    return _Packed(elements.unflatten(-1, (-1, fmt.block_bytes)).unsqueeze(2), scales[:, :, None, ..., None], fmt)


def _exact(parts: list[Any], window: int) -> tuple[list[ExactPart], Callable[[Tensor], Tensor] | None]:
    """What is read exactly, and which places those are. parts: the operands of both `mx::read_cache`, if it is that."""
    if not parts:
        return [], None
    keys, values = ExactTokens(*parts[:3]), ExactTokens(*parts[3:6])
    return exact_parts((keys, values), parts[6], parts[7].reshape(1), window)


def _attend(
    queries: tuple[Tensor, Tensor],
    keys: _Packed,
    values: _Packed,
    exact: Sequence[ExactPart],
    are_exact: Callable[[Tensor], Tensor] | None,
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
    rounded = (products * keys.powers).sum((-1, -2))
    if are_exact is not None:
        rounded = torch.where(are_exact(torch.arange(tokens, device=rows.device)), -torch.inf, rounded)
    scores = [rounded if mask is None else rounded + mask]
    row = (queries[1].float() * scale).reshape(*shape, width)
    for part in exact:
        own = torch.where(part.is_read, (row * part.keys.float().unsqueeze(2)).sum(-1), -torch.inf)
        scores.append(own if mask is None else own + mask.index_select(-1, part.places.clamp(0, tokens - 1)))
    most = reduce(torch.maximum, (part.amax(-1, keepdim=True) for part in scores))
    shares = [(part - most.clamp_min(torch.finfo(torch.float32).min)).exp() for part in scores]
    total = reduce(add, (part.sum(-1, keepdim=True) for part in shares)).clamp_min(torch.finfo(torch.float32).tiny)
    weights = shares[0][..., None, None] * values.powers
    result = torch.cat([(weights * numbers).sum(-3) for _, numbers in values.runs()], -1)
    result = result.flatten(-2)[..., :size] * values.unit
    for share, part in zip(shares[1:], exact, strict=True):
        result = result + (share.unsqueeze(-1) * part.values.float().unsqueeze(2)).sum(-2)
    return (result / total).reshape(batch, heads, 1, size).to(queries[0].dtype)


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
