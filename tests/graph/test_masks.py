"""Masks among a batch's inputs: which tokens each form hides, and whose."""

import pytest
import torch
from torch import Tensor, nn

from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.inputs import as_inputs
from mxcompile.graph.masks import find_masks, hides_everything
from mxcompile.graph.trace import trace

VISIBLE = torch.tensor([[True, True, False], [False, True, True]])
ADDED = torch.where(VISIBLE, 0.0, -torch.inf)
CAUSAL = torch.ones(3, 3, dtype=torch.bool).tril()
FORMS = {
    "int": VISIBLE.long(),
    "bool": VISIBLE,
    "float": VISIBLE.float(),
    "added": ADDED,
    "packed": VISIBLE * torch.tensor([1, 2, 3]),
    "queries and keys": VISIBLE[:, None] & CAUSAL,
    "heads, queries and keys": VISIBLE[:, None, None] & CAUSAL,
    "heads, queries and keys, added": torch.where(VISIBLE[:, None, None] & CAUSAL, 0.0, torch.finfo().min),
}


class Masked(nn.Module):
    """Reads a mask of any form, by attention or by a name of torch's."""

    def forward(self, input_ids: Tensor, attention_mask=None, key_padding_mask=None) -> Tensor:
        mask = attention_mask if key_padding_mask is None else key_padding_mask
        return input_ids + mask.flatten(1).sum() * 0


def masks_of(**masks: Tensor) -> list[Tensor]:
    batch = as_inputs({"input_ids": torch.ones(2, 3), **masks})
    program = trace(Masked(), batch)
    return [mask.visible for mask in find_masks(bind_inputs(program, batch))]


@pytest.mark.parametrize("form", FORMS)
def test_attention_masks(form):
    (visible,) = masks_of(attention_mask=FORMS[form])
    assert torch.equal(visible, VISIBLE)


@pytest.mark.parametrize("mask", [~VISIBLE, ADDED], ids=["bool", "added"])
def test_key_padding_masks_say_what_is_hidden(mask):
    (visible,) = masks_of(key_padding_mask=mask)
    assert torch.equal(visible, VISIBLE)


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.zeros(2, 1, 3, 3), torch.ones(2, 3) * 7])
def test_a_mask_that_hides_nothing(mask):
    assert masks_of(attention_mask=mask) == []


@pytest.mark.parametrize(("mask", "expected"), [(VISIBLE, False), (VISIBLE & False, True), (VISIBLE | True, False)])
def test_batches_that_are_hidden_altogether(mask, expected):
    batch = as_inputs({"input_ids": torch.ones(2, 3), "attention_mask": mask})
    assert hides_everything(bind_inputs(trace(Masked(), batch), batch)) is expected
