"""The module to trace in place of the user's: a copy on the same tensors, in eval mode, uncompiled, without a cache."""

import inspect
from typing import Any

from torch import nn

from mxcompile.errors import InputError
from mxcompile.graph.inputs import Inputs
from mxcompile.tensor.copying import copy_module
from mxcompile.tensor.reachable import reachable

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def traceable_copy(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The module to trace: a copy of the structure on the same tensors, in eval mode, uncompiled, without a cache."""
    _check_signature(model, inputs)
    shadow = copy_module(model, (*model.parameters(), *model.buffers())).eval()
    shadow._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage] - set by `model.compile()`
    _switch_off_caches(shadow)
    _name_arguments(shadow, inputs)
    return shadow


def _switch_off_caches(shadow: nn.Module) -> None:
    """Set `use_cache` to False in every configuration that a module has, those of its parts included."""
    for _, value in list(reachable(shadow)):
        if not isinstance(value, nn.Module) and getattr(value, "__dict__", {}).get("use_cache"):
            value.use_cache = False


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


def _check_signature(model: nn.Module, inputs: Inputs) -> None:
    try:
        inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        parameters = ", ".join(inspect.signature(model.forward).parameters)
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward({parameters}): {error}"
        ) from error
