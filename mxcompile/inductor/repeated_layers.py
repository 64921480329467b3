"""A[layer 0, layer 1, ... layer n], Z -> A + layer 0, (layer) x n, Z: the longest run of equal code in a Dynamo graph.

The layers of a model have the same code with other weights, so that a compiled layer can run for all of them. Here such
a run is found in the list of a graph's calls, and the borders between its repetitions are chosen: right after a matmul,
where the smallest tensors cross. There a kernel ends anyway, so no fusion is lost; between a layer's last sum and the
next norm one would be.

Two repetitions are equal if their calls have the same targets, constants, and sizes, strides and dtypes of results, and
read the same results of the repetition or of what precedes it, in the same order.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

_LEAST_REPETITIONS: Final = 3
_FARTHEST: Final = 24
"""How many calls of one kind a repetition may hold between two of its borders, for the search of the period."""
_MATMULS: Final = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "experts", "grouped_linear"})
_ONE_SIDED: Final = frozenset({"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode"})

Signature = Any
Kind = Any


@dataclass(frozen=True)
class Repetition:
    """`count` times `period` calls of `calls`, from number `start` on.

    outputs: numbers, within a repetition, of the calls whose results are read outside of it.
    operands: for each repetition the nodes outside of it that it reads, in the order of their first use.
    """

    calls: Sequence[Node]
    start: int
    period: int
    count: int
    outputs: tuple[int, ...]
    operands: tuple[tuple[Node, ...], ...]

    @property
    def stop(self) -> int:
        """The number of the first call after the run."""
        return self.start + self.count * self.period

    def body(self, index: int) -> Sequence[Node]:
        """The calls of one repetition."""
        return self.calls[self.start + index * self.period :][: self.period]


def find_repetition(graph: Graph, is_input: Callable[[Node], bool]) -> Repetition | None:
    """The run of equal code that saves the most when it is compiled once; None if the graph has none that can be.

    is_input: whether a node is no call of its own but an input of the graph, or derived from inputs alone by each
    reader.
    """
    calls = [node for node in graph.nodes if node.op != "output" and not is_input(node)]
    codes: dict[Signature, int] = {}

    @cache
    def kind(node: Node) -> Kind:
        return _kind(node, is_input)

    signatures = [codes.setdefault(_signature(node, kind), len(codes)) for node in calls]
    runs = [run for period in _periods(calls, signatures) for run in _runs(signatures, period)]
    for start, period, length in sorted(runs, key=lambda run: (run[1] - run[2], run[1])):
        if (repetition := _bounded(calls, start, period, length, kind)) is not None:
            return repetition
    return None


def _periods(calls: Sequence[Node], signatures: Sequence[int]) -> set[int]:
    """Distances between matmuls of one kind, among which the period of every run with a matmul is."""
    places: dict[int, list[int]] = {}
    for place, (node, code) in enumerate(zip(calls, signatures, strict=True)):
        if _is_matmul(node):
            places.setdefault(code, []).append(place)
    return {
        other - place
        for same in places.values()
        for index, place in enumerate(same)
        for other in same[index + 1 : index + 1 + _FARTHEST]
    }


def _runs(signatures: Sequence[int], period: int) -> Iterator[tuple[int, int, int]]:
    """(start, period, length) of each run of equal calls at a distance of `period`, with enough repetitions."""
    start = 0
    for place in range(len(signatures) - period + 1):
        end = place + period == len(signatures)
        if end or signatures[place] != signatures[place + period]:
            if (length := place + period - start) >= _LEAST_REPETITIONS * period:
                yield start, period, length
            start = place + 1


def _bounded(
    calls: Sequence[Node], start: int, period: int, length: int, kind: Callable[[Node], Kind]
) -> Repetition | None:
    """The repetition within a run with the smallest tensors across its borders; None if no borders will do."""
    place = {node: number for number, node in enumerate(calls)}
    last_read = [max((place.get(user, -1) for user in node.users), default=-1) for node in calls]
    borders: list[tuple[int, int, int]] = []
    for border in range(max(start, 1), start + period):
        count = (start + length - border) // period
        if count < _LEAST_REPETITIONS or not _ends_matmuls(calls[border - 1], border, place):
            continue
        middle = border + period
        crossing = [node for node, last in zip(calls[:middle], last_read, strict=False) if last >= middle]
        if all(_can_cross(node) for node in crossing):
            borders.append((sum(map(_numel, crossing)), -count, -border))
    for _, fewer, before in sorted(borders):
        for skipped in (0, 1):  # the first repetition may read what precedes the run in another way
            count, first = -fewer - skipped, -before + skipped * period
            if count >= _LEAST_REPETITIONS and (made := _verified(calls, first, period, count, kind)) is not None:
                return made
    return None


def _verified(
    calls: Sequence[Node], start: int, period: int, count: int, kind: Callable[[Node], Kind]
) -> Repetition | None:
    """The repetition if all its bodies read alike and give results that can be passed on."""
    bodies = [calls[start + index * period :][:period] for index in range(count)]
    if any(node.op == "get_attr" or _name(node) in _ONE_SIDED for node in bodies[0]):
        return None
    reads = [_reads(body, kind) for body in bodies]
    if any(read[0] != reads[0][0] for read in reads):
        return None
    outputs = set[int]()
    for body in bodies:
        inside = set(body)
        outputs |= {number for number, node in enumerate(body) if any(user not in inside for user in node.users)}
    if not all(_can_cross(body[number]) for body in bodies for number in outputs):
        return None
    operands = tuple(read[1] for read in reads)
    values = [[*body, *outside] for body, outside in zip(bodies, operands, strict=True)]
    if not all(_have_equal_sizes(zip(values[0], others, strict=True)) for others in values[1:]):
        return None
    return Repetition(calls, start, period, count, tuple(sorted(outputs)), operands)


def _have_equal_sizes(pairs: Iterable[tuple[Node, Node]]) -> bool:
    """Whether values have the same sizes, also where these are dynamic: Dynamo then guards that they stay equal."""
    for node, other in pairs:
        for a, b in zip(*(_sizes(each.meta.get("example_value")) for each in (node, other)), strict=True):
            if a.node.expr != b.node.expr and not bool(a == b):
                return False
    return True


def _sizes(value: Any) -> list[Any]:
    """All dynamic sizes of a value."""
    if isinstance(value, Tensor):
        strides = (*value.stride(), value.storage_offset()) if value.layout is torch.strided else ()
        return [size for size in (*value.shape, *strides) if isinstance(size, torch.SymInt)]
    if isinstance(value, torch.SymInt):
        return [value]
    return [size for part in value for size in _sizes(part)] if isinstance(value, list | tuple) else []  # pyright: ignore


def _reads(body: Sequence[Node], kind: Callable[[Node], Kind]) -> tuple[Any, tuple[Node, ...]]:
    """(which results every call reads, and of what kind those from outside are; these nodes)"""
    number = {node: index for index, node in enumerate(body)}
    outside: dict[Node, int] = {}
    pattern = [
        ("inside", number[source]) if source in number else ("outside", outside.setdefault(source, len(outside)))
        for node in body
        for source in sources(node)
    ]
    kinds = [kind(node) for node in outside]
    return (pattern, kinds, _aliases(outside)), tuple(outside)


def _aliases(nodes: Iterable[Node]) -> list[int]:
    """For each node the first that shares its memory, by number."""
    first: dict[Any, int] = {}
    return [first.setdefault(memory_of(node), number) for number, node in enumerate(nodes)]


def memory_of(node: Node) -> Any:
    """Equal for the values of a Dynamo graph that share memory."""
    value: Any = node.meta.get("example_value")
    is_plain = isinstance(value, Tensor) and value.layout is torch.strided and not hasattr(value, "__tensor_flatten__")
    return StorageWeakRef(value.untyped_storage()).cdata if is_plain else node


def sources(node: Node) -> list[Node]:
    """The nodes among the arguments of a call, in order, with repetitions."""
    return [leaf for leaf in _leaves((node.args, node.kwargs)) if isinstance(leaf, Node)]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, slice):
        return [leaf for part in (value.start, value.stop, value.step) for leaf in _leaves(part)]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]  # pyright: ignore[reportUnknownVariableType]
    return [value]


def _signature(node: Node, kind: Callable[[Node], Kind]) -> Signature:
    """What two calls must have in common to be the same code."""
    constants = _skeleton((node.args, node.kwargs), kind)
    target = node.target if isinstance(node.target, str) else (id(node.target), str(node.target))
    return node.op, target, constants, _form(node.meta.get("example_value"))


def _skeleton(value: Any, kind: Callable[[Node], Kind]) -> Any:
    """Arguments with nodes replaced by what they are, in a form that can be compared."""
    if isinstance(value, Node):
        return kind(value)
    if isinstance(value, slice):
        return "slice", *(_skeleton(part, kind) for part in (value.start, value.stop, value.step))
    if isinstance(value, list | tuple):
        return type(value).__name__, *(_skeleton(part, kind) for part in value)  # pyright: ignore
    if isinstance(value, dict):
        return "dict", *((str(key), _skeleton(part, kind)) for key, part in value.items())  # pyright: ignore
    return type(value).__name__, repr(value)


def _kind(node: Node, is_input: Callable[[Node], bool]) -> Kind:
    """The form of a node's value; for what readers derive from inputs, also how."""
    form = _form(node.meta.get("example_value"))
    if not is_input(node) or node.op == "placeholder":
        return form, ()
    parts = tuple(_form(part.meta.get("example_value")) for part in sources(node))
    return form, (str(node.target), repr(node.args[1:]), parts)


