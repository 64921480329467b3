"""Module tensors <-> the plain tensors of a file: MX weights are stored as their component tensors, each tensor once.

    q_proj.weight (MXWeight) <-> q_proj.weight, q_proj.weight.scales, q_proj.weight.multiplier

Elements are stored under the parameter's own name as `[..., out, blocks, bytes]`, with one dimension more than the
weight, so that a reader without MX support rejects them by their shape. `q_proj.weight.scales` cannot collide with a
name in the module, since a parameter is not a module. A tensor with several names (a tied head, a multiplier that q, k
and v share) is stored under the first.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.shards import PendingTensor
from mxcompile.errors import CheckpointError
from mxcompile.formats import parse_format
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXLayout, MXWeight

_LISTED = 3
Stored = Tensor | PendingTensor


@dataclass(frozen=True)
class WeightPacking:
    """How to read the bytes of a stored MX weight. dtype: of the values that it dequantizes to."""

    layout: MXLayout
    dtype: torch.dtype

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the stored component tensors; the elements have the weight's own name."""
        names = (name, f"{name}.scales")
        return names if self.layout.multiplier is None else (*names, f"{name}.multiplier")


@dataclass(frozen=True)
class TensorNames:
    """Under which names a module's tensors are stored.

    plain: tensors that are stored as they are. weights: MX weights. aliases: name -> the name under which the shared
    tensor is stored. non_persistent: those of `plain` that are buffers outside of the module's state dict.
    """

    plain: tuple[str, ...]
    weights: Mapping[str, WeightPacking]
    aliases: Mapping[str, str]
    non_persistent: frozenset[str]

    def sources(self, names: Iterable[str]) -> list[str]:
        """For each name, the name under which its tensor is stored."""
        return [self.aliases.get(name, name) for name in names]

    def stored(self) -> set[str]:
        """Names of all stored tensors."""
        parts = [part for name, packing in self.weights.items() for part in packing.parts(name)]
        return set(self.sources((*self.plain, *parts)))


def flatten_module(module: nn.Module, *, with_values: bool = True) -> tuple[TensorNames, dict[str, Stored]]:
    """The tensors to store for a module, by name, and how the module's tensors are made of them.

    Those of a planar weight are made, in the row-major layout, when they are written.

    with_values: False accepts tensors on the meta device, whose values come from elsewhere.
    Raises CheckpointError if the module holds something that cannot be stored.
    """
    _check_state(module)
    plain: list[str] = []
    weights: dict[str, WeightPacking] = {}
    aliases: dict[str, str] = {}
    stored: dict[str, Stored] = {}
    first: dict[object, str] = {}
    row_major = _RowMajor()
    for name, tensor in named_tensors(module, row_major=False).items():
        if isinstance(tensor, MXWeight):
            weights[name] = packing_of(tensor)
        else:
            plain.append(name)
        for part in tensor.parts if isinstance(tensor, MXWeight) else (tensor,):
            _check_storable(name, part, with_values)
        for part, values, identity in _components(name, tensor, row_major):
            stored_name = first.setdefault(identity, part)
            if stored_name == part:
                stored[part] = values
            else:
                aliases[part] = stored_name
    return TensorNames(tuple(plain), weights, aliases, frozenset(_non_persistent(module))), stored


def flatten_tensor(name: str, tensor: Tensor) -> dict[str, Stored]:
    """The tensors to store for one of a module's tensors, by the names that they get if it shares none of them."""
    return {part: values for part, values, _ in _components(name, tensor, _RowMajor())}


