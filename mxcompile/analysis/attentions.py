"""Find attention whose keys and values a cache holds: `softmax(q @ k.T * scale + mask) @ v`, fused or decomposed.

Keys and values are found as a cache holds them, before heads are repeated for the queries that share them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch.fx import Node

from mxcompile.analysis.score_steps import Step, insert_steps, score_steps
from mxcompile.graph.dataflow import CASTS, SAME_VALUE, operand, shapes_are_equal, swapped_axes
from mxcompile.graph.edit import insert_call
from mxcompile.graph.program import Program, module_path, where
from mxcompile.graph.records import Miss
from mxcompile.ops import CACHED_ATTENTION

aten = torch.ops.aten
_FUSED: Final = aten.scaled_dot_product_attention.default
_MATMULS: Final = {aten.matmul.default: (0, 1), aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2)}
_CACHE: Final = 6  # the argument of mx::cached_attention that is the cache's format; before it are those of attention
_SOFTMAX: Final = frozenset({aten.softmax.int, aten._softmax.default})
_VIEWS: Final = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.expand.default}
)
_REPEATS: Final = _VIEWS | SAME_VALUE | {aten.slice.Tensor, aten.repeat_interleave.self_int}
_SCALES: Final = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
_PLAIN: Final = _VIEWS | SAME_VALUE | CASTS
_ON_SCORES: Final = _PLAIN | _SCALES | {
    *(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.where.self, aten.where.ScalarOther, aten.cat.default),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.tanh.default, aten.slice.Tensor, aten.maximum.default),
}  # fmt: skip


STEPS: Final = "mx_score_steps"
"""Key of `Node.meta` on a `mx::cached_attention` in place of a decomposed attention: its `ScoreSteps.steps`."""
CACHED: Final = "mx_cached"
"""Key of `Node.meta` on the `mx::dequantize` of keys or values as a cache returns them."""


@dataclass(frozen=True)
class Source:
    """A key or value as a cache holds it, `[batch, kv heads, tokens, size]`.

    reader: the first node on the way from `node` to the attention. index: the argument of `reader` that is `node`.
    """

    node: Node
    reader: Node
    index: int

    @property
    def size(self) -> int:
        """The size of a head."""
        return int(self.node.meta["val"].shape[-1])

    def replace(self, new: Node) -> None:
        """Let the attention read another node in its place."""
        args = list(self.reader.args)
        args[self.index] = new
        self.reader.args = tuple(args)


@dataclass(frozen=True)
class Attention:
    """One attention. node: its result, `[batch, heads, queries, size]`. query: `[batch, heads, queries, head_dim]`.

    masks: what is added to the scores or selects them (one, if it is fused). scale: None where the scores are not
    multiplied by one number and then masked at most once. hides: whether its mask is true where a key is hidden. steps:
    what is done to the scores, if it is decomposed and has a scale.
    """

    node: Node
    query: Node
    key: Source
    value: Source
    masks: tuple[Node, ...]
    scale: float | None
    is_causal: bool
    hides: bool = False
    steps: tuple[Step, ...] | None = None

    @property
    def layer(self) -> str:
        """Path of the module that it is in."""
        return module_path(self.node) or self.node.name


def find_attentions(program: Program) -> tuple[list[Attention], tuple[Miss, ...]]:
    """All attentions in the order of the graph, and the nodes that look like one and are not understood."""
    found: list[Attention] = []
    misses: list[Miss] = []
    for node in program.graph.nodes:
        result = _fused(node) if node.target is _FUSED else _decomposed(node) if node.target in _MATMULS else None
        if isinstance(result, str):
            misses.append(Miss(where(node), result))
        elif result is not None:
            found.append(result)
    return found, tuple(misses)


def _fused(node: Node) -> Attention | str:
    query, key, value = (cast(Node, operand(node, index)) for index in range(3))
    mask, scale = operand(node, 3), node.kwargs.get("scale")
    if operand(node, 4):
        return "it drops attention weights at random, which generation does not"
    size = query.meta["val"].shape[-1]
    scale = 1 / math.sqrt(size) if scale is None else scale
    masks = (mask,) if isinstance(mask, Node) else ()
    sources = _source(node, 1, key), _source(node, 2, value)
    number = float(scale) if isinstance(scale, (int, float)) else None
    return Attention(node, query, *sources, masks, number, bool(operand(node, 5)))


def _decomposed(node: Node) -> Attention | None:
    """The attention that ends in a matmul of weights and values; None if another matmul."""
    left, right = _MATMULS[cast(Any, node.target)]
    softmax = weights = operand(node, left)
    while isinstance(softmax, Node) and softmax.target in _PLAIN | {aten.slice.Tensor}:
        softmax = operand(softmax, 0)
    if not isinstance(softmax, Node) or softmax.target not in _SOFTMAX:
        return None
    masks: list[Node] = []
    scores = _scores(operand(softmax, 0), masks)
    if scores is None:
        return None
    q_at, k_at = _MATMULS[cast(Any, scores.target)]
    transposed = operand(scores, k_at)
    if not isinstance(transposed, Node) or (axes := swapped_axes(transposed, transposed.meta["val"].dim())) is None:
        return None
    if axes[-2:] != (len(axes) - 1, len(axes) - 2):
        return None
    key = _source(transposed, 0, cast(Node, operand(transposed, 0)))
    value, query = _source(node, right, operand(node, right)), operand(scores, q_at)
    steps = score_steps(weights, scores) if scores.target is not aten.baddbmm.default else None
    if steps is None:
        return Attention(node, query, key, value, tuple(masks), None, False)
    only = () if steps.mask is None else (steps.mask,)
    return Attention(node, query, key, value, only, steps.scale, False, steps.hides, steps.steps)


def _scores(node: Any, masks: list[Node]) -> Node | None:
    """The matmul of queries and keys behind what is done to scores; `masks` gets what they are combined with."""
    if not isinstance(node, Node):
        return None
    if node.target in _MATMULS:
        if node.target is aten.baddbmm.default and isinstance(bias := operand(node, 0), Node):
            masks.append(bias)
        return node
    if node.target not in _ON_SCORES:
        return None
    operands = [part for part in node.all_input_nodes if isinstance(part.meta.get("val"), torch.Tensor)]
    results = [(part, _scores(part, masks)) for part in operands]
    scores = [result for _, result in results if result is not None]
    if scores:
        masks += [part for part, result in results if result is None]
    return scores[0] if scores else None


def _source(reader: Node, index: int, node: Node) -> Source:
    """What a cache holds of keys or values: behind what only copies them for several query heads."""
    while node.target in _REPEATS:
        source = operand(node, 0)
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if len(before) < 3 or not shapes_are_equal(before[-1:], after[-1:]):
            break
        if node.target is aten.slice.Tensor and not shapes_are_equal(before, after):
            break
        if node.target in _VIEWS and not _keeps_tokens(before, after):
            break
        reader, index, node = node, 0, source
    return Source(node, reader, index)


def is_latent(attention: Attention) -> bool:
    """Whether its heads share a part of their keys, as in multi-head latent attention.

    A cache then holds what keys and values are made of, not themselves.
    """
    key = attention.key.node
    if key.target is aten.cat.default:
        parts: list[Any] = list(operand(key, 0))
    else:  # a tensor whose slices are written
        slices = [user for user in key.users if user.target is aten.slice.Tensor]
        parts = [operand(user, 1) for part in slices for user in part.users if user.target is aten.copy_.default]
    return len(parts) > 1 and any(_copies_one_head(part) for part in parts)


def _copies_one_head(node: Node) -> bool:
    if node.target is not aten.expand.default:
        return False
    before, after = (part.meta["val"].shape for part in (operand(node, 0), node))
    return len(before) == len(after) and len(after) > 3 and before[-3] == 1 and after[-3] != 1


def _keeps_tokens(before: Any, after: Any) -> bool:
    """Whether the last two dimensions are those of before: only heads are repeated, split or joined."""
    return shapes_are_equal(before[-2:], after[-2:])


def ancestors_in_order(program: Program, wanted: set[Node]) -> Iterator[Node]:
    """The wanted nodes and all that they are computed from, in the order of the graph."""
    needed = set(wanted)
    for node in reversed(list(program.graph.nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
    return (node for node in program.graph.nodes if node in needed)


def with_exact_cache(program: Program) -> Program:
    """The program with keys and values in float, as the model's own forward computes them; itself if they are."""
    if program.cache is None:
        return program
    exact = program.copy()
    exact.cache = None
    for node in list(exact.graph.nodes):
        if CACHED in node.meta:
            quantize = cast(Node, cast(Node, node.args[0]).args[0])
            node.replace_all_uses_with(cast(Node, quantize.args[0]))
        elif node.target is CACHED_ATTENTION:
            _restore(exact, node)
    exact.graph.eliminate_dead_code()
    exact.graph_module.recompile()
    return exact


