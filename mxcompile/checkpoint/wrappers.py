"""Find the model inside a wrapper, and refuse one whose tensors have names that no reader would look for."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from mxcompile.errors import CheckpointError
from mxcompile.tensor.modules import is_pretrained

_COMPILED = "_orig_mod"  # what torch.compile calls the module in its wrapper


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, which `torch.compile`, DataParallel or DistributedDataParallel may have wrapped.

    Raises CheckpointError for a model with adapters of peft, offloaded weights or sharded ones, and for a transformers
    model with a wrapper inside.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    if _has_adapters(model):
        raise CheckpointError(
            f"{type(model).__name__} holds adapters of peft, which a checkpoint of the model cannot: write them with "
            "peft's own save_pretrained, take them off (unload()), and save the model that is left; or merge them into "
            "the float model (merge_and_unload()) before it is quantized"
        )
    for path, child in model.named_modules():
        _check(path or "the model", child)
    wrapped = [path for path, child in model.named_modules() if _inside(child) is not None]
    if is_pretrained(model) and wrapped:
        raise CheckpointError(
            f"{wrapped[0]} is wrapped in a {type(model.get_submodule(wrapped[0])).__name__}, under whose names "
            "transformers would not find its tensors: put the module inside it back in its place"
        )
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    """The module in a wrapper, None if it is no wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    return dict(module.named_children()).get(_COMPILED)


def _check(path: str, module: nn.Module) -> None:
    hook: Any = getattr(module, "_hf_hook", None)
    if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
        raise CheckpointError(
            f"accelerate has offloaded the weights of {path}: bring them back with "
            "accelerate.hooks.remove_hook_from_submodules(model)"
        )
    if any(isinstance(module, kind) for kind in _imported("torch.distributed.fsdp", "FullyShardedDataParallel")):
        raise CheckpointError(
            f"{path} is sharded by FullyShardedDataParallel, so that no process has all of its weights: save the model "
            "before it is wrapped"
        )


def _has_adapters(model: nn.Module) -> bool:
    layers = tuple(_imported("peft.tuners.tuners_utils", "BaseTunerLayer"))
    models = tuple(_imported("peft", "PeftModel", "PeftMixedModel"))
    return isinstance(model, models) or any(isinstance(child, layers) for child in model.modules())


def _imported(module: str, *names: str) -> Iterator[type]:
    """Classes of a module, without importing it: if nobody has, then there are no objects of them."""
    for name in names:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type):
            yield kind
