"""Program: the one thing that flows through a pipeline.

A graph module whose parameters still are the user's tensors, shared and never written to: a pass replaces a parameter
(`set_parameter`), it does not modify one. Around it: the example inputs, gathered statistics, and the ledger.
"""

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from mxcompile.errors import InputError
from mxcompile.formats import MXFormat
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.name_patterns import Selection
from mxcompile.graph.records import PassRecord

T = TypeVar("T")
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # what torch.export names the lack of a module

_DYNAMO_ROOT = re.compile(r"^L\['\w+'\]\.?")  # how Dynamo's graphs begin a module path


class Stage(IntEnum):
    """How far a Program has come; a pass accepts some stages and may move on to the next."""

    FLOAT = 0
    ROUNDED = 1
    LOWERED = 2
    FUSED = 3


@dataclass(frozen=True)
class Rounding:
    """A weight holds exactly values of `format` with these scales (E8M0 bytes `[..., out, blocks]`)."""

    format: MXFormat
    scales: Tensor


class Parts(Protocol):
    """Finished parts of a pass, kept for when it is interrupted (`resume.py`): tensors and notes by name."""

    def load(self, part: str) -> tuple[dict[str, Tensor], list[str]] | None:
        """A finished part, None if it is not finished."""
        ...

    def save(self, part: str, tensors: dict[str, Tensor], notes: list[str]) -> None:
        """Keep a part."""
        ...


