"""What rounding costs keys and values of each attention, on calibration data, with and without a rotation of heads."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.attentions import Attention
from mxcompile.calibration.runs.run import BoundBatch, Runner
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.dataflow import compute_nodes
from mxcompile.graph.program import Program
from mxcompile.numerics.cache_format import CacheFormat, head_rotation
from mxcompile.numerics.cached_attention import rounded_keys, rounded_values
from mxcompile.numerics.hadamard import rotate_input, rotate_weight

_BATCHES = 4


@dataclass
class CacheErrors:
    """Relative squared errors of one attention, summed over batches.

    keys, values: of the rounded tensors. scores: of `q @ k`, by the second moments of queries. rotated_*: with each
    head rotated before it is rounded. Zero for what stays float.
    """

    keys: float = 0.0
    values: float = 0.0
    scores: float = 0.0
    rotated_keys: float = 0.0
    rotated_values: float = 0.0
    rotated_scores: float = 0.0
    batches: int = 0

    def add(self, query: Tensor, key: Tensor, value: Tensor, cache: CacheFormat) -> None:
        """Query `[..., heads, tokens, size]`, key and value `[..., kv heads, tokens, size]`."""
        query, key, value = query.float(), key.float(), value.float()
        moments = _moments(query, key.shape[-3] if key.dim() == 4 else 1)
        rotated = CacheFormat(cache.key, None, rotate=True, shift=cache.shift)
        block = head_rotation(value.shape[-1])
        for prefix, rounded in (("", rounded_keys(key, cache)), ("rotated_", rounded_keys(key, rotated))):
            self._add(f"{prefix}keys", _relative(key, rounded))
            self._add(f"{prefix}scores", _weighted(rounded - key, moments) / max(_weighted(key, moments), 1e-30))
        self._add("values", _relative(value, rounded_values(value, cache)))
        turned = rotate_weight(rounded_values(rotate_input(value, block), cache), block)
        self._add("rotated_values", _relative(value, turned))
        self.batches += 1

    def _add(self, name: str, error: float) -> None:
        setattr(self, name, getattr(self, name) + error)

    def numbers(self, cache: CacheFormat, values_rotated: bool) -> dict[str, float]:
        """SQNR in dB of what is rounded, and the errors of rotated keys and values over plain ones."""
        chosen = {
            "key_sqnr_db": self.rotated_keys if cache.rotate else self.keys,
            "score_sqnr_db": self.rotated_scores if cache.rotate else self.scores,
            "value_sqnr_db": self.rotated_values if values_rotated else self.values,
        }
        numbers = {name: -10 * math.log10(error / self.batches) for name, error in chosen.items() if error > 0}
        if self.scores > 0:
            numbers["rotated_keys_over_plain"] = self.rotated_scores / self.scores
        if self.values > 0:
            numbers["rotated_values_over_plain"] = self.rotated_values / self.values
        return numbers


def measure_cache(
    program: Program, attentions: Sequence[Attention], cache: CacheFormat
) -> dict[Attention, CacheErrors]:
    """Run the first calibration batches, as the program computes them now."""
    errors = {attention: CacheErrors() for attention in attentions}
    if not attentions:
        return errors
    nodes = compute_nodes(program.graph.nodes)
    for batch in program.track(program.batches[:_BATCHES]):
        bound = BoundBatch.of(program, bind_inputs(program, batch), batch.weight)
        Runner(program).run_nodes(nodes, bound, _measuring(errors, cache))
    return errors


def _measuring(errors: dict[Attention, CacheErrors], cache: CacheFormat) -> Callable[[Node, Any], None]:
    """Called with every value: keeps queries, keys and values until their attention is there."""
    readers: dict[Node, int] = {}
    for attention in errors:
        for node in (attention.query, attention.key.node, attention.value.node):
            readers[node] = readers.get(node, 0) + 1
    kept: dict[Node, Tensor] = {}
    by_node = {attention.node: attention for attention in errors}

    def on_value(node: Node, value: Any) -> None:
        if node in readers:
            kept[node] = value
        if (attention := by_node.get(node)) is not None:
            operands = (attention.query, attention.key.node, attention.value.node)
            query, key, value = (kept[operand] for operand in operands)
            errors[attention].add(query, key, value, cache)
            for operand in operands:
                readers[operand] -= 1
                if not readers[operand]:
                    kept.pop(operand, None)

    return on_value


def _moments(query: Tensor, kv_heads: int) -> Tensor:
    """Second moments of the queries that share a KV head, `[kv heads, size, size]`."""
    grouped = query.unflatten(-3, (kv_heads, -1)) if query.dim() == 4 else query.unsqueeze(0).unsqueeze(0)
    rows = grouped.movedim(-4, 0).flatten(1, -2)
    return rows.mT @ rows / rows.shape[1]


def _weighted(values: Tensor, moments: Tensor) -> float:
    rows = values.movedim(-3, 0).flatten(1, -2) if values.dim() == 4 else values.flatten(0, -2).unsqueeze(0)
    return float(((rows @ moments) * rows).sum(dtype=torch.float64))


def _relative(exact: Tensor, rounded: Tensor) -> float:
    noise, power = (part.square().sum(dtype=torch.float64) for part in (rounded - exact, exact))
    return float(noise / power.clamp_min(1e-30))
