"""How far a Program has gone from the float one, as one number: KL divergence or perplexity of its logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mxcompile.calibration.run import Runner, run_outputs
from mxcompile.errors import InputError
from mxcompile.graph.agreement import output_tensors
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.numerics.metrics import kl_divergence

_LOGITS = "logits"
_TOKENS = "input_ids"


class Score(Protocol):
    """A number that is smaller for a better program."""

    @property
    def name(self) -> str:
        """As it is printed."""
        ...

    def __call__(self, runner: Runner, program: Program) -> float:
        """Of the program as the runner computes it."""
        ...


@dataclass(frozen=True)
class Divergence:
    """Mean KL(float || program) in nats a position."""

    batches: Sequence[Inputs]
    wanted: Sequence[Tensor]
    name: str = "KL"

    @classmethod
    def of(cls, program: Program, batches: Sequence[Inputs]) -> "Divergence":
        """From a float program; its logits are kept."""
        runner = Runner(program)
        return cls(batches, [_logits(runner, program, batch) for batch in batches])

    def __call__(self, runner: Runner, program: Program) -> float:
        """Run all batches."""
        pairs = zip(self.batches, self.wanted, strict=True)
        sums = [kl_divergence(w, _logits(runner, program, b)) * w[..., 0].numel() for b, w in pairs]
        return _bad_if_nan(sum(sums) / sum(wanted[..., 0].numel() for wanted in self.wanted))


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every token but the first of a window."""

    batches: Sequence[Inputs]
    name: str = "perplexity"

    def __call__(self, runner: Runner, program: Program) -> float:
        """Run all batches."""
        total, count = 0.0, 0
        for batch in self.batches:
            tokens = _tokens(batch)
            logits = _logits(runner, program, batch)[:, :-1].flatten(0, 1).float()
            total += torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").item()
            count += tokens[:, 1:].numel()
        mean = _bad_if_nan(total / max(count, 1))
        return math.exp(mean) if mean < 700 else math.inf


def _logits(runner: Runner, program: Program, batch: Inputs) -> Tensor:
    """`[..., vocabulary]`: the output of that name, or the only one."""
    outputs = output_tensors(run_outputs(runner, program, batch))
    if _LOGITS not in outputs and len(outputs) != 1:
        raise InputError(f"the model has no output {_LOGITS!r} to compare (it has {', '.join(outputs) or 'none'})")
    return outputs[_LOGITS] if _LOGITS in outputs else next(iter(outputs.values()))


def _tokens(batch: Inputs) -> Tensor:
    tokens = batch.kwargs.get(_TOKENS, batch.args[0] if batch.args else None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise InputError(f"perplexity needs token ids [batch, length] as {_TOKENS!r}: give a threshold on KL instead")
    return tokens


def _bad_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
