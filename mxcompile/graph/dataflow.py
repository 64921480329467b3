"""Walk a graph: which ops only transpose, cast or copy a value, and which nodes read a value through them."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

SAME_VALUE = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.lift_fresh_copy.default,
    }
)
CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default})
TRANSPOSES = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.swapaxes.default,
    }
)


def compute_nodes(nodes: Iterable[Node]) -> list[Node]:
    """The nodes that compute something: neither inputs, tensors nor the output."""
    return [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]


def shapes_are_equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal; a size that the data choose equals itself alone."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, as tracing does

    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def operand(node: Node, index: int, default: Any = None) -> Any:
    """Argument `index` of a call by its position in the schema, passed by position, by keyword or by default."""
    if index < len(node.args):
        return node.args[index]
    schema = getattr(node.target, "_schema", None)
    if schema is None or index >= len(schema.arguments):
        return default
    argument = schema.arguments[index]
    return node.kwargs.get(argument.name, argument.default_value if argument.has_default_value() else default)


def vmapped(graph: Callable[..., Any], *operands: Any) -> Any:
    """Run a nested graph that holds a torch.vmap."""
    return graph(*operands)


def is_nested(node: Node) -> bool:
    """Whether a node calls a higher-order operator, or `vmapped`: with graphs among its arguments."""
    return node.op == "call_function" and (isinstance(node.target, HigherOrderOperator) or node.target is vmapped)


def nested_graphs(node: Node) -> list[Graph]:
    """The graphs that a call of a higher-order operator, or of `vmapped`, has among its arguments."""
    if not is_nested(node) or node.graph.owning_module is None:
        return []
    sources = [source for source in node.all_input_nodes if reads_graph(source)]
    modules = [node.graph.owning_module.get_submodule(str(source.target)) for source in sources]
    return [module.graph for module in modules if isinstance(module, GraphModule)]


def target_name(node: Node) -> str:
    """What a call runs: `aten.linear.default`, `cond`, `vmapped`."""
    return vmapped.__name__ if node.target is vmapped else str(node.target)


def reads_graph(node: Node) -> bool:
    """Whether a `get_attr` reads a nested graph, for calls of higher-order operators alone."""
    return node.op == "get_attr" and "val" not in node.meta and bool(node.users) and all(map(is_nested, node.users))


def mutated_tensors(graph: Graph) -> list[str]:
    """Names of the tensors that a run of the graph writes to, directly or through a view, in order of appearance."""
    return list(dict.fromkeys(str(node.target) for node in _mutated(graph) if node.op == "get_attr"))


def mutates_inputs(graph: Graph) -> bool:
    """True if a run of the graph writes to an input, directly or through a view."""
    return any(node.op == "placeholder" for node in _mutated(graph))


def _mutated(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        yield from written_values(node)


def written_values(node: Node) -> Iterator[Node]:
    """The values that a node writes to, or those that it writes to a view of."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written = _viewed(operand(node, index))
            if isinstance(written, Node):
                yield written


def _viewed(value: Any) -> Any:
    """The node that a view is of; an op whose result aliases its first argument is a view, or writes to it."""
    while isinstance(value, Node) and value.op == "call_function":
        schema = getattr(value.target, "_schema", None)
        if schema is None or not schema.arguments or schema.arguments[0].alias_info is None:
            break
        value = operand(value, 0)
    return value


def is_cast_without_change(node: Node) -> bool:
    """True for a cast whose result has the dtype of its input."""
    source = node.args[0] if node.args else None
    if node.target not in CASTS or not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    return before is not None and after is not None and before.dtype == after.dtype


def swapped_axes(node: Node, ndim: int) -> tuple[int, ...] | None:
    """For a transposing op on an `ndim`-dimensional input: output dimension -> input dimension; None for other ops."""
    order = list(range(ndim))
    if node.target in (aten.t.default, aten.numpy_T.default):
        return tuple(reversed(order))
    if node.target is aten.permute.default:
        return tuple(dim % ndim for dim in operand(node, 1))
    if node.target in (aten.transpose.int, aten.swapaxes.default, aten.mT.default):
        first, second = (-2, -1) if node.target is aten.mT.default else (operand(node, 1), operand(node, 2))
        order[first % ndim], order[second % ndim] = order[second % ndim], order[first % ndim]
        return tuple(order)
    return None


def is_matrix_of_several(node: Node) -> bool:
    """Whether a node takes one matrix of a tensor of three dimensions, the same in every run: `weight[2]`."""
    if node.target is operator.getitem:
        node = operand(node, 0)
        fixed = node.target is aten.unbind.int
    else:
        fixed = node.target is aten.select.int and isinstance(operand(node, 2), int)
    return fixed and operand(node, 1) == 0 and operand(node, 0).meta["val"].dim() == 3


def is_constant(node: Node) -> bool:
    """True if the value depends on no input, only on the program's own tensors."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            return False
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return True


def effective_readers(node: Node) -> set[Node]:
    """Every node that computes with the value, looking through transposes, casts, copies and `value[2]`."""
    readers: set[Node] = set()
    for user in node.users:
        is_transparent = user.target in TRANSPOSES or user.target in SAME_VALUE or user.target in CASTS
        is_transparent |= user.target is aten.unbind.int or is_matrix_of_several(user)
        readers |= effective_readers(user) if is_transparent else {user}
    return readers
