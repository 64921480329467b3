"""Which ops propagate a factor, and which pin it.

Every case is checked as in test_groups.py: random factors are folded, outputs on inputs of three sizes stay the same.
"""

import pytest
import torch
from fold_nets import SHAPES, SIZE, Net, linear, net, one, prove, proven, reasons_of, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.analysis.folds.region import MAXIMUM_ATTEMPTS, Region

# Between a norm and its readers


THROUGH = {
    "other tokens": lambda m, h: m.first(h[:, 1:]).mean() + m.second(h[:, :1]),
    "last token": lambda m, h: m.first(h[:, -1]) + m.second(h[:, 0]),
    "reshaped": lambda m, h: m.first(h.reshape(-1, SIZE)) + m.second(h).flatten(0, 1),
    "unsqueezed": lambda m, h: m.first(h.unsqueeze(1)) + m.second(h[None, :, 0]).mean(),
    "cast there and back": lambda m, h: m.first(h.double().float()) + m.second(h.to(torch.float64).type_as(h)),
    "dropped out": lambda m, h: m.first(F.dropout(h, 0.5, m.training)) + m.second(h.contiguous().clone()),
    "functional": lambda m, h: h @ m.first.weight.t() + torch.matmul(h, m.second.weight.mT),
    "addmm": lambda m, h: torch.addmm(m.first.bias, h.flatten(0, 1), m.first.weight) + m.second(h).flatten(0, 1),
    "index_select": lambda m, h: m.first(h.index_select(1, torch.tensor([2, 0]))) + m.second(h)[:, :2],
    "indexed": lambda m, h: m.first(h[:, torch.arange(h.shape[1]).flip(0)]) + m.second(h),
    "masked rows": lambda m, h: m.first(h[torch.ones(h.shape[:2], dtype=torch.bool)]) + m.second(h).flatten(0, 1),
    "cumsum": lambda m, h: m.first(h.cumsum(1)) + m.second(h),
    "mean over tokens": lambda m, h: m.first(h.mean(1)) + m.second(h.sum(1)),
    "masked_fill 0": lambda m, h: m.first(h.masked_fill(h.new_ones(h.shape[1], 1) > 2, 0.0)) + m.second(h),
    "where with zeros": lambda m, h: (
        m.first(torch.where(h.new_ones(h.shape) > 0, h, torch.zeros_like(h))) + m.second(h)
    ),
    "padded with zeros": lambda m, h: m.first(F.pad(h, (0, 0, 1, 0))[:, :-1]) + m.second(h.roll(1, 1)),
    "scaled, negated": lambda m, h: m.first(h * 0.5 / 3) + m.second(-h),
    "times the length": lambda m, h: m.first(h / h.shape[1]) + m.second(h),
    "relu": lambda m, h: m.first(F.relu(h)) + m.second(F.leaky_relu(h)),
    "flipped channels": lambda m, h: m.first(h.flip(-1)) + m.second(h.unflatten(-1, (2, -1)).flip(-2).flatten(-2)),
    "two at once": lambda m, h: m.first(h + h[:, :1]) + m.second(h - 2 * h),
}


@pytest.mark.parametrize("name", THROUGH)
def test_factors_pass(name):
    parts = {"norm": nn.LayerNorm(SIZE), "first": linear(), "second": linear()}
    groups = proven(lambda m, x: THROUGH[name](m, m.norm(x)), **parts)
    assert groups == one("norm.bias norm.weight", "first.weight second.weight")


torch.library.define("mxcompile_test::bend", "(Tensor x) -> Tensor")
torch.library.impl("mxcompile_test::bend", "CompositeExplicitAutograd")(torch.tanh)
torch.library.register_fake("mxcompile_test::bend")(torch.empty_like)

