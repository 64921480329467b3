"""Choose the matmuls to quantize: apply the user's name patterns and format overrides, and check the coverage."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch.fx import Node

from mxcompile.analysis.float_tensors import find_float_tensors
from mxcompile.analysis.matmuls import Matmul, UnquantizedNode, find_matmuls
from mxcompile.analysis.routers import find_routers
from mxcompile.analysis.tensor_reads import EMBEDDING
from mxcompile.arguments import checked
from mxcompile.errors import CoverageError, PipelineError, UnknownNameError
from mxcompile.formats import MXFormat
from mxcompile.graph.dataflow import effective_readers
from mxcompile.graph.name_patterns import last_match
from mxcompile.graph.program import Program, module_path, where
from mxcompile.graph.records import Miss

_MINIMUM_COVERAGE = 0.5
_LISTED = 12
_EXCLUDED = "left in float: excluded"


@dataclass(frozen=True)
class MatmulChoice:
    """The result of applying a Program's `Selection` to its graph.

    matmuls, embeddings: to be quantized (embeddings only if `include` names them). unsupported: would be quantized, but
    cannot be. skipped: stay in float on purpose (excluded, the output head, routers). others: read tensors that are no
    matmul weights (embeddings, position tables, masks).
    """

    matmuls: tuple[Matmul, ...]
    embeddings: tuple[Node, ...]
    unsupported: tuple[UnquantizedNode, ...]
    skipped: tuple[UnquantizedNode, ...]
    others: tuple[UnquantizedNode, ...]

    @property
    def misses(self) -> tuple[Miss, ...]:
        """Everything that stays in float, with reasons."""
        staying_float = (*self.unsupported, *self.skipped, *self.others)
        return tuple(Miss(where(each.node), each.reason, each.bytes) for each in staying_float)

    def shared_weight_miss(self, matmul: Matmul) -> Miss:
        """The miss of a pass that rounds weights in place, for a matmul that does not own its weight."""
        reason = "is one of several in a parameter" if matmul.is_one_of_several else "is read elsewhere too"
        return Miss(where(matmul.node), f"its weight {reason}: lower-mx rounds a copy")

    def replaces_weight(self, matmul: Matmul) -> bool:
        """True if only chosen matmuls compute with the parameter, so that its float values are not needed."""
        return effective_readers(matmul.root) <= {m.node for m in self.matmuls}

    def owns_weight(self, matmul: Matmul) -> bool:
        """True if moreover each reads all of it, so that it may be rounded in place."""
        return not matmul.is_one_of_several and self.replaces_weight(matmul)


@checked
def choose(program: Program) -> MatmulChoice:
    """Apply the Program's `Selection` to its matmuls."""
    matmuls, refused = find_matmuls(program)
    routers = find_routers(program, matmuls, refused)
    unsupported: list[UnquantizedNode] = []
    skipped: list[UnquantizedNode] = []
    for each in refused:
        names = (*each.weights, module_path(each.node))
        if program.selection.excluded(*names):
            skipped.append(replace(each, reason=_EXCLUDED))
        elif each.node in routers and not program.selection.included(*names):
            skipped.append(replace(each, reason=_why_router(routers[each.node])))
        else:
            unsupported.append(each)
    chosen: list[Matmul] = []
    for matmul in matmuls:
        reason = None if matmul.is_lowered else _why_float(program, matmul, routers.get(matmul.node))
        if reason is None:
            chosen.append(matmul)
        else:
            skipped.append(UnquantizedNode.of(program, matmul.node, reason, [matmul.parameter]))
    embeddings = tuple(_embeddings(program))
    others = find_float_tensors(program, matmuls, refused, embeddings)
    return MatmulChoice(tuple(chosen), embeddings, tuple(unsupported), tuple(skipped), tuple(others))


