"""Losses on values inside a model in training, beside the loss on its predictions or in its place.

block          what each segment returns, as the float model has it: relative squared error
distribution   the mean and variance of each channel of it (Norm Tweaking, arXiv 2309.02784)
attention      what the projection behind each attention returns (self-distillation, SDQ)
next tokens    those of the data: cross-entropy, without a float model
kurtosis       of what layers return, without a float model: few large channels (arXiv 2404.03605)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import cross_entropy

from mxcompile.analysis.attentions import find_attentions
from mxcompile.analysis.matmuls import Matmul
from mxcompile.analysis.segments import find_segments
from mxcompile.calibration.learning.losses import capped_error
from mxcompile.calibration.runs.backward_run import reached_by
from mxcompile.graph.program import Program
from mxcompile.numerics.importance import token_weights
from mxcompile.ops import CACHED_ATTENTION

NEXT_TOKENS = "next tokens"
_HIDDEN = -100  # in place of a next token that does not count
_LARGEST_ERROR = 1.0  # relative and squared, that a value has before training: another value than the float model's
Loss = Callable[[Tensor, Tensor], Tensor]
"""From the rows of the float model and those of the model in training to the loss."""


@dataclass(frozen=True)
class InnerTerm:
    """weight times the mean of a loss over some values. nodes: of the model in training, by name.

    exact: those of the float model, by the same names; empty where the loss does not read them.
    """

    loss: Loss
    weight: float
    nodes: Mapping[str, Node]
    exact: Mapping[str, Node]

    def value(self, expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> Tensor:
        """The term. expected, actual: rows by name."""
        pairs = [(expected.get(name, actual[name]), actual[name]) for name in self.nodes]
        same = [pair for pair in pairs if pair[0].shape[:-1] == pair[1].shape[:-1]]  # else other tokens were selected
        losses = [self.loss(*pair) for pair in same]
        return self.weight * (torch.stack(losses).mean() if losses else torch.zeros(()))

    def without(self, names: Iterable[str]) -> "InnerTerm":
        """The term on the other values."""
        left = set(names)
        kept = {name: node for name, node in self.nodes.items() if name not in left}
        return InnerTerm(self.loss, self.weight, kept, {name: self.exact[name] for name in kept if name in self.exact})

    def unlike(self, expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> list[str]:
        """The values that are not those of the float model at all: an earlier pass has permuted or scaled them."""
        compared = [name for name in self.exact if expected[name].shape == actual[name].shape]
        like = [name for name in compared if capped_error(expected[name], actual[name]) < _LARGEST_ERROR]
        return [name for name in self.exact if name not in like]


def block_term(program: Program, exact: Program, matmuls: Sequence[Matmul], loss: Loss) -> InnerTerm:
    """On what the segments of these matmuls return."""
    nodes = [node for segment in find_segments(program, matmuls) for node in segment.outputs]
    reached = reached_by(matmuls)
    return compared_term(exact, [node for node in dict.fromkeys(nodes) if node in reached], loss, 1.0)


def attention_term(program: Program, exact: Program, matmuls: Sequence[Matmul], weight: float) -> InnerTerm:
    """On what the projections behind attention return.

    Their input itself may have other channels than the float model's, as folds into values scale and permute it.
    """
    projections = {matmul.node for matmul in matmuls}
    found: dict[Node, None] = {}
    attentions = [attention.node for attention in find_attentions(program)[0]]
    attentions += program.graph.find_nodes(op="call_function", target=CACHED_ATTENTION)
    for attention in attentions:
        behind, seen = [attention], set[Node]()
        while behind:
            node = behind.pop(0)
            if node in projections:
                found[node] = None
            elif node not in seen and len(seen) < _LONGEST_WAY:
                seen.add(node)
                behind += node.users
    return compared_term(exact, found, capped_error, weight)


def kurtosis_term(matmuls: Sequence[Matmul], weight: float, heads: Iterable[str]) -> InnerTerm:
    """On what all matmuls return but output heads."""
    nodes = {m.node.name: m.node for m in matmuls if m.parameter not in set(heads)}
    return InnerTerm(lambda _, actual: excess_kurtosis(actual), weight, nodes, {})


def next_token_term(logits: Node) -> InnerTerm:
    """The mean cross-entropy of the tokens that follow, as `next_tokens` returns them."""

    def loss(expected: Tensor, actual: Tensor) -> Tensor:
        return cross_entropy(actual.flatten(0, -2).float(), expected.flatten(), ignore_index=_HIDDEN)

    return InnerTerm(loss, 1.0, {NEXT_TOKENS: logits}, {})


def next_tokens(ids: Tensor, visible: Tensor) -> Tensor:
    """For each token the next one `[batch, tokens, 1]`, from `[batch, tokens]`; `_HIDDEN` where that does not count."""
    following = torch.where(visible, ids, _HIDDEN)[:, 1:]
    return torch.cat([following, following.new_full((len(ids), 1), _HIDDEN)], dim=1).unsqueeze(-1).long()


def token_input(exact: Program, logits: Node) -> Node | None:
    """The input `[batch, tokens]` that an embedding of as many rows as there are logits reads, if there is one."""
    size = logits.meta["val"].shape[-1]
    for node in exact.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        table, ids = node.args[0], node.args[1]
        if isinstance(table, Node) and isinstance(ids, Node) and ids.op == "placeholder":
            shape = ids.meta["val"].shape
            if table.meta["val"].shape[0] == size and list(map(str, shape)) == list(
                map(str, logits.meta["val"].shape[:-1])
            ):
                return ids
    return None


def distribution_distance(expected: Tensor, actual: Tensor) -> Tensor:
    """Mean over channels of |difference of means| and |difference of variances| over rows, of values `[..., size]`.

    In units of the root mean square of the expected values, and its square. Tokens of high energy count less, as in
    second moments (`token_weights`): the first of a sequence would be most of it.
    """
    rows, targets = actual.flatten(0, -2).float(), expected.flatten(0, -2).float()
    weights = token_weights(targets)
    weights = weights / weights.sum().clamp(min=1e-30)
    unit = (targets.square() * weights).sum(0).mean().clamp(min=1e-30)
    means = [(values * weights).sum(0) for values in (rows, targets)]
    variances = [(v.square() * weights).sum(0) - mean.square() for v, mean in zip((rows, targets), means, strict=True)]
    return (means[0] - means[1]).abs().mean() / unit.sqrt() + (variances[0] - variances[1]).abs().mean() / unit


def excess_kurtosis(values: Tensor) -> Tensor:
    """Mean over rows of the excess kurtosis over channels `[..., size]`, at least 0: 0 for normal values."""
    rows = values.flatten(0, -2).float()
    centred = rows - rows.mean(-1, keepdim=True)
    variance = centred.square().mean(-1).clamp(min=1e-15)  # its square is a normal float32
    return (centred.pow(4).mean(-1) / variance.square() - 3).clamp(min=0).mean()


_LONGEST_WAY = 32  # nodes behind an attention that are looked at for its projection


def compared_term(exact: Program, nodes: Iterable[Node], loss: Loss, weight: float) -> InnerTerm:
    """On float values that the float model computes by a node of the same name and operator."""
    twins = {node.name: node for node in exact.graph.nodes}
    own = {n.name: n for n in nodes if _is_float(n) and n.name in twins and twins[n.name].target == n.target}
    return InnerTerm(loss, weight, own, {name: twins[name] for name in own})


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
