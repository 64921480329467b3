"""Score a Program with one number: KL divergence from the float program, or perplexity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mxcompile.calibration.run import Runner, run_outputs
from mxcompile.errors import InputError
from mxcompile.graph.agreement import output_tensors
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.numerics.metrics import kl_divergence, negative_log_likelihood, perplexity

_LOGITS = "logits"
_TOKENS = "input_ids"


class Score(Protocol):
    """A number for a program; smaller is better."""

    @property
    def name(self) -> str:
        """The name that is printed."""
        ...

    def __call__(self, runner: Runner, program: Program) -> float:
        """Score a program that the runner executes."""
        ...


@dataclass(frozen=True)
class KLDivergence:
    """Mean KL(float || program) in nats per position."""

    batches: Sequence[Inputs]
    float_logits: Sequence[Tensor]
    name: str = "KL"

    @classmethod
    def of(cls, program: Program, batches: Sequence[Inputs]) -> "KLDivergence":
        """Run a float program on the batches and keep its logits."""
        runner = Runner(program)
        return cls(batches, [_logits(runner, program, batch) for batch in batches])

    def __call__(self, runner: Runner, program: Program) -> float:
        """Run all batches."""
        pairs = zip(self.batches, self.float_logits, strict=True)
        sums = [kl_divergence(exact, _logits(runner, program, b)) * exact[..., 0].numel() for b, exact in pairs]
        return _inf_if_nan(sum(sums) / sum(logits[..., 0].numel() for logits in self.float_logits))


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every token except the first of each row."""

    batches: Sequence[Inputs]
    name: str = "perplexity"

    def __call__(self, runner: Runner, program: Program) -> float:
        """Run all batches."""
        total, count = 0.0, 0
        for batch in self.batches:
            tokens = _tokens(batch)
            logits = _logits(runner, program, batch)[:, :-1].flatten(0, 1)
            total += negative_log_likelihood(logits, tokens[:, 1:].flatten())
            count += tokens[:, 1:].numel()
        return perplexity(_inf_if_nan(total / max(count, 1)))


def _logits(runner: Runner, program: Program, batch: Inputs) -> Tensor:
    """`[..., vocabulary]`: the output called logits, or the only output."""
    outputs = output_tensors(run_outputs(runner, program, batch))
    if _LOGITS not in outputs and len(outputs) != 1:
        raise InputError(f"the model has no output {_LOGITS!r} to compare (it has {', '.join(outputs) or 'none'})")
    return outputs[_LOGITS] if _LOGITS in outputs else next(iter(outputs.values()))


def _tokens(batch: Inputs) -> Tensor:
    tokens = batch.kwargs.get(_TOKENS, batch.args[0] if batch.args else None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise InputError(f"perplexity needs token ids [batch, length] as {_TOKENS!r}: use a KL threshold instead")
    return tokens


def _inf_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