def override_formats(
    program: Program, choice: MatmulChoice, default: MXFormat, overrides: Mapping[str, MXFormat | None]
) -> tuple[MatmulChoice, dict[Node, MXFormat]]:
    """The choice without the matmuls that an override keeps in float, and the weight format of each of the others.

    The format is that of the last override that matches, else the one that an earlier pass has chosen
    (`program.formats`), else the default. Its keys are the nodes of matmuls and embeddings.
    Raises UnknownNameError for a pattern that matches nothing that would be quantized, and PipelineError if one weight
    would get different formats for different readers.
    """
    names: dict[Node, tuple[str, ...]] = {m.node: pattern_names(program, m) for m in choice.matmuls}
    names |= {node: tuple(_embedding_names(program, node)) for node in choice.embeddings}
    matched = {node: last_match(overrides, aliases) for node, aliases in names.items()}
    _check_patterns(choice, overrides, [name for aliases in names.values() for name in aliases])
    weights = {m.node: m.parameter for m in choice.matmuls}
    weights |= {node: str(cast(Node, node.args[0]).target) for node in choice.embeddings}
    formats = {
        node: program.formats.get(weights[node], default) if pattern is None else overrides[pattern]
        for node, pattern in matched.items()
    }
    skipped = list(choice.skipped)
    for matmul in choice.matmuls:
        if formats[matmul.node] is None and not matmul.is_lowered:
            pattern = matched[matmul.node]
            reason = "left in float: " + ("chosen by a pass" if pattern is None else f"override {pattern}=none")
            skipped.append(UnquantizedNode.of(program, matmul.node, reason, [matmul.parameter]))
    by_weight: dict[str, set[MXFormat | None]] = {}
    for matmul in choice.matmuls:
        by_weight.setdefault(pattern_names(program, matmul)[0], set()).add(formats[matmul.node])
    if mixed := [name for name, weight_formats in by_weight.items() if len(weight_formats) > 1]:
        raise PipelineError(f"overrides give {mixed[0]!r} two formats: match its name instead of its readers' modules")
    kept = tuple(m for m in choice.matmuls if m.is_lowered or formats[m.node] is not None)
    embeddings = tuple(node for node in choice.embeddings if formats[node] is not None)
    chosen = {node: fmt for node, fmt in formats.items() if fmt is not None}
    return replace(choice, matmuls=kept, embeddings=embeddings, skipped=tuple(skipped)), chosen


def pattern_names(program: Program, matmul: Matmul) -> tuple[str, ...]:
    """The names that patterns are matched against: the weight's name and its module's path."""
    return name_in_module(program, matmul.name, matmul.node) or matmul.name, matmul.module_path


