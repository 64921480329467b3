"""Models that select the tokens a layer sees: every pass that reads calibration data, on layers that no token, or only
some batches' tokens, reach.
"""

import pytest
import torch
from torch import Tensor, nn

import mxcompile
from mxcompile.calibration.statistics.second_moments import SecondMoments
from mxcompile.pipeline.pipeline import Pipeline

NO_TOKENS = "no calibration token reaches it"
W4A8 = "weight=mxint4,activation=mxint8"


class Experts(nn.Module):
    """A norm and experts in a loop, each on the tokens whose largest channel of four is its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.router = nn.LayerNorm(64), nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(4)
        )
        self.out = nn.Linear(64, 64)
        with torch.no_grad():
            self.router.weight.zero_()[:, :4] = torch.eye(4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(0, 1)
        chosen = self.router(rows).argmax(-1)
        result = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            (row,) = torch.where(chosen == index)
            result = result.index_add(0, row, expert(rows[row]))
        return self.out(x + result.view_as(x))


def batch(*experts: int, seed: int = 0) -> Tensor:
    """`[2, 16, 64]`, whose tokens go to these experts in turn."""
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(seed))
    numbers = torch.tensor(experts).repeat(32)[:32].view(2, 16, 1)
    return x.scatter(-1, numbers, 8.0)


CALIBRATION = [batch(0, 1, seed=1), batch(0, seed=2), batch(0, 1, seed=3), batch(0, 2, seed=4)]
"""Expert 3 gets no token, 1 and 2 get some in some batches."""


@pytest.fixture(scope="module")
def program():
    """The router is quantized, too: the two models may choose other experts."""
    return mxcompile.trace(Experts().eval(), batch(0, 1, 2, 3), include=["router"])


def misses(result) -> dict[str, str]:
    return {miss.where: miss.reason for miss in result.ledger[-1].misses}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("smooth-quant", "%layer_norm_4 -> experts.3.3"),
        (f"smooth-quant{{alpha=none,{W4A8}}}", "%layer_norm_4 -> experts.3.3"),
        (f"smooth-quant{{alpha=none,objective=block,{W4A8}}}", "%layer_norm_4 -> experts.3.3"),
        (f"awq-fold{{{W4A8}}}", "%layer_norm_4 -> experts.3.3"),
        (f"awq-fold{{objective=block,{W4A8}}}", "%layer_norm_4 -> experts.3.3"),
        ("rotate{weight=mxint4,activation=mxint4}", "%linear_8 in experts.3.3"),
    ],
)
def test_what_no_token_reaches_stays_as_it_is(program, text, where):
    """The group of the norm in front of all experts takes its factors from the experts that tokens reach."""
    result = Pipeline.parse(text).run(program, CALIBRATION)
    assert misses(result)[where] == NO_TOKENS
    assert not {"%layer_norm -> router", "%layer_norm_1 -> experts.0.3"} & {
        name for name, reason in misses(result).items() if reason == NO_TOKENS
    }
    last = "experts.3.3.weight"
    assert "smooth" not in text or torch.equal(result.tensor(last), program.tensor(last))


def test_weighted_rounding_says_what_is_not_weighted(program):
    result = Pipeline.parse("round-weights{format=mxint4,weighted=true}").run(program, CALIBRATION)
    assert misses(result) == {
        f"%linear_{index} in experts.3.{place}": f"rounded without weighting: {NO_TOKENS}"
        for index, place in ((7, 0), (8, 3))
    }


def test_the_whole_recipe(program):
    lowered = mxcompile.recipes()["w4a8-mxint"].run(program, CALIBRATION)
    deployed = mxcompile.deploy(lowered, Experts().eval())
    torch.testing.assert_close(deployed(CALIBRATION[0]), lowered(CALIBRATION[0]), rtol=1e-4, atol=1e-4)


def test_rows_are_compared_with_the_float_model_only_where_they_are_the_same_tokens(program, monkeypatch):
    """`update` gets the float model's rows for the router and for what follows the experts, never inside them."""
    compared = []
    update = SecondMoments.update

    def watched(self, x, exact=None, residual_errors=None, exact_outputs=None, *others, **named):
        compared.append(exact is not None or bool(exact_outputs))
        return update(self, x, exact, residual_errors, exact_outputs, *others, **named)

    monkeypatch.setattr(SecondMoments, "update", watched)
    result = Pipeline.parse("gptq{format=mxint4,activation=mxint8,correction=0.5,residual=true}").run(
        program, CALIBRATION
    )
    uncorrected, nothing = (
        {miss.where for miss in result.ledger[-1].misses if text in miss.reason}
        for text in ("without correction", NO_TOKENS)
    )
    assert uncorrected | nothing == {f"%linear_{i} in experts.{(i - 1) // 2}.{3 * ((i - 1) % 2)}" for i in range(1, 9)}
    assert nothing == {"%linear_7 in experts.3.0", "%linear_8 in experts.3.3"}
    assert compared.count(True) == 2 * len(CALIBRATION)  # the router's input and that of the last linear


class Gate(nn.Module):
    """Rows whose number the quantized model's own sums decide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y[: (y[:, 0] > 0).sum().item()])


def test_rows_of_other_numbers_are_not_compared():
    """What the data flow does not show is seen when the two models run."""
    batches = [torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    program = mxcompile.trace(Gate().eval(), batches[0])
    result = Pipeline.parse("gptq{format=mxint4,activation=mxint4,correction=0.5}").run(program, batches)
    assert "rounded without correction" in misses(result)["%linear_1 in second"]
