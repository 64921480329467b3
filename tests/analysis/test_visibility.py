"""Which rows of a value stand for visible tokens: the mask goes where the tokens go, through every op of a model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.analysis.visibility import Visibility, output_masks
from mxcompile.calibration.runs.run import BoundBatch, Runner
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.dataflow import compute_nodes
from mxcompile.graph.inputs import as_inputs
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace

MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0], [0] * 6])


class Embedded(nn.Module):
    """Functions of token embeddings `[batch, sequence, 8]` and of the mask, by name."""

    def __init__(self, functions: dict[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=2)
        self.strided = nn.Conv1d(8, 8, 2, stride=2)
        self.functions = functions

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        return {name: function(self, x, attention_mask) for name, function in self.functions.items()}


def attention(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q = m.linear(x).unflatten(-1, (2, 4)).transpose(1, 2)
    k = x.unflatten(-1, (2, 4)).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) + (mask[:, None, None] == 0) * -1e9
    return (scores.softmax(-1) @ k).transpose(1, 2).flatten(2)


def fused_attention(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.linear(x), x, x, attn_mask=mask[:, None].bool())


def sorted_by_expert(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    return m.linear(rows[rows[:, 0].argsort()])


def back_in_order(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    order = rows[:, 0].argsort()
    return torch.zeros_like(rows).index_add(0, order, m.linear(rows[order])).view(x.shape)


def windows_of_four(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, 0, 2))
    return m.linear(padded.reshape(x.shape[0], 2, 4, 8)).reshape(x.shape[0], 8, 8)[:, : x.shape[1]]


PER_TOKEN = {
    "linear": lambda m, x, mask: m.linear(x),
    "residual of a bias by position": lambda m, x, mask: (
        x + m.linear(torch.arange(x.shape[1])[:, None] * torch.ones(8))
    ),
    "flattened": lambda m, x, mask: m.linear(x.flatten(0, 1)),
    "heads in front": lambda m, x, mask: x.unflatten(-1, (2, 4)).transpose(1, 2).transpose(1, 2).flatten(2),
    "sequence in front": lambda m, x, mask: m.linear(x.transpose(0, 1)).transpose(0, 1),
    "normed": lambda m, x, mask: F.layer_norm(x, (8,)) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1),
    "attention": attention,
    "fused attention": fused_attention,
    "causal convolution": lambda m, x, mask: x + m.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2),
    "a mean added": lambda m, x, mask: x + m.linear(x.mean(1, keepdim=True)),
    "halves joined": lambda m, x, mask: torch.cat([x[..., 4:], -x[..., :4]], -1),
    "experts, back in order": back_in_order,
    "windows": windows_of_four,
    "max": lambda m, x, mask: torch.maximum(x, x.max(-1, keepdim=True).values),
    "chunks": lambda m, x, mask: x.chunk(2, -1)[1],
    "stacked": lambda m, x, mask: torch.stack([x, m.linear(x)])[1],
}


def selected_by_a_condition(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    (chosen,) = torch.where(rows[:, 0] > 0)
    return m.linear(rows[chosen])


PER_SEVERAL: dict[str, tuple[Any, list[int]]] = {
    "mean": (lambda m, x, mask: m.linear(x.mean(1)), [1, 1, 1, 0]),
    "first": (lambda m, x, mask: m.linear(x[:, 0]), [1, 0, 0, 0]),
    "last": (lambda m, x, mask: m.linear(x[:, -1]), [0, 1, 0, 0]),
    "last visible": (
        lambda m, x, mask: m.linear(x[torch.arange(len(x)), mask.cumsum(1).argmax(1)]),
        [1, 1, 1, 0],
    ),
    "joined": (lambda m, x, mask: x.flatten(1), [1, 1, 1, 0]),
    "strided convolution": (
        lambda m, x, mask: m.strided(x.transpose(1, 2)).transpose(1, 2),
        [1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0],
    ),
}
OTHERS = {
    "no tokens": lambda m, x, mask: m.linear(torch.arange(x.shape[1])[:, None] * torch.ones(8)),
    "sorted by a router": sorted_by_expert,
    "selected": selected_by_a_condition,
}
FUNCTIONS = PER_TOKEN | {name: function for name, (function, _) in PER_SEVERAL.items()} | OTHERS
IDS = torch.randint(32, MASK.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return trace(Embedded(FUNCTIONS).eval(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})


@pytest.fixture(scope="module")
def masks(program) -> dict[str, Tensor]:
    return output_masks(program, as_inputs({"input_ids": IDS, "attention_mask": MASK}))


@pytest.mark.parametrize("name", PER_TOKEN)
def test_rows_of_tokens(name, masks):
    """Wherever the padding is, the visible rows are those of the visible tokens."""
    assert torch.equal(masks[name].view(MASK.shape), MASK.bool())


@pytest.mark.parametrize("name", PER_SEVERAL)
def test_rows_of_several_tokens(name, masks):
    """A row counts if a visible token goes into it."""
    assert masks[name].tolist() == [bool(value) for value in PER_SEVERAL[name][1]]


def test_rows_that_the_model_selects(program, masks):
    """The mask is sorted and selected as the rows are, at run time."""
    order = program.tensor("embed.weight")[IDS].flatten(0, 1)[:, 0]
    assert torch.equal(masks["sorted by a router"], MASK.bool().flatten()[order.argsort()])
    assert torch.equal(masks["selected"], MASK.bool().flatten()[order > 0])


def test_values_without_hidden_tokens_count_whole(program, masks):
    assert "no tokens" not in masks
    assert output_masks(program, program.example) == {}


class Fixed(nn.Module):
    """Positions of a fixed length, as many as channels: no size tells the sequence from the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(32, 6), nn.Linear(6, 6)
        self.positions = nn.Parameter(torch.randn(1, 6, 6))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.linear(self.embed(input_ids) + self.positions)
        return x, self.linear(x.transpose(0, 1).flatten(0, 1))


