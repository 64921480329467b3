"""Score a Program with one number: KL divergence from the float program, or perplexity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.fx import Node

from mxcompile.calibration.runs.run import BoundBatch, Runner, run_outputs, visible_batches, visible_outputs
from mxcompile.errors import InputError
from mxcompile.graph.agreement import output_tensors
from mxcompile.graph.binding import bind_inputs
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
    """Mean KL(float || program) in nats per position that no mask hides."""

    batches: Sequence[Inputs]
    float_logits: Sequence[Tensor]
    name: str = "KL"

    @classmethod
    def of(cls, program: Program, batches: Sequence[Inputs]) -> "KLDivergence":
        """Run a float program on the batches and keep its logits."""
        runner, batches = Runner(program), visible_batches(program, batches, "probe")
        return cls(batches, [_logits(runner, program, batch) for batch in batches])

    def __call__(self, runner: Runner, program: Program) -> float:
        """Run all batches."""
        pairs = zip(self.batches, self.float_logits, strict=True)
        sums = [kl_divergence(exact, _logits(runner, program, b)) * exact[..., 0].numel() for b, exact in pairs]
        return _inf_if_nan(sum(sums) / sum(logits[..., 0].numel() for logits in self.float_logits))


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every token except the first of each row.

    Where a mask hides tokens: of every visible token behind a visible one.
    """

    batches: Sequence[Inputs]
    name: str = "perplexity"

    def __call__(self, runner: Runner, program: Program) -> float:
        """Run all batches."""
        total, count = 0.0, 0
        for batch in self.batches:
            tokens = _tokens(batch)
            bound = BoundBatch.of(program, bind_inputs(program, batch))
            logits = _named_logits(output_tensors(run_outputs(runner, program, bound)))[:, :-1]
            visible = bound.visibility.elements(_tokens_node(program), tokens)
            predicted = visible[:, 1:] & visible[:, :-1]
            total += negative_log_likelihood(logits[predicted], tokens[:, 1:][predicted])
            count += int(predicted.sum())
        if count == 0:
            raise InputError(
                "perplexity needs a token that another one precedes: every row has one visible token at most"
            )
        return perplexity(_inf_if_nan(total / count))


def _logits(runner: Runner, program: Program, batch: Inputs) -> Tensor:
    """Visible rows of the logits, `[..., vocabulary]`."""
    return _named_logits(visible_outputs(runner, program, batch))


def _named_logits(outputs: dict[str, Tensor]) -> Tensor:
    """The output called logits, or the only output."""
    if _LOGITS not in outputs and len(outputs) != 1:
        raise InputError(f"the model has no output {_LOGITS!r} to compare (it has {', '.join(outputs) or 'none'})")
    return outputs[_LOGITS] if _LOGITS in outputs else next(iter(outputs.values()))


def _tokens_node(program: Program) -> Node:
    placeholders = program.graph.find_nodes(op="placeholder")
    return next((node for node in placeholders if node.target == _TOKENS), placeholders[0])


def _tokens(batch: Inputs) -> Tensor:
    tokens = batch.kwargs.get(_TOKENS, batch.args[0] if batch.args else None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise InputError(f"perplexity needs token ids [batch, length] as {_TOKENS!r}: use a KL threshold instead")
    return tokens


def _inf_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
