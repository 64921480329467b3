"""Records of what a pass did: what it returns (`PassResult`), and what the pipeline makes of it (`PassRecord`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mxcompile.numerics.histogram import Distribution


@dataclass(frozen=True)
class Miss:
    """Something a pass looked at and left alone."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class PassResult:
    """What `Pass.run` returns.

    `numbers` holds measurements per layer, `{"model.layers.0.mlp.up_proj": {"weight_sqnr_db": 18.3}}`; `folds` the
    steps of a pass that keeps the function, so that one which does not can be found.
    """

    rewrites: int
    misses: tuple[Miss, ...] = ()
    numbers: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    folds: "tuple[Fold, ...]" = ()


@dataclass(frozen=True)
class Fold:
    """A rewrite that keeps the function: what it is about, and how to do it to another Program in that state."""

    where: str
    apply: Callable[[Any], None]


@dataclass(frozen=True)
class LayerNumbers:
    """A layer after a pass, against the float model; numbers are None where they could not be measured.

    weight, activation: formats that its weight is in and that its input is rounded to; None: float.
    weight_db: SQNR of its weight. local_db: of its output on the float model's own input, so the error that it makes by
        itself. accumulated_db: of its output on the way through the quantized model.
    output_error: ||y' - y|| / ||y|| of the latter.
    """

    weight: str | None
    activation: str | None
    weight_db: float | None
    local_db: float | None
    accumulated_db: float | None
    output_error: float | None


@dataclass(frozen=True)
class Measured:
    """The model after a pass, against the float model, on a probe.

    output_db: SQNR of its outputs, the least. kl, top1: mean KL(float || now) in nats and share of positions with the
    same largest entry, of the output called logits; None without one. layers: by the names of their weights.
    distributions: likewise; too many for the ledger's file, they have one of their own.
    """

    output_db: float
    kl: float | None
    top1: float | None
    layers: dict[str, LayerNumbers]
    distributions: dict[str, Distribution] = field(default_factory=dict[str, Distribution])


@dataclass(frozen=True)
class PassRecord:
    """A pass that ran. `spec` is the pass with its options, as in a pipeline.

    preserved_db: for a pass that keeps the function, how well the outputs before and after it agree.
    bytes: of all tensors that the graph reads afterwards. measured: None if nothing was.
    """

    name: str
    spec: str
    rewrites: int
    misses: tuple[Miss, ...]
    seconds: float
    numbers: dict[str, dict[str, float]]
    preserved_db: float | None = None
    bytes: int = 0
    measured: Measured | None = None