class Program:
    """A traced model.

    graph_module: the graph at its present stage, ATen and `mx::` calls.
    example: the inputs it was traced with.
    output_heads: names of the parameters that make the model's output (lm_head).
    aliases: for a parameter that the user's module holds under several names, all of them.
    rounded: parameter name -> how its values have been rounded.
    batches: calibration data, while a pipeline runs. statistics: (value name, observer name) -> what they showed.
    importance: weight name -> mean square of each of its input channels `[in]`, where a pass has measured it.
    formats: weight name -> the format that a pass has chosen for it, None for float; later passes use it in place of
    their default, where their overrides say nothing.
    origin: the program as traced, once passes have run. outputs: the output tensors on the example inputs, kept while
    passes preserve the function.
    report: told how many segments of how many a pass has gone through. resume: keeps what long passes have finished.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        example: Inputs,
        *,
        output_heads: Iterable[str] = (),
        aliases: dict[str, tuple[str, ...]] | None = None,
        selection: Selection | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.example = example
        self.output_heads = frozenset(output_heads)
        self.aliases = aliases or {}
        self.selection = selection or Selection()
        self.stage = Stage.FLOAT
        self.ledger: list[PassRecord] = []
        self.rounded: dict[str, Rounding] = {}
        self.batches: tuple[Inputs, ...] = (example,)
        self.statistics: dict[tuple[str, str], Tensor] = {}
        self.importance: dict[str, Tensor] = {}
        self.formats: dict[str, MXFormat | None] = {}
        self.origin: Program | None = None
        self.outputs: dict[str, Tensor] | None = None
        self.report: Callable[[int, int], None] | None = None
        self.resume: Parts | None = None

    @property
    def graph(self) -> Graph:
        """The fx graph."""
        return self.graph_module.graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph at its present stage, without gradients; same arguments and result as the model's forward."""
        self.example.check_ranks(Inputs(args, kwargs))
        with torch.no_grad(), guards_explained():
            return self.graph_module(*args, **kwargs)

    def copy(self) -> "Program":
        """A Program with its own graph and ledger; tensors are shared until a pass replaces them."""
        graph_module = GraphModule(self.graph_module, _copy_graph(self.graph))
        other = Program(
            graph_module,
            self.example,
            output_heads=self.output_heads,
            aliases=self.aliases,
            selection=self.selection,
        )
        other.stage = self.stage
        other.ledger = list(self.ledger)
        other.rounded = dict(self.rounded)
        other.batches = self.batches
        other.statistics = dict(self.statistics)
        other.importance = dict(self.importance)
        other.formats = dict(self.formats)
        other.origin = self.origin
        other.outputs = self.outputs
        return other

    def through(self, parts: Sequence[T]) -> Iterator[T]:
        """The parts of a pass's work (segments, batches, matmuls), each reported when its turn comes."""
        for done, part in enumerate(parts):
            if self.report is not None:
                self.report(done, len(parts))
            yield part

    def parameter_names(self) -> Iterator[str]:
        """Names of the parameters, buffers and constants that the graph reads, in order of appearance."""
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in seen:
                seen.add(str(node.target))
                yield str(node.target)

    def stored_bytes(self) -> int:
        """Bytes of all tensors that the graph reads, each once."""
        tensors = {tensor.data_ptr(): tensor for tensor in map(self.tensor, self.parameter_names())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def has_tensor(self, name: str) -> bool:
        """True if the graph module holds a tensor of that name."""
        owner, leaf = self._owner(name)
        return owner is not None and isinstance(getattr(owner, leaf, None), Tensor)

    def tensor(self, name: str) -> Tensor:
        """The parameter, buffer or constant of that full name. Do not write to it: it may be the user's."""
        owner, leaf = self._owner(name)
        value = None if owner is None else getattr(owner, leaf, None)
        if not isinstance(value, Tensor):
            raise KeyError(f"the program has no tensor {name!r}")
        return value

    def is_parameter(self, name: str) -> bool:
        """True for an `nn.Parameter`, False for a buffer or constant."""
        owner, leaf = self._owner(name)
        return owner is not None and isinstance(getattr(owner, leaf, None), nn.Parameter)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Put a tensor in place of the one of that name, or add it. The old tensor is left as it was.

        What is added is a buffer, or a parameter if it is an `nn.Parameter`.
        """
        owner, leaf = self._owner(name, create=True)
        assert owner is not None
        kind = getattr(owner, leaf, value)
        if isinstance(kind, nn.Parameter):
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        elif hasattr(owner, leaf):
            setattr(owner, leaf, value)
        else:
            owner.register_buffer(leaf, value)

    def forget(self, node: Node) -> None:
        """Erase a `get_attr` that nothing reads, and let go of its tensor if no other node reads it."""
        name = str(node.target)
        self.graph.erase_node(node)
        if name not in self.parameter_names():
            owner, leaf = self._owner(name)
            delattr(owner, leaf)

    def drop_unread(self) -> None:
        """Recompile the graph and let go of every tensor that no node reads."""
        read = set(self.parameter_names())
        for path, module in self.graph_module.named_modules():
            prefix = f"{path}." if path else ""
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for leaf, _ in own:
                if prefix + leaf not in read:
                    delattr(module, leaf)
        self.graph_module.recompile()

    def _owner(self, name: str, *, create: bool = False) -> tuple[nn.Module | None, str]:
        *path, leaf = name.split(".")
        owner: nn.Module = self.graph_module
        for part in path:
            child = getattr(owner, part, None)
            if not isinstance(child, nn.Module):
                if not create:
                    return None, leaf
                child = nn.Module()
                owner.add_module(part, child)
            owner = child
        return owner, leaf


@contextmanager
def guards_explained() -> Generator[None]:
    """Turn the failure of a traced graph's own guard (a size it was specialised to) into an InputError."""
    try:
        yield
    except AssertionError as error:
        if "Guard failed" not in str(error):
            raise
        raise InputError(
            f"these inputs do not fit the traced graph ({error}); trace again with inputs of this kind"
        ) from error


def module_path(node: Node) -> str:
    """Dotted path of the user's module whose forward made the node ("" for the top module)."""
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return "" if path == _NO_MODULE else _DYNAMO_ROOT.sub("", path)


def _copy_graph(graph: Graph) -> Graph:
    """The same nodes in a new graph; the convention of inputs and outputs is shared."""
    copied = Graph()
    outputs = copied.graph_copy(graph, {})
    copied.output(outputs)
    copied.set_codegen(graph._codegen)  # pyright: ignore[reportPrivateUsage] - there is a setter, but no getter
    return copied


def where(node: Node) -> str:
    """A node as a person would look for it: its name and module."""
    path = module_path(node)
    return f"%{node.name} in {path}" if path else f"%{node.name}"
