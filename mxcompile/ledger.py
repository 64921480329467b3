"""What each pass did: rewrites, misses with reasons, seconds, and the numbers it measured per layer."""

from dataclasses import dataclass, field


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

    `numbers` holds measurements per layer, `{"model.layers.0.mlp.up_proj": {"weight_sqnr_db": 18.3}}`.
    """

    rewrites: int
    misses: tuple[Miss, ...] = ()
    numbers: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])


@dataclass(frozen=True)
class PassRecord:
    """One line of a Program's ledger: a pass that ran. `spec` is the pass with its options, as in a pipeline."""

    name: str
    spec: str
    rewrites: int
    misses: tuple[Miss, ...]
    seconds: float
    numbers: dict[str, dict[str, float]]
