"""Values whose rows the model selects by something it has learned, and where rows are back in order."""

import pytest
import torch
from fold_nets import SIZE, linear, net
from models import build, inputs

from mxcompile.analysis.choice import choose
from mxcompile.analysis.row_order import values_with_selected_rows
from mxcompile.graph.trace import trace


def selected(function) -> list[str]:
    """Names of the modules `a`, `b` whose inputs have selected rows; x is `[batch, tokens, SIZE]`."""
    parts = {"score": linear(1), "a": linear(), "b": linear()}
    program = net(function, **parts)
    values = values_with_selected_rows(program)
    return [matmul.module_path for matmul in choose(program).matmuls if matmul.activation in values]


def top(m, x):
    """Indices `[batch, 2, SIZE]` of the two tokens with the highest scores."""
    return m.score(x).topk(2, 1).indices.expand(-1, -1, SIZE)


def picked_by_the_input(m, x):
    return m.a(x.flatten(0, 1)[x.flatten(0, 1)[:, 0] > 0])


def picked_by_a_score(m, x):
    rows = x.flatten(0, 1)
    return m.a(rows[m.score(rows)[:, 0] > 0])


def through_an_activation(m, x):
    return m.b(torch.relu(m.a(x.gather(1, top(m, x)))))


def added_into_place(m, x):
    index = top(m, x)
    return m.b(x.scatter_add(1, index, m.a(x.gather(1, index))))


def scaled_by_channel(m, x):
    rows = x.flatten(0, 1)
    return m.a(rows[m.score(rows)[:, 0] > 0] * m.b.weight[0])


def sorted_back(m, x):
    rows = x.flatten(0, 1)
    order = m.score(rows)[:, 0].argsort()
    return m.b(rows + m.a(rows[order])[order.argsort()])


def channels_in_order_of_size(m, x):
    return m.a(m.b(x).sort(-1).values)


def tokens_in_order_of_size(m, x):
    return m.a(m.b(x).sort(1).values)


def entries_of_a_table(m, x):
    return m.a(torch.nn.functional.embedding(m.score(x)[..., 0].long().clamp(0, 3), m.b.weight))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (picked_by_the_input, []),
        (picked_by_a_score, ["a"]),
        (through_an_activation, ["a", "b"]),
        (added_into_place, ["a"]),
        (scaled_by_channel, ["a"]),
        (sorted_back, ["a"]),
        (channels_in_order_of_size, []),
        (tokens_in_order_of_size, ["a"]),
        (entries_of_a_table, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rows_that_the_model_selects(function, expected):
    assert selected(function) == expected


def test_experts_alone_are_out_of_order_in_a_mixture():
    program = trace(build("mixtral"), inputs("mixtral"))
    values = values_with_selected_rows(program)
    paths = {matmul.parameter: matmul.activation in values for matmul in choose(program).matmuls}
    assert {name for name, is_selected in paths.items() if is_selected} == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    head = next(node for node in reversed(program.graph.nodes) if "linear" in str(node.target))
    assert head.args[0] not in values
