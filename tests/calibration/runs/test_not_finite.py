"""NaN and Inf in calibration data: the batch and the first value at fault are named, whichever pass meets them."""

import pytest
import torch
from torch import Tensor, nn

import mxcompile
from mxcompile.errors import InputError
from mxcompile.pipeline.pipeline import Pipeline

ROUND = "round-weights{format=mxint4,weighted=true}"
PASSES = [
    "smooth-quant",
    "smooth-quant{alpha=none,weight=mxint4}",
    "awq-fold{weight=mxint4}",
    "awq-fold{weight=mxint4,objective=block}",
    "rotate{weight=mxint4,activation=mxint4}",
    "gptq{format=mxint4}",
    "gptq{format=mxint4,activation=mxint8,correction=0.5}",
    ROUND,
]


class Net(nn.Module):
    """norm -> a -> log of a sum of squares (of zeros: -Inf) -> b. missing: NaN in x is read as zero."""

    def __init__(self, missing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.missing = missing

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        y = self.a(self.norm(torch.nan_to_num(x) if self.missing else x))
        return self.b(y + (offset * offset).sum(-1, keepdim=True).log())


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 64, generator=generator), torch.ones(8, 4)) for _ in range(count)]


@pytest.fixture(scope="module")
def program():
    return mxcompile.trace(Net().eval(), batches()[0])


@pytest.mark.parametrize("text", [*PASSES, "tune-vectors", "lower-mx{weight=mxint8}"])
def test_nan_in_an_input_is_found_before_the_first_pass(program, text):
    data = batches()
    data[2][0][3, 5] = torch.nan
    with pytest.raises(InputError, match=r"calibration\[2\] gives NaN at %layer_norm in norm: its input 'x'; repair"):
        Pipeline.parse(text).run(program, data)


@pytest.mark.parametrize("text", PASSES[1:])  # a fixed alpha reads the norm's output alone
def test_values_that_the_model_makes(program, text):
    data = batches()
    data[1][1][4] = 0.0
    with pytest.raises(InputError, match=r"calibration\[1\] gives Inf at %add: first in %log") as caught:
        Pipeline.parse(text).run(program, data)
    assert "report" not in str(caught.value)


def test_inf_in_an_input(program):
    """Inf alone is no fault (a mask may hold it): it is one where a statistic becomes NaN."""
    data = batches()
    data[1][0][0, 0] = torch.inf
    message = (
        r"calibration\[1\] gives NaN at %layer_norm in norm: first in %layer_norm in norm, which reads Inf from %x"
    )
    with pytest.raises(InputError, match=message):
        Pipeline.parse("gptq{format=mxint4}").run(program, data)


@pytest.mark.parametrize("recipe", ["w4a8-mxint", "smooth-quant | lower-mx{weight=mxint8}"])
def test_a_model_that_reads_nan_as_missing(recipe):
    data = batches()
    data[1][0][::2, ::3] = torch.nan
    lowered = mxcompile.passes.recipes.as_pipeline(recipe).run(mxcompile.trace(Net(True).eval(), data[0]), data)
    assert lowered(*data[1]).isfinite().all()


def test_example_inputs_and_the_probe_are_called_so(program):
    x, offset = batches()[0]
    bad = x.clone()
    bad[0, 0] = torch.nan
    example = mxcompile.trace(Net().eval(), (bad, offset))
    with pytest.raises(InputError, match="the example inputs give NaN"):
        Pipeline.parse("gptq{format=mxint4}").run(example)
    with pytest.raises(InputError, match="the probe gives NaN at %layer_norm in norm: its input 'x'"):
        Pipeline.parse("lower-mx{weight=mxint8}").run(program, instruments=[mxcompile.Measure((bad, offset))])


def test_a_batch_whose_output_is_nan_is_not_trained_on():
    """No statistic sees the output. The other batches train the vectors, and a miss names it."""

    class Log(Net):
        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            return self.b(self.a(self.norm(x))) + offset.log()[:, :1]

    data = batches(8)
    data[1][1][4] = -1.0
    program = mxcompile.trace(Log().eval(), data[0])
    tuned = Pipeline.parse(f"{ROUND} | tune-vectors{{steps=8,rate=0.01}}").run(program, data)
    assert tuned.ledger[-1].rewrites > 0
    assert [str(miss) for miss in tuned.ledger[-1].misses] == [
        "output 0: not compared: NaN in the float model, for one batch or more"
    ]
