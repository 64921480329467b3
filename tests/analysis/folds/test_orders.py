"""Order groups: which channels can change places, with which parameters, and why others cannot."""

import pytest
import torch
from fold_nets import SIZE, tokens
from torch import nn
from torch.nn import functional as F

from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.order_region import moved
from mxcompile.analysis.folds.orders import OrderKind, find_orders, reorder
from mxcompile.graph.trace import trace
from mxcompile.numerics.metrics import sqnr_db


class Mlp(nn.Module):
    """A gated MLP with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(SIZE, 64), nn.Linear(SIZE, 64), nn.Linear(64, SIZE)

    def forward(self, x):
        return self.down(F.gelu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Grouped-query attention: 4 query heads of 8 channels share 2 heads of v."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(SIZE, 32), nn.Linear(SIZE, 16), nn.Linear(SIZE, 16)
        self.o = nn.Linear(32, SIZE)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Stream(nn.Module):
    """A residual stream: embedding, position table, norms, two blocks, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(16, SIZE), nn.Parameter(torch.randn(64, SIZE))
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(3))
        self.blocks = nn.ModuleList([Attention(), Mlp()])
        self.head = nn.Linear(SIZE, 16, bias=False)
        self.head.weight = self.embed.weight
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, ids):
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x = x + block(norm(x))
        return self.head(self.norms[2](x))


class Residual(nn.Module):
    """The same stream is read and written by one linear: its rows and columns are reordered alike."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.linear, self.after = nn.Linear(4, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4)

    def forward(self, x):
        x = self.before(x)
        return self.after(x + F.relu(self.linear(F.layer_norm(x, (SIZE,)))))


class Experts(nn.Module):
    """The experts' hidden channels, each expert with its own order."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = nn.Parameter(torch.randn(3, SIZE, 16)), nn.Parameter(torch.randn(3, 1, 16))
        self.down = nn.Parameter(torch.randn(3, 16, SIZE))

    def forward(self, x):
        hidden = torch.bmm(x.flatten(0, 1).expand(3, -1, -1), self.up) + self.bias
        return torch.bmm(F.silu(hidden), self.down).sum(0)


class Fused(nn.Module):
    """One linear makes gate and up, in two halves or interleaved."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.gate_up, self.down, self.interleaved = nn.Linear(SIZE, 128), nn.Linear(64, SIZE), interleaved

    def forward(self, x):
        both = self.gate_up(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Convolved(nn.Module):
    """A convolution makes the channels, and a depthwise one follows."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(SIZE, 24, 3, padding=1)
        self.each = nn.Conv1d(24, 24, 3, padding="same", groups=24)
        self.out = nn.Linear(24, SIZE)

    def forward(self, x):
        return self.out(self.each(F.relu(self.one(x.mT))).mT)


class Halved(nn.Module):
    """Half of the channels are gated by the other half's rotation."""

    def __init__(self, twisted: bool) -> None:
        super().__init__()
        self.up, self.down, self.twisted = nn.Linear(SIZE, 16), nn.Linear(32, SIZE), twisted
        self.gain = nn.Parameter(torch.randn(32))

    def forward(self, x):
        y = self.up(x)
        return self.down(torch.stack((y, y.flip(-1) if self.twisted else y), -1).flatten(-2) * self.gain)


NETS = {
    "gated MLP": (Mlp(), tokens(2, 7)),
    "grouped-query attention": (Attention(), tokens(2, 7)),
    "residual stream": (Stream(), torch.arange(14).view(2, 7)),
    "both dimensions of a matrix": (Residual(), tokens(2, 7, 4)),
    "experts": (Experts(), tokens(2, 7)),
    "fused halves": (Fused(interleaved=False), tokens(2, 7)),
    "fused, interleaved": (Fused(interleaved=True), tokens(2, 7)),
    "convolutions": (Convolved(), tokens(2, 7)),
    "each channel twice": (Halved(twisted=False), tokens(2, 7)),
}


def orders_of(name):
    module, x = NETS[name]
    program = trace(module.double().eval(), x.double() if x.is_floating_point() else x)
    return program, *find_orders(program, choose(program).matmuls)


@pytest.mark.parametrize("name", NETS)
def test_a_random_order_keeps_the_function(name):
    """In float64: a wrong place would leave about 0 dB."""
    program, groups, _ = orders_of(name)
    example = program.example.args
    expected = program(*example)
    assert groups
    for group in groups:
        order = group.sorted_by(torch.rand(group.count, generator=torch.Generator().manual_seed(1)))
        assert not torch.equal(order, torch.arange(group.count))
        reorder(program, group, order)
        assert sqnr_db(expected, program(*example)) > 250


def test_the_hidden_channels_of_an_mlp():
    _, (group,), misses = orders_of("gated MLP")
    assert (group.kind, group.count, len(group.cells)) == (OrderKind.HIDDEN, 64, 1)
    assert sorted(name for name, _ in group.parameters) == [
        *("down.weight", "gate.bias", "gate.weight", "up.bias", "up.weight"),
    ]
    assert {miss.matmul.module_path: miss.reason for miss in misses} == dict.fromkeys(
        ("gate", "up"), "%x is an input of the model"
    )


def test_channels_stay_inside_their_head_and_query_heads_that_share_one_agree():
    _, (group,), _ = orders_of("grouped-query attention")
    assert group.kind is OrderKind.HEADS
    assert [cell.tolist() for cell in group.cells] == [list(range(8)), list(range(8, 16))]
    ((_, channels),) = group.matmuls
    assert channels.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    assert sorted(name for name, _ in group.parameters) == ["o.weight", "v.bias", "v.weight"]


def test_one_order_for_the_residual_stream():
    _, groups, misses = orders_of("residual stream")
    assert [group.kind for group in groups] == [OrderKind.STREAM, OrderKind.HEADS, OrderKind.HIDDEN]
    assert not misses
    names = {name for name, _ in groups[0].parameters}
    assert {"head.weight", "positions", "norms.2.bias", "blocks.0.o.weight", "blocks.0.q.weight"} <= names
    assert "blocks.0.q.bias" not in names


def test_a_matrix_is_reordered_along_both_dimensions():
    _, (group,), _ = orders_of("both dimensions of a matrix")
    shapes = [tuple(channels.shape) for name, channels in group.parameters if name == "linear.weight"]
    assert sorted(shapes) == [(1, SIZE), (SIZE, 1)]


def test_copies_in_another_order_are_refused():
    program = trace(Halved(twisted=True), tokens(2, 7))
    groups, misses = find_orders(program, choose(program).matmuls)
    assert not groups
    assert misses[1].reason == "%stack puts copies of its channels in different orders"


def test_an_operator_that_depends_on_the_order_says_so():
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(SIZE, 16), nn.Linear(16, SIZE)

        def forward(self, x):
            return self.down(self.up(x).cumsum(-1))

    program = trace(Sorted(), tokens(2, 7))
    groups, misses = find_orders(program, choose(program).matmuls)
    assert not groups
    assert misses[1].reason == "%cumsum accumulates along its channels"


def test_moved_takes_the_nth_element_of_one_channel_to_the_nth_of_another():
    labels = torch.tensor([0, 1, -1, 0, 1, 2])
    assert moved(labels, torch.tensor([1, 0, 2])).tolist() == [1, 0, 2, 4, 3, 5]
