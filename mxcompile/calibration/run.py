"""Run batches through a Program with observers on chosen values."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Interpreter, Node

from mxcompile.calibration.observers import Observer
from mxcompile.errors import InputError
from mxcompile.inputs import Inputs
from mxcompile.program import Program, guards_explained


@dataclass(frozen=True)
class Request:
    """A statistic that a pass needs: an observer kind (a class without arguments) on the value of a node."""

    value: str
    observer: Callable[[], Observer]

    @property
    def key(self) -> tuple[str, str]:
        """Where the result is found in `Program.statistics`."""
        return self.value, getattr(self.observer, "__name__", str(self.observer))


class _AllSeenError(Exception):
    """The rest of the graph need not run."""


class _Observing(Interpreter):
    """Runs the graph node by node up to the last requested value, showing each to its observers; frees values after
    their last use.
    """

    def __init__(self, program: Program, observers: dict[str, list[Observer]]) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False  # errors are ours to explain
        self._observers = observers
        self._last = [node.name for node in program.graph.nodes if node.name in observers][-1]

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        for observer in self._observers.get(n.name, ()):
            observer.update(result)
        if n.name == self._last:
            raise _AllSeenError
        return result


def gather(program: Program, requests: Sequence[Request], batches: Iterable[Inputs]) -> None:
    """Measure what is requested and not yet known, over all batches, into `program.statistics`."""
    wanted = {request.key: request for request in requests if request.key not in program.statistics}
    if not wanted:
        return
    observers = {key: request.observer() for key, request in wanted.items()}
    by_value: dict[str, list[Observer]] = {}
    for (value, _), observer in observers.items():
        by_value.setdefault(value, []).append(observer)
    if missing := sorted(set(by_value) - {node.name for node in program.graph.nodes}):
        raise KeyError(f"the graph has no value {missing[0]!r}")
    interpreter = _Observing(program, by_value)
    with torch.no_grad(), guards_explained():
        for batch in batches:
            program.example.check_ranks(batch)
            with suppress(_AllSeenError):
                interpreter.run(*_flat_arguments(program, batch), enable_io_processing=False)
            interpreter.env.clear()
    program.statistics.update({key: observer.value for key, observer in observers.items()})


def _flat_arguments(program: Program, batch: Inputs) -> list[Any]:
    """A batch as the graph's placeholders take it: flattened in the order of the traced inputs."""
    names = list(program.example.kwargs)
    if len(batch.args) != len(program.example.args) or set(batch.kwargs) != set(names):
        raise InputError(
            f"a calibration batch has {len(batch.args)} positional arguments and keywords {sorted(batch.kwargs)}; the "
            f"model was traced with {len(program.example.args)} and {sorted(names)}"
        )
    kwargs = {name: batch.kwargs[name] for name in names}
    return list(_leaves_like((program.example.args, program.example.kwargs), (batch.args, kwargs)))


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
