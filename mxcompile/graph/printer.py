"""Print a Program as stable text: the same program prints the same everywhere, a small change is a small diff.

One node a line: name, type and shape, call, module path. No file paths, object ids or times; dynamic sizes are renamed
s0, s1, ... in order of appearance; columns have fixed widths, and a name that is too long overflows only its own line.
A tensor that the graph reads is printed with its largest magnitude and a hash of its bytes, since a rewritten weight
does not show in the graph, and with the format to which it has been rounded, or that a pass has chosen for it. The
nodes of a nested graph (a branch of torch.cond) stand below its line, indented.
"""

import difflib
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from mxcompile.arguments import checked
from mxcompile.graph.dataflow import reads_graph
from mxcompile.graph.program import Program, module_path
from mxcompile.tensor.digest import tensor_sha256
from mxcompile.tensor.dtypes import short_name

_NAME, _TYPE, _CALL = 40, 28, 84
_SUMMARIES: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}


@checked
def print_program(program: Program) -> str:
    """The whole program as text, ending in a newline."""
    symbols: dict[str, str] = {}
    lines = (line for node in program.graph.nodes for line in _lines(program, node, symbols))
    return "\n".join(lines) + "\n"


@checked
def print_changes(before: Program, after: Program) -> str:
    """The lines that differ, with `-` or `+` in front and without column padding: for tests of a pass."""
    lines = diff_text(print_program(before), print_program(after), "", "").splitlines()[2:]
    changed = [line for line in lines if line[0] in "-+"]
    return "".join(f"{line[0]} {' '.join(line[1:].split())}\n" for line in changed)


def print_type(value: Any, symbols: dict[str, str] | None = None) -> str:
    """The type of a node's value: `f32[s0, 16, 64]`, `(f32[2], i64[2])`, `int`."""
    symbols = {} if symbols is None else symbols
    if isinstance(value, Tensor):
        sizes = ", ".join(_size(size, symbols) for size in value.shape)
        return f"{short_name(value.dtype)}[{sizes}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(print_type(item, symbols) for item in value)})"
    if isinstance(value, torch.SymInt | int):
        return f"int({_size(value, symbols)})"
    return "" if value is None else type(value).__name__


def summarize(tensor: Tensor) -> str:
    """`absmax=0.93 sha=1f2e3d4c`: largest magnitude and the start of the SHA-256 of the bytes."""
    cached = _SUMMARIES.get(id(tensor))
    version = tensor._version
    if cached is not None and cached[0]() is tensor and cached[1] == version:
        return cached[2]
    data = tensor.detach()
    digest = tensor_sha256(data)[:8] if data.numel() else "empty"
    absmax = ""
    if data.numel() and data.is_floating_point():
        absmax = f"absmax={torch.stack(data.aminmax()).abs().amax().item():.6g} "
    _SUMMARIES[id(tensor)] = (weakref.ref(tensor), version, f"{absmax}sha={digest}")
    return _SUMMARIES[id(tensor)][2]


def print_target(target: Any) -> str:
    """`aten.linear` for `torch.ops.aten.linear.default`, `getitem` for the operator."""
    text = str(target) if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))
    return text.removesuffix(".default")


def _lines(program: Program, node: Node, symbols: dict[str, str], owner: str = "") -> Iterator[str]:
    """The line of a node; a nested graph has those of its nodes below it, indented."""
    yield _line(program, node, symbols, owner).rstrip()
    path = owner + str(node.target)
    nested = program.graph_module.get_submodule(path) if reads_graph(node) else None
    for inner in nested.graph.nodes if isinstance(nested, GraphModule) else ():
        yield from (f"    {line}" for line in _lines(program, inner, symbols, f"{path}."))


def _line(program: Program, node: Node, symbols: dict[str, str], owner: str) -> str:
    kind = print_type(node.meta.get("val"), symbols)
    head = f"%{node.name:<{_NAME}} {kind:<{_TYPE}} = "
    match node.op:
        case "placeholder":
            return head + "input"
        case "get_attr" if reads_graph(node):
            return head + f'graph "{owner}{node.target}"'
        case "get_attr":
            return head + _tensor(program, owner + str(node.target))
        case "output":
            return f"return {_argument(node.args[0])}"
        case "call_module":
            return head + f"{node.target}{_arguments(node)}"
        case _:
            call = f"{print_target(node.target)}{_arguments(node)}"
            path = module_path(node)
            return head + (f"{call:<{_CALL}} # {path}" if path else call)


def _tensor(program: Program, name: str) -> str:
    fmt = f" input={program.input_formats[name] or 'float'}" if name in program.input_formats else ""
    if name in program.rounded:
        fmt += f" format={program.rounded[name].format}"
    elif name in program.formats:
        fmt += f" chosen={program.formats[name] or 'float'}"
    return f'tensor "{name}" {summarize(program.tensor(name))}{fmt}'


def _arguments(node: Node) -> str:
    parts = [_argument(arg) for arg in node.args]
    parts += [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    return f"({', '.join(parts)})"


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        inner = ", ".join(_argument(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, torch.dtype):
        return short_name(value)
    if value == 2**63 - 1:
        return "end"
    return repr(value)


def _size(size: Any, symbols: dict[str, str]) -> str:
    def rename(match: re.Match[str]) -> str:
        return symbols.setdefault(match.group(), f"s{len(symbols)}")

    return re.sub(r"[su]\d+", rename, str(size))


def diff_text(before: str, after: str, before_name: str, after_name: str) -> str:
    """Unified diff of two graph texts, without file names or times."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), before_name, after_name, lineterm="", n=1)
    return "".join(f"{line}\n" for line in lines)
