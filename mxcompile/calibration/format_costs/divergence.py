"""Measured costs: the KL divergence of the model with one item changed and everything else in float.

`kl_costs` rounds the item: a forward for each item and format, exact for that item alone, and slow. `noise_costs` adds
Gaussian noise (HIGGS, Malinovskii et al., arXiv 2411.17525): KL = alpha t^2 for small relative errors t, whatever made
them, so that a few noise levels give alpha, and the cost of a format is alpha times its squared relative error.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mxcompile.analysis.format_items import FormatItem
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.calibration.format_costs.pairs import FormatPair, rounded_weights
from mxcompile.calibration.learning.distillation import Distillation
from mxcompile.calibration.quantizers import round_input
from mxcompile.calibration.runs.altered_run import AlteredRun, Prepare
from mxcompile.errors import NoDataError
from mxcompile.formats import MXFormat
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.numerics.importance import floored

LEVELS = (0.05, 0.1)
"""Relative errors of the noise, about those of weights in 4 to 5 bits."""


def kl_costs(
    program: Program, items: Sequence[FormatItem], pairs: Sequence[FormatPair], batches: Sequence[Inputs]
) -> Tensor:
    """Costs `[items, pairs]`, float64, the weighted mean over batches. Raises NoDataError as `_losses` does."""

    def changes(item: FormatItem) -> Iterator[_Change]:
        for pair in pairs:
            tensors = {
                name: rounded_weights(program, matmul, [pair.weight])[pair.weight]
                for name, matmul in item.by_weight.items()
            }
            yield tensors, dict.fromkeys(item.matmuls, partial(round_input, pair.activation))

    return _losses(program, items, changes, batches, len(pairs))


def noise_costs(
    program: Program, items: Sequence[FormatItem], pairs: Sequence[FormatPair], batches: Sequence[Inputs]
) -> Tensor:
    """Costs `[items, pairs]`, float64, of rounding weights alone; inputs are not rounded.

    Errors are weighted by the importance of input channels where a pass has measured it.
    """

    def changes(item: FormatItem) -> Iterator[_Change]:
        for seed, level in enumerate(LEVELS):
            named = item.by_weight.items()
            yield {name: _noisy(program, matmul, level, seed) for name, matmul in named}, {}

    measured = _losses(program, items, changes, batches, len(LEVELS))
    squares = torch.tensor(LEVELS, dtype=torch.float64).square()
    alpha = (measured * squares).sum(-1) / squares.square().sum()
    errors = [[_mean_error(program, item, pair.weight) for pair in pairs] for item in items]
    return alpha.unsqueeze(-1) * torch.tensor(errors, dtype=torch.float64)


_Change = tuple[dict[str, Tensor], dict[Matmul, Prepare]]
"""Tensors in place of a program's, and what matmuls do to their inputs."""


def _losses(
    program: Program,
    items: Sequence[FormatItem],
    changes: Callable[[FormatItem], Iterator[_Change]],
    batches: Sequence[Inputs],
    count: int,
) -> Tensor:
    """The mean loss `[items, count]` of every change of every item. Raises NoDataError if no output can be compared."""
    student = AlteredRun(program, {})
    distillation = Distillation(program, student, program, comes_again=False)
    losses = torch.zeros(len(items), count, dtype=torch.float64)
    work = [(batch, index) for batch in batches for index in range(len(items))]
    expected: dict[str, Tensor] = {}
    weight = 0.0
    for batch, index in program.track(work):
        if index == 0:
            student.change({}, {})
            expected = distillation.expected(batch)
        for number, (tensors, prepare) in enumerate(changes(items[index])):
            student.change(prepare, tensors)
            loss = distillation.loss(batch, expected)
            if loss is not None:
                losses[index, number] += loss.item()
                weight += batch.weight / (len(items) * count)
    if not weight:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in distillation.left_out.items())
        raise NoDataError(f"no output of the model can be compared ({reasons}): formats cannot be chosen by their cost")
    return losses / weight


def _weighted_square(program: Program, matmul: Matmul, rows: Tensor) -> float:
    """The squares of a weight `[..., out, in]`, weighted by the importance of its channels if it is known."""
    importance = program.importance.get(matmul.parameter)
    weights = 1.0 if importance is None else floored(importance).to(rows.device)
    return float((rows.float().square() * weights).sum())


def _noisy(program: Program, matmul: Matmul, level: float, seed: int) -> Tensor:
    """A weight, as the parameter is, plus noise of that relative size."""
    rows = finite_rows(program, matmul)
    generator = torch.Generator(rows.device).manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator, device=rows.device)
    size = _weighted_square(program, matmul, rows) / max(_weighted_square(program, matmul, noise), 1e-30)
    return matmul.rows((rows.float() + noise * (level * math.sqrt(size))).to(rows.dtype))


def _mean_error(program: Program, item: FormatItem, fmt: MXFormat | None) -> float:
    """The mean over an item's weights of their squared relative errors in a format."""
    errors: list[float] = []
    for matmul in item.by_weight.values():
        rows = finite_rows(program, matmul)
        change = matmul.rows(rounded_weights(program, matmul, [fmt])[fmt]) - rows
        errors.append(_weighted_square(program, matmul, change) / max(_weighted_square(program, matmul, rows), 1e-30))
    return sum(errors) / len(errors)
