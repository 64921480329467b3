"""The kernel that appends a token does what torch does in many operations."""

import copy

import pytest
import torch

from mxcompile.inductor.generation.scores import Scores
from mxcompile.inductor.generation.sequences import Ends, Sequences, advance

NO_SCORES = Scores((), 0, None)


def begun(batch, ends, room=12):
    sequences = Sequences(batch, room, 40, ends, torch.device("cpu"))
    sequences.begin(torch.arange(batch * 5).view(batch, 5), torch.ones(batch, dtype=torch.bool), ends, NO_SCORES)
    return sequences


def step_inputs(batch, mask, positions=True):
    masks = {"bool": torch.rand(batch, 1, 1, 12) < 0.5, "float": torch.randn(batch, 1, 1, 12), None: None}
    masks["one"] = torch.rand(1, 1, 1, 12) < 0.5
    inputs = {"input_ids": torch.full((batch, 1), -1), "position_ids": torch.arange(batch)[:, None] + 3}
    return {
        **(inputs if positions else {"input_ids": inputs["input_ids"]}),
        **({"attention_mask": masks[mask]} if mask else {}),
    }


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mask", ["bool", "float", "one", None])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_torch_does(interpreted, batch, mask, count):
    ends = Ends(torch.tensor([7, 9, 11])[:count], torch.tensor(2)) if count else Ends(None, None)
    wanted = begun(batch, ends)
    given, wanted_inputs = copy.deepcopy(wanted), step_inputs(batch, mask, positions=count != 1)
    inputs = copy.deepcopy(wanted_inputs)
    for length, tokens in ((5, [1, 7, 8]), (6, [3, 4, 9]), (11, [7, 5, 6]), (12, [8, 8, 8])):
        token, valid = torch.tensor(tokens[:batch]), torch.tensor([True, length != 6, True])[:batch]
        wanted.length.fill_(length - 1)
        given.length.fill_(length - 1)
        wanted.append(token, valid)
        advance(wanted_inputs, wanted.report[0], torch.tensor(length))
        rest = (inputs["input_ids"], inputs.get("position_ids"), inputs.get("attention_mask"))
        assert interpreted.append_token.supports(given.ends, *rest) is None
        into = (given.report, given.tokens, given.length, given.ends, given.pad)
        interpreted.append_token.append(token, valid, *into, *rest, torch.tensor(length))
        for name in ("report", "tokens", "length"):
            assert torch.equal(getattr(given, name), getattr(wanted, name)), name
        assert all(torch.equal(inputs[name], wanted_inputs[name]) for name in inputs)


def test_without_probabilities(interpreted):
    given = begun(2, Ends(None, None))
    token = torch.tensor([4, 5])
    into = (given.report, given.tokens, given.length, given.ends, given.pad)
    interpreted.append_token.append(
        token, None, *into, torch.zeros(2, 1, dtype=torch.int64), None, None, torch.tensor(5)
    )
    assert given.report.tolist() == [[4, 5], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ends": torch.arange(33)}, "more than 1024 sequences or 32 end tokens"),
        ({"ids": torch.zeros(1025, 1, dtype=torch.int64)}, "more than 1024 sequences or 32 end tokens"),
        ({"positions": torch.zeros(2, 1, dtype=torch.int32)}, "position_ids are not contiguous int64"),
        ({"mask": torch.zeros(2, 4, 1, 8)}, "attention_mask is not [batch, 1, 1, cache]"),
    ],
)
def test_what_it_does_not_take(interpreted, change, reason):
    given = {"ends": None, "ids": torch.zeros(2, 1, dtype=torch.int64), "positions": None, "mask": None, **change}
    assert interpreted.append_token.supports(**given) == reason
