"""fine-blocks: small blocks where they pay for their scales; later passes obey."""

import copy

import pytest
import torch
from torch import nn

import mxcompile
from mxcompile.errors import PipelineError
from mxcompile.formats import MXINT4, MXINT8
from mxcompile.graph.printer import print_changes
from mxcompile.numerics.metrics import rounding_db
from mxcompile.passes.fine_blocks import FineBlocks
from mxcompile.pipeline.pipeline import Pipeline


def model() -> nn.Sequential:
    """Three linears: all values alike, an outlier in every 16 values, and one in every 64."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3)))
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(256, 256))
        layers[1].weight[:, ::128] *= 30
        layers[2].weight[:, ::64] *= 30
    return layers.eval()


@pytest.fixture(name="program")
def traced():
    return mxcompile.trace(model(), torch.randn(4, 256))


def test_each_weight_s_line_says_which_block_it_gets(program):
    after = Pipeline([FineBlocks(MXINT4)]).run(program)
    blocks = {name: fmt.block_size for name, fmt in after.formats.items()}
    changed = [line for line in print_changes(program, after).splitlines() if line.startswith("+")]
    assert [line.rsplit(" ", 1)[1] for line in changed] == [
        f"chosen=mxint4:{block}".removesuffix(":32") for block in blocks.values()
    ]
    assert blocks["1.weight"] == 16
    assert blocks["0.weight"] > 16


def test_halves_as_long_as_a_bit_of_scales_gains_more_than_6_db(program):
    """The rule, computed again: the chosen block is worth its bits, and the next smaller one is not."""
    record = Pipeline([FineBlocks(MXINT4)]).run(program).ledger[0]
    for name, numbers in record.numbers.items():
        weight, block = program.tensor(name), int(numbers["block"])
        db = {size: rounding_db(weight, MXINT4.with_block(size)) for size in (16, 32, 64, 128)}
        assert numbers["weight_sqnr_db"] == db[block]
        while block < 128:
            assert db[block] - db[2 * block] > 6.02 * (8 / block - 4 / block)
            block *= 2
        block = int(numbers["block"])
        assert block == 16 or db[block // 2] - db[block] < 6.03 * 8 / block


def test_later_passes_obey(program):
    lowered = Pipeline.parse("fine-blocks{element=mxint4} | lower-mx{weight=mxint4,activation=mxint8}").run(program)
    text = mxcompile.print_program(lowered)
    assert "mxint4:16" in text


def test_importance_weights_the_error(program):
    """The channel with the outliers does not matter: its neighbours' small values do."""
    program.importance["0.weight"] = torch.where(torch.arange(256) % 128 == 5, 1.0, 1e-6)
    after = Pipeline([FineBlocks(MXINT4)]).run(program)
    expected = rounding_db(program.tensor("0.weight"), after.formats["0.weight"], program.importance["0.weight"])
    assert after.ledger[0].numbers["0.weight"]["weight_sqnr_db"] == expected


def test_limits(program):
    after = Pipeline([FineBlocks(MXINT4, least=64, most=64)]).run(program)
    assert {fmt.block_size for fmt in after.formats.values()} == {64}


@pytest.mark.parametrize("sizes", ["least=64,most=32", "least=8", "most=256"])
def test_impossible_limits_are_refused(sizes):
    with pytest.raises(PipelineError, match="give two of the block sizes 16, 32, 64, 128, the smaller one first"):
        Pipeline.parse(f"fine-blocks{{element=mxint4,{sizes}}}")


def test_what_a_pass_has_chosen_stays(program):
    program.formats |= {"0.weight": MXINT8, "2.weight": None}
    after = Pipeline([FineBlocks(MXINT4)]).run(program)
    assert (after.formats["0.weight"], after.formats["2.weight"]) == (MXINT8, None)
    assert [str(miss) for miss in after.ledger[0].misses] == [
        "%linear in 0: a pass has chosen mxint8 for it",
        "%linear_2 in 2: a pass has chosen float for it",
    ]


def test_twice_is_once_and_the_user_s_model_is_untouched():
    layers = model()
    state = copy.deepcopy(layers.state_dict())
    once = Pipeline([FineBlocks(MXINT4)]).run(mxcompile.trace(layers, torch.randn(4, 256)))
    twice = Pipeline([FineBlocks(MXINT4)]).run(once)
    assert (once.ledger[-1].rewrites, twice.ledger[-1].rewrites) == (3, 0)
    assert once.formats == twice.formats
    assert all(torch.equal(state[name], tensor) for name, tensor in layers.state_dict().items())


@pytest.mark.parametrize("size", [1, 20, 100])
def test_odd_sizes_and_zeros(size):
    layer = nn.Linear(size, 3, bias=False)
    with torch.no_grad():
        layer.weight[0] = 0
    after = Pipeline([FineBlocks(MXINT4)]).run(mxcompile.trace(layer, torch.randn(2, size)))
    assert after.formats["weight"].block_size in (16, 32, 64, 128)
