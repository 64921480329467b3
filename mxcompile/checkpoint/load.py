"""Load a checkpoint; `mxcompile.load` also compiles it."""

from collections.abc import Collection
from pathlib import Path
from threading import RLock
from typing import Final, TypeVar, overload

from torch import Tensor, nn

from mxcompile.checkpoint.hf.registration import mark_quantized
from mxcompile.checkpoint.hub import find_folder
from mxcompile.checkpoint.interop import foreign
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.stored_tensors import check_fits
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import named_tensors, set_tensors

M = TypeVar("M", bound=nn.Module)
_ONE_AT_A_TIME: Final = RLock()
"""While transformers (5.17 to 5.24) builds a model it replaces methods of its classes: two threads that load at a time
would leave `tie_weights` without effect for the rest of the process."""


@overload
def load(path: str | Path, *, model: M, verify: bool = True) -> M: ...
@overload
def load(path: str | Path, *, model: None = None, verify: bool = True) -> nn.Module: ...
def load(path: str | Path, *, model: nn.Module | None = None, verify: bool = True) -> nn.Module:
    """The module that `save` wrote, in eval mode. Its tensors are memory-mapped: pages are read when first touched.

    Other projects' checkpoints are loaded too, in the formats of `interop`. path: a folder or file, or a hub id.
    Threads that load take turns.
    """
    with _ONE_AT_A_TIME:
        return _load_latest(find_folder(path), model, verify)


def _load_latest(path: Path, model: nn.Module | None, verify: bool) -> nn.Module:
    if foreign.is_foreign(path):
        loaded = foreign.load(path, model)
        mark_quantized(loaded, None)
        return loaded
    while True:
        checkpoint = Checkpoint(path, verify=verify)
        try:
            loaded = _load(checkpoint, model)
        except CheckpointError:
            if not checkpoint.was_replaced():
                raise
        else:
            if not checkpoint.was_replaced():  # else its generation config may be the other's
                return loaded


def _load(checkpoint: Checkpoint, model: nn.Module | None) -> nn.Module:
    if model is not None:
        return _fill(model, checkpoint)
    if "model_type" not in checkpoint.config.model_config:
        raise CheckpointError(
            f"{checkpoint.folder} holds a {checkpoint.config.class_name}, which is not a transformers model: build one "
            "yourself (on the meta device, if you like) and pass it: load(path, model=...)"
        )
    from mxcompile.checkpoint.hf.models import build  # imports transformers

    return build(checkpoint)


def _fill(model: M, checkpoint: Checkpoint) -> M:
    """Put the saved tensors into a module of the same class; it is unchanged if they do not all fit."""
    kind = type(model).__name__
    if kind != checkpoint.config.class_name:
        raise CheckpointError(f"{checkpoint.folder} holds a {checkpoint.config.class_name}, `model` is a {kind}")
    tensors = checkpoint.tensors()
    check_fits(model, checkpoint.names, tensors)
    _check_values(model, tensors)
    own = named_tensors(model)
    set_tensors(model, [(name, tensor) for name, tensor in tensors.items() if name in own])
    mark_quantized(model.requires_grad_(False).eval(), checkpoint.config.provenance)
    return model


def _check_values(model: nn.Module, tensors: Collection[str]) -> None:
    """Raise CheckpointError if a tensor of the module would stay on the meta device."""
    left = [name for name, tensor in named_tensors(model).items() if name not in tensors and tensor.is_meta]
    for path, child in model.named_modules():
        plain = (name for name, value in vars(child).items() if isinstance(value, Tensor) and value.is_meta)
        left += [f"{path}.{name}".removeprefix(".") for name in plain]
    if left:
        raise CheckpointError(
            f"{', '.join(left)} of `model` is on the meta device and is not a saved parameter or buffer: build the "
            "model on the CPU"
        )
