"""Tensors in training: rounded weights of equal rows are trained together, as each would be alone."""

import torch

from mxcompile.calibration.learning import trained_tensors
from mxcompile.calibration.learning.latent_weights import Trained
from mxcompile.calibration.learning.schedule import Training
from mxcompile.calibration.learning.trained_tensors import (
    SCALES,
    RoundedWeight,
    TrainedTensors,
    TrainedTogether,
    TrainedVectors,
    TrainedWeights,
)
from mxcompile.formats import MXFP4, MXINT4, ScaleRule
from mxcompile.graph.program import Rounding
from mxcompile.numerics.importance import round_rows
from mxcompile.numerics.rounding_offsets import offsets_of

SHAPES = {"q": (24, 64), "k": (8, 64), "down": (16, 96), "up": (40, 64), "transposed": (12, 64), "other": (8, 64)}


def rounded_weights() -> dict[str, RoundedWeight]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in SHAPES.items():
        fmt = MXINT4 if name == "other" else MXFP4
        rows, scales = round_rows(torch.randn(shape, generator=generator), fmt, ScaleRule.MSE)
        weights[name] = RoundedWeight(rows, Rounding(fmt, scales), -2 if name == "transposed" else -1)
    return weights


def trained(kind: Trained) -> tuple[int, dict[str, torch.Tensor]]:
    """Some steps towards other weights; returns how many tensors the optimizer has, and what becomes of the weights."""
    weights = TrainedWeights(rounded_weights(), kind)
    goals = {name: 1.1 * tensor.detach() + 0.05 for name, tensor in weights.tensors().items()}
    training = Training(weights, 6, 0.3)
    for _ in range(6):
        loss = torch.stack([(t - goals[name]).square().sum() for name, t in weights.tensors().items()]).sum()
        loss.backward()
        weights.collect_gradients()
        training.optimizer.step()
    return len(weights.parameters), weights.detached()


def test_weights_of_equal_rows_are_trained_together(monkeypatch):
    for kind in (Trained.WEIGHTS, Trained.CLIP):
        count, together = trained(kind)
        with monkeypatch.context() as patch:
            patch.setattr(trained_tensors, "_LARGEST_GROUP", 64 * 40)
            fewer, apart = trained(kind)
        assert (count, fewer) == (3, 5)
        assert list(together) == list(apart)
        assert all(torch.equal(together[name], apart[name]) for name in together)
        assert together["transposed"].shape == (64, 12)
        before = rounded_weights()
        assert all(not torch.equal(together[name], before[name].rows) for name in ("q", "down", "other"))


def one_step(trained: TrainedTensors, rate: float) -> dict[str, torch.Tensor]:
    """Towards smaller values of all tensors; returns what becomes of them."""
    training = Training(trained, 4, rate)
    torch.stack([tensor.sum() for tensor in trained.tensors().values()]).sum().backward()
    trained.collect_gradients()
    training.optimizer.step()
    return trained.detached()


def test_elements_begin_where_they_were_before_they_were_rounded():
    """A step of a tenth changes those within a tenth of the end of their interval; from the values it changes none."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows, scales = round_rows(weight, MXINT4, ScaleRule.MSE)
    changed = {}
    for kept in (True, False):
        offsets = offsets_of(weight, rows, scales, MXINT4) if kept else None
        trained = TrainedWeights({"w": RoundedWeight(rows, Rounding(MXINT4, scales, offsets), -1)}, Trained.WEIGHTS)
        first = trained.detached()
        assert torch.equal(first["w"], rows)
        assert first["w"].dtype == torch.bfloat16
        changed[kept] = (one_step(trained, 0.1)["w"] != rows).float().mean().item()
    assert changed[False] == 0
    assert 0.07 < changed[True] < 0.13


def test_weights_and_vectors_train_together_as_each_alone():
    """A vector's step is `pace` times the optimizer's rate, in units of its mean magnitude."""
    vectors = {"norm": torch.tensor([1.0, 2.0, 3.0])}
    both = TrainedTogether(
        [TrainedWeights(rounded_weights(), Trained.WEIGHTS), TrainedVectors(vectors, bound=0.3, pace=0.1)]
    )
    assert list(both.named) == ["q", "down", "other", "norm"]
    result = one_step(both, 0.8)
    alone = one_step(TrainedWeights(rounded_weights(), Trained.WEIGHTS), 0.8)
    assert result.keys() == alone.keys() | {"norm"}
    assert f"q{SCALES}" in result
    assert all(torch.equal(result[name], alone[name]) for name in alone)
    torch.testing.assert_close(result["norm"], vectors["norm"] - 0.8 * 0.1 * 2.0)
    both.named["norm"].data.fill_(-9.0)
    both.keep_bounds()
    torch.testing.assert_close(both.detached()["norm"], vectors["norm"] - 0.3 * 2.0)