def _form(value: Any) -> Any:
    """Type, sizes, strides, dtype and device of a value."""
    if isinstance(value, Tensor):
        shape, strides = tuple(map(_number, value.shape)), ()
        if value.layout is torch.strided:
            strides = (*map(_number, value.stride()), _number(value.storage_offset()))
        return type(value).__name__, shape, strides, value.dtype, str(value.device), value.requires_grad
    if isinstance(value, torch.SymInt):
        return _number(value)
    leaves, spec = pytree.tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return type(value).__name__, str(value)
    return str(spec), *map(_form, leaves)


def _number(value: Any) -> Any:
    """A size for comparison: of a dynamic one its present value."""
    return value if isinstance(value, int) else ("dynamic", str(value.node.hint or value))


def _can_cross(node: Node) -> bool:
    """Whether a compiled piece can return the result of a call."""
    value = node.meta.get("example_value")
    return isinstance(value, Tensor | torch.SymInt) and not hasattr(value, "__tensor_flatten__")


def _numel(node: Node) -> int:
    """The number of elements of a value, at the present sizes."""
    value: Any = node.meta["example_value"]
    sizes: Sequence[Any] = value.shape if isinstance(value, Tensor) else ()
    return math.prod((size.node.hint or 1) if isinstance(size, torch.SymInt) else size for size in sizes)


def _is_matmul(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and _name(node) in _MATMULS


def _ends_matmuls(node: Node, border: int, place: dict[Node, int]) -> bool:
    """Whether a call is the last matmul of what it reads: those that share an input are joined."""
    readers = [user for source in node.all_input_nodes for user in source.users if user is not node]
    return _is_matmul(node) and not any(_is_matmul(user) and place.get(user, -1) >= border for user in readers)


def _name(node: Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target)).partition(".")[0]
