"""What a decomposed attention does to its scores, as data: `softmax(q @ k.T * scale + mask)`, and as nodes again."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from mxcompile.graph.dataflow import CASTS, SAME_VALUE, operand, shapes_are_equal
from mxcompile.graph.edit import insert_call
from mxcompile.graph.program import Program

aten = torch.ops.aten
_SCORES, _MASK, _HIDDEN = "scores", "mask", "hidden"
_SCALES: Final = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
_DIVISIONS: Final = frozenset({aten.div.Tensor, aten.div.Scalar})
_SHAPES: Final = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.slice.Tensor}
)
_SOFTMAX: Final = frozenset({aten.softmax.int, aten._softmax.default})
_LOWEST: Final = -1e4  # what is put in place of a score that nobody may see, or less

Step = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class ScoreSteps:
    """A scale, and one mask at most.

    mask: added to the scores, or bool: false where a key is hidden, true there if `hides`. steps: operators with their
    arguments, from the product of queries and keys to the weights of values; scores and mask are words in them.
    """

    scale: float
    mask: Node | None
    hides: bool
    steps: tuple[Step, ...]


def score_steps(weights: Node, product: Node) -> ScoreSteps | None:
    """The steps from the product of queries and keys to what values are multiplied with; None if there are others."""
    scale, mask, hides = 1.0, None, False
    steps: list[Step] = []
    node, is_before_softmax = weights, False
    while node is not product:
        source: Any = operand(node, 0)
        if not isinstance(source, Node):
            return None
        rest = tuple(node.args[1:])
        if node.target in _SOFTMAX:
            is_before_softmax = True
            if operand(node, 1) % node.meta["val"].dim() != node.meta["val"].dim() - 1:
                return None
        elif node.target in CASTS and not any(isinstance(part, Node) for part in rest):
            pass
        elif _is_copy(node, source):
            node = source
            continue
        elif not is_before_softmax:
            return None
        elif node.target in _SCALES and isinstance(rest[0], int | float):
            scale = scale / rest[0] if node.target in _DIVISIONS else scale * rest[0]
        elif mask is None and scale == 1.0 and (found := _mask(node)) is not None:
            source, mask, hides, rest = found
        else:
            return None
        steps.append((node.target, (_SCORES, *rest), tuple(node.kwargs.items())))
        node = source
    return ScoreSteps(scale, mask, hides, tuple(reversed(steps))) if is_before_softmax else None


def insert_steps(program: Program, before: Node, product: Node, mask: Node | None, steps: tuple[Step, ...]) -> Node:
    """The steps as nodes in front of `before`. mask: as `mx::cached_attention` takes it. Returns the weights."""
    node = product
    for target, args, kwargs in steps:
        words = {_SCORES: node, _MASK: mask}
        if _HIDDEN in args:
            words[_HIDDEN] = insert_call(program, before, aten.logical_not.default, (mask,), f"{before.name}_hidden")
        node = insert_call(program, before, target, tuple(map(words.get, args, args)), None, **dict(kwargs))
    return node


def _is_copy(node: Node, source: Node) -> bool:
    return node.target in SAME_VALUE or (
        node.target in _SHAPES and shapes_are_equal(node.meta["val"].shape, source.meta["val"].shape)
    )


def _mask(node: Node) -> tuple[Node, Node, bool, tuple[Any, ...]] | None:
    """The scores, the mask, whether it hides, and the arguments behind the scores of a step that masks; or None."""
    if node.target is aten.add.Tensor and not node.kwargs:
        left, right = node.args[:2]
        if isinstance(left, Node) and isinstance(right, Node) and right.meta["val"].dim() <= left.meta["val"].dim():
            return left, right, False, (_MASK,)
    if node.target is aten.masked_fill.Scalar and isinstance(node.args[2], int | float) and node.args[2] <= _LOWEST:
        scores, hidden, value = node.args
        if isinstance(scores, Node) and isinstance(hidden, Node):
            return scores, hidden, True, (_HIDDEN, value)
    return None
