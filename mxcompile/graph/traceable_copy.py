"""The module to trace in place of the user's: a copy on the same tensors, in eval mode, uncompiled, without a cache.

Experts of transformers models are traced as grouped matmuls, however the model computes them.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from mxcompile.errors import InputError
from mxcompile.graph.inputs import Inputs, check_has_values, named_leaves
from mxcompile.tensor.copying import copy_module
from mxcompile.tensor.modules import is_pretrained, named_tensors
from mxcompile.tensor.reachable import reachable

_COMPILED = "_orig_mod"
_HOOK: Final = "_hf_hook"
_SHARDED: Final = {"DTensor", "FlatParameter"}  # classes whose modules take long to import
_FROM_FILES: Final = (
    "quantize it from its files, which needs little memory (mxcompile quantize MODEL --low-memory, or "
    "mxcompile.quantize_checkpoint)"
)
_GROUPED: Final = "grouped_mm"
_OTHER_EXPERTS: Final = frozenset({"eager", "batched_mm", "deepgemm", "sonicmoe"})
"""transformers' other ways to compute experts: a loop that reads values, copies of weights for each token, kernels."""
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def traceable_copy(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The module to trace: a copy of the structure on the same tensors, in eval mode, uncompiled, without a cache."""
    _check_module(model)
    _check_inputs(inputs, model)
    _check_signature(model, inputs)
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if not _cannot_be_traced(tensor))
    shadow = copy_module(model, tensors, own_collections=True).eval()
    shadow._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage] - set by `model.compile()`
    _switch_off_caches(shadow)
    _group_experts(shadow)
    _name_arguments(shadow, inputs)
    return shadow


def _cannot_be_traced(tensor: Tensor) -> bool:
    """Whether a tensor was made in inference mode, to have gradients: torch.export would ask for them outside of it."""
    return tensor.is_inference() and tensor.requires_grad


def _switch_off_caches(shadow: nn.Module) -> None:
    """Set `use_cache` to False in every configuration that a module has, those of its parts included."""
    for _, value in list(reachable(shadow)):
        if not isinstance(value, nn.Module) and getattr(value, "__dict__", {}).get("use_cache"):
            value.use_cache = False


def _group_experts(shadow: nn.Module) -> None:
    """Make transformers compute experts as grouped matmuls, which can be traced and quantized."""
    for module in shadow.modules():
        implementations = getattr(module, "get_experts_implementation", None)
        if not is_pretrained(module) or implementations is None or not _OTHER_EXPERTS & set(implementations().values()):
            continue
        try:
            cast(Any, module).set_experts_implementation(_GROUPED)
        except ValueError:  # a model without experts, or with experts of its own
            continue


def _name_arguments(shadow: nn.Module, inputs: Inputs) -> None:
    """Give forward a signature with a name for each argument of the call that it takes as `*args` or `**kwargs`.

    torch.export (2.11 to 2.14) cannot match the sizes of such keywords with them.
    """
    forward, signature = shadow.forward, inspect.signature(shadow.forward)
    bound = signature.bind(*inputs.args, **inputs.kwargs).arguments
    kinds = {name: signature.parameters[name].kind for name in bound}
    if not set(kinds.values()) & set(_VARIABLE):
        return
    positional: list[str] = []
    for name, value in bound.items():
        if kinds[name] is inspect.Parameter.VAR_POSITIONAL:
            positional += [f"{name}_{index}" for index in range(len(value))]
        elif len(positional) < len(inputs.args):
            positional.append(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    free = (f"{name}_" if name in inputs.kwargs else name for name in positional)
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in free]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs.kwargs]
    vars(call)["__signature__"] = inspect.Signature(parameters)
    shadow.forward = call


def _check_module(model: nn.Module) -> None:
    """Raise InputError for a module that is scripted, compiled, lazy, sharded, moved by accelerate, or partly meta."""
    if isinstance(getattr(model, _COMPILED, None), nn.Module):
        raise InputError(
            f"this {type(model).__name__} is the result of torch.compile: pass the module that it was made from, as "
            f"quantize_and_compile compiles the quantized one (it is model.{_COMPILED})"
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{path or 'the model'} is a ScriptModule, which has no Python code: pass the nn.Module itself"
            )
    moved = [path or "the model" for path, module in model.named_modules() if _moves_tensors(module)]
    if moved:
        raise InputError(
            f"accelerate moves tensors of {moved[0]} to a device when it runs (device_map): load the whole model on "
            f"one device (device_map=None), or {_FROM_FILES}"
        )
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise InputError(f"{lazy[0]} has no shape yet (a lazy module): run the model once on the example inputs before")
    _check_whole(model)
    tensors = named_tensors(model)
    without = [name for name, tensor in tensors.items() if tensor.is_meta]
    if without and len(without) < len(tensors):
        raise InputError(no_values(without))


def _check_whole(model: nn.Module) -> None:
    """Raise InputError for a module that runs together with those of other processes, or has a part of its tensors."""
    for path, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise InputError(
                f"{path or 'the model'} is in a DistributedDataParallel: pass the module inside it "
                f"({'.'.join(('model', *filter(None, (path, 'module'))))})"
            )
    sharded = [name for name, tensor in named_tensors(model).items() if type(tensor).__name__ in _SHARDED]
    if sharded:
        raise InputError(
            f"{sharded[0]} is sharded, so that each process has a part of it (fully_shard, FullyShardedDataParallel, "
            f"tensor parallelism): quantize the model before it is sharded, or {_FROM_FILES}"
        )


def _moves_tensors(module: nn.Module) -> bool:
    """Whether a hook of accelerate, alone or in a sequence, brings the module's tensors or inputs to a device."""
    hook = getattr(module, _HOOK, None)
    return any(getattr(each, "execution_device", None) is not None for each in getattr(hook, "hooks", (hook,)))


def no_values(names: Sequence[str]) -> str:
    """The message for tensors on the meta device."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more} of the model is on the meta device and has no values (offloaded by "
        "accelerate, or not loaded): load the whole model into memory, without offloading (device_map=None), or "
        f"{_FROM_FILES}"
    )


def _check_inputs(inputs: Inputs, model: nn.Module) -> None:
    """Raise InputError for an input that forward can hardly want, and that torch cannot trace."""
    with_values = not any(tensor.is_meta for tensor in named_tensors(model).values())
    for path, leaf in named_leaves((inputs.args, inputs.kwargs)):
        if hasattr(leaf, "__array__") and not isinstance(leaf, Tensor):
            name = path.partition(".")[2]
            raise InputError(f"example input {name} is a {type(leaf).__name__}: convert it with torch.from_numpy")
        if isinstance(leaf, Tensor) and with_values:
            check_has_values(leaf)


def _check_signature(model: nn.Module, inputs: Inputs) -> None:
    try:
        inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        parameters = ", ".join(inspect.signature(model.forward).parameters)
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward({parameters}): {error}"
        ) from error
