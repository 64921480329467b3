"""Routers: which matmuls choose the rows or weights of others, which only look like it, and what becomes of them."""

import pytest
import torch
from architectures import build as build_architecture
from architectures import inputs as architecture_inputs
from fold_nets import SIZE, Net, described, linear, net, prove, tokens
from models import build, inputs
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.analysis.choice import check_coverage, choose
from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.analysis.routers import find_routers
from mxcompile.graph.name_patterns import Selection
from mxcompile.graph.program import Program, module_path
from mxcompile.graph.trace import trace
from mxcompile.pipeline.pipeline import Pipeline

EXPERTS = 4


def routers(program: Program) -> dict[str, str]:
    """Module path of each router -> that of the node that multiplies what it chooses, or the node's name."""
    found = find_routers(program, *find_matmuls(program))
    return {module_path(node): module_path(reader) or reader.name for node, reader in found.items()}


def experts() -> dict[str, nn.Module | nn.Parameter]:
    return {
        "router": linear(EXPERTS),
        "experts": nn.ModuleList(linear() for _ in range(EXPERTS)),
        "weight": nn.Parameter(torch.ones(EXPERTS, SIZE, SIZE)),
        "out": linear(),
        "table": nn.Embedding(EXPERTS, SIZE),
    }


def scores(m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[rows, SIZE]`, and the shares and numbers of their two experts."""
    rows = x.flatten(0, 1)
    return rows, *m.router(rows).softmax(-1).topk(2)


# Routers


def loop_over_positions(m, x):
    rows, share, chosen = scores(m, x)
    y = torch.zeros_like(rows)
    for index, expert in enumerate(m.experts):
        row, place = torch.where(chosen == index)
        y = y.index_add(0, row, expert(rows[row]) * share[row, place, None])
    return y


def loop_over_a_mask(m, x):
    chosen, y = m.router(x).argmax(-1), torch.zeros_like(x)
    for index, expert in enumerate(m.experts):
        y[chosen == index] = expert(x[chosen == index])
    return y


def loop_over_one_hot(m, x):
    rows, share, chosen = scores(m, x)
    mask, y = F.one_hot(chosen, EXPERTS).permute(2, 1, 0), torch.zeros_like(rows)
    for index, expert in enumerate(m.experts):
        place, row = torch.where(mask[index])
        y.index_add_(0, row, expert(rows[None, row].reshape(-1, SIZE)) * share[row, place, None])
    return y


def sampled(m, x):
    rows = x.flatten(0, 1)
    chosen = torch.multinomial(m.router(rows).softmax(-1), 1)[:, 0]
    return m.experts[0](rows[(chosen == 0).nonzero()[:, 0]])


def every_expert_on_masked_inputs(m, x):
    rows, share, chosen = scores(m, x)
    shares = torch.full((rows.shape[0], EXPERTS), -torch.inf).scatter_(1, chosen, share)
    return torch.bmm(rows.expand(EXPERTS, -1, -1) * shares.sigmoid().T[..., None], m.weight).sum(0)


def every_expert_then_masks(m, x):
    rows, share, chosen = scores(m, x)
    y = [expert(rows) * (share * (chosen == index)).sum(-1, keepdim=True) for index, expert in enumerate(m.experts)]
    return m.out(torch.stack(y).sum(0))


def dispatched_by_a_product(m, x):
    rows, _, chosen = scores(m, x)
    masks = F.one_hot(chosen, EXPERTS).sum(1).T.float()  # [experts, rows]
    return torch.bmm(masks[:, :1, None] * torch.matmul(masks, rows)[:, None], m.weight)


def slots_of_experts(m, x):
    rows = x.flatten(0, 1)
    chosen = m.router(rows).argmax(-1)
    slots = (F.one_hot(chosen, EXPERTS).cumsum(0).gather(1, chosen[:, None]) - 1)[:, 0]
    buffer = torch.zeros(EXPERTS, 64, SIZE)
    buffer[chosen, slots] = rows
    return torch.bmm(buffer, m.weight)


def weights_by_number(m, x):
    rows, _, chosen = scores(m, x)
    return torch.bmm(rows[:, None], m.weight[chosen[:, 0]])


def experts_that_choose(m, x):
    rows = x.flatten(0, 1)
    chosen = m.router(rows).softmax(-1).T.topk(2).indices  # [experts, 2]
    return torch.bmm(rows[chosen], m.weight)


def groups_first(m, x):
    rows = x.flatten(0, 1)
    score = m.router(rows).sigmoid()
    group = score.view(-1, 2, 2).topk(2).values.sum(-1).topk(1).indices
    mask = torch.zeros_like(score.view(-1, 2, 2)[..., 0]).scatter_(1, group, 1)
    score = score.masked_fill(~mask.repeat_interleave(2, -1).bool(), 0)
    return loop_over(m, rows, score.topk(2).indices)


def masked_in_place(m, x):
    rows, _, chosen = scores(m, x)
    mask = torch.zeros(rows.shape[0], EXPERTS)
    mask.view(-1, EXPERTS).scatter_(1, chosen, 1.0)
    return m.experts[0](rows * mask[:, :1])


def above_a_threshold(m, x):
    rows = x.flatten(0, 1)
    return m.experts[0](rows[m.router(rows)[:, 0] > 0])


def tokens_by_their_score(m, x):
    chosen = m.router(x)[..., :1].topk(2, 1).indices.expand(-1, -1, SIZE)
    return x.scatter_add(1, chosen, m.out(x.gather(1, chosen)))


def loop_over(m, rows, chosen):
    y = torch.zeros_like(rows)
    for index, expert in enumerate(m.experts):
        (row, _) = torch.where(chosen == index)
        y = y.index_add(0, row, expert(rows[row]))
    return y


@pytest.mark.parametrize(
    ("function", "reader"),
    [
        (loop_over_positions, "experts.0"),
        (loop_over_a_mask, "experts.0"),
        (loop_over_one_hot, "experts.0"),
        (sampled, "experts.0"),
        (every_expert_on_masked_inputs, "bmm"),
        (every_expert_then_masks, "out"),
        (dispatched_by_a_product, "bmm"),
        (slots_of_experts, "bmm"),
        (weights_by_number, "index"),
        (experts_that_choose, "bmm"),
        (groups_first, "experts.0"),
        (masked_in_place, "experts.0"),
        (above_a_threshold, "experts.0"),
        (tokens_by_their_score, "out"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_matmul_that_chooses(function, reader):
    assert routers(net(function, **experts())) == {"router": reader}


# No routers


def all_experts_by_share(m, x):
    return sum(expert(x) * share for expert, share in zip(m.experts, m.router(x).softmax(-1).split(1, -1), strict=True))


def the_next_token(m, x):
    ids = m.router(x).argmax(-1)
    return m.out(m.table(torch.where(ids == 1, 0, ids)))


def attention_to_the_nearest(m, x):
    score = m.experts[0](x) @ m.experts[1](x).mT
    far = torch.ones_like(score).scatter(-1, score.topk(2).indices, 0.0).bool()
    return m.out(score.masked_fill(far, -torch.inf).softmax(-1) @ m.experts[2](x))


def attention_by_an_indexer(m, x):
    query, key = (m.experts[index](x).unflatten(-1, (EXPERTS, -1)).transpose(1, 2) for index in (0, 1))
    score = ((query @ key.mT).relu() * m.router(x).mT[..., None]).sum(1)
    hidden = torch.full_like(score, -torch.inf).scatter(-1, score.topk(2).indices, 0.0)
    return m.out(F.scaled_dot_product_attention(query, key, query, hidden[:, None]).transpose(1, 2).flatten(2))


def a_sparse_code(m, x):
    top = m.experts[0](x).topk(4)
    return m.out(torch.zeros_like(x).scatter(-1, top.indices, top.values))


def a_step_function(m, x):
    return m.out(torch.where(m.experts[0](x) > 0, 1.0, 0.1) * m.experts[1](x))


def the_largest_values(m, x):
    return m.out(m.experts[0](x).topk(SIZE).values)


def the_largest_norm(m, x):
    chosen = m.experts[0](x).square().sum(-1).topk(2, 1).indices
    return m.out(x.gather(1, chosen[..., None].expand(-1, -1, SIZE)))


def chosen_by_the_inputs(m, x):
    return m.out(x.gather(1, x.topk(2, 1).indices))


@pytest.mark.parametrize(
    "function",
    [
        *(all_experts_by_share, the_next_token, attention_to_the_nearest, attention_by_an_indexer, a_sparse_code),
        *(a_step_function, the_largest_values, the_largest_norm, chosen_by_the_inputs),
    ],
    ids=lambda function: function.__name__,
)
def test_a_matmul_that_chooses_nothing(function):
    assert routers(net(function, **experts())) == {}


def test_of_two_linears_the_last_one_chooses():
    parts = {**experts(), "first": linear()}
    program = net(
        lambda m, x: loop_over(m, x.flatten(0, 1), m.router(m.first(x).tanh()).flatten(0, 1).topk(2)[1]), **parts
    )
    assert routers(program) == {"router": "experts.0"}


# Models


PATHS = {
    "qwen2_moe": "mlp.gate",
    **dict.fromkeys(("qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe"), "mlp.gate"),
    **dict.fromkeys(("minimax", "minimax_m2", "dots1", "mixtral"), "mlp.gate"),
    **dict.fromkeys(("phimoe", "gpt_oss"), "mlp.router"),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), "block_sparse_moe.router"),
    **dict.fromkeys(("llama4", "jamba"), "feed_forward.router"),
    "hunyuan_moe": "mlp.gate.wg",
}


FAST = ("qwen2_moe", "llama4")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in FAST for dtype in (torch.float32, torch.bfloat16)),
        *(pytest.param(name, torch.bfloat16, marks=pytest.mark.slow) for name in PATHS if name not in FAST),
    ],
    ids=str,
)
def test_routers_of_an_architecture(name, dtype):
    program = trace(build_architecture(name).to(dtype), architecture_inputs(name))
    found = routers(program)
    assert found
    for path, reader in found.items():
        layer, _, rest = path.partition(".layers.")[2].partition(".")
        assert rest == PATHS[name]
        assert reader == f"model.layers.{layer}.{PATHS[name].partition('.')[0]}.experts"
    choice = choose(program)
    assert not {m.module_path for m in choice.matmuls} & found.keys()
    assert not {module_path(each.node) for each in choice.unsupported} & found.keys()


@pytest.mark.slow
def test_experts_of_attention_have_a_router_too():
    program = trace(build_architecture("jetmoe"), architecture_inputs("jetmoe"), allow_partial=True)
    assert routers(program) == {
        f"model.layers.{layer}.{block}": f"model.layers.{layer}.{block.removesuffix('.router.layer')}.input_linear"
        for layer in range(2)
        for block in ("self_attention.experts.router.layer", "mlp.router.layer")
    }


# What is quantized


def test_a_router_stays_float_and_says_why(traced):
    program = traced("mixtral")
    choice = choose(program)
    assert "model.layers.0.mlp.gate" not in [matmul.module_path for matmul in choice.matmuls]
    router = choice.skipped[0]
    assert router.reason == (
        "a router stays float: it chooses what model.layers.0.mlp.experts multiplies; ask for "
        "it with include=['model.layers.0.mlp.gate']"
    )
    assert (router.weights, router.bytes) == (("model.layers.0.mlp.gate.weight",), 4 * 64 * 4)
    assert router.reason in [miss.reason for miss in choice.misses]


def test_name_patterns_override(traced):
    program = traced("mixtral").copy()
    program.selection = Selection(include=("*.gate",))
    assert "model.layers.0.mlp.gate" in [matmul.module_path for matmul in choose(program).matmuls]
    program.selection = Selection(exclude=("*.gate",))
    assert choose(program).skipped[0].reason == "left in float: excluded"


def test_it_is_found_in_lowered_and_fused_graphs(traced):
    """Also where the weights that it chooses are packed."""
    for model, path in ((build("mixtral"), "model.layers.0.mlp.gate"), (Loop(), "router")):
        program = trace(model.eval(), inputs("mixtral") if path != "router" else tokens(2, 7))
        lowered = Pipeline.parse("lower-mx{weight=mxint4,activation=mxint8} | fuse-mx-gemm").run(program)
        assert routers(lowered).keys() == {path}
        assert path not in [matmul.module_path for matmul in choose(lowered).matmuls]


class Loop(Net):
    def __init__(self) -> None:
        super().__init__(loop_over_positions, **experts())


class CastRouter(nn.Module):
    """The weights of its router are larger than all others, and cast at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(SIZE, EXPERTS * SIZE, bias=False, dtype=torch.bfloat16)
        self.expert, self.out = linear(SIZE), linear(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        chosen = F.linear(x, self.router.weight.float()).argmax(-1)
        (rows,) = torch.where(chosen.flatten() == 1)
        return self.out(self.expert(x.flatten(0, 1)[rows]))


def test_a_router_that_cannot_be_quantized_does_not_count_in_the_coverage():
    program = trace(CastRouter().eval(), tokens(2, 7))
    choice = choose(program)
    assert choice.unsupported == ()
    assert [each.reason for each in choice.skipped] == ["a router stays float: it chooses what expert multiplies"]
    check_coverage(program, choice)
    program.selection = Selection(include=("router.weight",))
    (refused,) = choose(program).unsupported
    assert "is cast to torch.float32 at run time" in refused.reason


def test_a_fold_scales_the_router_that_stays_float(traced):
    program = traced("mixtral")
    groups = prove(program, inputs("mixtral"), inputs("mixtral", 3, 5))
    (group,) = (group for group in groups if "experts.gate_up_proj" in described(group).partition("->")[2])
    path = "model.layers.0."
    assert described(group) == (
        f"64: {path}post_attention_layernorm.weight -> {path}mlp.experts.gate_up_proj {path}mlp.gate.weight"
    )
    assert [matmul.module_path for matmul, _ in group.matmuls] == [f"{path}mlp.experts"]
    (absorber,) = (each for each in group.absorbers if each.parameter == f"{path}mlp.gate.weight")
    assert absorber.power == 1
    ratio = program.tensor(absorber.parameter) / traced("mixtral").tensor(absorber.parameter)
    norm = program.tensor(f"{path}post_attention_layernorm.weight")
    before = traced("mixtral").tensor(f"{path}post_attention_layernorm.weight")
    torch.testing.assert_close(ratio, (before / norm).expand_as(ratio), rtol=1e-4, atol=0)
