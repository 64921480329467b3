"""choose: what is quantized by default and by name patterns, which uses of a shared weight can be told apart, and that
too small a share of the model is an error that lists the reasons.
"""

import pytest
import torch
from models import LANGUAGE_MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from mxcompile.analysis.choice import MatmulChoice, check_coverage, choose, exclude_shared_weights, name_in_module
from mxcompile.errors import CoverageError
from mxcompile.graph.name_patterns import Selection
from mxcompile.graph.program import Program, module_path, where
from mxcompile.graph.records import Miss
from mxcompile.graph.trace import trace

SIZE = 64


def select(program: Program, include=(), exclude=(), allow_partial=False) -> MatmulChoice:
    program.selection = Selection(tuple(include), tuple(exclude), allow_partial)
    return choose(program)


def chosen(choice: MatmulChoice) -> list[str]:
    """Paths of the modules whose matmuls are chosen."""
    return [matmul.module_path for matmul in choice.matmuls]


def reasons(choice: MatmulChoice) -> dict[str, str]:
    """where -> reason of every matmul weight that stays float."""
    return {where(each.node): each.reason for each in (*choice.unsupported, *choice.skipped)}


def a_model(function, *shapes: tuple[int, ...]) -> Program:
    """A Program of `function(x, *weights)`."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

        def forward(self, x: Tensor) -> Tensor:
            return function(x, *self.weights)

    return trace(Model(), torch.randn(2, SIZE))


# By default


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_output_head_stays_float(name, traced):
    choice = choose(traced(name))
    assert "lm_head" not in chosen(choice)
    assert choice.embeddings == ()
    path = "transformer.wte" if name == "gpt2" else "model.embed_tokens"
    embedding = next(each for each in choice.others if module_path(each.node) == path)
    assert embedding.reason == f"an embedding stays float; ask for it with include={[path]}"
    assert embedding.bytes == 128 * 64 * 4
    head = choice.skipped[-1]
    assert head.reason == "the output head stays float; ask for it with include=['lm_head']"
    assert head.bytes == 128 * 64 * 4
    assert choice.unsupported == ()


def test_a_tied_embedding_is_an_output_head_without_being_declared():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, SIZE)
            self.hidden = nn.Linear(SIZE, SIZE)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.hidden(self.embed(ids)), self.embed.weight)

    program = trace(Tied(), torch.zeros(2, 5, dtype=torch.long))
    assert program.output_heads == frozenset()
    choice = choose(program)
    assert chosen(choice) == ["hidden"]
    assert len(choice.skipped) == 1


@pytest.mark.parametrize("name", ["mlp", "cnn", "bert", "vit"])
def test_everything_else_is_chosen(name, traced):
    choice = choose(traced(name))
    assert choice.skipped == ()
    assert len(choice.matmuls) == {"mlp": 2, "cnn": 2, "bert": 7, "vit": 7}[name]
    assert all(choice.owns_weight(matmul) for matmul in choice.matmuls)


def test_what_stays_float_is_a_miss_with_its_bytes(traced):
    convolution, positions, token = choose(traced("vit")).misses
    assert convolution == Miss(
        "%conv2d in embeddings.patch_embeddings.projection",
        "a convolution: MX quantization covers matmuls only, it stays float",
        64 * 3 * 8 * 8 * 4,
    )
    assert "embeddings.position_embeddings" in positions.reason
    assert positions.bytes == 5 * 64 * 4
    assert "embeddings.cls_token" in token.reason
    assert token.bytes == 64 * 4


# Patterns


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("pattern", ["lm_head", "lm_head.weight", "lm_*", "*head*"])
def test_include_asks_for_the_output_head(name, pattern, traced):
    choice = select(traced(name), include=[pattern])
    assert chosen(choice)[-1] == "lm_head"
    assert (choice.embeddings, reasons(choice)) == ((), {})


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("pattern", ["model.embed_tokens", "model.embed_tokens.weight"])
def test_include_asks_for_an_embedding(name, pattern, traced):
    choice = select(traced(name), include=[pattern])
    assert [node.name for node in choice.embeddings] == ["embedding"]
    assert "lm_head" not in chosen(choice)


class TwoTables(nn.Module):
    """Two embeddings on one tensor, the name of one begins with that of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(16, SIZE)
        self.emb_out = nn.Embedding(16, SIZE)
        self.emb_out.weight = self.emb.weight
        self.hidden = nn.Linear(SIZE, SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(self.emb(ids)) + self.emb_out(ids)


@pytest.mark.parametrize("name", ["emb", "emb_out", "emb.weight", "emb_out.weight"])
def test_a_name_does_not_stand_for_those_that_begin_with_it(name):
    program = trace(TwoTables(), torch.zeros(2, 5, dtype=torch.long), include=[name])
    assert [module_path(node) for node in choose(program).embeddings] == [name.removesuffix(".weight")]


def test_exclude(traced):
    layer = "model.layers.0."
    choice = select(traced("llama"), exclude=["*.down_proj", "*.self_attn.*", f"{layer}mlp.up_proj.weight"])
    assert chosen(choice) == [f"{layer}mlp.gate_proj"]
    found = reasons(choice)
    assert found.pop("%linear_7 in lm_head").startswith("the output head stays float")
    assert set(found.values()) == {"left in float: excluded"}
    assert list(found)[-1] == "%linear_6 in model.layers.0.mlp.down_proj"
    assert len(found) == 6


def test_include_wins_over_exclude(traced):
    choice = select(traced("llama"), include=["*.q_proj", "lm_head"], exclude=["*"])
    assert chosen(choice) == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert set(reasons(choice).values()) == {"left in float: excluded"}


def test_exclude_wins_over_nothing_else(traced):
    choice = select(traced("llama"), exclude=["lm_head"])
    assert reasons(choice) == {"%linear_7 in lm_head": "left in float: excluded"}


class SharedWeight(nn.Module):
    """Two modules with one weight between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE, bias=False)
        self.second = nn.Linear(SIZE, SIZE, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(("excluded", "left"), [("first", ["second"]), ("second", ["first"])])
def test_exclude_one_module_of_a_tied_weight(excluded, left):
    choice = choose(trace(SharedWeight(), torch.randn(2, SIZE), exclude=[excluded]))
    assert chosen(choice) == left
    assert not choice.owns_weight(choice.matmuls[0])


@pytest.mark.parametrize(("excluded", "left"), [("first.weight", ["second"]), ("second.weight", ["first"])])
def test_exclude_one_name_of_a_tied_weight(excluded, left):
    choice = choose(trace(SharedWeight(), torch.randn(2, SIZE), exclude=[excluded]))
    assert chosen(choice) == left


# Uses of one weight


def test_uses_under_their_own_names_are_separable():
    program = trace(SharedWeight(), torch.randn(2, SIZE), exclude=["second"])
    choice = choose(program)
    assert exclude_shared_weights(program, choice) == choice
    (matmul,) = choice.matmuls
    assert name_in_module(program, matmul.parameter, matmul.node) == "first.weight"


def test_a_tied_head_is_separable_from_its_embedding(traced):
    program = traced("llama-tied")
    choice = select(program, include=["lm_head"])
    head = choice.matmuls[-1]
    assert not choice.owns_weight(head)
    assert exclude_shared_weights(program, choice) == choice
    assert name_in_module(program, head.parameter, head.node) == "lm_head.weight"


@pytest.mark.parametrize(
    ("other_use", "reader"),
    [
        (lambda w: w.sum(), "aten.sum.default (%sum_1)"),
        (lambda w: w.t().contiguous().abs().amax(), "aten.abs.default (%abs_1)"),
        (lambda w: w[0], "aten.select.int (%select)"),
    ],
    ids=["sum", "through a transpose", "row"],
)
def test_uses_under_one_name_are_inseparable(other_use, reader):
    program = a_model(lambda x, w: F.linear(x, w) + other_use(w), (SIZE, SIZE))
    choice = choose(program)
    assert len(choice.matmuls) == 1
    assert not choice.owns_weight(choice.matmuls[0])
    separated = exclude_shared_weights(program, choice)
    assert separated.matmuls == ()
    (refusal,) = separated.unsupported
    assert refusal.reason == f"its weight 'weights.0' is also read, in float and by the same name, by {reader}"
    assert refusal.bytes == SIZE * SIZE * 4


def test_a_transpose_that_is_shared_with_another_use_is_inseparable():
    class Transposing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            columns = self.weight.t()
            return x @ columns + columns.sum()

    model = SharedWeight()
    model.first = Transposing(SIZE, SIZE, bias=False)
    model.first.weight = model.second.weight
    program = trace(model, torch.randn(2, SIZE))
    assert chosen(exclude_shared_weights(program, choose(program))) == ["second"]


def test_uses_in_one_module_of_a_tied_weight_are_inseparable():
    class Summing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.sum()

    model = SharedWeight()
    model.first = Summing(SIZE, SIZE, bias=False)
    model.first.weight = model.second.weight
    program = trace(model, torch.randn(2, SIZE))
    separated = exclude_shared_weights(program, choose(program))
    assert chosen(separated) == ["second"]
    assert "aten.sum.default" in separated.unsupported[0].reason


def test_two_chosen_uses_of_one_name_are_fine():
    program = a_model(lambda x, w: F.linear(F.linear(x, w), w), (SIZE, SIZE))
    choice = choose(program)
    assert len(choice.matmuls) == 2
    assert all(map(choice.owns_weight, choice.matmuls))
    assert exclude_shared_weights(program, choice) == choice


class Summed(nn.Module):
    """The table of a lookup is read in float too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(16, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        return self.first(self.table(ids)) + self.table.weight.sum()


@pytest.mark.parametrize(
    ("model", "reader"),
    [
        (lambda: nn.Sequential(nn.Embedding(16, SIZE, max_norm=1.0), nn.Linear(SIZE, SIZE)), "aten.embedding_renorm_"),
        (Summed, "aten.sum.default"),
    ],
    ids=["its rows are scaled in place", "it is summed"],
)
def test_a_table_that_something_else_reads_or_writes_is_inseparable(model, reader):
    program = trace(model(), torch.zeros(2, 5, dtype=torch.long))
    choice = select(program, include=["0.weight", "table"])
    assert len(choice.embeddings) == 1
    separated = exclude_shared_weights(program, choice)
    assert (separated.embeddings, len(separated.matmuls)) == ((), 1)
    (refusal,) = separated.unsupported
    assert f"by the same name, by {reader}" in refusal.reason


def test_an_embedding_in_one_module_with_its_head():
    class OneModule(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(super().forward(ids), self.weight)

    program = trace(OneModule(16, SIZE), torch.zeros(2, 5, dtype=torch.long))
    both = select(program, include=["weight"])
    assert (len(both.matmuls), len(both.embeddings)) == (1, 1)
    assert exclude_shared_weights(program, both) == both


# Coverage


def refused(count: int) -> nn.Module:
    """`count` linears whose weights are computed at run time, and one plain linear of as many bytes."""
    layers = [parametrizations.weight_norm(nn.Linear(SIZE, SIZE)) for _ in range(count)]
    return nn.Sequential(*layers, nn.Linear(SIZE, SIZE + 1))  # each of the others also has a norm per row


def test_half_of_the_bytes_is_enough():
    program = trace(refused(1), torch.randn(2, SIZE))
    check_coverage(program, choose(program))


def test_less_than_half_is_an_error_with_its_reasons():
    program = trace(refused(3), torch.randn(2, SIZE))
    with pytest.raises(CoverageError) as caught:
        check_coverage(program, choose(program))
    first, second, *reasons, last = str(caught.value).splitlines()
    assert first == "only 25% of the matmul weight bytes would be quantized (1 matmuls). Kept in float:"
    assert second.startswith("  %linear in 0: the weight is computed at run time by aten._weight_norm.default")
    assert len(reasons) == 2
    assert last == "Pass allow_partial=True to quantize anyway."


def test_a_long_list_of_reasons_is_cut():
    program = trace(refused(20), torch.randn(2, SIZE))
    with pytest.raises(CoverageError) as caught:
        check_coverage(program, choose(program))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 12 + 1 + 1
    assert lines[-2] == "  ... and 8 more"


def test_weights_in_buffers_count():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(SIZE, SIZE))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    program = trace(nn.Sequential(nn.Linear(SIZE, SIZE), Frozen(), Frozen(), Frozen()), torch.randn(2, SIZE))
    with pytest.raises(CoverageError, match=r"only 25%(?s:.)*'1.weight' is a buffer or a constant"):
        check_coverage(program, choose(program))
    check_coverage(program, select(program, exclude=["1", "2.*", "3.weight"]))


def test_the_largest_come_first():
    program = a_model(lambda x, w, v: F.linear(x, w.abs()).sum() + F.linear(x, v.abs()), (8, SIZE), (SIZE, SIZE))
    with pytest.raises(CoverageError, match=r"only 0%.*\n.*from weights.1: .*\n.*from weights.0: "):
        check_coverage(program, choose(program))


def test_allow_partial():
    program = trace(refused(3), torch.randn(2, SIZE), allow_partial=True)
    check_coverage(program, choose(program))


def test_what_is_left_on_purpose_does_not_count(traced):
    program = traced("llama")
    check_coverage(program, select(program, exclude=["*.mlp.*"]))


def test_nothing_at_all_is_an_error():
    program = trace(nn.Sequential(nn.ReLU()), torch.randn(2, SIZE))
    with pytest.raises(CoverageError) as caught:
        check_coverage(program, choose(program))
    assert str(caught.value).splitlines()[:2] == [
        "only 0% of the matmul weight bytes would be quantized (0 matmuls). Kept in float:",
        "  the graph has no matmul by a weight",
    ]


def test_everything_excluded_is_an_error(traced):
    program = traced("mlp")
    with pytest.raises(CoverageError, match=r"%linear in up: left in float: excluded\n  %linear_1 in down"):
        check_coverage(program, select(program, exclude=["*"]))
    check_coverage(program, select(program, exclude=["*"], allow_partial=True))


def test_a_weight_read_twice_is_counted_once():
    twice = lambda x, w, v: F.linear(F.linear(x, w), w).sum() + F.linear(x, v.abs())  # noqa: E731
    program = a_model(twice, (SIZE, SIZE), (2 * SIZE, SIZE))
    with pytest.raises(CoverageError, match="only 33% of the matmul weight bytes"):
        check_coverage(program, choose(program))


def test_choosing_changes_nothing(traced):
    program = traced("llama")
    before = str(program.graph)
    assert choose(program) == choose(program)
    exclude_shared_weights(program, choose(program))
    assert str(program.graph) == before
