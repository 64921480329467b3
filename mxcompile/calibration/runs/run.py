"""Run calibration batches through a Program and feed chosen values to observers."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from mxcompile.analysis.visibility import Visibility, output_paths
from mxcompile.calibration.ranks.dealing import observing, own_batches
from mxcompile.calibration.runs.saved_weights import SavedWeights
from mxcompile.calibration.statistics.observers import Observer, observe
from mxcompile.errors import InputError, NoDataError
from mxcompile.graph.binding import NodeValues, bind_inputs, writes_in_place
from mxcompile.graph.dataflow import compute_nodes, mutated_tensors
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.masks import hides_everything
from mxcompile.graph.program import Program, guards_explained
from mxcompile.tensor.weight import MXWeight

NO_TOKENS = "no calibration token reaches it"
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


@dataclass(frozen=True)
class BoundBatch:
    """One batch on its way through a program.

    values: those computed so far that are still needed. visibility: which of their rows count, and how much. buffers:
    the batch's own copies of the buffers that forward writes to; every batch starts from the traced ones.
    """

    values: NodeValues
    visibility: Visibility
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, program: Program, values: NodeValues, weight: float = 1.0) -> "BoundBatch":
        """A batch that is bound to the graph's placeholders (`bind_inputs`). weight: of each of its tokens."""
        buffers = {name: program.tensor(name).detach().clone() for name in mutated_tensors(program.graph)}
        return cls(values, Visibility(values, weight), buffers)

    def fork(self, nodes: Iterable[Node]) -> "BoundBatch":
        """The batch, or a copy if one of the nodes writes in place, so that the nodes can be run on it repeatedly."""
        if not writes_in_place(nodes):
            return self
        values, buffers = copy.deepcopy((list(self.values.values()), self.buffers))  # views still share their storage
        return BoundBatch(dict(zip(self.values, values, strict=True)), self.visibility, buffers)


class _Step(NamedTuple):
    """node: to be computed. read: tensors of the program that it reads. dead: what nothing reads after it."""

    node: Node
    read: list[Node]
    dead: list[Node]


class Runner(Interpreter):
    """Runs parts of a graph on values that the caller holds; tensors of the program are read again for each use.

    visibility: the rows that count of the batch that runs.
    gradients: run with autograd, for inputs that need gradients (the program's own tensors are detached).
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.extra_traceback = False  # error_location adds the node and module path
        self.gradients = False
        self.visibility = Visibility({})
        self._program = program
        self._buffers: dict[str, Tensor] = {}
        self._saved = SavedWeights()
        self._planned: tuple[Sequence[Node], list[_Step]] = ((), [])

    def run_nodes(
        self,
        nodes: Sequence[Node],
        values: NodeValues | BoundBatch,
        on_value: Callable[[Node, Any], None] | None = None,
        outputs: Iterable[Node] = (),
    ) -> NodeValues:
        """Compute nodes in order from `values`; return the values of `outputs`, in their order.

        values: of one batch; without a BoundBatch, all rows count and buffers are as traced.
        on_value: called with each node and its value. A value is freed after its last use among the nodes.
        A program whose tensors lie in files first gives freed memory back to the system.
        """
        self._program.return_freed()
        outputs = dict.fromkeys(outputs)
        batch = values if isinstance(values, BoundBatch) else BoundBatch.of(self._program, values)
        self.env, self.visibility, self._buffers = dict(batch.values), batch.visibility, batch.buffers
        self._saved = SavedWeights()
        with torch.set_grad_enabled(self.gradients), guards_explained(), self._saved.hooks():
            for node, read, dead in self._plan(nodes):
                for source in read:
                    self.env[source] = self.parameter(source)
                self.env[node] = self.run_node(node)
                batch.visibility.record(node, self.env)
                if on_value is not None:
                    on_value(node, self.env[node])
                for source in dead:
                    if source not in outputs:
                        self.env.pop(source, None)
        results = {node: self.env[node] for node in outputs}
        self._end_run()
        return results

    def run_node(self, n: Node) -> Any:
        """Compute a node: fx's own method, without what it notes for tracing, which takes longer than a small op."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _plan(self, nodes: Sequence[Node]) -> "list[_Step]":
        """How nodes are run; made once for nodes that are run again and again."""
        if self._planned[0] is not nodes:
            last = {source: index for index, node in enumerate(nodes) for source in node.all_input_nodes}
            plan: list[_Step] = []
            for index, node in enumerate(nodes):
                inputs = node.all_input_nodes
                read = [source for source in inputs if source.op == "get_attr"]
                plan.append(_Step(node, read, [n for n in (*inputs, node) if last.get(n, index) == index]))
            self._planned = nodes, plan
        return self._planned[1]

    def _end_run(self) -> None:
        """Free the values of the last run."""
        self.env = {}

    def parameter(self, node: Node) -> Tensor:
        """The tensor that a `get_attr` node reads; a copy if autograd cannot save it (made in inference mode)."""
        value = self._buffers.get(str(node.target))
        value = self.fetch_attr(str(node.target)) if value is None else value
        if not isinstance(value, Tensor):
            return value
        used = self._program.in_use(value)
        if isinstance(used, MXWeight):
            return self._saved.decode(used)
        if used is not value:
            return self._saved.make(partial(self._program.in_use, value))
        return value.clone() if self.gradients and value.is_inference() else value.detach()


