"""Random graphs: folding all groups that are found preserves the function, and finding them never fails.

The same of order groups: channels in a random order, one group at a time and all after each other.

More than the 40 examples: MXCOMPILE_EXAMPLES=500 python -m pytest tests/analysis/folds/test_random_graphs.py
"""

import os

import pytest
import torch
from fold_nets import REQUIRED_DB, SHAPES, whole_exponents
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.groups import find_groups, fold
from mxcompile.analysis.folds.orders import find_orders, reorder
from mxcompile.graph.trace import trace
from mxcompile.numerics.metrics import sqnr_db

C = 8


class Graph(nn.Module):
    """A random graph: every step is (op, place of one operand, of another), places counting back from the last value.

    All values are `[batch, tokens, 8]`; those nothing reads go through a linear each and are the outputs.
    """

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps, self.names, self.parameters_made = steps, iter(()), nn.ParameterDict()
        self.known = False
        with torch.no_grad():
            self(torch.randn(2, 6, C))
        self.known = True

    def p(self, *shape: int, name: str | None = None) -> nn.Parameter:
        """The next parameter, drawn when the graph is made; the same one whenever it has a name."""
        name = name or f"p{next(self.names)}"
        if not self.known and name not in self.parameters_made:
            self.parameters_made[name] = nn.Parameter(torch.randn(*shape) * (shape[-1] ** -0.5 if shape[1:] else 1.0))
        return self.parameters_made[name]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.names = iter(range(1000))
        values, read = [x], set[int]()
        for name, *places in self.steps:
            function, operands = OPS[name]
            indices = [len(values) - 1 - place % len(values) for place in places[:operands]]
            read.update(indices)
            values.append(function(self, *(values[index] for index in indices)))
        return tuple(F.linear(v, self.p(C, C)) for i, v in enumerate(values) if i not in read)


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, C // heads)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def grouped_query(m: Graph, x: Tensor, y: Tensor) -> Tensor:
    v = F.linear(y, m.p(C // 2, C)).unsqueeze(1).expand(-1, 2, -1, -1)
    return joined(F.scaled_dot_product_attention(split(x, 2), split(x, 2), v))


def mixed(m: Graph, x: Tensor) -> Tensor:
    share = F.linear(x, m.p(2, C)).softmax(-1).unsqueeze(-2)
    return (torch.stack((F.linear(x, m.p(C, C)), F.linear(x, m.p(C, C))), -1) * share).sum(-1)


UNARY = {
    "linear": lambda m, x: F.linear(x, m.p(C, C), m.p(C)),
    "linear, shared": lambda m, x: F.linear(x, m.p(C, C, name="linear")),
    "matmul": lambda m, x: x @ m.p(C, C),
    "addmm": lambda m, x: torch.addmm(m.p(C), x.flatten(0, 1), m.p(C, C)).unflatten(0, x.shape[:2]),
    "linear by a sum": lambda m, x: F.linear(x, m.p(C, C) + m.p(C, C)),
    "linear by a product": lambda m, x: F.linear(x, m.p(C, C) * m.p(C, 1)),
    "matmul per head": lambda m, x: joined(split(x, 2) @ m.p(2, C // 2, C // 2)),
    "gate and up": lambda m, x: gated(F.linear(x, m.p(2 * C, C))),
    "experts": mixed,
    "layer_norm": lambda m, x: F.layer_norm(x, (C,), m.p(C), m.p(C)),
    "rms_norm": lambda m, x: F.rms_norm(x, (C,), m.p(C)),
    "rms_norm, shared": lambda m, x: F.rms_norm(x, (C,), m.p(C, name="norm")),
    "rms": lambda m, x: m.p(C) * rms(x),
    "rms, 1 + w": lambda m, x: rms(x) * (1 + m.p(C)),
    "relu": lambda m, x: F.relu(x),
    "gelu": lambda m, x: F.gelu(x),
    "negated": lambda m, x: -x,
    "halved": lambda m, x: x * 0.5,
    "plus one": lambda m, x: x + 1,
    "scaled": lambda m, x: x * m.p(C),
    "scaled, shared": lambda m, x: x * m.p(C, name="gain"),
    "scaled by one number": lambda m, x: x * m.p(1),
    "scaled per head": lambda m, x: joined(split(x, 2) * m.p(2, 1, 1)),
    "divided": lambda m, x: x / m.p(C).exp(),
    "biased": lambda m, x: x + m.p(C),
    "heads swapped": lambda m, x: joined(split(x, 2).flip(1)),
    "interleaved": lambda m, x: x.unflatten(-1, (2, -1)).mT.flatten(2),
    "halves swapped": lambda m, x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "half": lambda m, x: F.linear(x[..., : C // 2], m.p(C, C // 2)),
    "repeated": lambda m, x: F.linear(x.repeat_interleave(2, -1), m.p(C, 2 * C)),
    "tiled": lambda m, x: x.repeat(1, 1, 2)[..., C // 2 : -C // 2],
    "class token": lambda m, x: torch.cat((m.p(1, 1, C).expand(x.shape[0], 1, C), x), 1)[:, :-1],
    "padded": lambda m, x: F.pad(x, (0, 0, 1, 0))[:, :-1],
    "centred": lambda m, x: x - x.mean(1, keepdim=True),
    "channels centred": lambda m, x: x - x.mean(-1, keepdim=True),
    "cumsum": lambda m, x: x.cumsum(1),
    "masked": lambda m, x: x.masked_fill(x.new_ones(x.shape[1], 1) > 2, 0.0),
    "indexed": lambda m, x: x[:, torch.arange(x.shape[1]).flip(0)],
    "convolved": lambda m, x: F.conv1d(x.mT, m.p(C, C, 3), m.p(C), padding=1).mT,
    "looked up": lambda m, x: x + F.embedding((x[..., 0] > 0).long(), m.p(2, C)),
}
BINARY = {
    "added": lambda m, x, y: x + y,
    "added, alpha": lambda m, x, y: torch.sub(x, y, alpha=0.5),
    "multiplied": lambda m, x, y: x * y,
    "silu gate": lambda m, x, y: F.silu(x) * y,
    "gate per head": lambda m, x, y: joined(split(x, 2) * split(y, 2)[..., :1]),
    "gate per token": lambda m, x, y: x * y[..., :1],
    "where": lambda m, x, y: torch.where(x > 0, x, y),
    "halves joined": lambda m, x, y: torch.cat((x[..., : C // 2], y[..., C // 2 :]), -1),
    "tokens joined": lambda m, x, y: torch.cat((x, y), 1)[:, : x.shape[1]],
    "attention": lambda m, x, y: joined(
        F.scaled_dot_product_attention(split(x, 2), split(y, 2), split(F.linear(y, m.p(C, C)), 2))
    ),
    "eager attention": lambda m, x, y: joined(torch.softmax(split(x, 2) @ split(x, 2).mT, -1) @ split(y, 2)),
    "grouped-query attention": grouped_query,
    "linear attention": lambda m, x, y: x.softmax(-1) @ (y.mT @ y),
}
OPS = {**{name: (op, 1) for name, op in UNARY.items()}, **{name: (op, 2) for name, op in BINARY.items()}}
EXAMPLES = int(os.environ.get("MXCOMPILE_EXAMPLES", "40"))
steps = st.lists(st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9)


@settings(derandomize=True, deadline=None, database=None, max_examples=12)
@given(steps, st.sets(st.integers(0, 8)))
def test_some_random_graphs_keep_their_function(steps, left_out):
    assert_folds_keep_the_function(steps, left_out)


@pytest.mark.slow
@settings(derandomize=EXAMPLES == 40, deadline=None, database=None, max_examples=EXAMPLES)
@given(steps, st.sets(st.integers(0, 8)))
def test_random_graphs_keep_their_function(steps, left_out):
    assert_folds_keep_the_function(steps, left_out)


def assert_folds_keep_the_function(steps, left_out):
    """In float64 and with powers of two, so that only a wrong factor shows, not a badly conditioned graph."""
    torch.manual_seed(0)
    calls = [torch.randn(batch, length, C).double() for batch, length in SHAPES]
    program = trace(Graph(steps).double().eval(), calls[0])
    chosen = [matmul for i, matmul in enumerate(choose(program).matmuls) if i not in left_out]
    before = [program(call) for call in calls]
    for group in find_groups(program, chosen)[0]:
        fold(program, group, torch.exp2(whole_exponents(group.count)))
    for call, outputs in zip(calls, before, strict=True):
        for wanted, found in zip(outputs, program(call), strict=True):
            assert not wanted.isfinite().all() or sqnr_db(wanted, found) >= REQUIRED_DB


@settings(derandomize=True, deadline=None, database=None, max_examples=12)
@given(steps)
def test_some_random_graphs_compute_the_same_in_another_order(steps):
    assert_orders_keep_the_function(steps)


@pytest.mark.slow
@settings(derandomize=EXAMPLES == 40, deadline=None, database=None, max_examples=EXAMPLES)
@given(steps)
def test_random_graphs_compute_the_same_in_another_order(steps):
    assert_orders_keep_the_function(steps)


def assert_orders_keep_the_function(steps):
    torch.manual_seed(0)
    calls = [torch.randn(batch, length, C).double() for batch, length in SHAPES]
    program = trace(Graph(steps).double().eval(), calls[0])
    before = [program(call) for call in calls]
    for group in find_orders(program, choose(program).matmuls)[0]:
        order = group.sorted_by(torch.rand(group.count))
        assert sorted(order.tolist()) == list(range(group.count))
        reorder(program, group, order)
    for call, outputs in zip(calls, before, strict=True):
        for wanted, found in zip(outputs, program(call), strict=True):
            assert not wanted.isfinite().all() or sqnr_db(wanted, found) >= REQUIRED_DB
