"""Run batches through a Program with observers on chosen values."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from mxcompile.calibration.observers import Observer
from mxcompile.errors import InputError
from mxcompile.graph.dataflow import computing
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program, guards_explained

NodeValues = dict[Node, Any]
"""What some nodes of a graph are worth for one batch."""
Observers = Mapping[Node, Sequence[Observer]]


@dataclass(frozen=True)
class Request:
    """A statistic that a pass needs: an observer kind (a class without arguments) on the value of a node, by its name.

    Equal requests have one answer: `request.result(program)` while the pass runs.
    """

    value: str
    observer: Callable[[], Observer]

    @property
    def key(self) -> tuple[str, str]:
        """Where the result is found in `Program.statistics`."""
        return self.value, getattr(self.observer, "__name__", str(self.observer))

    def result(self, program: Program) -> Tensor:
        """What the observer has seen; raises KeyError if it was not asked for."""
        return program.statistics[self.key]


class Runner(Interpreter):
    """Runs parts of a graph on values kept outside; tensors of the program are read anew each time.

    gradients: record what is computed, for values that need gradients (the program's own tensors never do).
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.extra_traceback = False  # errors are ours to explain
        self.gradients = False

    def run_nodes(
        self,
        nodes: Sequence[Node],
        values: NodeValues,
        seen: Callable[[Node, Any], None] | None = None,
        wanted: Iterable[Node] = (),
    ) -> NodeValues:
        """Compute nodes in order from `values`, show each result to `seen`, return those wanted (in order).

        A value is let go after its last use among the nodes.
        """
        wanted = dict.fromkeys(wanted)
        last = {source: index for index, node in enumerate(nodes) for source in node.all_input_nodes}
        self.env = dict(values)
        with torch.set_grad_enabled(self.gradients), guards_explained():
            for index, node in enumerate(nodes):
                for source in node.all_input_nodes:
                    if source.op == "get_attr":
                        self.env[source] = self.parameter(source)
                self.env[node] = self.run_node(node)
                if seen is not None:
                    seen(node, self.env[node])
                for source in (*node.all_input_nodes, node):
                    if last.get(source, index) == index and source not in wanted:
                        self.env.pop(source, None)
        found = {node: self.env[node] for node in wanted}
        self.env = {}
        return found

    def parameter(self, node: Node) -> Tensor:
        """The tensor that a `get_attr` node reads."""
        value = self.fetch_attr(str(node.target))
        return value.detach() if isinstance(value, Tensor) else value


def feed_observers(observers: Observers) -> Callable[[Node, Any], None]:
    """What shows the values of nodes to their observers."""

    def show(node: Node, value: Any) -> None:
        for observer in observers.get(node, ()):
            observer.update(value)

    return show


def copied_if_mutated(values: NodeValues, nodes: Iterable[Node]) -> NodeValues:
    """The values, or copies of them if one of the nodes writes in place: they can be run on them more than once."""
    if not any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in nodes):
        return values
    copies = copy.deepcopy(list(values.values()))  # all at once: views of one tensor stay views of one
    return dict(zip(values, copies, strict=True))


def gather_statistics(program: Program, requests: Sequence[Request], batches: Iterable[Inputs] | None = None) -> None:
    """Measure what is requested and not yet known, over all batches (None: the program's), into its statistics."""
    wanted = {request.key: request for request in requests if request.key not in program.statistics}
    if not wanted:
        return
    observers = {key: request.observer() for key, request in wanted.items()}
    nodes = {node.name: node for node in program.graph.nodes}
    if missing := sorted({value for value, _ in observers} - set(nodes)):
        raise KeyError(f"the graph has no value {missing[0]!r}")
    by_value: dict[Node, list[Observer]] = {}
    for (value, _), observer in observers.items():
        by_value.setdefault(nodes[value], []).append(observer)
    show = feed_observers(by_value)
    runner = Runner(program)
    needed = list(nodes.values())
    needed = needed[: max(map(needed.index, by_value)) + 1]
    computed = computing(needed)
    for batch in program.through(program.batches) if batches is None else batches:
        given = bind_inputs(program, batch)
        for node, value in given.items():
            show(node, value)
        runner.run_nodes(computed, given, show)
    program.statistics.update({key: observer.value for key, observer in observers.items()})


def run_outputs(runner: Runner, program: Program, batch: Inputs) -> Any:
    """What the model returns for a batch, as the runner computes it."""
    given = bind_inputs(program, batch)
    (end,) = program.graph.find_nodes(op="output")
    wanted = [node for node in end.all_input_nodes if node.op not in ("placeholder", "get_attr")]
    known = given | runner.run_nodes(computing(program.graph.nodes), given, None, wanted)

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Node):
            return runner.parameter(leaf) if leaf.op == "get_attr" else known[leaf]
        return leaf

    return program.graph.process_outputs(tuple(map(value, end.args[0])))


def bind_inputs(program: Program, batch: Inputs) -> NodeValues:
    """A batch as the graph's placeholders take it; raises InputError if it is not of the traced kind.

    The user's tensors are not written to: a graph that writes in place gets copies.
    """
    program.example.check_ranks(batch)
    names = list(program.example.kwargs)
    if len(batch.args) != len(program.example.args) or set(batch.kwargs) != set(names):
        raise InputError(
            f"a calibration batch has {len(batch.args)} positional arguments and keywords {sorted(batch.kwargs)}; the "
            f"model was traced with {len(program.example.args)} and {sorted(names)}"
        )
    kwargs = {name: batch.kwargs[name] for name in names}
    leaves = _leaves_like((program.example.args, program.example.kwargs), (batch.args, kwargs))
    given = dict(zip(program.graph.find_nodes(op="placeholder"), leaves, strict=True))
    return copied_if_mutated(given, program.graph.nodes)


def _leaves_like(example: Any, value: Any) -> Iterator[Any]:
    """Leaves of a value in the order in which the traced one has them."""
    if isinstance(example, Mapping):
        pairs = [(item, value[key]) for key, item in example.items()]
    elif isinstance(example, tuple | list):
        pairs = list(zip(example, value, strict=True))
    else:
        yield value
        return
    for one, other in pairs:
        yield from _leaves_like(one, other)