def unflatten_tensors(names: TensorNames, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's tensors, made of stored ones; several names of one tensor share one object.

    Raises CheckpointError if the component tensors of a weight do not fit each other.
    """
    made: dict[object, Tensor] = {}
    tensors = {name: stored[source] for name, source in zip(names.plain, names.sources(names.plain), strict=True)}
    for name, packing in names.weights.items():
        sources = names.sources(packing.parts(name))
        key = (*sources, packing)
        if key not in made:
            made[key] = _weight(name, packing, [stored[source] for source in sources])
        tensors[name] = made[key]
    return tensors


def check_fits(module: nn.Module, names: TensorNames, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a module does not have the same tensors; non-persistent buffers may differ."""
    own, kind, free = named_tensors(module), type(module).__name__, {*names.non_persistent, *_non_persistent(module)}
    differences = {
        "only saved": [name for name in tensors if name not in own and name not in free],
        f"only in {kind}": [name for name in own if name not in tensors and name not in free],
        "of another shape": [
            f"{name} {list(value.shape)}, not {list(own[name].shape)}"
            for name, value in tensors.items()
            if name in own and name not in free and own[name].shape != value.shape
        ],
    }
    if any(differences.values()):
        listed = "; ".join(
            f"{what}: {', '.join(which[:_LISTED])}{' ...' if len(which) > _LISTED else ''}"
            for what, which in differences.items()
            if which
        )
        raise CheckpointError(f"{kind} does not have the saved tensors ({listed}): build it as it was when saved")


class _RowMajor:
    """Row-major copies of planar weights. The last one is kept, as its parts are written one after the other."""

    def __init__(self) -> None:
        self._last: tuple[MXWeight, MXWeight] | None = None

    def __call__(self, weight: MXWeight) -> MXWeight:
        """The weight in the row-major layout."""
        if self._last is None or self._last[0] is not weight:
            self._last = None  # it is freed before the next is made
            self._last = weight, weight.to_row_major()
        return self._last[1]


def packing_of(weight: MXWeight) -> WeightPacking:
    """How to read the weight once it is stored, which is always in the row-major layout."""
    return WeightPacking(replace(weight.layout_, planes=None), weight.dtype)


def _components(name: str, tensor: Tensor, row_major: _RowMajor) -> Iterator[tuple[str, Stored, object]]:
    """The tensors to store for one of the module's: name, values, and a key that is equal for shared tensors."""
    if not isinstance(tensor, MXWeight):
        yield name, tensor, _memory(name, tensor)
        return
    packing = packing_of(tensor)
    values = (*_elements_and_scales(tensor, row_major), *tensor.parts[2:])
    for part, stored, own in zip(packing.parts(name), values, tensor.parts, strict=True):
        is_multiplier = own is tensor.multiplier
        yield part, stored, (packing.layout.multiplier, tensor.dtype) if is_multiplier else _memory(part, own)


def _elements_and_scales(weight: MXWeight, row_major: _RowMajor) -> tuple[Stored, Stored]:
    """Elements `[..., out, blocks, bytes]` and scales `[..., out, blocks]`; those of a planar weight are made later."""
    fmt = parse_format(weight.layout_.format)
    if weight.layout_.planes is None:
        return weight.elements.unflatten(-1, (-1, fmt.block_bytes)), weight.scales
    shape = torch.Size((*weight.elements.shape[:-1], fmt.blocks(weight.layout_.size)))

    def elements() -> Tensor:
        return row_major(weight).elements.unflatten(-1, (-1, fmt.block_bytes))

    return (
        PendingTensor(torch.uint8, torch.Size((*shape, fmt.block_bytes)), elements),
        PendingTensor(torch.uint8, shape, lambda: row_major(weight).scales),
    )


def _weight(name: str, packing: WeightPacking, parts: list[Tensor]) -> MXWeight:
    layout = packing.layout
    fmt = parse_format(layout.format)
    elements, scales = parts[:2]
    blocks = fmt.blocks(layout.size)
    if scales.dtype != torch.uint8 or scales.dim() < 2 or scales.shape[-1] != blocks:
        raise CheckpointError(
            f"{name} has scales {list(scales.shape)}: a row of {layout.size} values in {fmt} has {blocks} scales"
        )
    expected = [*scales.shape, fmt.block_bytes]
    if elements.dtype != torch.uint8 or list(elements.shape) != expected:
        raise CheckpointError(f"{name} has elements {list(elements.shape)}, its scales need {expected}")
    for multiplier in parts[2:]:
        if multiplier.dtype != packing.dtype or (*multiplier.shape,) != layout.multiplier_shape:
            expected = list(layout.multiplier_shape)
            raise CheckpointError(f"{name} has a multiplier that is not {expected} values of {packing.dtype}")
    return MXWeight(elements.flatten(-2), scales, layout, packing.dtype, *parts[2:])


def _memory(name: str, tensor: Tensor) -> object:
    """Equal for tensors that are views of the same memory in the same way; the name for an empty tensor.

    On the meta device there is no memory: equal for one tensor.
    """
    if tensor.numel() == 0:
        return name
    if tensor.is_meta:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _check_storable(name: str, tensor: Tensor, with_values: bool) -> None:
    kind = type(tensor)
    if with_values and tensor.device.type == "meta":
        raise CheckpointError(f"{name} is on the meta device and has no values: load the model before saving it")
    if kind not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{name} is a {kind.__name__} ({tensor.layout}): checkpoints hold MX weights and plain dense tensors only"
        )


def _check_state(module: nn.Module) -> None:
    """Raise CheckpointError for state that is not in tensors."""
    for path, child in module.named_modules():
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{path or 'the module'} ({type(child).__name__}) has extra state (get_extra_state), which a "
                "checkpoint of tensors cannot hold"
            )


def _non_persistent(module: nn.Module) -> Iterator[str]:
    """Names of buffers that are not in the state dict."""
    for path, child in module.named_modules(remove_duplicate=False):
        for leaf in child._non_persistent_buffers_set:  # pyright: ignore[reportPrivateUsage] - no public API
            if isinstance(getattr(child, leaf, None), Tensor):
                yield f"{path}.{leaf}" if path else leaf
