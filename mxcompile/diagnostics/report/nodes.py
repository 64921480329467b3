"""Parse the printed graph of a dump, one node per line.

A line that does not parse as a node (a name with a line break in it) is kept as text.
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

    op: `aten.linear`, `mx.quantize`, or input, tensor, output. call: the arguments; for a tensor, its name and digest.
    dtype, shape: as text; a value with several tensors lists them all. format: the MX format that the value holds, is
    rounded to or is decoded from; "" for none. module: path of the module that the node belongs to.
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
    nodes = [_parse(line) for line in text.splitlines()]
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        if node.op == "getitem" or node.op.startswith("mx."):
            by_name[node.name] = _with_format(node, by_name)
            _mark_packed_tensors(by_name[node.name], by_name)
    return [by_name[node.name] if node.name else node for node in nodes]


def _parse(line: str) -> GraphNode:
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
    if call := _CALL.fullmatch(rest):
        return replace(node, op=call.group(1), call=call.group(2), module=call.group(3) or "")
    return node


def _with_format(node: GraphNode, by_name: dict[str, GraphNode]) -> GraphNode:
    """Set the format that the call names; an item of a quantized value has the format of the value."""
    if node.op == "getitem":
        source = _READS.search(node.call)
        return replace(node, format=by_name[source.group(1)].format if source and source.group(1) in by_name else "")
    named = _FORMAT.search(node.call)
    return replace(node, format=named.group(1)) if named else node


def _mark_packed_tensors(node: GraphNode, by_name: dict[str, GraphNode]) -> None:
    """Set the format of the tensors that a node reads as elements and scales."""
    for name in _READS.findall(node.call):
        tensor = by_name.get(name)
        if tensor is not None and tensor.op == "tensor" and tensor.dtype == "u8":
            by_name[name] = replace(tensor, format=node.format)
