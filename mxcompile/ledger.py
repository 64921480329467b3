"""What each pass did: rewrites, misses with reasons, seconds, and the numbers it measured per layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


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
class PassRecord:
    """One line of a Program's ledger: a pass that ran. `spec` is the pass with its options, as in a pipeline.

    preserved_db: for a pass that keeps the function, how well the outputs before and after it agree.
    """

    name: str
    spec: str
    rewrites: int
    misses: tuple[Miss, ...]
    seconds: float
    numbers: dict[str, dict[str, float]]
    preserved_db: float | None = None
