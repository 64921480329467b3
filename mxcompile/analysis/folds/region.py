"""A region: the values that must be scaled together if one of them is.

It grows by constraint propagation. A label says which factors a value's elements carry, and to which power. Every node
that makes or reads a labelled value is a constraint (`constraints.py`): it labels further values or pins factors to 1.
Where either operand of a product may carry a factor, both alternatives are tried, and the one that leaves more factors
free is kept.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from mxcompile.analysis.folds.factors import ONE, UNKNOWN, Factors, InconsistentSizesError, merged
from mxcompile.graph.program import Program

MAXIMUM_VALUES = 400
MAXIMUM_ATTEMPTS = 64
Constraint = Callable[[Any, Node], None]
"""Takes the region, of the class that has this constraint, and the node."""
Option = Callable[["Region"], None]


class ConcreteSizes:
    """Concrete shapes for all values of a program.

    They are those of the example; if `small`, every symbolic size is replaced by a small number of its own, which is
    cheaper and gives the same labels unless the graph depends on the size.
    """

    def __init__(self, program: Program, small: bool = True) -> None:
        self._numbers: dict[Any, int] = {}
        by_hint: dict[int, int] = {}
        for node in program.graph.nodes:
            value = node.meta.get("val")
            for size in value.shape if node.op == "placeholder" and isinstance(value, Tensor) else ():
                if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                    hint = size.node.hint or 3
                    reduced = hint if hint < 4 or not small else 4 + len(by_hint)
                    self._numbers[size.node.expr] = by_hint.setdefault(hint, reduced)

    def of(self, size: Any) -> int:
        """A size as a number."""
        if not isinstance(size, SymInt):
            return int(size)
        expr = size.node.expr
        return int(expr.xreplace({symbol: self._numbers.get(symbol, 3) for symbol in expr.free_symbols}))

    def shape(self, node: Node) -> tuple[int, ...]:
        """A value's shape in numbers; raises InconsistentSizesError for an empty value, which has no labels."""
        shape = tuple(self.of(size) for size in node.meta["val"].shape)
        if 0 in shape:
            raise InconsistentSizesError(f"%{node.name} is empty with the example inputs")
        return shape

    def arguments(self, node: Node, replace: Callable[[Node], Any]) -> tuple[Any, dict[str, Any]]:
        """A call's arguments, with sizes as numbers and tensors replaced by `replace`."""

        def concrete(argument: Node) -> Any:
            value = argument.meta.get("val")
            return replace(argument) if isinstance(value, Tensor) or value is None else self.of(value)

        return map_arg(node.args, concrete), map_arg(node.kwargs, concrete)


class Region:
    """Labels and powers of values: a value of power -1 is divided by its factors, one of power 1 multiplied."""

    maximum_values = MAXIMUM_VALUES

    def __init__(
        self, program: Program, sizes: ConcreteSizes, constraints: Callable[[Node], Constraint | None]
    ) -> None:
        self.program, self.sizes, self.factors = program, sizes, Factors()
        self.labels: dict[Node, Tensor] = {}
        self.power: dict[Node, int] = {}
        self.offsets: dict[Node, float] = {}
        self._constraints = constraints
        self._queue: deque[Node] = deque()
        self._choices: dict[Node, list[Option]] = {}
        self._chosen: set[Node] = set()
        self._attempts = [0]

    def copy(self) -> "Region":
        """An independent copy, for trying an alternative."""
        other = Region(self.program, self.sizes, self._constraints)
        other.factors = self.factors.copy()
        other.labels, other.power, other.offsets = dict(self.labels), dict(self.power), dict(self.offsets)
        other._queue, other._choices, other._chosen = deque(self._queue), dict(self._choices), set(self._chosen)
        other._attempts = self._attempts
        return other

    def assign(self, node: Node, labels: Tensor, power: int) -> None:
        """Require that a value carries these factors, to this power; `labels` has the value's rank."""
        if bool((labels == UNKNOWN).all()):
            return None
        before = self.labels.get(node)
        if before is None:
            after = self.factors.find(labels)
            self.power[node] = power
        else:
            if self.power[node] != power:
                both = merged(self.factors, before, labels)
                return self.pin(node, both, "would have to be scaled and unscaled by the same factor")
            after = merged(self.factors, before, labels)
            old = self.factors.find(before)
            if after.shape == old.shape and torch.equal(after, old):
                return None
        self.labels[node] = after
        self._touch(node)
        if len(self.labels) > self.maximum_values:
            self.pin(node, after, f"is one of more than {self.maximum_values} values that would change together")
        return None

    def get(self, node: Any) -> Tensor | None:
        """The labels of a value; None if it has none or is not a node."""
        labels = self.labels.get(node) if isinstance(node, Node) else None
        return None if labels is None else self.factors.find(labels)

    def pin(self, node: Node, labels: Tensor, reason: str) -> None:
        """Require that these factors are 1; reason: the predicate of a sentence about the node."""
        self.factors.pin(labels, f"%{node.name} {reason}")

    def for_all_sizes(self, labels: Tensor) -> Tensor | None:
        """Labels of all of a value of which the example's sizes read a part only; None if they cannot be known."""
        del labels
        return None

    def choose(self, node: Node, options: list[Option]) -> None:
        """Add alternatives of which one must hold; they are tried after all certain constraints."""
        if node not in self._chosen:
            self._choices[node] = options

    def settled(self, node: Node) -> None:
        """Drop the node's alternatives: they are decided."""
        self._choices.pop(node, None)

    def is_scaled(self, node: Any) -> bool:
        """True for a value that carries a factor other than 1."""
        labels = self.get(node)
        return labels is not None and self.free_factors(labels) > 0

    def free_factors(self, labels: Tensor) -> int:
        """How many different factors other than 1 the labels hold."""
        ids = self.factors.find(labels).unique()
        return int((ids > ONE).sum())

    def solve(self, target: Tensor) -> "Region":
        """Propagate and try alternatives; returns the region that leaves the most factors of `target` free."""
        self._propagate(target)
        if not self._choices or not self.free_factors(target):
            return self
        node, options = next(iter(self._choices.items()))
        best: Region | None = None
        for option in options:
            self._attempts[0] += 1
            attempt = self.copy()
            attempt._choices.pop(node)
            attempt._chosen.add(node)
            option(attempt)
            attempt = attempt.solve(target)
            if best is None or attempt.free_factors(target) > best.free_factors(target):
                best = attempt
            if best.free_factors(target) == self.free_factors(target) or self._attempts[0] > MAXIMUM_ATTEMPTS:
                break
        assert best is not None
        return best

    def _propagate(self, target: Tensor) -> None:
        while self._queue:
            node = self._queue.popleft()
            constraint = self._constraints(node)
            if constraint is not None:
                constraint(self, node)
            if not self.free_factors(target):
                self._queue.clear()

    def _touch(self, node: Node) -> None:
        for neighbour in self._neighbours(node):
            if neighbour not in self._queue:
                self._queue.append(neighbour)

    def _neighbours(self, node: Node) -> Iterable[Node]:
        """The nodes whose constraints involve the value."""
        yield node
        for user in node.users:
            yield user
            value = user.meta.get("val")
            if isinstance(value, tuple | list):
                yield from user.users