def for_autograd(value: Any) -> Any:
    """A copy of a tensor that was made in inference mode, which autograd cannot save; any other value as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def feed_observers(observers: Observers, visibility: Visibility) -> Callable[[Node, Any], None]:
    """An `on_value` callback for `Runner.run_nodes` that updates the observers of each node with its visible rows."""

    def update(node: Node, value: Any) -> None:
        if kinds := observers.get(node):
            rows = visibility.rows(node, value)
            for observer in kinds:
                observe(observer, rows, visibility.weight)

    return update


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
    runner = Runner(program)
    needed = list(nodes.values())
    needed = needed[: max(map(needed.index, by_value)) + 1]
    computed = compute_nodes(needed)
    tracked, batches = batches is None, tuple(program.batches if batches is None else batches)
    share, before = own_batches(program, batches)
    with observing(program, by_value, before) as own:
        for index in program.track(share) if tracked else share:
            bound = _bound(program, batches[index])
            update = feed_observers(own, bound.visibility)
            for node, value in bound.values.items():
                update(node, value)
            runner.run_nodes(computed, bound, update)
    for key, observer in observers.items():
        with suppress(NoDataError):
            program.statistics[key] = observer.value


def visible_batches(program: Program, batches: Iterable[Inputs], kind: str = "calibration") -> tuple[Inputs, ...]:
    """The batches without those of which a mask hides every token; raises InputError if none is left."""
    batches = tuple(batches)
    visible = tuple(batch for batch in batches if not hides_everything(bind_inputs(program, batch)))
    if not visible:
        raise InputError(f"the masks of all {len(batches)} {kind} batches hide every token: there is no data")
    return visible


def run_outputs(runner: Runner, program: Program, batch: Inputs | BoundBatch) -> Any:
    """The model's outputs for a batch, computed by the runner."""
    bound = batch if isinstance(batch, BoundBatch) else _bound(program, batch)
    return program.graph.process_outputs(_output_leaves(runner, program, bound))


def visible_outputs(runner: Runner, program: Program, batch: Inputs) -> dict[str, Tensor]:
    """The float outputs for a batch by path, computed by the runner; `[tokens, size]` where a mask hides some rows."""
    bound = _bound(program, batch)
    leaves = zip(output_paths(program), _output_nodes(program), _output_leaves(runner, program, bound), strict=True)
    floats = (
        (path, node, leaf) for path, node, leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    return {path: bound.visibility.rows(node, leaf) if isinstance(node, Node) else leaf for path, node, leaf in floats}


def _bound(program: Program, batch: Inputs) -> BoundBatch:
    return BoundBatch.of(program, bind_inputs(program, batch), batch.weight)


def _output_nodes(program: Program) -> tuple[Any, ...]:
    """What the graph returns: nodes, and constants."""
    (end,) = program.graph.find_nodes(op="output")
    return tuple(end.args[0])


def _output_leaves(runner: Runner, program: Program, bound: BoundBatch) -> tuple[Any, ...]:
    leaves = _output_nodes(program)
    computed = [leaf for leaf in leaves if isinstance(leaf, Node) and leaf.op not in ("placeholder", "get_attr")]
    values = bound.values | runner.run_nodes(compute_nodes(program.graph.nodes), bound, None, computed)

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Node):
            return runner.parameter(leaf) if leaf.op == "get_attr" else values[leaf]
        return leaf

    return tuple(map(value, leaves))
