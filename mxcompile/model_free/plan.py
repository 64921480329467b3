"""What will be done to each tensor of a checkpoint, known before the work."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from mxcompile.checkpoint.source_files import SourceFiles
from mxcompile.formats import ScaleRule
from mxcompile.tensor.dtypes import torch_name
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXWeight

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorPlan:
    """What will be done to a tensor.

    format: of the weight, or its dtype if it stays float. input: format to which its matmul's input is rounded.
    reason: why it stays float, "" for a weight that is quantized. before, after: its bytes in the files.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    input: str | None
    reason: str
    before: int
    after: int


@dataclass(frozen=True)
class FilesPlan:
    """What will be done to a checkpoint.

    module: the result, its tensors on the meta device. rules: scale rules of weights that are not rounded by `rule`.
    guessed: why shapes and names decide what is quantized, None if the traced model does. notes: what is decoded, left
    out or otherwise worth knowing.
    """

    source: SourceFiles
    recipe: str
    module: nn.Module
    rule: ScaleRule
    rules: Mapping[str, ScaleRule] = field(default_factory=dict[str, ScaleRule])
    reasons: Mapping[str, str] = field(default_factory=dict[str, str])
    guessed: str | None = None

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """The tensors that come from the files, in the order of the module; one of several names once."""
        seen: dict[int, str] = {}
        names = set(self.source.names)
        return tuple(
            self._plan(name, value)
            for name, value in named_tensors(self.module).items()
            if name in names and seen.setdefault(id(value), name) == name
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing besides the tensors."""
        notes = list(self.source.notes)
        if self.guessed is not None:
            notes.append(f"chosen by shapes and names: {self.guessed}")
        unused = list(self.source.unused)
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            notes.append(f"left out, as {type(self.module).__name__} has no place for it: {unused[0]}{more}")
        return tuple(notes)

    def groups(self) -> dict[str, list[TensorPlan]]:
        """The tensors with equal plans together, by a name in which their numbers are `*`."""
        groups: dict[tuple[object, ...], list[TensorPlan]] = {}
        for each in self.tensors:
            key = (_NUMBER.sub("*", each.name), each.shape, each.format, each.input, _NUMBER.sub("*", each.reason))
            groups.setdefault(key, []).append(each)
        named: dict[str, list[TensorPlan]] = {}
        for key, members in groups.items():
            name = str(key[0]) if len(members) > 1 else members[0].name
            named.setdefault(name if name not in named else members[0].name, []).extend(members)
        return named

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tensors = self.tensors
        return {
            "source": str(self.source.folder),
            "module": type(self.module).__name__,
            "recipe": self.recipe,
            "notes": list(self.notes),
            "before": sum(each.before for each in tensors),
            "after": sum(each.after for each in tensors),
            "tensors": [asdict(each) for each in tensors],
        }

    def _plan(self, name: str, value: Any) -> TensorPlan:
        shape, before = tuple(value.shape), self.source.stored_bytes(name)
        if isinstance(value, MXWeight):
            layout = value.layout_
            return TensorPlan(name, shape, layout.format, layout.activation, "", before, value.packed_bytes)
        reason = self.reasons.get(name) or ("no matmul multiplies by it" if len(shape) > 1 else "not a matrix")
        return TensorPlan(name, shape, torch_name(value.dtype), None, reason, before, value.nbytes)
