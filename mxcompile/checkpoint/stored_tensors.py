"""A module's tensors as a file can hold them: plain, named, each once; and the module's tensors made of them again.

    q_proj.weight (MXWeight) -> q_proj.weight, q_proj.weight.scales, q_proj.weight.multiplier

Elements take the parameter's own name, `[..., out, blocks, bytes]`: one dimension more than the weight, so that a
reader that knows nothing of MX refuses them by their shape. A parameter is no module, so none of the module's tensors
can have a name below its own. What is held under several names (a tied head, a multiplier that q, k and v share) is
stored under the first.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxcompile.errors import CheckpointError
from mxcompile.formats import parse_format
from mxcompile.tensor.modules import own_tensors
from mxcompile.tensor.weight import MXLayout, MXWeight

_LISTED = 3


@dataclass(frozen=True)
class Packing:
    """What the bytes of a stored MX weight mean. dtype: of the weight that it stands for."""

    layout: MXLayout
    dtype: torch.dtype

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the weight's parts, its own for the elements."""
        names = (name, f"{name}.scales")
        return names if self.layout.multiplier is None else (*names, f"{name}.multiplier")


@dataclass(frozen=True)
class Names:
    """What a module's tensors are made of.

    plain: tensors that are stored as they are. weights: MX weights. aliases: for a name that shares another's stored
    tensor, that one. temporary: those of `plain` that are buffers outside of the module's state dict.
    """

    plain: tuple[str, ...]
    weights: Mapping[str, Packing]
    aliases: Mapping[str, str]
    temporary: frozenset[str]

    def sources(self, names: Iterable[str]) -> list[str]:
        """The stored tensors behind names."""
        return [self.aliases.get(name, name) for name in names]

    def stored(self) -> set[str]:
        """Names of all stored tensors."""
        parts = [part for name, packing in self.weights.items() for part in packing.parts(name)]
        return set(self.sources((*self.plain, *parts)))


def take_apart(module: nn.Module) -> tuple[Names, dict[str, Tensor]]:
    """How a module's tensors are made up of stored ones, and these by name.

    Raises CheckpointError if the module holds something that cannot be stored.
    """
    _check_state(module)
    plain: list[str] = []
    weights: dict[str, Packing] = {}
    aliases: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    first: dict[object, str] = {}
    for name, tensor in own_tensors(module).items():
        if isinstance(tensor, MXWeight):
            weights[name] = Packing(tensor.layout_, tensor.dtype)
        else:
            plain.append(name)
        for part in tensor.parts if isinstance(tensor, MXWeight) else (tensor,):
            _check_storable(name, part)
        for part, values, identity in _parts(name, tensor):
            known = first.setdefault(identity, part)
            if known == part:
                stored[part] = values
            else:
                aliases[part] = known
    return Names(tuple(plain), weights, aliases, frozenset(_temporary(module))), stored


def put_together(names: Names, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's tensors, made of stored ones; names of one tensor have one object.

    Raises CheckpointError if parts do not fit each other.
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


def check_fits(module: nn.Module, names: Names, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a module does not have the same tensors; temporary buffers may come and go."""
    own, kind, free = own_tensors(module), type(module).__name__, {*names.temporary, *_temporary(module)}
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
        raise CheckpointError(
            f"{kind} does not have the saved tensors ({listed}): build it as it was when it was saved"
        )


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor, object]]:
    """The tensors to store for one of the module's: name, values, and what is equal for those to be stored once."""
    if not isinstance(tensor, MXWeight):
        yield name, tensor, _memory(name, tensor)
        return
    layout = tensor.layout_
    blocks = tensor.elements.unflatten(-1, (-1, parse_format(layout.format).block_bytes))
    names = Packing(layout, tensor.dtype).parts(name)
    for part, values in zip(names, (blocks, *tensor.parts[1:]), strict=True):
        is_multiplier = values is tensor.multiplier
        yield part, values, (layout.multiplier, tensor.dtype) if is_multiplier else _memory(part, values)


def _weight(name: str, packing: Packing, parts: list[Tensor]) -> MXWeight:
    layout = packing.layout
    fmt = parse_format(layout.format)
    elements, scales = parts[:2]
    blocks = fmt.blocks(layout.size)
    if scales.dtype != torch.uint8 or scales.dim() < 2 or scales.shape[-1] != blocks:
        raise CheckpointError(f"{name} has scales {list(scales.shape)}: {layout.size} values of {fmt} have {blocks}")
    wanted = [*scales.shape, fmt.block_bytes]
    if elements.dtype != torch.uint8 or list(elements.shape) != wanted:
        raise CheckpointError(f"{name} has elements {list(elements.shape)}, its scales are for {wanted}")
    for multiplier in parts[2:]:
        if multiplier.dtype != packing.dtype or list(multiplier.shape) != [layout.size]:
            raise CheckpointError(f"{name} has a multiplier that is not {layout.size} values of {packing.dtype}")
    return MXWeight(elements.flatten(-2), scales, layout, packing.dtype, *parts[2:])


def _memory(name: str, tensor: Tensor) -> object:
    """Equal for tensors on the same memory; the name for one without any."""
    if tensor.numel() == 0:
        return name
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _check_storable(name: str, tensor: Tensor) -> None:
    kind = type(tensor)
    if tensor.device.type == "meta":
        raise CheckpointError(f"{name} is on the meta device and has no values: load the model before saving it")
    if kind not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{name} is a {kind.__name__} ({tensor.layout}): a checkpoint holds MX weights and plain tensors"
        )


def _check_state(module: nn.Module) -> None:
    """Raise CheckpointError for state outside of tensors."""
    for path, child in module.named_modules():
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{path or 'the module'} ({type(child).__name__}) keeps state of its own (get_extra_state), which a "
                "checkpoint of tensors cannot hold"
            )


def _temporary(module: nn.Module) -> Iterator[str]:
    """Names of buffers that are not in the state dict."""
    for path, child in module.named_modules(remove_duplicate=False):
        for leaf in child._non_persistent_buffers_set:  # pyright: ignore[reportPrivateUsage] - there is no other way
            if isinstance(getattr(child, leaf, None), Tensor):
                yield f"{path}.{leaf}" if path else leaf
