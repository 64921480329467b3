"""Local rewrites: a pattern, a check that returns a reason to skip a match, and a rewrite.

A pattern is matched at a node and backwards along its operands:

    x, w = Wildcard("x"), Wildcard("w")
    Rule("relu-of-linear", Call(aten.relu.default, Call(aten.linear.default, x, w)), check, rewrite)

If the pattern matches and the check returns a reason, `apply_rules` reports a miss.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch._ops import OpOverloadPacket
from torch.fx import Graph, Node

from mxcompile.arguments import checked
from mxcompile.graph.dataflow import operand
from mxcompile.graph.program import where
from mxcompile.graph.records import Miss, PassResult

_KEPT_META = ("val", "nn_module_stack", "stack_trace")  # not Inductor's entries: they describe the old operands


@dataclass(frozen=True)
class Match:
    """A matched pattern: its root node, and the node or plain argument that each name is bound to."""

    root: Node
    bindings: dict[str, Any] = field(default_factory=dict[str, Any])

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def replace(self, target: Any, *args: Any, name: str = "") -> Node:
        """Replace the root by `target(*args)` of the same shape and dtype, with the same module path."""
        graph = self.root.graph
        name = name or getattr(target, "__name__", str(target)).partition(".")[0]
        with graph.inserting_before(self.root):
            replacement = graph.create_node("call_function", target, args, name=name)
        replacement.meta = {key: self.root.meta[key] for key in _KEPT_META if key in self.root.meta}
        self.root.replace_all_uses_with(replacement)
        graph.erase_node(self.root)
        return replacement


class Pattern:
    """Base of the patterns for a node or argument."""

    def match(self, value: Any, bindings: dict[str, Any]) -> bool:
        """True if the value matches; bindings of names are added to `bindings`."""
        raise NotImplementedError


class Wildcard(Pattern):
    """Matches any value and binds it to a name; a name that occurs twice must match the same value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def match(self, value: Any, bindings: dict[str, Any]) -> bool:
        """Bind the name."""
        if self.name in bindings:
            return bool(bindings[self.name] is value or bindings[self.name] == value)
        bindings[self.name] = value
        return True


class Call(Pattern):
    """Matches a call of one of the targets; operands are matched by position in the schema, further ones ignored.

    A target may be an operator's name, such as "aten.mm.default": of a library that may not be imported yet.
    """

    def __init__(self, targets: Any, *operands: Any, name: str = "") -> None:
        self.targets = _overloads(targets)
        self.operands = operands
        self.name = name

    def match(self, value: Any, bindings: dict[str, Any]) -> bool:
        """Match the call and its operands."""
        if not isinstance(value, Node) or value.op != "call_function":
            return False
        if value.target not in self.targets and str(value.target) not in self.targets:
            return False
        if self.name and not Wildcard(self.name).match(value, bindings):
            return False
        for index, expected in enumerate(self.operands):
            actual = operand(value, index)
            matches = expected.match(actual, bindings) if isinstance(expected, Pattern) else expected == actual
            if not matches:
                return False
        return True


def _overloads(targets: Any) -> frozenset[Any]:
    """One target, a collection of targets, or all overloads of an operator (`torch.ops.aten.relu`), as a set."""
    if isinstance(targets, OpOverloadPacket):
        return frozenset(getattr(targets, name) for name in targets.overloads())
    return frozenset(targets) if isinstance(targets, frozenset | set | tuple | list) else frozenset({targets})


@dataclass(frozen=True)
class Rule:
    """A local rewrite.

    check: None if the match may be rewritten, else the reason why not, as a sentence.
    rewrite: inserts nodes in front of `match.root` and replaces all its uses (`match.replace` does); dead nodes may
        remain.
    """

    name: str
    pattern: Pattern
    check: Callable[[Match], str | None]
    rewrite: Callable[[Graph, Match], None]


@checked
def apply_rules(graph: Graph, rules: Iterable[Rule]) -> PassResult:
    """Try every rule at every node once, in graph order, then eliminate dead code."""
    rules = tuple(rules)
    rewrites = 0
    misses: list[Miss] = []
    for node in list(graph.nodes):
        for rule in rules:
            match = Match(node)
            if not rule.pattern.match(node, match.bindings):
                continue
            reason = rule.check(match)
            if reason is not None:
                misses.append(Miss(where(node), f"{rule.name}: {reason}"))
                continue
            with graph.inserting_before(node):
                rule.rewrite(graph, match)
            rewrites += 1
            break
    if rewrites:
        graph.eliminate_dead_code()
    return PassResult(rewrites, tuple(misses))