REFUSED = {
    "residual": (lambda m, h: h + m.first(h), "%linear multiplies it by %first_weight, which is scaled along"),
    "output": (lambda m, h: (m.first(h), h), "%layer_norm is read by %output, the output of the model"),
    "residual behind a view": (lambda m, h: h[:, :1].exp() + m.first(h), "is read by %exp, aten.exp.default"),
    "gelu": (lambda m, h: m.first(F.gelu(h)), "%gelu is aten.gelu.default, which is not linear in it"),
    "silu": (lambda m, h: m.first(F.silu(h)), "%silu is aten.silu.default, which is not linear in it"),
    "square": (lambda m, h: m.first(h * h), "%mul multiplies two scaled values"),
    "plus one": (lambda m, h: m.first(h + 1), "has 1 added to it in %add"),
    "norm": (lambda m, h: m.norm(h) + m.first(h), "%layer_norm_1 normalizes it"),
    "denominator": (lambda m, h: m.first(h) / h, "%div divides by it"),
    "scores": (
        lambda m, h: m.first(h) + F.scaled_dot_product_attention(h, m.keys, m.keys),
        "computes attention scores",
    ),
    "masked_fill 1": (lambda m, h: m.first(h.masked_fill(h.new_ones(SIZE) > 2, 1.0)), "masked_fill.Scalar"),
    "padded with ones": (
        lambda m, h: m.first(F.pad(h, (0, 0, 1, 0), value=1.0)),
        "pads with something other than zero",
    ),
    "in place": (lambda m, h: m.first(h) + h.add_(1), "is read by %add_, aten.add_.Tensor"),
    "in place, of a view": (lambda m, h: h[:, 0].fill_(1).mean() + m.first(h), "is read by %fill_, aten.fill_"),
    "custom op": (
        lambda m, h: m.first(torch.ops.mxcompile_test.bend(h)),
        "is mxcompile_test.bend.default, which is not",
    ),
    "vector": (lambda m, h: m.first(h) + (h @ h.new_ones(SIZE)).mean(), "%matmul multiplies by a vector"),
    "its weight read elsewhere": (
        lambda m, h: m.first(h) + m.first.weight.sum(),
        "is read by %sum_1, aten.sum.default",
    ),
    "its gain read elsewhere": (lambda m, h: m.first(h) + m.norm.weight.exp(), "is read by %exp, aten.exp.default"),
    "cond": (
        lambda m, h: m.first(h) + torch.cond(m.c > 0, torch.tanh, torch.exp, (h,)),
        "%layer_norm is read by %cond",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_factors_are_refused(name):
    function, reason = REFUSED[name]
    parts = {"norm": nn.LayerNorm(SIZE), "first": linear(), "c": nn.Parameter(torch.ones(1))}
    parts["keys"] = nn.Parameter(torch.ones(1, 3, SIZE))
    program = net(lambda m, x: function(m, m.norm(x)), **parts)
    assert reason in reasons_of(program)["first"]


def test_part_of_the_channels():
    """The other half is read by exp: half of the factors are left."""
    parts = {"norm": nn.RMSNorm(SIZE), "first": linear(), "second": linear(width=SIZE // 2)}
    groups = proven(lambda m, x: m.first(h := m.norm(x)) + h[..., SIZE // 2 :].exp().mean(), **parts)
    assert groups == one("norm.weight", "first.weight", SIZE // 2)
    groups = proven(lambda m, x: m.second(m.norm(x)[..., : SIZE // 2]), **parts)
    assert groups == one("norm.weight", "second.weight", SIZE // 2)


# Attention


HEADS, KV_HEADS, WIDTH = 4, 2, 8
KV = KV_HEADS * WIDTH


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def expanded(v: Tensor) -> Tensor:
    batch, heads, length, width = v.shape
    shared = v[:, :, None].expand(batch, heads, HEADS // KV_HEADS, length, width)
    return shared.reshape(batch, HEADS, length, width)


ATTENTION = {
    "expand": lambda q, k, v: F.scaled_dot_product_attention(q, expanded(k), expanded(v), is_causal=True),
    "repeat_interleave": lambda q, k, v: F.scaled_dot_product_attention(
        q, k.repeat_interleave(HEADS // KV_HEADS, 1), v.repeat_interleave(HEADS // KV_HEADS, 1)
    ),
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "eager": lambda q, k, v: torch.softmax(q @ expanded(k).mT, -1) @ expanded(v),
    "bmm": lambda q, k, v: torch.bmm(
        torch.softmax(q.flatten(0, 1) @ expanded(k).flatten(0, 1).mT, -1), expanded(v).flatten(0, 1)
    ).unflatten(0, (-1, HEADS)),
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("fused", [False, True])
def test_attention_has_a_factor_per_value_channel(name, fused):
    """v -> o with fewer heads of keys and values than of queries; q, k and v may come from one linear."""

    def function(m: nn.Module, x: Tensor) -> Tensor:
        parts = m.qkv(x).split([SIZE, KV, KV], -1) if fused else (m.q(x), m.k(x), m.v(x))
        heads = (split(part, n) for part, n in zip(parts, (HEADS, KV_HEADS, KV_HEADS), strict=True))
        return m.o(joined(ATTENTION[name](*heads)))

    each = {"q": linear(), "k": linear(KV), "v": linear(KV)}
    groups = proven(function, o=linear(), **({"qkv": linear(SIZE + 2 * KV)} if fused else each))
    source = "qkv" if fused else "v"
    assert groups == one(f"{source}.bias {source}.weight", "o.weight", KV)


# Feed-forward


GATED = {
    "silu": lambda m, x: F.silu(m.gate(x)) * m.up(x),
    "gelu": lambda m, x: m.up(x) * F.gelu(m.gate(x)),
}


@pytest.mark.parametrize("name", GATED)
def test_gated(name):
    groups = proven(lambda m, x: m.o(GATED[name](m, x)), gate=linear(64), up=linear(64), o=linear(width=64))
    assert groups == one("up.bias up.weight", "o.weight", 64)


FUSED = {
    "chunk": lambda y: y.chunk(2, -1),
    "split": lambda y: y.split(64, -1),
    "split with sizes": lambda y: torch.split(y, [64, 64], -1),
    "sliced": lambda y: (y[..., :64], y[..., 64:]),
    "unbound": lambda y: y.unflatten(-1, (2, 64)).unbind(-2),
    "interleaved": lambda y: (y[..., ::2], y[..., 1::2]),
}


@pytest.mark.parametrize("name", FUSED)
def test_gate_and_up_from_one_linear(name):
    def function(m: nn.Module, x: Tensor) -> Tensor:
        gate, up = FUSED[name](m.fused(x))
        return m.o(F.silu(gate) * up)

    assert proven(function, fused=linear(128), o=linear(width=64)) == one("fused.bias fused.weight", "o.weight", 64)


@pytest.mark.parametrize("function", [F.relu, F.dropout, torch.neg, torch.abs], ids=lambda f: f.__name__)
def test_linear_to_linear(function):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.fc2(function(m.fc1(x), 0.5, False) if function is F.dropout else function(m.fc1(x)))

    assert proven(forward, fc1=linear(64), fc2=linear(width=64)) == one("fc1.bias fc1.weight", "fc2.weight", 64)


def test_a_gain_in_between_takes_the_factors_up():
    groups = proven(
        lambda m, x: m.fc2(m.fc1(x) * m.gain), fc1=linear(), fc2=linear(), gain=nn.Parameter(torch.ones(SIZE))
    )
    assert groups == one("gain", "fc2.weight")


def test_experts():
    """A router, and the experts' weights in one 3-D parameter."""
    experts, wide = 3, 16

    def function(m: nn.Module, x: Tensor) -> Tensor:
        h = m.norm(x)
        share = m.router(h).softmax(-1)
        flat = h.flatten(0, 1).expand(experts, -1, -1)
        gate, up = torch.bmm(flat, m.gate_up).chunk(2, -1)
        out = torch.bmm(F.silu(gate) * up, m.down).unflatten(1, x.shape[:2])
        return (out * share.permute(2, 0, 1).unsqueeze(-1)).sum(0)

    parts = {"gate_up": (experts, SIZE, 2 * wide), "down": (experts, wide, SIZE)}
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in parts.items()}
    assert proven(function, norm=nn.RMSNorm(SIZE), router=linear(experts, bias=False), **parameters) == [
        f"{SIZE}: norm.weight -> gate_up router.weight",
        f"{wide}: gate_up -> down",
    ]


def test_concatenated_linears():
    parts = {"one": linear(), "two": linear(16), "o": linear(width=SIZE + 16)}
    groups = proven(lambda m, x: m.o(torch.cat((m.one(x), m.two(x)), -1)), **parts)
    assert groups == one("one.bias one.weight two.bias two.weight", "o.weight", SIZE + 16)


# Known to be wrong


def bend_into(x: Tensor, out: Tensor) -> None:
    out.copy_(x.tanh())


torch.library.define("mxcompile_test::bend_into", "(Tensor x, Tensor(a!) out) -> ()")
torch.library.impl("mxcompile_test::bend_into", "CompositeExplicitAutograd")(bend_into)
torch.library.register_fake("mxcompile_test::bend_into")(lambda x, out: None)


def bent_into(m: Net, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    torch.ops.mxcompile_test.bend_into(h, out)
    return m.first(h) + m.second(out)


TRICKY = {
    "zeros filled in place": lambda m, x: m.first((h := m.norm(x)).masked_fill_(x > 0, 0.0)) + m.second(h),
    "relu in place, of a view": lambda m, x: m.first((h := m.norm(x))[:, 0].relu_())[:, None] + m.second(h),
    "add with alpha": lambda m, x: m.first(x.tanh() * torch.add(m.gain, 1, alpha=2)),
    "where with a number": lambda m, x: m.first(torch.where(x > 0, m.norm(x), 3.0)),
    "cast to integers": lambda m, x: m.first(h := m.norm(x)) + m.second(h.long().float()),
    "cast to bool": lambda m, x: m.first(h := m.norm(x)) + m.second(h.relu().bool().float()),
    "one value twice in a concatenation": lambda m, x: m.wide(torch.cat((h := m.first(x), h, m.second(x)), -1)),
    "a linear beside its input": lambda m, x: m.wide(torch.cat((m.first(x), x, x), -1)),
    "sliced positions": lambda m, x: m.second(m.first(x) + m.positions[:, : x.shape[1]]),
    "depthwise convolution": lambda m, x: m.second(m.depthwise(m.first(x).mT).mT),
    "heads of the model's input": lambda m, x: m.first(joined(split(x, 2) @ m.per_head)),
    "mask of attention scores": lambda m, x: (
        F.scaled_dot_product_attention(x, m.keys, m.keys, attn_mask=(h := m.norm(x))) + m.first(h)
    ),
    "plus the length": lambda m, x: m.first(m.norm(x) + x.shape[1]),
    "times the length": lambda m, x: m.first(m.norm(x) * x.shape[1]),
    "a far token": lambda m, x: m.first(m.norm(x)[:, 6]),
    "an element as a number": lambda m, x: m.first(h := m.norm(x)) * h[0, 0, 0].item(),
    "a custom op without a result": lambda m, x: bent_into(m, m.norm(x)),
    "native_dropout": lambda m, x: m.first(h := m.norm(x)) + m.second(torch.native_dropout(h, 0.5, False)[0]),
}
TRICKY_SHAPES = {"a far token": ((2, 7), (3, 11))}


@pytest.mark.parametrize("name", TRICKY)
def test_tricky_uses_keep_the_function(name):
    parts = {"norm": nn.LayerNorm(SIZE), "first": linear(), "second": linear(), "wide": linear(width=3 * SIZE)}
    parts |= {"gain": nn.Parameter(torch.ones(SIZE)), "positions": nn.Parameter(torch.ones(1, 16, SIZE))}
    parts |= {
        "depthwise": nn.Conv1d(SIZE, SIZE, 3, padding=1, groups=SIZE),
    }
    parts |= {"keys": nn.Parameter(torch.ones(1, SIZE, SIZE)), "per_head": nn.Parameter(torch.ones(2, 16, 16))}
    prove(net(TRICKY[name], **parts), *(tokens(*shape) for shape in TRICKY_SHAPES.get(name, SHAPES)))


def test_alternatives_are_not_tried_in_all_combinations(monkeypatch):
    """A sum of products whose operands each have a channel that exp reads."""
    copies, products = [], 7
    copy = Region.copy
    monkeypatch.setattr(Region, "copy", lambda self: copies.append(self) or copy(self))
    parts = {f"{side}{i}": linear() for side in ("one", "two") for i in range(products)}

    def function(m: Net, x: Tensor) -> Tensor:
        pairs = [(getattr(m, f"one{i}")(x), getattr(m, f"two{i}")(x)) for i in range(products)]
        exps = (side[..., i : i + 1].exp() for i, pair in enumerate(pairs) for side in pair)
        return m.o(sum(a * b for a, b in pairs)) + sum(exps)

    reasons_of(net(function, o=linear(), **parts))
    assert len(copies) <= MAXIMUM_ATTEMPTS + products
