"""Records of what a pass did: what the pass returns (`PassResult`), and what the ledger holds (`PassRecord`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mxcompile.numerics.histogram import HistogramChange


@dataclass(frozen=True)
class Miss:
    """A node or layer that a pass skipped, and the reason. bytes: of the tensors that stay float because of it."""

    where: str
    reason: str
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class ItemFormat:
    """The format chosen for weights that get one together (`analysis/format_items.py`), as text; None: float.

    weights: their names. bytes: theirs in a file. cost: its estimated cost, in nats of KL a token. costs: what each
    format would cost. fixed: an override or an earlier pass has given the format, and there are no costs.
    """

    weights: tuple[str, ...]
    format: str | None
    activation: str | None
    bytes: int
    cost: float | None = None
    costs: dict[str, float] = field(default_factory=dict[str, float])
    fixed: bool = False


@dataclass(frozen=True)
class Allocation:
    """Formats chosen under a budget.

    score: how costs were estimated. rounding: of weights, as costs see it. solver: how the choice was made. limit: the
    budget, in words. bits: stored bits a weight of all items, with scales. microseconds: of all matmuls, None without a
    budget of time. kl: the sum of the costs. price: KL in nats that one more `unit` would save, a bit a weight or a
    microsecond.
    """

    score: str
    solver: str
    limit: str
    bits: float
    kl: float
    price: float
    items: tuple[ItemFormat, ...]
    unit: str = "bit"
    microseconds: float | None = None
    rounding: str = "to nearest"


@dataclass(frozen=True)
class LossCurve:
    """How a loss went while a pass trained.

    training: (step, loss of that step's batches). held_out: (step, mean loss of batches that are not trained on), step
    0 before training.
    """

    training: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, content: Mapping[str, Sequence[tuple[int, float]]]) -> "LossCurve":
        """What JSON has made of a curve."""
        return cls(**{key: tuple((int(step), float(loss)) for step, loss in value) for key, value in content.items()})


@dataclass(frozen=True)
class PassResult:
    """What `Pass.run` returns.

    numbers: measurements of each layer, `{"model.layers.0.mlp.up_proj": {"weight_sqnr_db": 18.3}}`. folds: the steps
    that preserve the function; if the outputs do not agree, they are replayed one by one to find the cause, and
    measurements compare each layer with the float model after the same folds.
    expert_tokens: calibration tokens of each expert, by the names of the experts' weights, where the pass counts them.
    allocation: the formats that a pass has chosen under a budget. curves: of a pass that trains, by what was trained.
    """

    rewrites: int
    misses: tuple[Miss, ...] = ()
    numbers: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    folds: "tuple[Fold, ...]" = ()
    expert_tokens: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    allocation: Allocation | None = None
    curves: dict[str, LossCurve] = field(default_factory=dict[str, LossCurve])


@dataclass(frozen=True)
class Fold:
    """A rewrite that preserves the function. where: what it rewrites. apply: does the same to a copy of the Program."""

    where: str
    apply: Callable[[Any], None]


@dataclass(frozen=True)
class LayerMeasurements:
    """A layer after a pass, compared with the float model. A number is None where it could not be measured.

    weight, activation: formats of its weight and its rounded input; None: float.
    weight_db: SQNR of its weight. local_db: SQNR of its output on the float model's input, that is, its own error.
    accumulated_db: SQNR of its output within the quantized model; None also where the model selects the layer's tokens
    (experts), which may be others after the pass. output_error: ||y' - y|| / ||y|| of the latter.
    """

    weight: str | None
    activation: str | None
    weight_db: float | None
    local_db: float | None
    accumulated_db: float | None
    output_error: float | None


@dataclass(frozen=True)
class ModelMeasurements:
    """The model after a pass, compared with the float model on probe inputs.

    output_db: lowest SQNR of its outputs. kl, top1: of the output called `logits`, mean KL(float || now) in nats and
    share of positions with the same argmax; None without that output. layers: by the names of their weights.
    distributions: likewise; they are large, so they have a file of their own beside the ledger.
    """

    output_db: float
    kl: float | None
    top1: float | None
    layers: dict[str, LayerMeasurements]
    distributions: dict[str, HistogramChange] = field(default_factory=dict[str, HistogramChange])


@dataclass(frozen=True)
class PassRecord:
    """A pass that ran. spec: the pass with its options, in a pipeline's text form.

    preserved_db: for a pass that preserves the function, SQNR of the outputs after it with respect to those before.
    bytes: of all tensors that the graph reads after it. measured: None if no measurement was made. expert_tokens,
    allocation, curves: as in `PassResult`.
    """

    name: str
    spec: str
    rewrites: int
    misses: tuple[Miss, ...]
    seconds: float
    numbers: dict[str, dict[str, float]]
    preserved_db: float | None = None
    bytes: int = 0
    measured: ModelMeasurements | None = None
    expert_tokens: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    allocation: Allocation | None = None
    curves: dict[str, LossCurve] = field(default_factory=dict[str, LossCurve])
