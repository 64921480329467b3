"""Nested graphs: regions of forward are inlined, with autocast's casts; what cannot be inlined is a call that every
pass, copy and check carries along.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import mxcompile
from mxcompile.graph import verify
from mxcompile.graph.dataflow import is_nested
from mxcompile.graph.printer import print_program
from mxcompile.graph.trace import trace
from mxcompile.tensor.weight import MXWeight


class Nested(nn.Module):
    """`out(norm(inner(x)))`, on `[rows, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 32)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.inner(x)))


class Disabled(Nested):
    def inner(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            wave = (x.float() * 2).cos()
        return self.up(x * wave)


class OtherDevice(Nested):
    def inner(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            return self.up(x)


class Enabled(Nested):
    """Ops that autocast runs in bfloat16, in float32, in the widest dtype of their inputs, and as they come."""

    def inner(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.softmax(self.up(x), -1)
            z = self.down(y.relu()) + x
            z = F.layer_norm(z.bfloat16(), (32,), self.norm.weight)
            z = torch.cat([z, x], -1)[..., :32] @ self.down.weight
            z = F.scaled_dot_product_attention(z[:, None], z[:, None].float(), z[:, None])[:, 0]
        return z.float() + F.mse_loss(z, x)


class Within(Nested):
    """A region in a region, and a gradient mode in it, which must not end the cast."""

    def inner(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            y = self.up(x)
            with torch.autocast("cpu", enabled=False):
                y = self.up(y.float())
            with torch.enable_grad():
                y = self.down(y)
        return y.float()


class GradientModes(Nested):
    def inner(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.up(x)
        with torch.enable_grad():
            x = self.down(x)
        with torch.inference_mode():
            return x * 2


class Checkpointed(Nested):
    def inner(self, x: Tensor) -> Tensor:
        return checkpoint(self.up, x, use_reentrant=False) + self.down(x)


class Branch(Nested):
    """One branch has a region of its own."""

    def inner(self, x: Tensor) -> Tensor:
        def low(value: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.up(value).float()

        return torch.cond(x.sum() > 0, low, lambda value: self.down(value) * 2, (x,))


class BranchUnderAutocast(Nested):
    """Cannot be inlined: the branches would no longer be cast."""

    def inner(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.cond(x.sum() > 0, self.up, lambda v: self.down(v) * 2, (x,)).float()


class Loop(Nested):
    def inner(self, x: Tensor) -> Tensor:
        start = torch.zeros((), dtype=torch.int64)
        return while_loop(lambda i, value: i < 3, lambda i, value: (i + 1, self.up(value)), (start, x))[1]


class Scanned(Nested):
    def inner(self, x: Tensor) -> Tensor:
        return scan(lambda carry, row: (carry + row, self.up(carry)), torch.zeros(32), x)[1]


class Mapped(Nested):
    def inner(self, x: Tensor) -> Tensor:
        return map_rows(self.up, x)


class Vmapped(Nested):
    def inner(self, x: Tensor) -> Tensor:
        return torch.vmap(self.up)(x)


class Flexible(Nested):
    def inner(self, x: Tensor) -> Tensor:
        heads, rows = self.up(x)[None, None], x.shape[0]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, rows, rows, device="cpu")
        return flex_attention(heads, heads, heads, score_mod=lambda s, b, h, i, j: s + (i - j), block_mask=mask)[0, 0]


INLINED = [Disabled, OtherDevice, Enabled, Within, GradientModes, Checkpointed]
CALLED = [Branch, BranchUnderAutocast, Loop, Scanned, Mapped, Vmapped, Flexible]
SLOW = (Scanned, Mapped, Loop, Flexible)


def rows(count: int) -> Tensor:
    return torch.randn(count, 32)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", INLINED)
def test_a_region_is_inlined_with_its_casts(kind):
    model = kind()
    program = trace(model, rows(4))
    verify.check(program)
    assert not any(map(is_nested, program.graph.nodes))
    assert "graph" not in print_program(program)
    for count in (4, 7):
        x = rows(count)
        assert torch.equal(program(x), model(x))


def test_casts_are_where_autocast_makes_them():
    class Low(Nested):
        def inner(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.up(x).float()

    lines = [" ".join(line.split()) for line in print_program(trace(Low(), rows(4))).splitlines()]
    casts = [line.partition(" # ")[0] for line in lines if "aten.to.dtype" in line]
    assert [cast.partition(" = ")[2] for cast in casts] == [
        "aten.to.dtype(%x, bf16)",
        "aten.to.dtype(%up_weight, bf16)",
        "aten.to.dtype(%up_bias, bf16)",
        "aten.to.dtype(%linear, f32)",
    ]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in CALLED]
)
def test_a_call_of_a_nested_graph_is_carried(kind):
    model = kind()
    program = trace(model, rows(4), allow_partial=True).copy()
    assert any(map(is_nested, program.graph.nodes))
    for count in (4, 7):
        x = rows(count)
        torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-5)
    lowered = mxcompile.recipes()["w4a8-mxint"].run(program, [rows(4), -rows(4).abs()])
    deployed = mxcompile.deploy(lowered, model)
    assert isinstance(deployed.out.weight, MXWeight)


def test_the_text_shows_nested_graphs_indented():
    text = print_program(trace(Branch(), rows(4)))
    lines = [" ".join(line.split()) if line[:1] != " " else "  " + " ".join(line.split()) for line in text.splitlines()]
    start = lines.index('%true_graph_0 = graph "true_graph_0"')
    assert lines[start + 1].startswith("  %x f32[s0, 32] = input")
    assert any(line.startswith("  %linear f32[s0, 32] = aten.linear(%x, %p_down_weight") for line in lines)


def test_a_tensor_of_a_nested_graph_survives():
    class Constant(Nested):
        def inner(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda v: v + torch.tensor([2.0]), self.up, (x,))

    model, x = Constant(), rows(4).abs()
    program = trace(model, x)
    program.drop_unread()
    assert torch.equal(program(x), model(x))
