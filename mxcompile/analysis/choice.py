"""Which of the matmuls are to be quantized, what stays float on purpose, and what share of the bytes that covers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from mxcompile.analysis.dataflow import destinations
from mxcompile.analysis.matmuls import Matmul, Refusal, find_matmuls
from mxcompile.errors import CoverageError
from mxcompile.ledger import Miss
from mxcompile.program import Program, module_path, where

_MINIMUM_COVERAGE = 0.5
_LISTED = 12
_EMBEDDING = torch.ops.aten.embedding.default


@dataclass(frozen=True)
class Choice:
    """What a Selection comes to on a graph.

    matmuls, embeddings: to be quantized (embeddings only when asked for by name). refusals: wanted, but impossible.
    left_float: not wanted (excluded, or the output head).
    """

    matmuls: tuple[Matmul, ...]
    embeddings: tuple[Node, ...]
    refusals: tuple[Refusal, ...]
    left_float: tuple[Refusal, ...]

    @property
    def misses(self) -> tuple[Miss, ...]:
        """Everything that stays float, with reasons."""
        return tuple(Miss(where(r.node), r.reason) for r in (*self.refusals, *self.left_float))

    def left_to_lowering(self, matmul: Matmul) -> Miss:
        """Why a pass that rounds weights in place leaves one that is not alone."""
        return Miss(where(matmul.node), "its weight is read elsewhere too: lower-mx rounds a copy")

    def alone(self, matmul: Matmul) -> bool:
        """True if nothing but chosen matmuls computes with the weight."""
        return destinations(matmul.root) <= {m.node for m in self.matmuls}


def choose(program: Program) -> Choice:
    """Apply the Program's Selection to its matmuls."""
    found, refusals = find_matmuls(program)
    chosen: list[Matmul] = []
    left: list[Refusal] = []
    for matmul in found:
        reason = None if matmul.is_lowered else _why_float(program, matmul)
        if reason is None:
            chosen.append(matmul)
        else:
            left.append(Refusal(matmul.node, reason, _bytes(program, matmul)))
    return Choice(tuple(chosen), tuple(_embeddings(program)), tuple(refusals), tuple(left))


def refuse_inseparable(program: Program, choice: Choice) -> Choice:
    """Refuse matmuls whose weight something else must go on reading in float through the same name.

    A tied parameter has a name in each module that holds it, so its uses can be told apart; one name cannot stand for
    a float tensor and an MX one.
    """
    lowered = {m.node for m in choice.matmuls} | set(choice.embeddings)
    kept: list[Matmul] = []
    refusals = list(choice.refusals)
    for matmul in choice.matmuls:
        others = destinations(matmul.root) - lowered
        own = slot(program, matmul.parameter, matmul.node)
        same = {other for other in others if slot(program, matmul.parameter, other) in (None, own)}
        if not others or (own and not same and not _shares_reader(matmul, lowered)):
            kept.append(matmul)
            continue
        readers = ", ".join(sorted(f"{other.target} ({where(other)})" for other in others))
        reason = f"its weight {matmul.parameter!r} is also read, in float and by the same name, by {readers}"
        refusals.append(Refusal(matmul.node, reason, _bytes(program, matmul)))
    return replace(choice, matmuls=tuple(kept), refusals=tuple(refusals))


def check_coverage(program: Program, choice: Choice) -> None:
    """Raise CoverageError if less than half of the matmul weight bytes that were wanted will be quantized."""
    covered = sum({m.parameter: _bytes(program, m) for m in choice.matmuls}.values())
    missed = sum(r.bytes for r in choice.refusals)
    enough = covered > 0 and covered >= _MINIMUM_COVERAGE * (covered + missed)
    if enough or program.selection.allow_partial:
        return
    share = covered / (covered + missed) if covered + missed else 0.0
    reasons = [f"  {miss}" for miss in choice.misses] or ["  the graph has no matmul by a weight"]
    listed = reasons[:_LISTED] + ([f"  ... and {len(reasons) - _LISTED} more"] if len(reasons) > _LISTED else [])
    raise CoverageError(
        f"only {share:.0%} of the matmul weight bytes would be quantized ({len(choice.matmuls)} matmuls). "
        "Left in float:\n" + "\n".join(listed) + "\nPass allow_partial=True to go on all the same."
    )


def _why_float(program: Program, matmul: Matmul) -> str | None:
    names = (slot(program, matmul.parameter, matmul.node) or matmul.parameter, matmul.module_path)
    if program.selection.included(*names):
        return None
    if program.selection.excluded(*names):
        return "left in float: excluded"
    if matmul.parameter in program.output_heads or _read_by_embedding(matmul.root):
        return f"the output head stays float; ask for it with include={[matmul.module_path]}"
    return None


def _read_by_embedding(weight: Node) -> bool:
    return any(user.target is _EMBEDDING for user in weight.users)


def _embeddings(program: Program) -> Iterator[Node]:
    """Lookups in a parameter that `include` asks for."""
    for node in program.graph.nodes:
        weight = node.args[0] if node.target is _EMBEDDING else None
        if isinstance(weight, Node) and weight.op == "get_attr" and program.is_parameter(str(weight.target)):
            names = [module_path(node), *program.aliases.get(str(weight.target), (str(weight.target),))]
            own = [name for name in names if name.startswith(module_path(node))]
            if program.selection.included(*own):
                yield node


def _shares_reader(matmul: Matmul, lowered: set[Node]) -> bool:
    """True if the weight's transpose, on the way to this matmul, is read in float by something else."""
    return matmul.reader is not matmul.node and bool(destinations(matmul.reader) - lowered)


def slot(program: Program, parameter: str, reader: Node) -> str | None:
    """The name under which the reader's own module holds a tied parameter; None if it is not tied or not held there."""
    owners = {name.rpartition(".")[0]: name for name in program.aliases.get(parameter, ())}
    return owners.get(module_path(reader))


def _bytes(program: Program, matmul: Matmul) -> int:
    tensor = program.tensor(matmul.parameter)
    return tensor.numel() * tensor.element_size()
