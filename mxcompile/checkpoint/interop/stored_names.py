"""The names and rows under which other programs store the tensors of a model: experts one by one.

    experts.gate_up_proj [experts, 2 * inner, hidden] <-> experts.0.gate_proj.weight [inner, hidden], 0.up_proj, ...

A model has its experts in one parameter; files of other programs have a tensor for each, under the published names.
transformers knows how to split one into the other (`revert_weight_conversion`). It is asked with the numbers of the
rows in place of the tensor, in two columns, since some versions drop a dimension of one: what it does to rows is then
done to elements and scales alike.

Experts that were published as one tensor (gpt-oss, Llama-4, GraniteMoE) have no such names. They get those of
llm-compressor, which makes an `nn.Linear` of each projection: `experts.0.gate_proj`, gpt-oss' even rows for gate and
odd ones for up, with `.bias` (llmcompressor/modeling/moe/gpt_oss.py, linear_experts.py, llama4.py, of 2026). vLLM's
loader has these names for Llama-4 (models/llama4.py), and w1, w3, w2 for GraniteMoE (models/granitemoe.py).
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.interop.fused_experts import MIXTRAL_NAMES, FusedTensor, expert_of, fused_tensors
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import is_pretrained, named_tensors
from mxcompile.tensor.weight import MXWeight

_COLUMNS: Final = 2
_CONVERSIONS: Final = "_weight_conversions"  # of the files a model was loaded from, which may have had other names
_MIXTRAL_NAMED: Final = "GraniteMoe"
"""Beginning of the names of classes whose experts vLLM reads under Mixtral's names."""