def _check_patterns(choice: MatmulChoice, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if last_match([pattern], names) is not None:
            continue
        for unquantized in (*choice.skipped, *choice.unsupported, *choice.others):
            if last_match([pattern], [module_path(unquantized.node)]):
                raise PipelineError(
                    f"override {pattern!r}: {where(unquantized.node)} stays in float: {unquantized.reason}"
                )
        raise UnknownNameError("module or parameter pattern of an override", pattern, dict.fromkeys(names))


def exclude_shared_weights(program: Program, choice: MatmulChoice) -> MatmulChoice:
    """Move matmuls and lookups to `unsupported` whose weight another node reads or writes in float by the same name.

    One name cannot stand for both a float tensor and an MX weight. A tied parameter has a name in each module that
    holds it, so its uses can be told apart.
    """
    lowered = {m.node for m in choice.matmuls} | set(choice.embeddings)
    readers = [(m.node, m.root, m.parameter, m.reader) for m in choice.matmuls]
    tables = [(node, cast(Node, node.args[0])) for node in choice.embeddings]
    readers += [(node, table, str(table.target), node) for node, table in tables]
    shared: dict[Node, UnquantizedNode] = {}
    for node, root, name, first in readers:
        others = effective_readers(root) - lowered
        own = name_in_module(program, name, node)
        same = {other for other in others if name_in_module(program, name, other) in (None, own)}
        by_transpose = first is not node and bool(effective_readers(first) - lowered)
        if others and not (own and not same and not by_transpose):
            listed = ", ".join(sorted(f"{other.target} ({where(other)})" for other in others))
            reason = f"its weight {name!r} is also read, in float and by the same name, by {listed}"
            shared[node] = UnquantizedNode.of(program, node, reason, [name])
    matmuls = tuple(m for m in choice.matmuls if m.node not in shared)
    embeddings = tuple(node for node in choice.embeddings if node not in shared)
    return replace(choice, matmuls=matmuls, embeddings=embeddings, unsupported=(*choice.unsupported, *shared.values()))


def check_coverage(program: Program, choice: MatmulChoice) -> None:
    """Raise CoverageError if less than half of the matmul weight bytes that are not skipped will be quantized."""
    quantized = {matmul.parameter for matmul in choice.matmuls}
    floats = {name for each in choice.unsupported for name in each.weights} - quantized
    covered, missed = (sum(map(program.tensor_bytes, names)) for names in (quantized, floats))
    enough = covered > 0 and covered >= _MINIMUM_COVERAGE * (covered + missed)
    if enough or program.selection.allow_partial:
        return
    share = covered / (covered + missed) if covered + missed else 0.0
    largest_first = replace(choice, unsupported=tuple(sorted(choice.unsupported, key=lambda each: -each.bytes)))
    reasons = [f"  {miss}" for miss in largest_first.misses] or ["  the graph has no matmul by a weight"]
    listed = reasons[:_LISTED] + ([f"  ... and {len(reasons) - _LISTED} more"] if len(reasons) > _LISTED else [])
    raise CoverageError(
        f"only {share:.0%} of the matmul weight bytes would be quantized ({len(choice.matmuls)} matmuls). "
        "Kept in float:\n" + "\n".join(listed) + "\nPass allow_partial=True to quantize anyway."
    )


def head_paths(program: Program) -> list[str]:
    """The module paths of the matmuls that make the output: by `lm_head`, or by the embedding."""
    matmuls = find_matmuls(program)[0]
    return list(dict.fromkeys(matmul.module_path for matmul in matmuls if _is_head(program, matmul)))


def _is_head(program: Program, matmul: Matmul) -> bool:
    return matmul.parameter in program.output_heads or _read_by_embedding(matmul.root)


def _why_float(program: Program, matmul: Matmul, chosen_for: Node | None) -> str | None:
    """The reason, None for a matmul to quantize. chosen_for: of a router, the first node that its choice reaches."""
    names = (name_in_module(program, matmul.parameter, matmul.node) or matmul.parameter, matmul.module_path)
    if program.selection.included(*names):
        return None
    if program.selection.excluded(*names):
        return _EXCLUDED
    if _is_head(program, matmul):
        return f"the output head stays float; ask for it with include={[matmul.module_path]}"
    if chosen_for is not None:
        return f"{_why_router(chosen_for)}; ask for it with include={[matmul.module_path]}"
    return None


def _why_router(chosen_for: Node) -> str:
    multiplies = module_path(chosen_for) or where(chosen_for)  # without the node's name, layers have equal reasons
    return f"a router stays float: it chooses what {multiplies} multiplies"


def _read_by_embedding(weight: Node) -> bool:
    return any(user.target is EMBEDDING for user in weight.users)


def _embeddings(program: Program) -> Iterator[Node]:
    """The embedding lookups that `include` names."""
    for node in program.graph.nodes:
        weight = node.args[0] if node.target is EMBEDDING else None
        if not isinstance(weight, Node) or weight.op != "get_attr" or not program.is_parameter(str(weight.target)):
            continue
        if program.selection.included(*_embedding_names(program, node)):
            yield node


def _embedding_names(program: Program, node: Node) -> list[str]:
    weight, path = str(cast(Node, node.args[0]).target), module_path(node)
    names = program.aliases.get(weight, (weight,))
    return [path, *(name for name in names if not path or name.startswith(f"{path}."))]


def name_in_module(program: Program, parameter: str, reader: Node) -> str | None:
    """The name of a tied parameter in the reader's own module; None if it is not tied or has no name there."""
    owners = {name.rpartition(".")[0]: name for name in program.aliases.get(parameter, ())}
    return owners.get(module_path(reader))
