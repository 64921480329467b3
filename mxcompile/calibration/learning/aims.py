"""What a model is trained to minimize: the distance from the float model's predictions, or losses inside the model."""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor
from torch.fx import Node

from mxcompile.analysis.choice import choose
from mxcompile.calibration.compared_outputs import ComparedOutputs, output_nodes
from mxcompile.calibration.learning import inner_terms
from mxcompile.calibration.learning.inner_terms import InnerTerm
from mxcompile.calibration.learning.losses import capped_error
from mxcompile.errors import PassError
from mxcompile.graph.program import Program


class Compared(Enum):
    """What is compared.

    kl: the predictions of the two models. ce: the predictions with the next tokens of the data (a chat model forgets
    its tuning that way). block: what each segment of the two models returns. distribution: the mean and variance of
    each channel of that.
    """

    KL = "kl"
    CE = "ce"
    BLOCK = "block"
    DISTRIBUTION = "distribution"

    @property
    def inner(self) -> inner_terms.Loss | None:
        """The loss of what segments return, None for predictions."""
        distances = {Compared.BLOCK: capped_error, Compared.DISTRIBUTION: inner_terms.distribution_distance}
        return distances.get(self)


@dataclass(frozen=True)
class Aims:
    """What training minimizes, summed. predictions: the distance from the teacher's outputs. terms: losses inside.

    tokens: the input of the teacher whose next tokens a term predicts (`NEXT_TOKENS`), if any.
    """

    predictions: bool = True
    terms: tuple[InnerTerm, ...] = ()
    tokens: Node | None = None

    @property
    def student_nodes(self) -> dict[str, Node]:
        """The student's values that the terms read, by name."""
        return {name: node for term in self.terms for name, node in term.nodes.items()}

    @property
    def exact_nodes(self) -> dict[str, Node]:
        """Those of the teacher."""
        return {name: node for term in self.terms for name, node in term.exact.items()}


def aims_of(program: Program, compared: Compared, attention: float, kurtosis: float) -> Aims:
    """The aims of a program in a pipeline. attention, kurtosis: weights of these terms.

    Raises PassError if there is nothing of that kind in the model.
    """
    exact, matmuls = program.origin, choose(program).matmuls
    if exact is None:
        return Aims()
    terms, tokens = list[InnerTerm](), None
    if compared is Compared.CE:
        term, tokens = _next_tokens(program, exact)
        terms.append(term)
    elif (loss := compared.inner) is not None:
        terms.append(inner_terms.block_term(program, exact, matmuls, loss))
    if attention:
        term = inner_terms.attention_term(program, exact, matmuls, attention)
        if not term.nodes:
            raise PassError("attention: no layer that multiplies what an attention returns was found: take attention=0")
        terms.append(term)
    if kurtosis:
        terms.append(inner_terms.kurtosis_term(matmuls, kurtosis, program.output_heads))
    return Aims(compared is Compared.KL, tuple(term for term in terms if term.nodes), tokens)


def _next_tokens(program: Program, exact: Program) -> tuple[InnerTerm, Node]:
    outputs = ComparedOutputs(exact)
    for name, node in outputs.nodes.items():
        shape: Tensor = node.meta["val"]
        tokens = inner_terms.token_input(exact, node) if outputs.is_logits(shape.shape) else None
        if tokens is not None:
            return inner_terms.next_token_term(output_nodes(program)[name]), tokens
    raise PassError(
        "loss=ce predicts the next tokens of an input of token ids, and the model has no such: take loss=kl"
    )
