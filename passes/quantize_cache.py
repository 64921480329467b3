"""attention(q, k, v) -> attention(q, dequantize(quantize(k)), dequantize(quantize(v))): a cache in MX formats.

Keys, behind the rotary embedding, and values are rounded in blocks along the head dimension, before heads are
repeated. Each token is rounded once, so one run over a text computes what generation computes with the same cache.
With exact tokens (`window`, `sink`), rotated or shifted keys or a `prompt`, the attention becomes one
`mx::cached_attention`, told which query reads which key exactly. The weights of the model do not change, except for
values that are rotated:

    v_proj rows @ H, o_proj columns @ H^-1        a Hadamard rotation of each value head, which costs nothing

A bias of keys that no position rotates changes no weight of a softmax and is set to zero, so that it costs no bits.
Values are rotated where that saves a tenth of their error; keys, which cost a rotation of every query, if it saves a
tenth of the scores' error in all layers. `deploy` stores the format on the module, and `generate` makes such a cache.
(Yue et al., WKVQuant, arXiv 2402.12065; Liu et al., KIVI, arXiv 2402.02750; Ashkboos et al., QuaRot, arXiv 2404.00456)
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.attentions import (
    CACHED,
    STEPS,
    Attention,
    Source,
    ancestors_in_order,
    find_attentions,
    is_latent,
)
from mxcompile.analysis.folds.key_bias import KeyBias, key_bias
from mxcompile.analysis.folds.value_rotation import RotatedValues, rotated_values
from mxcompile.calibration.cache_errors import CacheErrors, measure_cache
from mxcompile.calibration.runs.run import BoundBatch, Runner
from mxcompile.formats import MXINT8, MXFormat, activation_rule
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.dataflow import compute_nodes, shapes_are_equal
from mxcompile.graph.edit import insert_call
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program, Stage, where
from mxcompile.graph.records import Fold, Miss, PassResult
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.ops import CACHED_ATTENTION, DEQUANTIZE, QUANTIZE
from mxcompile.pipeline.interfaces import FLOATING, Pass
from mxcompile.pipeline.options import Range
from mxcompile.pipeline.preservation import REQUIRED_DB, REQUIRED_DB_HALF, check_preserved, record_outputs

_WORTH: Final = 0.9
_NOT_WORTH: Final = f"a rotation of its {{}} would save less than {1 - _WORTH:.0%} of their error"
_ALL: Final = "all layers"
_HIDDEN: Final = -1e4  # what is added to a score that a mask hides, or less


class Rotation(StrEnum):
    """none: as the model computes keys and values. head: a Hadamard rotation of each head."""

    NONE = "none"
    HEAD = "head"


class Shift(StrEnum):
    """none: keys are rounded as they are. mean: after the mean key of the prompt is subtracted."""

    NONE = "none"
    MEAN = "mean"


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """key, value: formats, none for float.

    window: the newest tokens, a query's own one included, that it reads exactly. sink: the first tokens, likewise.
    rotate: head rotates keys and values where it pays; values only in front of the passes that round weights.
    shift: mean subtracts the mean key of the prompt, or of the first 128 tokens, from all keys, which changes no
    attention, only their rounding.
    prompt: the first tokens of every text that count as a prompt, which is read exactly; with 0, all tokens are read
    as if the model had generated them.
    """

    key: MXFormat | None = MXINT8
    value: MXFormat | None = MXINT8
    window: Annotated[int, Range(0)] = 0
    sink: Annotated[int, Range(0)] = 0
    rotate: Rotation = Rotation.NONE
    shift: Shift = Shift.NONE
    prompt: Annotated[int, Range(0)] = 0

    name = "quantize-cache"
    accepts = FLOATING | {Stage.LOWERED}

    def __post_init__(self) -> None:
        super().__post_init__()
        CacheFormat(self.key, self.value, self.window, self.sink)

    def run(self, program: Program) -> PassResult:
        """Measure keys and values on the calibration data, rotate what pays, and round the rest."""
        found, misses = find_attentions(program)
        is_shifted = self.shift is Shift.MEAN
        is_mixed = bool(self.window or self.sink or self.prompt or self.rotate is Rotation.HEAD or is_shifted)
        reasons = _reasons(program, [attention for attention in found if not _is_rounded(attention)])
        reasons = {a: reason or (_why_not_one_operator(a) if is_mixed else None) for a, reason in reasons.items()}
        attentions = [attention for attention, reason in reasons.items() if reason is None]
        skipped = [Miss(where(attention.node), reason) for attention, reason in reasons.items() if reason]
        folds = self._drop_key_biases(program, attentions)
        errors = measure_cache(program, attentions, CacheFormat(self.key, self.value, shift=is_shifted))
        rotates, unrotated = self._rotates_keys(attentions, errors)
        cache = CacheFormat(self.key, self.value, self.window, self.sink, rotates, is_shifted)
        rotated, rotations, unfolded = self._fold_values(program, attentions, errors)
        for attention in attentions:
            self._insert(program, attention, cache)
        program.graph.eliminate_dead_code()
        if attentions:
            program.cache = cache
        numbers = {a.layer: self._numbers(a, cache, errors[a], a.layer in rotated) for a in attentions}
        return PassResult(len(attentions), (*misses, *skipped, *unrotated, *unfolded), numbers, (*folds, *rotations))

    def _drop_key_biases(self, program: Program, attentions: Sequence[Attention]) -> tuple[Fold, ...]:
        found = [key_bias(program, attention) for attention in attentions] if self.key is not None else []
        return self._fold(program, [bias for bias in found if bias is not None])

    def _fold(self, program: Program, folds: Sequence[KeyBias] | Sequence[RotatedValues]) -> tuple[Fold, ...]:
        """Apply folds, and check that they change nothing."""
        steps = tuple(Fold(fold.layer, partial(_apply, fold)) for fold in folds)
        if folds:
            record_outputs(program)
            before = program.copy()
            for fold in folds:
                fold.apply(program)
            names = (name for fold in folds for name in fold.parameters)
            is_half = any(program.tensor(name).dtype.itemsize < 4 for name in names)
            check_preserved(program, before, steps, self.name, REQUIRED_DB_HALF if is_half else REQUIRED_DB)
        return steps

    def _rotates_keys(
        self, attentions: Sequence[Attention], errors: dict[Attention, CacheErrors]
    ) -> tuple[bool, list[Miss]]:
        if self.rotate is Rotation.NONE or self.key is None or not attentions:
            return False, []
        plain, rotated = (sum(getattr(errors[a], name) for a in attentions) for name in ("scores", "rotated_scores"))
        if rotated < _WORTH * plain:
            return True, []
        return False, [Miss(_ALL, _NOT_WORTH.format("keys"))]

    def _fold_values(
        self, program: Program, attentions: Sequence[Attention], errors: dict[Attention, CacheErrors]
    ) -> tuple[frozenset[str], tuple[Fold, ...], list[Miss]]:
        """Rotate values where it pays; the layers, what was done to them, and why not to the others."""
        if self.rotate is Rotation.NONE or self.value is None:
            return frozenset(), (), []
        rotations: list[RotatedValues] = []
        layers: list[str] = []
        misses: list[Miss] = []
        worth = [a for a in attentions if errors[a].rotated_values < _WORTH * errors[a].values]
        if unworthy := [where(a.node) for a in attentions if a not in worth]:
            misses.append(Miss(_together(unworthy, len(attentions)), _NOT_WORTH.format("values")))
        for attention in worth:
            found = rotated_values(program, attention)
            if isinstance(found, str):
                misses.append(Miss(where(attention.node), found))
            else:
                rotations.append(found)
                layers.append(attention.layer)
        return frozenset(layers), self._fold(program, rotations), misses

    def _insert(self, program: Program, attention: Attention, cache: CacheFormat) -> None:
        if cache.has_exact_tokens or cache.rotate or cache.shift or self.prompt:
            _insert_attention(program, attention, cache, self.prompt)
            return
        for source, fmt in ((attention.key, self.key), (attention.value, self.value)):
            if fmt is not None:
                source.replace(_rounded(program, source, fmt))

    def _numbers(self, attention: Attention, cache: CacheFormat, errors: CacheErrors, folded: bool) -> dict[str, float]:
        heads = int(attention.key.node.meta["val"].shape[-3])
        dtype = attention.key.node.meta["val"].dtype
        stored = cache.bytes_per_token(heads, attention.key.size, attention.value.size, dtype.itemsize)
        return errors.numbers(cache, folded) | {"bytes_per_token": float(stored)}


def _apply(fold: KeyBias | RotatedValues, program: Any) -> None:
    fold.apply(program)


def _together(places: Sequence[str], total: int) -> str:
    """Where a miss is that several of `total` layers have."""
    if len(places) == 1:
        return places[0]
    others = "another layer" if len(places) == 2 else f"{len(places) - 1} other layers"
    return _ALL if len(places) == total else f"{places[0]} and {others}"


def _is_rounded(attention: Attention) -> bool:
    return any(source.node.target is DEQUANTIZE for source in (attention.key, attention.value))


def _why_not_one_operator(attention: Attention) -> str | None:
    if attention.scale is None:
        return (
            "exact tokens and rotated keys need attention that multiplies its scores by a number and masks them once: "
            "load the model with sdpa as its attention, or take window=0, sink=0, rotate=none, shift=none, prompt=0"
        )
    sources = (attention.query, attention.key.node, attention.value.node)
    if not all(node.meta["val"].dim() == 4 for node in sources):
        return "its queries, keys and values are not [batch, heads, tokens, size]"
    return None


def _rounded(program: Program, source: Source, fmt: MXFormat) -> Node:
    """The dequantized key or value, in front of its reader; one that other readers have is reused."""
    node, before = source.node, source.reader
    quantized = insert_call(
        program, before, QUANTIZE, (node, str(fmt), str(activation_rule(fmt))), f"{node.name}_quantized"
    )
    elements = insert_call(program, before, operator.getitem, (quantized, 0), f"{node.name}_elements")
    scales = insert_call(program, before, operator.getitem, (quantized, 1), f"{node.name}_scales")
    args = (elements, scales, str(fmt), source.size, node.meta["val"].dtype)
    rounded = insert_call(program, before, DEQUANTIZE, args, f"{node.name}_dequantized")
    rounded.meta[CACHED] = True
    return rounded


def _insert_attention(program: Program, attention: Attention, cache: CacheFormat, prompt: int) -> None:
    """attention(q, k, v, mask) -> mx::cached_attention(q, k, v, mask, ...)."""
    key, value = attention.key.node, attention.value.node
    mask = attention.masks[0] if attention.masks else None
    if attention.hides:
        mask = insert_call(program, attention.node, torch.ops.aten.logical_not.default, (mask,), f"{mask}_visible")
    args = (attention.query, key, value, mask, attention.scale, attention.is_causal, str(cache), prompt)
    new = insert_call(program, attention.node, CACHED_ATTENTION, args, f"{attention.node.name}_cached")
    if attention.steps is not None:
        new.meta[STEPS] = attention.steps
    attention.node.replace_all_uses_with(new)
    program.graph.erase_node(attention.node)  # it may draw random numbers, so nothing else removes it


def _reasons(program: Program, attentions: Sequence[Attention]) -> dict[Attention, str | None]:
    """Why generation caches no keys and values of an attention in MX, or None."""
    masks = {mask for attention in attentions for mask in attention.masks}
    values = _evaluated(program, masks) if masks else {}
    return {attention: _why_not(attention, _seen(attention, values)) for attention in attentions}


def _seen(attention: Attention, values: dict[Node, Tensor]) -> list[Tensor]:
    """The masks of an attention, bool ones true where a key is attended to."""
    masks = [values[mask] for mask in attention.masks]
    return [~mask.bool() for mask in masks] if attention.hides else masks


def _why_not(attention: Attention, masks: Sequence[Tensor]) -> str | None:
    if is_latent(attention):
        return (
            "its keys and values are made of a latent of all heads, which transformers caches in their place, in float"
        )
    queries, keys = (source.meta["val"].shape[-2] for source in (attention.query, attention.key.node))
    if not shapes_are_equal((queries,), (keys,)):
        return "it attends to tokens of another sequence, whose keys are computed once and not appended to"
    visible = [mask if mask.dtype == torch.bool else mask > _HIDDEN for mask in masks if mask.dim() >= 2]
    square = [mask for mask in visible if mask.shape[-1] == mask.shape[-2] > 1]
    causal = [mask for mask in square if not torch.triu(mask, 1).any()]
    if not attention.is_causal and not causal:
        return "every token attends to later ones, so generation has no cache of it"
    for mask in causal:
        if (width := _sliding_window(mask)) is not None:
            return f"it attends to a sliding window of {width} tokens, whose cache is small and stays exact"
    return None


def _sliding_window(mask: Tensor) -> int | None:
    """The number of keys that a query sees at most, if later queries no longer see a key that one has seen."""
    rows = mask.reshape(-1, *mask.shape[-2:])
    forgotten = rows[:, :-1] & ~rows[:, 1:]
    return int(rows.sum(-1).max()) if forgotten.any() else None


def _evaluated(program: Program, masks: set[Node]) -> dict[Node, Tensor]:
    """The values of masks for the longest inputs at hand."""
    batch = max((program.example, *program.batches), key=_longest)
    bound = BoundBatch.of(program, bind_inputs(program, batch), batch.weight)
    given = {mask: bound.values[mask] for mask in masks if mask in bound.values}
    computed = masks - set(given)
    nodes = compute_nodes(list(ancestors_in_order(program, computed)))
    return given | Runner(program).run_nodes(nodes, bound, None, computed)


def _longest(batch: Inputs) -> int:
    tensors = (part for part in (*batch.args, *batch.kwargs.values()) if isinstance(part, Tensor) and part.dim() > 1)
    return max((part.shape[1] for part in tensors), default=0)
