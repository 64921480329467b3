"""Program: what every pass of a pipeline takes and changes.

It holds a graph module, the example inputs, gathered statistics and the ledger. The graph module's parameters are the
user's tensors, shared and never written to: a pass replaces a tensor with `set_tensor`.
"""

import copy
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from mxcompile.errors import InputError
from mxcompile.formats import MXFormat
from mxcompile.graph.dataflow import mutated_tensors, mutates_inputs, reads_graph
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.name_patterns import Selection
from mxcompile.graph.records import PassRecord
from mxcompile.graph.run_by_node import run_by_node
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.exact_packing import pack_exactly
from mxcompile.tensor.mapped_tensors import MappedTensors
from mxcompile.tensor.weight import MXLayout, MXWeight

T = TypeVar("T")
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch.export's name for "no module"

_DYNAMO_ROOT = re.compile(r"^L\['\w+'\]\.?")  # how Dynamo's graphs begin a module path


class Stage(IntEnum):
    """How far a Program is lowered; a pass accepts some stages and may advance it to another."""

    FLOAT = 0
    ROUNDED = 1
    LOWERED = 2
    FUSED = 3


@dataclass(frozen=True)
class Rounding:
    """A weight's values are exactly representable in `format` with these scales (E8M0 bytes `[..., out, blocks]`).

    offsets: where the elements of a 2-D weight were before they were rounded (`rounding_offsets.py`), if that is kept.
    """

    format: MXFormat
    scales: Tensor
    offsets: Tensor | None = None


class ResumeStore(Protocol):
    """Stores the finished parts of a long pass for a later run to resume from: tensors and notes by part name."""

    def load(self, part: str) -> tuple[dict[str, Tensor], list[str]] | None:
        """A finished part, None if it is not finished."""
        ...

    def save(self, part: str, tensors: dict[str, Tensor], notes: list[str]) -> None:
        """Store a finished part."""
        ...


