"""Tensors in training: rounded weights of equal rows are trained together, as each would be alone."""

import torch

from mxcompile.calibration.learning import trained_tensors
from mxcompile.calibration.learning.latent_weights import Trained
from mxcompile.calibration.learning.trained_tensors import RoundedWeight, TrainedWeights, Training
from mxcompile.formats import MXFP4, MXINT4, ScaleRule
from mxcompile.graph.program import Rounding
from mxcompile.numerics.importance import round_rows

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