def _restore(program: Program, node: Node) -> None:
    """mx::cached_attention -> the model's own operators: inputs rounded behind it magnify differences of float sums."""
    query, key, value, mask, scale, is_causal = cast(Any, node.args[:_CACHE])
    if (steps := node.meta.get(STEPS)) is not None:
        attention = _decompose(program, node, steps)
    else:
        with program.graph.inserting_before(node):
            args = (query, key, value, mask, 0.0, is_causal)
            attention = program.graph.call_function(_FUSED, args, {"scale": scale, "enable_gqa": True})
        attention.meta = dict(node.meta)
    node.replace_all_uses_with(attention)
    program.graph.erase_node(node)


def _decompose(program: Program, node: Node, steps: tuple[Step, ...]) -> Node:
    query, key, value, mask = cast(Any, node.args[:4])
    copies = query.meta["val"].shape[1] // key.meta["val"].shape[1]
    repeat = aten.repeat_interleave.self_int
    if copies > 1:
        key, value = (insert_call(program, node, repeat, (part, copies, 1), None) for part in (key, value))
    transposed = insert_call(program, node, aten.transpose.int, (key, 2, 3), None)
    product = insert_call(program, node, aten.matmul.default, (query, transposed), None)
    weights = insert_steps(program, node, product, mask, steps)
    return insert_call(program, node, aten.matmul.default, (weights, value), None)