@dataclass(frozen=True)
class StoredParts:
    """Under which names a tensor of a model is stored.

    rows: name -> the rows stored there, counted over all leading dimensions: int64 `[rows]`; None: the whole tensor.
    experts: name -> (projection, expert) of a fused tensor whose projections are stored one by one; else empty.
    """

    rows: Mapping[str, Tensor | None]
    experts: Mapping[str, tuple[str, int]]
    fused: FusedTensor | None = None

    @property
    def names(self) -> list[str]:
        """The stored names."""
        return [*self.rows, *self.experts]

    @property
    def are_experts(self) -> bool:
        """Whether experts are stored one by one."""
        return bool(self.experts) or None not in self.rows.values()

    def take(self, value: Tensor, name: str) -> Tensor:
        """What of the tensor is stored under a name: all of it, or a weight `[rows, width]`, or a bias `[rows]`."""
        if self.fused is not None:
            projection, number = self.experts[name]
            return expert_of(self.fused.split(value)[projection], number)
        rows = self.rows[name]
        if rows is None:
            return value
        if not isinstance(value, MXWeight):
            return value.flatten(0, -2)[rows]
        elements, scales = value.elements.flatten(0, -2)[rows], value.scales.flatten(0, -2)[rows]
        return MXWeight(elements, scales, value.layout_, value.dtype)

    def shape_of(self, value: Tensor, name: str) -> torch.Size:
        """The shape of what `take` returns."""
        if self.fused is not None:
            return self.fused.split(value)[self.experts[name][0]].shape[1:]
        rows = self.rows[name]
        return value.shape if rows is None else torch.Size((len(rows), value.shape[-1]))

    def join(self, source: str, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """The tensor, of that shape, from what is stored under all names.

        Raises CheckpointError, beginning with `source`, if the parts do not fit together.
        """
        if self.fused is None:
            return _join(source, parts, self.rows, shape)
        lists: dict[str, list[Tensor]] = {}
        for name, (projection, _) in self.experts.items():
            lists.setdefault(projection, []).append(parts[name])
        return self.fused.join(source, lists, shape)


def stored_parts(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, StoredParts]:
    """Where the tensors of these names and shapes are stored; a module of your own has them under its own names.

    A tensor that transformers stores in another way than by rows keeps its own name.
    """
    if not is_pretrained(module):
        return {name: StoredParts({name: None}, {}) for name in shapes}
    fused = fused_tensors(module)
    stored = _published(module, shapes)
    for name, parts in stored.items():
        if name in fused and not parts.are_experts:
            owner = module.get_submodule(fused[name].path)
            mixtral = any(kind.__name__.startswith(_MIXTRAL_NAMED) for kind in type(owner).__mro__)
            names = MIXTRAL_NAMES if mixtral else {}
            stored[name] = _one_by_one(fused[name], fused[name].path, shapes[name][0], names)
    return stored


def published_names(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name of a module's tensor -> the name under which the model is published, for tensors published unchanged.

    Mixtral's `mlp.gate.weight` is published as `block_sparse_moe.gate.weight`. Experts, which are published one by one,
    are left out. The module may be on the meta device.
    """
    own = named_tensors(module)
    shapes = {name: own[name].shape for name in names if name in own}
    stored = _published(module, shapes) if is_pretrained(module) else {}
    return {name: parts.names[0] for name, parts in stored.items() if not parts.are_experts}


def _published(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, StoredParts]:
    from transformers.core_model_loading import revert_weight_conversion

    fresh: Any = copy.copy(module)
    vars(fresh).pop(_CONVERSIONS, None)
    stored: dict[str, StoredParts] = {}
    for name, shape in shapes.items():
        leading = shape[:-1] if len(shape) > 1 else (1,)
        numbers = torch.arange(torch.Size(leading).numel()).view(*leading, 1).repeat_interleave(_COLUMNS, -1)
        parts: dict[str, Tensor] = revert_weight_conversion(fresh, {name: numbers})
        rows: dict[str, Tensor | None] = {name: None}
        if all(part.shape == numbers.shape and torch.equal(part, numbers) for part in parts.values()):
            rows = {next(iter(parts)): None}
        elif all(_keeps_rows(part) for part in parts.values()):
            rows = {part: rows.view(-1, _COLUMNS)[:, 0] for part, rows in parts.items()}
        stored[name] = StoredParts(rows, {})
    return stored


def _one_by_one(fused: FusedTensor, path: str, experts: int, names: Mapping[str, str]) -> StoredParts:
    """A fused tensor stored as a Linear for each projection of each expert, under that path."""
    parts = {
        f"{path}.{number}.{names.get(projection, projection)}.{fused.leaf}": (projection, number)
        for number in range(experts)
        for projection in fused.projections
    }
    return StoredParts({}, parts, fused)


def _keeps_rows(part: Tensor) -> bool:
    """Whether a part is `[rows, columns]`, or `[columns]` of one row, and each row is one of the tensor's."""
    return part.dim() in (1, 2) and part.shape[-1] == _COLUMNS and bool((part == part[..., :1]).all())


def join_experts(source: str, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give stored tensors the model's own names: experts are joined to one parameter, MX weights to one MXWeight.

    Experts are looked for under their published names, then as the Linears that llm-compressor makes of them. Those of
    a parameter leave `tensors` when it is joined, so that no more than one of them exists twice.
    Raises CheckpointError if one of several experts is missing, or if they differ in format or shape.
    """
    own = named_tensors(model)
    if all(name in own for name in tensors):
        return
    available = sum(torch.Size(tensor.shape[:-1]).numel() for tensor in tensors.values())
    shapes = {name: tensor.shape for name, tensor in own.items() if name not in tensors}
    shapes = {name: shape for name, shape in shapes.items() if torch.Size(shape[:-1]).numel() <= available}
    for name, candidates in _candidates(model, shapes).items():
        for stored in candidates:
            parts = {part: tensors[part] for part in stored.names if part in tensors}
            if not parts or set(stored.names) == {name}:
                continue
            missing = [part for part in stored.names if part not in parts]
            if missing:
                raise CheckpointError(f"{source} does not hold {missing[0]}, which belongs to {name}")
            for part in parts:
                del tensors[part]
            tensors[name] = stored.join(f"{source}: {name}", parts, own[name].shape)
            break


def _candidates(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, list[StoredParts]]:
    """The ways in which each tensor may be stored."""
    fused = fused_tensors(model) if is_pretrained(model) else {}
    candidates: dict[str, list[StoredParts]] = {}
    for name, parts in stored_parts(model, shapes).items():
        candidates[name] = [parts]
        if name in fused:
            path = fused[name].path
            leaf = path.rpartition(".")[2]
            published = parts.names[0].partition(f".{leaf}.")[0]
            for stored_path in dict.fromkeys((path, f"{published}.{leaf}")):
                candidates[name].append(_one_by_one(fused[name], stored_path, shapes[name][0], {}))
    return candidates


def _join(name: str, parts: Mapping[str, Tensor], rows_of: Mapping[str, Tensor | None], shape: torch.Size) -> Tensor:
    first = next(iter(parts.values()))
    rows = {part: numbers for part, numbers in rows_of.items() if numbers is not None}
    if not rows:
        return first
    for part, value in parts.items():
        expected = (len(rows[part]), shape[-1])
        if type(value) is not type(first) or value.dtype != first.dtype or tuple(value.shape) != expected:
            raise CheckpointError(
                f"{name}: {part} is {list(value.shape)} ({value.dtype}, {type(value).__name__}), which does not fit "
                "the others that belong there"
            )
        if isinstance(value, MXWeight) and isinstance(first, MXWeight) and value.layout_ != first.layout_:
            raise CheckpointError(f"{name}: {part} is in {value.layout_.format}, others that belong there are not")
    weights = [value for value in parts.values() if isinstance(value, MXWeight)]
    if not weights:
        return _placed(list(parts.values()), rows, shape)
    elements = _placed([weight.elements for weight in weights], rows, shape)
    scales = _placed([weight.scales for weight in weights], rows, shape)
    return MXWeight(elements, scales, weights[0].layout_, weights[0].dtype)


def _placed(parts: list[Tensor], rows_of: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    joined = torch.empty(torch.Size(shape[:-1]).numel(), parts[0].shape[-1], dtype=parts[0].dtype)
    for part, rows in zip(parts, rows_of.values(), strict=True):
        joined[rows] = part
    return joined.view(*shape[:-1], -1)
