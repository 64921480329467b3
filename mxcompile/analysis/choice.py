"""Which of the matmuls are to be quantized, what stays float on purpose, and what share of the bytes that covers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.fx import Node

from mxcompile.analysis.matmuls import Matmul, Refusal, find_matmuls
from mxcompile.errors import CoverageError, PipelineError, UnknownNameError
from mxcompile.formats import MXFormat
from mxcompile.graph.dataflow import destinations
from mxcompile.graph.name_patterns import last_match
from mxcompile.graph.program import Program, module_path, where
from mxcompile.graph.records import Miss

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


def override_formats(
    program: Program, choice: Choice, default: MXFormat, overrides: Mapping[str, MXFormat | None]
) -> tuple[Choice, dict[Node, MXFormat]]:
    """Leave in float what an override says, and the weight formats of all others, by matmul or embedding.

    Overrides count before what an earlier pass has chosen (`program.formats`), and that before the default.
    Raises UnknownNameError for a pattern that matches nothing that would be quantized, and PipelineError if readers of
    one weight would have it in different formats.
    """
    names: dict[Node, tuple[str, ...]] = {m.node: _names(program, m) for m in choice.matmuls}
    names |= {node: tuple(_embedding_names(program, node)) for node in choice.embeddings}
    matched = {node: last_match(overrides, known) for node, known in names.items()}
    _check_patterns(choice, overrides, [name for known in names.values() for name in known])
    weights = {m.node: m.parameter for m in choice.matmuls}
    weights |= {node: str(cast(Node, node.args[0]).target) for node in choice.embeddings}
    formats = {
        node: program.formats.get(weights[node], default) if pattern is None else overrides[pattern]
        for node, pattern in matched.items()
    }
    left = list(choice.left_float)
    for matmul in choice.matmuls:
        if formats[matmul.node] is None and not matmul.is_lowered:
            pattern = matched[matmul.node]
            reason = "left in float: " + ("chosen by a pass" if pattern is None else f"override {pattern}=none")
            left.append(Refusal(matmul.node, reason, _bytes(program, matmul)))
    by_weight: dict[str, set[MXFormat | None]] = {}
    for matmul in choice.matmuls:
        by_weight.setdefault(_names(program, matmul)[0], set()).add(formats[matmul.node])
    if mixed := [name for name, found in by_weight.items() if len(found) > 1]:
        raise PipelineError(f"overrides give {mixed[0]!r} two formats: match its name instead of its readers' modules")
    kept = tuple(m for m in choice.matmuls if m.is_lowered or formats[m.node] is not None)
    embeddings = tuple(node for node in choice.embeddings if formats[node] is not None)
    chosen = {node: fmt for node, fmt in formats.items() if fmt is not None}
    return replace(choice, matmuls=kept, embeddings=embeddings, left_float=tuple(left)), chosen


def _names(program: Program, matmul: Matmul) -> tuple[str, ...]:
    """What patterns are matched with: the weight's name and its module's path."""
    own = slot(program, matmul.parameter, matmul.node) or matmul.parameter
    return own.removesuffix("_elements") if matmul.is_lowered else own, matmul.module_path


def _check_patterns(choice: Choice, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if last_match([pattern], names) is not None:
            continue
        for refusal in (*choice.left_float, *choice.refusals):
            if last_match([pattern], [module_path(refusal.node)]):
                raise PipelineError(f"override {pattern!r}: {where(refusal.node)} stays float: {refusal.reason}")
        raise UnknownNameError("module or parameter pattern of an override", pattern, dict.fromkeys(names))


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
        if not isinstance(weight, Node) or weight.op != "get_attr" or not program.is_parameter(str(weight.target)):
            continue
        if program.selection.included(*_embedding_names(program, node)):
            yield node


def _embedding_names(program: Program, node: Node) -> list[str]:
    weight = str(cast(Node, node.args[0]).target)
    names = [module_path(node), *program.aliases.get(weight, (weight,))]
    return [name for name in names if name.startswith(module_path(node))]


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
