"""`mxcompile.load`, without the compiling."""

from collections.abc import Collection
from pathlib import Path
from typing import TypeVar, overload

from torch import Tensor, nn

from mxcompile.checkpoint.interop import foreign
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.save import adopt
from mxcompile.checkpoint.stored_tensors import check_fits
from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import own_tensors, place_all

M = TypeVar("M", bound=nn.Module)


@overload
def load(path: str | Path, *, model: M, verify: bool = True) -> M: ...
@overload
def load(path: str | Path, *, model: None = None, verify: bool = True) -> nn.Module: ...
def load(path: str | Path, *, model: nn.Module | None = None, verify: bool = True) -> nn.Module:
    """The module that `save` wrote, in eval mode, on mapped files: pages are read when they are touched.

    Or the model of another project's checkpoint, in `interop`'s formats.
    """
    if foreign.is_foreign(Path(path)):
        loaded = foreign.load(Path(path), model)
        adopt(loaded, None)
        return loaded
    checkpoint = Checkpoint(path, verify=verify)
    if model is not None:
        return _fill(model, checkpoint)
    if "model_type" not in checkpoint.card.config:
        raise CheckpointError(
            f"{path} holds a {checkpoint.card.module} that is no model of transformers: build one (on the meta device, "
            "if you like) and give load(path, model=...)"
        )
    from mxcompile.checkpoint.hf_models import build  # imports transformers

    return build(checkpoint)


def _fill(model: M, checkpoint: Checkpoint) -> M:
    """Put the saved tensors into a module of the same class; nothing happens to it if they do not all fit."""
    kind = type(model).__name__
    if kind != checkpoint.card.module:
        raise CheckpointError(f"{checkpoint.folder} holds a {checkpoint.card.module}, the model given is a {kind}")
    tensors = checkpoint.tensors()
    check_fits(model, checkpoint.names, tensors)
    _check_values(model, tensors)
    own = own_tensors(model)
    place_all(model, [(name, tensor) for name, tensor in tensors.items() if name in own])
    adopt(model.requires_grad_(False).eval(), checkpoint.card.provenance)
    return model


def _check_values(model: nn.Module, tensors: Collection[str]) -> None:
    """Raise CheckpointError if something of a module on the meta device would stay there."""
    left = [name for name, tensor in own_tensors(model).items() if name not in tensors and tensor.is_meta]
    for path, child in model.named_modules():
        plain = (name for name, value in vars(child).items() if isinstance(value, Tensor) and value.is_meta)
        left += [f"{path}.{name}".removeprefix(".") for name in plain]
    if left:
        raise CheckpointError(
            f"{', '.join(left)} of the model given is on the meta device, and no parameter or buffer that was saved: "
            "build the model on the CPU"
        )
