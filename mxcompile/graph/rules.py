"""Local rewrites: a pattern, a check that gives its reason when it says no, and a rewrite.

A pattern is matched at a node and backwards along its operands:

    x, w = Any("x"), Any("w")
    Rule("relu-of-linear", Call(aten.relu.default, Call(aten.linear.default, x, w)), check, rewrite)

A Rule whose pattern matches and whose check gives a reason is a near miss; `apply_rules` reports it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any as AnyType

from torch._ops import OpOverloadPacket
from torch.fx import Graph, Node

from mxcompile.graph.dataflow import operand
from mxcompile.graph.program import where
from mxcompile.graph.records import Miss, PassResult

_CARRIED = ("val", "nn_module_stack", "stack_trace")  # Inductor keeps the operands' types in meta too: those change


@dataclass(frozen=True)
class Match:
    """A matched pattern: its root node, and what each named part stands for (nodes or plain arguments)."""

    root: Node
    parts: dict[str, AnyType] = field(default_factory=dict[str, AnyType])

    def __getitem__(self, name: str) -> AnyType:
        return self.parts[name]

    def replace(self, target: AnyType, *args: AnyType, name: str = "") -> Node:
        """Put `target(*args)`, of the same shape and dtype, in place of the root, in the same module."""
        graph = self.root.graph
        name = name or getattr(target, "__name__", str(target)).partition(".")[0]
        with graph.inserting_before(self.root):
            made = graph.create_node("call_function", target, args, name=name)
        made.meta = {key: self.root.meta[key] for key in _CARRIED if key in self.root.meta}
        self.root.replace_all_uses_with(made)
        graph.erase_node(self.root)
        return made


class Pattern:
    """Something that a node or argument may match."""

    def match(self, value: AnyType, parts: dict[str, AnyType]) -> bool:
        """True if the value fits; named parts are added to `parts`."""
        raise NotImplementedError


class Any(Pattern):
    """Anything; the same name twice in a pattern must stand for the same thing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def match(self, value: AnyType, parts: dict[str, AnyType]) -> bool:
        """Bind the name."""
        if self.name in parts:
            return bool(parts[self.name] is value or parts[self.name] == value)
        parts[self.name] = value
        return True


class Call(Pattern):
    """A call of one of the targets; operands are matched by their place in the schema, further ones are free."""

    def __init__(self, targets: AnyType, *operands: AnyType, name: str = "") -> None:
        self.targets = _overloads(targets)
        self.operands = operands
        self.name = name

    def match(self, value: AnyType, parts: dict[str, AnyType]) -> bool:
        """Match the call and its operands."""
        if not isinstance(value, Node) or value.op != "call_function" or value.target not in self.targets:
            return False
        if self.name and not Any(self.name).match(value, parts):
            return False
        for index, wanted in enumerate(self.operands):
            given = operand(value, index)
            fits = wanted.match(given, parts) if isinstance(wanted, Pattern) else wanted == given
            if not fits:
                return False
        return True


def _overloads(targets: AnyType) -> frozenset[AnyType]:
    """One target, a collection of them, or an operator in all its overloads (`torch.ops.aten.relu`)."""
    if isinstance(targets, OpOverloadPacket):
        return frozenset(getattr(targets, name) for name in targets.overloads())
    return frozenset(targets) if isinstance(targets, frozenset | set | tuple | list) else frozenset({targets})


@dataclass(frozen=True)
class Rule:
    """A local rewrite.

    check: None if the match may be rewritten, else the reason in a sentence.
    rewrite: edits the graph in front of `match.root`; replaces all uses of it (`match.replace` does) and may leave dead
        nodes behind.
    """

    name: str
    pattern: Pattern
    check: Callable[[Match], str | None]
    rewrite: Callable[[Graph, Match], None]


def apply_rules(graph: Graph, rules: Iterable[Rule]) -> PassResult:
    """Try every rule at every node once, in graph order; dead code is removed at the end."""
    rules = tuple(rules)
    rewrites = 0
    misses: list[Miss] = []
    for node in list(graph.nodes):
        for rule in rules:
            match = Match(node)
            if not rule.pattern.match(node, match.parts):
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
