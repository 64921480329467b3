"""Choose a format for every weight: the least KL divergence under a budget of bits, bytes or time.

    q, k, v in mxint8; gate, up in mxint4; ...        written to `program.formats`, which later passes obey

Half a bit a weight, given to the layers that need it, is worth more than a better rounding. What a format costs is
estimated for every item (`format_items.py`) in nats of KL a token: with errors that are small and independent the costs
add up (HIGGS, Malinovskii et al., arXiv 2411.17525), and the best choice is a knapsack (`budget.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Annotated, Final

from torch import Tensor

from mxcompile.analysis.budget import choose_under_budget
from mxcompile.analysis.format_items import FormatItem, find_items
from mxcompile.calibration.data.random_tokens import random_batches
from mxcompile.calibration.finished_parts import load_part, save_part
from mxcompile.calibration.format_costs.budgets import Budgets, Latency
from mxcompile.calibration.format_costs.divergence import kl_costs, noise_costs
from mxcompile.calibration.format_costs.fisher import fisher_costs
from mxcompile.calibration.format_costs.gptq_errors import FormatRounding
from mxcompile.calibration.format_costs.pairs import FormatPair, item_records
from mxcompile.calibration.runs.run import visible_batches
from mxcompile.errors import PipelineError
from mxcompile.formats import MXFormat
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.name_patterns import Overrides
from mxcompile.graph.program import Program, where
from mxcompile.graph.records import Allocation, Miss, PassResult
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.options import Range


class FormatScore(Enum):
    """How the cost of a format is estimated: see `fisher.py` and `divergence.py`."""

    FISHER = "fisher"
    NOISE = "noise"
    KL = "kl"


_COSTS: Final = {FormatScore.FISHER: fisher_costs, FormatScore.NOISE: noise_costs, FormatScore.KL: kl_costs}


@dataclass(frozen=True)
class Allocate(Pass):
    """formats: to choose from, `[mxint4,mxint6,mxint8]`; none is float. Blocks may differ: `[mxint4:128,mxint4]`.

    bits: the budget, in stored bits a weight, scales included; or bytes: in all. It counts the weights that are
        quantized: neither the output head and embeddings, nor what is excluded or kept in float.
    latency, microseconds: another budget, or the only one: the time of all these matmuls at one token (decode) or 2048
        (prefill), from times that were measured on the GPU where the model is, or on `gpu` (sm90).
    score: fisher needs a forward and a backward pass over the data; kl, which is exact for each item alone, a forward
        for each item and format; noise no data: it runs on random tokens, and sees the errors of weights alone.
    rounding: how weights will be rounded, as costs are estimated (gptq: by fisher alone).
    joined: q, k and v, and gate and up, get one format, so that one launch multiplies them; false: each weight its own.
    activation: the format of inputs at run time. activations: one for each of `formats`, so that some weights have
        inputs of more bits than others; then formats may repeat. windows: how many rows of the batches are used.
    overrides: formats by name pattern that are not to be chosen; none keeps a weight in float.

    Weights that an earlier pass has given a format keep it, and count.
    """

    formats: tuple[MXFormat | None, ...]
    bits: Annotated[float | None, Range(0, above=True)] = None
    bytes: Annotated[int | None, Range(1)] = None
    latency: Latency | None = None
    microseconds: Annotated[float | None, Range(0, above=True)] = None
    gpu: str | None = None
    score: FormatScore = FormatScore.FISHER
    activation: MXFormat | None = None
    activations: tuple[MXFormat | None, ...] = ()
    windows: Annotated[int, Range(1)] = 16
    rounding: FormatRounding = FormatRounding.NEAREST
    joined: bool = True
    overrides: Mapping[str, MXFormat | None] = Overrides()

    name = "allocate"
    preserves_function = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.latency is None) != (self.microseconds is None) or (self.gpu is not None and self.latency is None):
            raise PipelineError("allocate{latency=decode} and microseconds=... go together, gpu=... with them")
        stored = [budget for budget in (self.bits, self.bytes) if budget is not None]
        if len(stored) > 1 or (not stored and self.latency is None):
            raise PipelineError("allocate needs one budget: bits=... (stored bits a weight) or bytes=..., or a latency")
        if self.activations and (len(self.activations) != len(self.formats) or self.activation is not None):
            raise PipelineError(
                "allocate{activations=[...]} has one entry for each of formats, and no activation beside"
            )
        if self.activations and self.score is FormatScore.NOISE:
            raise PipelineError("allocate{score=noise} does not see the errors of inputs: use fisher with activations")
        if self.rounding is FormatRounding.GPTQ and self.score is not FormatScore.FISHER:
            raise PipelineError("allocate{rounding=gptq} needs score=fisher: other scores round to nearest")
        if self.activations and not self.joined:
            raise PipelineError("allocate{joined=false} would give one value inputs of several formats: no activations")
        if not any(self.formats) or len(set(self.pairs)) < len(self.formats):
            raise PipelineError("allocate{formats=[...]} lists different formats, at least one of them MX")

    @property
    def reads_calibration(self) -> bool:
        """False for noise, which runs on random tokens."""
        return self.score is not FormatScore.NOISE

    @property
    def pairs(self) -> tuple[FormatPair, ...]:
        """The formats to choose from, with those of inputs; a float weight has a float input."""
        activations = self.activations or (self.activation,) * len(self.formats)
        pairs = zip(self.formats, activations, strict=True)
        return tuple(FormatPair(fmt, None if fmt is None else activation) for fmt, activation in pairs)

    def run(self, program: Program) -> PassResult:
        """Estimate the costs of all items, choose, and write the choice to `program.formats`."""
        first = next(fmt for fmt in self.formats if fmt is not None)
        items = find_items(program, first, self.overrides, joined=self.joined)
        budgets = Budgets(self.bits, self.bytes, self.microseconds, self.latency, self.gpu)
        misses = [*items.choice.misses, *budgets.misses(items)]
        limits = budgets.limits(program, items, self.formats)
        before = dict(program.formats)
        program.formats |= {name: fmt for item, fmt in items.fixed for name in item.weights}
        allocation = None
        if items.free:
            costs = self._costs(program, items.free)
            unseen = costs.isnan().any(-1).tolist()
            misses += [_unseen(item) for item, is_unseen in zip(items.free, unseen, strict=True) if is_unseen]
            choice = choose_under_budget(costs.nan_to_num(0.0), limits)
            pairs = [self.pairs[option] for option in choice.options]
            for item, pair in zip(items.free, pairs, strict=True):
                program.formats |= dict.fromkeys(item.weights, pair.weight)
                program.input_formats |= dict.fromkeys(item.weights, pair.activation) if self.activations else {}
            rows = item_records(program, items, pairs, self.pairs, costs.nan_to_num(0.0), self.activation)
            chosen = [(item, pair.weight) for item, pair in zip(items.free, pairs, strict=True)]
            stored = sum(item.stored_bytes(fmt) for item, fmt in chosen) + items.fixed_bytes
            price = choice.prices[0] * (items.values / 8 if budgets.unit == "bit" else 1)
            numbers = stored * 8 / items.values, choice.cost, price
            time = budgets.microseconds_of(program, [*chosen, *items.fixed])
            score = self.score.value
            by = "by gptq" if self.rounding is FormatRounding.GPTQ else "to nearest"
            allocation = Allocation(score, choice.solver, budgets.text, *numbers, rows, budgets.unit, time, by)
        new = [n for n, fmt in program.formats.items() if n not in before or before[n] != fmt]
        return PassResult(len(new), tuple(misses), allocation=allocation)

    def _costs(self, program: Program, items: Sequence[FormatItem]) -> Tensor:
        """Costs `[items, formats]`; an interrupted run's are loaded."""
        saved = load_part(program, "costs")
        if saved is not None:
            return saved[0]["costs"]
        estimate = partial(fisher_costs, gptq=True) if self.rounding is FormatRounding.GPTQ else _COSTS[self.score]
        costs = estimate(program, items, self.pairs, self._batches(program))
        save_part(program, "costs", {"costs": costs})
        return costs

    def _batches(self, program: Program) -> tuple[Inputs, ...]:
        """The first batches, with about as many rows as `windows` says."""
        rows = [max((t.shape[0] for t in batch.tensors() if t.dim()), default=1) for batch in program.batches]
        if self.score is FormatScore.NOISE:
            return random_batches(program, max(1, self.windows // rows[0]))
        count = next((i for i in range(1, len(rows)) if sum(rows[:i]) >= self.windows), len(rows))
        return visible_batches(program, program.batches[:count])


def _unseen(item: FormatItem) -> Miss:
    return Miss(where(item.matmuls[0].node), "no output depends on it in the data: it gets the smallest format")
