"""Losses on values inside a model: their values, and where in a graph they are taken."""

import pytest
import torch
from models import build, inputs, llama
from torch.nn import functional as F

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.calibration.learning.aims import Compared, aims_of
from mxcompile.calibration.learning.inner_terms import distribution_distance, excess_kurtosis, next_tokens, token_input
from mxcompile.errors import PassError
from mxcompile.pipeline.pipeline import Pipeline


def test_the_distance_of_distributions():
    values = torch.rand(3, 400, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1  # no token's energy is capped
    assert distribution_distance(values, values) == 0
    order = torch.randperm(400)
    assert distribution_distance(values, values[:, order]) < 1e-5  # of tokens, their order does not count
    moved = values + 0.5
    unit = values.square().mean().sqrt()
    torch.testing.assert_close(distribution_distance(values, moved), 0.5 / unit, rtol=1e-4, atol=1e-5)
    wider = (values - values.flatten(0, 1).mean(0)) * 2 + values.flatten(0, 1).mean(0)
    variance = values.flatten(0, 1).var(0, correction=0).mean()
    torch.testing.assert_close(distribution_distance(values, wider), 3 * variance / unit**2, rtol=1e-4, atol=1e-5)
    first, moved_first = values.clone(), moved.clone()
    first[0, 0], moved_first[0, 0] = 1e3, 1e3  # of a sequence: without the cap, the unit would be 30 times as large
    assert distribution_distance(first, moved_first) > 0.9 * distribution_distance(values, moved)


def test_excess_kurtosis_is_that_of_few_large_channels():
    normal = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    assert excess_kurtosis(normal) < 0.1
    normal[:, 7] = 40
    values = normal[0].double() - normal[0].double().mean()
    expected = values.pow(4).mean() / values.square().mean() ** 2 - 3
    assert excess_kurtosis(normal[:1]).double() == pytest.approx(expected.item(), rel=1e-4)
    assert excess_kurtosis(torch.ones(4, 8)) == 0


def test_next_tokens_that_are_hidden_do_not_count():
    ids = torch.tensor([[5, 6, 7, 8]])
    assert next_tokens(ids, torch.ones_like(ids).bool()).flatten().tolist() == [6, 7, 8, -100]
    assert next_tokens(ids, torch.tensor([[True, True, False, True]])).flatten().tolist() == [6, -100, 8, -100]


def rounded(name="llama", layers=2):
    model = llama(layers) if name == "llama" else build(name)
    x = inputs(name)
    return model, Pipeline.parse("round-weights{format=mxint4}").run(mxcompile.trace(model, x), x)


def test_cross_entropy_is_transformers_own():
    model, program = rounded()
    aims = aims_of(program, Compared.CE, 0, 0)
    x = inputs("llama", 2, 12)
    (term,) = aims.terms
    logits = model(**x).logits
    ids = next_tokens(x["input_ids"], torch.ones_like(x["input_ids"]).bool())
    expected = model(**x, labels=x["input_ids"]).loss
    torch.testing.assert_close(term.value({"next tokens": ids}, {"next tokens": logits}), expected)
    assert not aims.predictions
    assert aims.tokens is token_input(program.origin, next(iter(term.nodes.values())))


def test_where_terms_are_taken():
    _, program = rounded()
    block, attention, kurtosis = aims_of(program, Compared.BLOCK, 0.5, 0.25).terms
    matmuls = {m.node: m.parameter for m in choose(program).matmuls}
    assert block.nodes.keys() == block.exact.keys()
    assert len(block.nodes) == 4  # behind each attention and each MLP
    projections = [matmuls[node] for node in attention.nodes.values()]
    assert projections == [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)]
    assert [kurtosis.nodes[node.name] for node in matmuls] == list(matmuls)
    assert (block.weight, attention.weight, kurtosis.weight, kurtosis.exact) == (1.0, 0.5, 0.25, {})


def test_what_a_model_has_not_is_named():
    _, program = rounded("mlp")
    with pytest.raises(PassError, match=r"loss=ce predicts the next tokens of an input of token ids, .* take loss=kl"):
        aims_of(program, Compared.CE, 0, 0)
    with pytest.raises(PassError, match="attention: no layer that multiplies what an attention returns"):
        aims_of(program, Compared.KL, 1.0, 0)


def test_terms_are_weighted_means_and_leave_out_what_is_not_alike():
    _, program = rounded()
    (term,) = aims_of(program, Compared.BLOCK, 0, 0).terms
    first, *others = term.nodes
    values = {name: torch.randn(2, 3, 4) for name in term.nodes}
    other = {**values, first: -values[first]}
    assert term.unlike(values, other) == [first]
    assert term.unlike(values, values) == []
    assert list(term.without([first]).nodes) == others
    assert term.value(values, values) == 0
    short = {**values, first: values[first][:1]}
    assert term.value(short, values) == 0  # other tokens, which a router has selected
    torch.testing.assert_close(F.relu(term.value(values, other)), torch.tensor(4.0 / len(values)))