class Program:
    """A traced model.

    graph_module: the graph at its present stage, ATen and `mx::` calls.
    example: the inputs that it was traced with.
    output_heads: names of the output embedding's parameters (lm_head).
    aliases: for each name of a tied parameter, all its names in the user's module.
    rounded: parameter name -> how its values have been rounded; see `set_rounded`.
    batches: calibration data, while a pipeline runs. statistics: (value name, observer name) -> the observed statistic.
    importance: weight name -> mean square of each of its input channels `[in]`, where a pass has measured it.
    formats: weight name -> the format that a pass has chosen for it, None for float. Later passes use it instead of
        their default, unless their overrides match the weight. input_formats: likewise for the input of its matmuls.
    cache: the format of the key/value cache that the graph computes with; None: float.
    origin: the program as traced, once passes have run. outputs: the output tensors on the example inputs, kept while
        passes preserve the function.
    ranks: the processes that share a running pipeline (`calibration/ranks/`), None for one.
    report: called by `track` with how many of how many items a pass has done. loss: the latest of a pass that trains.
    resume: stores what long passes finish.
    mapped: where large tensors are kept in files, None: in memory. See `keep_in_files`.
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
        self.input_formats: dict[str, MXFormat | None] = {}
        self.cache: CacheFormat | None = None
        self.origin: Program | None = None
        self.outputs: dict[str, Tensor] | None = None
        self.ranks: object = None
        self.report: Callable[[int, int], None] | None = None
        self.loss: float | None = None
        self.resume: ResumeStore | None = None
        self.mapped: MappedTensors | None = None
        self._stays_in_memory: frozenset[str] = frozenset()

    @property
    def graph(self) -> Graph:
        """The fx graph."""
        return self.graph_module.graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph at its present stage, without gradients; same arguments and result as the model's forward.

        Every run starts from the same state: what forward writes into buffers is undone, and if it writes to inputs, it
        gets copies.
        """
        inputs = Inputs(args, kwargs)
        self.example.check_fits(inputs)
        if mutates_inputs(self.graph):
            inputs = inputs.cloned()
        with torch.no_grad(), guards_explained(), self.state_kept():
            if self.mapped is None:
                return self.graph_module(*inputs.args, **inputs.kwargs)
            return run_by_node(self.graph_module, self.example.leaves_of(inputs), self.mapped.use)

    @contextmanager
    def state_kept(self) -> Generator[None]:
        """Undo what the block writes into buffers that the graph writes to: `trace` has made them the program's own."""
        buffers = [self.tensor(name) for name in mutated_tensors(self.graph)]
        state = [buffer.detach().clone() for buffer in buffers]
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in zip(buffers, state, strict=True):
                    buffer.copy_(values)

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
        other.batches, other.mapped, other.ranks = self.batches, self.mapped, self.ranks
        other._stays_in_memory = self._stays_in_memory
        other.set_state(self.state())
        return other

    def state(self) -> dict[str, Any]:
        """Everything except the graph, its tensors, and what a running pipeline sets; later changes do not show."""
        kept = (
            "stage",
            "ledger",
            "rounded",
            "statistics",
            "importance",
            "formats",
            "input_formats",
            "cache",
            "origin",
            "outputs",
        )
        return {name: copy.copy(getattr(self, name)) if name != "origin" else self.origin for name in kept}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value if name == "origin" else copy.copy(value))

    def track(self, items: Sequence[T]) -> Iterator[T]:
        """Iterate over the items of a pass's work (segments, batches, matmuls), and report the progress.

        A program whose tensors lie in files gives freed memory back to the system before each.
        """
        for done, item in enumerate(items):
            self.return_freed()
            if self.report is not None:
                self.report(done, len(items))
            yield item

    def return_freed(self) -> None:
        """Give freed memory back to the system, if tensors lie in files: then memory is short."""
        if self.mapped is not None:
            self.mapped.return_freed()

    def parameter_names(self) -> Iterator[str]:
        """Names of the parameters, buffers and constants that the graph reads, in order of appearance."""
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in seen and not reads_graph(node):
                seen.add(str(node.target))
                yield str(node.target)

    def stored_bytes(self) -> int:
        """Bytes of all tensors that the graph reads, each once."""
        stored = map(self.stored, self.parameter_names())
        tensors = [part for each in stored for part in (each.parts if isinstance(each, MXWeight) else (each,))]
        unique = {tensor.data_ptr() or id(tensor): tensor for tensor in tensors}  # meta tensors have no address
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())

    def has_tensor(self, name: str) -> bool:
        """True if the graph module holds a tensor of that name."""
        owner, leaf = self._owner(name)
        return owner is not None and isinstance(getattr(owner, leaf, None), Tensor)

    def tensor(self, name: str) -> Tensor:
        """The parameter, buffer or constant of that full name. Do not write to it: it may be the user's tensor.

        Rounded experts are decoded at each call. A tensor in a file is brought to the device where the graph runs.
        """
        return float_values(self.in_use(self.stored(name)))

    def stored(self, name: str) -> Tensor:
        """What `tensor` returns, but an MXWeight for rounded experts: it has the same shape, dtype and device."""
        owner, leaf = self._owner(name)
        value = None if owner is None else getattr(owner, leaf, None)
        if not isinstance(value, Tensor):
            raise KeyError(f"the program has no tensor {name!r}")
        return value

    def in_use(self, stored: Tensor) -> Tensor:
        """A tensor of the program as the graph reads it: on the device, if its values are kept in files."""
        return stored if self.mapped is None else self.mapped.use(stored)

    def device(self, name: str) -> torch.device:
        """The device where the tensor of that name is used."""
        return self.stored(name).device if self.mapped is None else self.mapped.device

    def keep_in_files(self, mapped: MappedTensors) -> None:
        """Keep large tensors in files from now on, those that passes will set included.

        Buffers that the graph writes to stay in memory, on the device.
        """
        self.mapped, self._stays_in_memory = mapped, frozenset(mutated_tensors(self.graph))
        for name in self.parameter_names():
            self.set_tensor(name, self.stored(name))

    def tensor_bytes(self, name: str) -> int:
        """Bytes of the tensor of that name."""
        tensor = self.stored(name)
        return tensor.numel() * tensor.element_size()

    def is_parameter(self, name: str) -> bool:
        """True for an `nn.Parameter`, False for a buffer or constant."""
        owner, leaf = self._owner(name)
        return owner is not None and isinstance(getattr(owner, leaf, None), nn.Parameter)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replace the tensor of that name, or add one; the old tensor is not written to.

        A new name becomes a parameter if the value is an `nn.Parameter`, else a buffer.
        """
        owner, leaf = self._owner(name, create=True)
        assert owner is not None
        value = self._kept(value, name)
        kind = getattr(owner, leaf, value)
        if value is getattr(owner, leaf, None):
            return
        if isinstance(kind, nn.Parameter):
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        elif hasattr(owner, leaf):
            setattr(owner, leaf, value)
        else:
            owner.register_buffer(leaf, value)

    def set_rounded(self, name: str, rows: Tensor, rounding: Rounding, axis: int) -> None:
        """Replace a weight by its rounded values `[..., out, in]`; axis: the dimension of the weight that is `in`.

        Experts (3-D weights) are stored packed, as `stored` returns them: a rounded float copy of a model of experts
        beside the user's would need as much memory again. Others stay float, since every run of the graph reads them.
        """
        if rows.dim() == 3:
            elements = pack_exactly(rows, rounding.scales, rounding.format)
            self.set_packed(name, elements, rounding, axis, rows.dtype)
        else:
            self.set_tensor(name, (rows if axis == -1 else rows.transpose(-1, -2)).contiguous())
            offsets = None if rounding.offsets is None else self._kept(rounding.offsets)
            self.rounded[name] = Rounding(rounding.format, self._kept(rounding.scales), offsets)

    def set_packed(self, name: str, elements: Tensor, rounding: Rounding, axis: int, dtype: torch.dtype) -> None:
        """`set_rounded` of experts that are packed already; elements: uint8 `[experts, out, bytes]`."""
        size = int(self.stored(name).shape[axis])
        layout = MXLayout(str(rounding.format), size, axis == -2)
        scales = self._kept(rounding.scales)
        self.set_tensor(name, MXWeight(elements, scales, layout, dtype))
        self.rounded[name] = Rounding(rounding.format, scales)

    def erase_tensor_node(self, node: Node) -> None:
        """Erase a `get_attr` without readers, and delete its tensor if no other node reads it."""
        name = str(node.target)
        self.graph.erase_node(node)
        if name not in self.parameter_names():
            owner, leaf = self._owner(name)
            delattr(owner, leaf)

    def drop_unread(self) -> None:
        """Delete every tensor and nested graph that no node reads, and recompile the graph."""
        read = set(self.parameter_names())
        called = {str(node.target) for node in self.graph.nodes if node.op == "call_module" or reads_graph(node)}
        for name, module in list(self.graph_module.named_children()):
            if isinstance(module, GraphModule) and name not in called:
                delattr(self.graph_module, name)
        nested = tuple(f"{name}." for name in called)
        for path, module in self.graph_module.named_modules():
            if f"{path}.".startswith(nested):
                continue
            prefix = f"{path}." if path else ""
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for leaf, _ in own:
                if prefix + leaf not in read:
                    delattr(module, leaf)
        self.graph_module.recompile()

    def _kept(self, value: Tensor, name: str = "") -> Tensor:
        if self.mapped is None:
            return value
        return value.to(self.mapped.device) if name in self._stays_in_memory else self.mapped.keep(value)

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


def float_values(tensor: Tensor) -> Tensor:
    """The values of a stored tensor: those of an MXWeight, decoded, or the tensor itself."""
    return tensor.dequantize() if isinstance(tensor, MXWeight) else tensor


@contextmanager
def guards_explained() -> Generator[None]:
    """Raise an InputError where a guard (a size that the graph is specialised to) or an operator of the graph fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of an operator: another dtype or device
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"the traced graph fails on these inputs: {reason}; trace again with inputs of this kind"
        ) from (error)
    except AssertionError as error:
        if "Guard failed" not in str(error):
            raise
        raise InputError(
            f"these inputs do not fit the traced graph ({error}); trace again with inputs of this kind"
        ) from error


def module_path(node: Node) -> str:
    """Dotted path of the user's module whose forward the node comes from ("" for the top module)."""
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return "" if path == _NO_MODULE else _DYNAMO_ROOT.sub("", path)


def _copy_graph(graph: Graph) -> Graph:
    """The same nodes in a new graph; the codegen, which defines the calling convention, is shared."""
    copied = Graph()
    outputs = copied.graph_copy(graph, {})
    copied.output(outputs)
    copied.set_codegen(graph._codegen)  # pyright: ignore[reportPrivateUsage] - there is a setter, but no getter
    return copied


def where(node: Node) -> str:
    """A node's name and module path, for messages: `%linear in model.layers.0.mlp.up_proj`."""
    path = module_path(node)
    return f"%{node.name} in {path}" if path else f"%{node.name}"
