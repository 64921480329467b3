"""The Fisher estimate: cost = E (g . dy)^2 / 2, with one forward and one backward pass and a product for each format.

dy is the change of a matmul's output with its weight and its input rounded as at run time, and g the gradient of
-log p(y) by that output, for a token y drawn from the model's own prediction: this is the second-order term of
KL(model || rounded model). Matmuls of one item that share an input change each token together, so their products are
added before squaring. For outputs that are no logits, the cost is the relative squared error, from random directions.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.format_items import FormatItem
from mxcompile.analysis.matmuls import Matmul, multiply
from mxcompile.analysis.segments import Segment
from mxcompile.calibration.compared_outputs import ComparedOutputs
from mxcompile.calibration.format_costs.gptq_errors import weights_by_gptq
from mxcompile.calibration.format_costs.pairs import FormatPair, rounded_weights
from mxcompile.calibration.quantizers import round_input
from mxcompile.calibration.ranks.dealing import own_batches
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.runs.backward_run import BackwardRun
from mxcompile.calibration.runs.run import BoundBatch
from mxcompile.errors import NoDataError
from mxcompile.graph.binding import NodeValues
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program

_ROWS = 1024


def fisher_costs(
    program: Program,
    items: Sequence[FormatItem],
    pairs: Sequence[FormatPair],
    batches: Sequence[Inputs],
    *,
    gptq: bool = False,
) -> Tensor:
    """Costs `[items, pairs]`, float64, the weighted mean over batches; NaN for an item that no gradient reaches.

    gptq: of weights as `gptq` rounds them (`gptq_errors.py`), else of weights rounded to nearest.
    Raises NoDataError if no output of the model can be compared.
    """
    own, _ = own_batches(program, batches)
    loss = _SampledLoss(program, own.start)
    if not loss.outputs:
        raise NoDataError(loss.why_none)
    matmuls = [matmul for item in items for matmul in item.matmuls]
    run = BackwardRun(program, matmuls, [batches[index] for index in own], loss.outputs, loss.gradients)
    costs = torch.zeros(len(items), len(pairs) + 1, dtype=torch.float64)
    owner = {matmul: index for index, item in enumerate(items) for matmul in item.matmuls}
    for segment in program.track(run.segments):
        rounded = weights_by_gptq(program, run, segment, pairs) if gptq else _to_nearest(program, segment, pairs)
        scorer = _SegmentScorer(program, segment, owner, pairs, rounded)
        for batch in run.backward(segment, scorer.add):
            scorer.finish(batch, costs)
    ranks_of(program).sum(costs)
    seen = costs[:, -1:] > 0
    return torch.where(seen, costs[:, :-1] / sum(batch.weight for batch in batches), torch.nan)


def _to_nearest(
    program: Program, segment: Segment, pairs: Sequence[FormatPair]
) -> dict[Matmul, dict[FormatPair, Tensor]]:
    """For each matmul its weight rounded to nearest in every pair's format."""
    formats = {pair.weight for pair in pairs}
    nearest = {matmul: rounded_weights(program, matmul, formats) for matmul in segment.matmuls}
    return {matmul: {pair: weights[pair.weight] for pair in pairs} for matmul, weights in nearest.items()}


class _SegmentScorer:
    """Adds the costs of the matmuls of one segment; their rounded weights are held while all batches pass."""

    def __init__(
        self,
        program: Program,
        segment: Segment,
        owner: Mapping[Matmul, int],
        pairs: Sequence[FormatPair],
        rounded: Mapping[Matmul, Mapping[FormatPair, Tensor]],
    ) -> None:
        self._owner, self._pairs, self._rounded = owner, pairs, rounded
        self._exact = {matmul: rounded_weights(program, matmul, [None])[None] for matmul in segment.matmuls}
        self._products: dict[tuple[int, Node], Tensor] = {}

    def add(self, matmul: Matmul, values: NodeValues, gradient: Tensor) -> None:
        """Add g . dy of every row and pair, `[rows, pairs]`, to those of the item's other matmuls of that input."""
        weights = self._rounded[matmul]
        dtype = torch.float32 if matmul.root.meta["val"].dim() == 2 else gradient.dtype
        x = values[matmul.activation].to(dtype)
        exact = multiply(matmul, values, x, self._exact[matmul].to(dtype))
        inputs = {fmt: round_input(fmt, x) for fmt in {pair.activation for pair in self._pairs}}
        products = torch.stack(
            [
                (multiply(matmul, values, inputs[pair.activation], weights[pair].to(dtype)) - exact)
                .float().mul_(gradient).sum(-1).flatten()
                for pair in self._pairs
            ],
            -1,
        )  # fmt: skip
        key = self._owner[matmul], matmul.activation
        self._products[key] = products + self._products[key] if key in self._products else products

    def finish(self, batch: BoundBatch, costs: Tensor) -> None:
        """Square what a batch has added; the last column counts the rows seen."""
        for (item, _), products in self._products.items():
            costs[item, :-1] += products.double().square().sum(0).cpu() * (batch.visibility.weight / 2)
            costs[item, -1] += len(products)
        self._products.clear()


class _SampledLoss:
    """Gradients of a loss whose mean square along a small change of the outputs is twice its KL, or relative error.

    first: the number of the first batch of this process; each batch draws by its own seed.
    """

    def __init__(self, program: Program, first: int) -> None:
        self._compared, self._first = ComparedOutputs(program), first

    @property
    def outputs(self) -> tuple[Node, ...]:
        """The compared outputs."""
        return tuple(self._compared.nodes.values())

    @property
    def why_none(self) -> str:
        """Why no output is compared."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self._compared.left_out.items())
        return f"no output of the model can be compared ({reasons}): formats cannot be chosen by what they cost"

    def gradients(self, index: int, batch: BoundBatch, values: NodeValues) -> dict[Node, Tensor]:
        """The gradient by every compared output of a batch that can be compared; hidden rows have none."""
        gradients: dict[Node, Tensor] = {}
        for name, node in self._compared.nodes.items():
            value = values[node]
            mask = batch.visibility.mask(node, value)
            rows = value.reshape(-1, value.shape[-1])
            rows = rows if mask is None else rows[mask]
            if rows.isnan().any() or not len(rows):
                self._compared.leave_out(name, "NaN in the float model" if len(rows) else "no visible row")
                continue
            generator = torch.Generator(value.device).manual_seed(self._first + index)
            draw = _nll_gradient if self._compared.is_logits(value.shape) else _error_gradient
            drawn = draw(rows, generator).to(value.dtype)
            if mask is not None:
                drawn = torch.zeros_like(value).reshape(len(mask), -1).index_put_((mask,), drawn)
            gradients[node] = drawn.view_as(value)
        return gradients


def _nll_gradient(rows: Tensor, generator: torch.Generator) -> Tensor:
    """p - onehot(y), y drawn from p = softmax of logits `[tokens, vocabulary]`, over the root of the tokens."""
    gradient = torch.empty_like(rows)
    for part, logits in zip(gradient.split(_ROWS), rows.split(_ROWS), strict=True):
        p = logits.float().softmax(-1)
        tokens = p.multinomial(1, generator=generator)
        part.copy_(p.scatter_add_(-1, tokens, -torch.ones_like(p[:, :1])).div_(math.sqrt(len(rows))))
    return gradient


def _error_gradient(rows: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction, such that half its mean square along a change is |change|^2 / |rows|^2."""
    finite = rows.isfinite()
    norm = torch.where(finite, rows, 0.0).float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    direction = torch.randn(rows.shape, generator=generator, device=rows.device)
    return torch.where(finite, direction * (math.sqrt(2) / norm), 0.0)
