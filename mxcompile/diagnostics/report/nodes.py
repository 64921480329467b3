"""The printed graph of a dump, read back: one node a line, with what it is.

A line that does not look like a node (a name with a line break in it) is kept as it is.
"""

import re
from dataclasses import dataclass, replace

_NODE = re.compile(r"%(\S+) +(.*?) *= (.*)")
_CALL = re.compile(r"([\w.<>-]+)\((.*?)\)(?: +# (.*))?")
_TENSOR = re.compile(r'tensor "(.*)" (.*)')
_RETURN = "return "
_TYPE = re.compile(r"(\w+)\[([^\]]*)\]")
_FORMAT = re.compile(r"'(mx\w+(?::\d+)?)'")
_ROUNDED = re.compile(r" format=(\S+)$")
_READS = re.compile(r"%(\w+)")


@dataclass(frozen=True)
class GraphNode:
    """A line of a graph.

    op: `aten.linear`, `mx.quantize`, or input, tensor, output. call: its arguments; of a tensor, its name and numbers.
    dtype, shape: texts; of a value of several tensors, one after the other. format: the MX format that it holds, that
    it is rounded to or comes from; "" if there is none. module: path of the module that it belongs to.
    """

    name: str
    op: str
    call: str
    dtype: str = ""
    shape: str = ""
    format: str = ""
    module: str = ""


def read_graph(text: str) -> list[GraphNode]:
    """The nodes of a graph as `print_program` prints it, in order."""
    nodes = [_read(line) for line in text.splitlines()]
    known = {node.name: node for node in nodes}
    for node in nodes:
        if node.op == "getitem" or node.op.startswith("mx."):
            known[node.name] = _with_format(node, known)
            _pass_on(known[node.name], known)
    return [known[node.name] if node.name else node for node in nodes]


def _read(line: str) -> GraphNode:
    if line.startswith(_RETURN):
        return GraphNode("", "output", line.removeprefix(_RETURN))
    match = _NODE.fullmatch(line)
    if match is None:
        return GraphNode("", "", line)
    name, kind, rest = match.groups()
    types = _TYPE.findall(kind)
    dtype = ", ".join(dict.fromkeys(dtype for dtype, _ in types)) or kind
    node = GraphNode(name, rest, "", dtype, "  ".join(f"[{shape}]" for _, shape in types))
    if tensor := _TENSOR.fullmatch(rest):
        owner, leaf = tensor.group(1).rpartition(".")[::2]
        rounded = _ROUNDED.search(tensor.group(2))
        fmt = rounded.group(1) if rounded else ""
        return replace(node, op="tensor", call=f"{leaf}  {tensor.group(2)}", format=fmt, module=owner)
    if found := _CALL.fullmatch(rest):
        return replace(node, op=found.group(1), call=found.group(2), module=found.group(3) or "")
    return node


def _with_format(node: GraphNode, known: dict[str, GraphNode]) -> GraphNode:
    """With the format that its call names; an item of a quantized value has that of the value."""
    if node.op == "getitem":
        source = _READS.search(node.call)
        return replace(node, format=known[source.group(1)].format if source and source.group(1) in known else "")
    named = _FORMAT.search(node.call)
    return replace(node, format=named.group(1)) if named else node


def _pass_on(node: GraphNode, known: dict[str, GraphNode]) -> None:
    """Tensors that are read as elements and scales have the format as well."""
    for name in _READS.findall(node.call):
        read = known.get(name)
        if read is not None and read.op == "tensor" and read.dtype == "u8":
            known[name] = replace(read, format=node.format)
