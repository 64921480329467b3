"""Run calibration batches through a Program and feed chosen values to observers."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from mxcompile.calibration.observers import Observer
from mxcompile.errors import InputError, NoDataError
from mxcompile.graph.dataflow import compute_nodes
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program, guards_explained

NO_TOKENS = "no calibration token reaches it"
NodeValues = dict[Node, Any]
"""Values of some nodes of a graph, for one batch."""
Observers = Mapping[Node, Sequence[Observer]]


@dataclass(frozen=True)
class Request:
    """A statistic that a pass needs: an observer class (called without arguments) and the name of a node.

    The statistic is `request.result(program)` while the pass runs, if `request.seen(program)`: no token may reach the
    input of an expert that a router never selects. Equal requests share one observer.
    """

    value: str
    observer: Callable[[], Observer]

    @property
    def key(self) -> tuple[str, str]:
        """The key of the result in `Program.statistics`."""
        return self.value, getattr(self.observer, "__name__", str(self.observer))

    def result(self, program: Program) -> Tensor:
        """The observed statistic; raises NoDataError if no token reached the value, or if it was not requested."""
        if not self.seen(program):
            raise NoDataError(f"there is no {self.key[1]} of %{self.value}: {NO_TOKENS}, or no pass requested it")
        return program.statistics[self.key]

    def seen(self, program: Program) -> bool:
        """Whether calibration data have reached the value."""
        return self.key in program.statistics


class Runner(Interpreter):
    """Runs parts of a graph on values that the caller holds; tensors of the program are read again for each use.

    gradients: run with autograd, for inputs that need gradients (the program's own tensors are detached).
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.extra_traceback = False  # error_location adds the node and module path
        self.gradients = False

    def run_nodes(
        self,
        nodes: Sequence[Node],
        values: NodeValues,
        on_value: Callable[[Node, Any], None] | None = None,
        outputs: Iterable[Node] = (),
    ) -> NodeValues:
        """Compute nodes in order from `values`; return the values of `outputs`, in their order.

        on_value: called with each node and its value. A value is freed after its last use among the nodes.
        """
        outputs = dict.fromkeys(outputs)
        last = {source: index for index, node in enumerate(nodes) for source in node.all_input_nodes}
        self.env = dict(values)
        with torch.set_grad_enabled(self.gradients), guards_explained():
            for index, node in enumerate(nodes):
                for source in node.all_input_nodes:
                    if source.op == "get_attr":
                        self.env[source] = self.parameter(source)
                self.env[node] = self.run_node(node)
                if on_value is not None:
                    on_value(node, self.env[node])
                for source in (*node.all_input_nodes, node):
                    if last.get(source, index) == index and source not in outputs:
                        self.env.pop(source, None)
        results = {node: self.env[node] for node in outputs}
        self.env = {}
        return results

    def parameter(self, node: Node) -> Tensor:
        """The tensor that a `get_attr` node reads; a copy if autograd cannot save it (made in inference mode)."""
        value = self.fetch_attr(str(node.target))
        if not isinstance(value, Tensor):
            return value
        return value.clone() if self.gradients and value.is_inference() else value.detach()


def feed_observers(observers: Observers) -> Callable[[Node, Any], None]:
    """An `on_value` callback for `Runner.run_nodes` that updates the observers of each node."""

    def update(node: Node, value: Any) -> None:
        for observer in observers.get(node, ()):
            observer.update(value)

    return update


def copied_if_mutated(values: NodeValues, nodes: Iterable[Node]) -> NodeValues:
    """The values, or copies if one of the nodes writes in place, so that the nodes can be run on them repeatedly."""
    if not any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in nodes):
        return values
    copies = copy.deepcopy(list(values.values()))  # in one call, so that views of one tensor still share storage
    return dict(zip(values, copies, strict=True))


def gather_statistics(program: Program, requests: Sequence[Request], batches: Iterable[Inputs] | None = None) -> None:
    """Add requested statistics that are missing to `program.statistics`, over all batches (None: `program.batches`).

    A value that no token reaches gets no statistic.
    """
    pending = {request.key: request for request in requests if request.key not in program.statistics}
    if not pending:
        return
    observers = {key: request.observer() for key, request in pending.items()}
    nodes = {node.name: node for node in program.graph.nodes}
    if missing := sorted({value for value, _ in observers} - set(nodes)):
        raise KeyError(f"the graph has no value {missing[0]!r}")
    by_value: dict[Node, list[Observer]] = {}
    for (value, _), observer in observers.items():
        by_value.setdefault(nodes[value], []).append(observer)
    update = feed_observers(by_value)
    runner = Runner(program)
    needed = list(nodes.values())
    needed = needed[: max(map(needed.index, by_value)) + 1]
    computed = compute_nodes(needed)
    for batch in program.track(program.batches) if batches is None else batches:
        bound = bind_inputs(program, batch)
        for node, value in bound.items():
            update(node, value)
        runner.run_nodes(computed, bound, update)
    for key, observer in observers.items():
        with suppress(NoDataError):
            program.statistics[key] = observer.value


def run_outputs(runner: Runner, program: Program, batch: Inputs) -> Any:
    """The model's outputs for a batch, computed by the runner."""
    bound = bind_inputs(program, batch)
    (end,) = program.graph.find_nodes(op="output")
    outputs = [node for node in end.all_input_nodes if node.op not in ("placeholder", "get_attr")]
    values = bound | runner.run_nodes(compute_nodes(program.graph.nodes), bound, None, outputs)

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Node):
            return runner.parameter(leaf) if leaf.op == "get_attr" else values[leaf]
        return leaf

    return program.graph.process_outputs(tuple(map(value, end.args[0])))


def bind_inputs(program: Program, batch: Inputs) -> NodeValues:
    """A batch as values of the graph's placeholders; raises InputError if its structure is not the traced one.

    The user's tensors are never written to: a graph with in-place ops gets copies.
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
    bound = dict(zip(program.graph.find_nodes(op="placeholder"), leaves, strict=True))
    return copied_if_mutated(bound, program.graph.nodes)


def _leaves_like(example: Any, value: Any) -> Iterator[Any]:
    """The leaves of a value, in the order of the traced example."""
    if isinstance(example, Mapping):
        pairs = [(item, value[key]) for key, item in example.items()]
    elif isinstance(example, tuple | list):
        pairs = list(zip(example, value, strict=True))
    else:
        yield value
        return
    for one, other in pairs:
        yield from _leaves_like(one, other)