def test_sizes_that_the_trace_fixed():
    batch = {"input_ids": torch.randint(32, (4, 6)), "attention_mask": MASK}
    masks = output_masks(trace(Fixed().eval(), batch), as_inputs(batch))
    assert torch.equal(masks["0"], MASK.bool().flatten())
    assert torch.equal(masks["1"], MASK.bool().T.flatten())


class TwoStreams(nn.Module):
    """An encoder and a decoder, and cross-attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask=None):
        x, y = self.embed(input_ids), self.embed(decoder_input_ids)
        scores = y @ x.transpose(1, 2) + (attention_mask[:, None] == 0) * -1e9
        return x, y + scores.softmax(-1) @ x


@pytest.mark.parametrize("masked", [True, False])
def test_an_encoder_and_a_decoder(masked):
    """Of one size; a decoder without a mask of its own counts whole, but for a sample that is hidden altogether."""
    batch = {"input_ids": torch.randint(32, (4, 6)), "attention_mask": MASK, "decoder_input_ids": torch.ones_like(MASK)}
    batch |= {"decoder_attention_mask": MASK.flip(1)} if masked else {}
    masks = output_masks(trace(TwoStreams().eval(), batch), as_inputs(batch))
    assert torch.equal(masks["0"].view(4, 6), MASK.bool())
    whole = MASK.bool().any(1, keepdim=True)
    assert torch.equal(masks["1"].view(4, 6), whole & MASK.bool().flip(1) if masked else whole.expand(4, 6))


def test_one_mask_for_all_samples():
    """A mask of one row, of two dimensions or four."""
    row = torch.tensor([[True, True, False, True, True, False]])
    shown = row[:, None, None].expand(1, 1, 6, 6)
    for mask in (row, shown):
        batch = {"input_ids": IDS, "attention_mask": mask}
        program = trace(Embedded({"flat": PER_TOKEN["flattened"], "windows": windows_of_four}).eval(), batch)
        for found in output_masks(program, as_inputs(batch)).values():
            assert torch.equal(found.view(4, 6), row.expand(4, 6))


class Pair(nn.Module):
    """Two texts, each with a mask of its own, in one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)

    def forward(self, texts: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
        kept = texts["left_attention_mask"] * texts["right_attention_mask"]
        ids = (texts["left_ids"], texts["right_ids"], texts["other"])
        return tuple(self.embed(i) + 0 * kept[..., None] for i in ids)


def test_a_mask_belongs_to_inputs_of_its_name():
    texts = {"left_ids": IDS, "left_attention_mask": MASK, "right_ids": IDS, "right_attention_mask": MASK.flip(1)}
    batch = as_inputs(({**texts, "other": IDS},))
    program = trace(Pair().eval(), batch)
    values = bind_inputs(program, batch)
    visibility = Visibility(values)
    found = {str(node.target): visibility.elements(node, value) for node, value in values.items()}
    assert torch.equal(found["texts_left_ids"], MASK.bool())
    assert torch.equal(found["texts_right_ids"], MASK.flip(1).bool())
    assert torch.equal(found["texts_other"], (MASK * MASK.flip(1)).bool())


def test_rows_of_a_run(program):
    """A value that a run hands out keeps its rows; without masks, every value is its own rows."""
    bound = BoundBatch.of(program, bind_inputs(program, as_inputs({"input_ids": IDS, "attention_mask": MASK})))
    end = program.graph.output_node().all_input_nodes[list(FUNCTIONS).index("attention")]
    value = Runner(program).run_nodes(compute_nodes(program.graph.nodes), bound, None, [end])[end]
    assert torch.equal(bound.visibility.rows(end, value), value[MASK.bool()])
    assert Visibility({}).rows(end, value) is value
