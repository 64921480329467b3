"""Methods of a quantized transformers model that replace transformers' own, which take every weight for a float tensor.

    save_pretrained           writes MX weights; arguments of other libraries are accepted where they change nothing
    get_memory_footprint      counts packed bytes
    dequantize                float weights in place of the MX weights
    tie_weights, resize_token_embeddings      never replace an MX weight
    half, float               cast the values that MX weights dequantize to
    _prepare_cache_for_generation             makes an MXCache if the pipeline had quantize-cache
    _get_candidate_generator                  proposes nothing until the prompt is in an MXCache

They are set on the instance, so that the model keeps its class; a copy has its own.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from mxcompile.checkpoint.config_json import untie
from mxcompile.checkpoint.hf.cache import candidate_generator, prepare_cache
from mxcompile.checkpoint.hf.experts import use_default_experts
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.checkpoint.save import SHARD_SIZE, save
from mxcompile.errors import CheckpointError, MXCompileError
from mxcompile.tensor.modules import float_tensors, set_tensors, stored_bytes
from mxcompile.tensor.weight import MXWeight

_NO_EFFECT: Final = frozenset(
    {"safe_serialization", "save_function", "save_peft_format", "save_original_format", "token"}
)


def replace_methods(model: nn.Module) -> None:
    """Set the methods on a quantized PreTrainedModel. Its config says from now on whether its embeddings are tied."""
    for name, method in _METHODS.items():
        setattr(model, name, partial(method, model))
    if any(_untied_pairs(model)):
        untie(cast(Any, model).config)


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    max_shard_size: int | str | None = SHARD_SIZE,
    **options: Any,
) -> None:
    """`save` with the signature of transformers' `save_pretrained`.

    state_dict: the model's own, as training loops pass it; another is refused, as are options that are not supported.
    A model with an adapter (`add_adapter`) saves that alone, as transformers does.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        options |= {"is_main_process": is_main_process, "state_dict": state_dict, "max_shard_size": max_shard_size}
        _transformers(model).save_pretrained(model, save_directory, **options)
        return
    if options.pop("push_to_hub", False):
        raise CheckpointError(
            "save_pretrained of a model with MX weights does not push: call model.push_to_hub(repo_id)"
        )
    refused = sorted(name for name, value in options.items() if value and name not in _NO_EFFECT)
    if refused:
        raise CheckpointError(
            f"save_pretrained of a model with MX weights does not support {', '.join(refused)}: leave it out"
        )
    if is_main_process:
        _check_state(model, state_dict)
        save(model, save_directory, max_shard_size=max_shard_size or SHARD_SIZE)


def get_memory_footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """Bytes of the parameters, and of the buffers if asked; MX weights at their packed size, each tensor once."""
    buffers = 0 if return_buffers else sum(buffer.nbytes for buffer in model.buffers())
    return stored_bytes(model) - buffers


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every MX weight by the float weight that gives the same matmul; inputs are no longer rounded.

    The model, which is changed in place and returned, is an ordinary one of transformers afterwards; it is not compiled
    any more. dtype: what to cast the model to; None: each weight has the dtype that it dequantized to. Parameters are
    trainable afterwards, unless some were already (an adapter's).
    """
    was_frozen = not any(parameter.requires_grad for parameter in model.parameters())
    set_tensors(model, float_tensors(model))
    for name in _METHODS:
        vars(model).pop(name, None)
    Provenance.remove_from(model)
    _forget_compiled(model)
    use_default_experts(model)
    owner = cast(Any, model)
    owner.hf_quantizer.remove_quantization_config(model)
    owner.is_quantized = False
    if was_frozen:
        model.requires_grad_(True)
    return model if dtype is None else model.to(dtype)


def tie_weights(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """As transformers', but never replaces an MX weight: one of the same bytes keeps its own preparation of inputs.

    Raises MXCompileError where a tie would replace an MX weight by other values.
    """
    for target, source in _untied_pairs(model):
        raise MXCompileError(
            f"tie_weights would replace {target} by {source}, and one of them is an MX weight of its own: set "
            "model.config.tie_word_embeddings = False, or call model.dequantize() first"
        )
    before = dict(model.named_parameters(remove_duplicate=False))
    _transformers(model).tie_weights(model, *args, **kwargs)
    for name, value in before.items():
        path, _, leaf = name.rpartition(".")
        if isinstance(value, MXWeight):
            model.get_submodule(path).register_parameter(leaf, value)


def resize_token_embeddings(
    model: nn.Module,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    **options: Any,
) -> Any:
    """As transformers', but raises MXCompileError, leaving the model unchanged, where it would resize an MX weight."""
    owner = cast(Any, model)
    tables = {"input embedding": owner.get_input_embeddings(), "output head": owner.get_output_embeddings()}
    for what, module in tables.items():
        weight = getattr(module, "weight", None)
        size = None if weight is None else _new_size(len(weight), new_num_tokens, pad_to_multiple_of)
        if isinstance(weight, MXWeight) and size != len(weight):
            raise MXCompileError(
                f"the {what} holds MX weights, which cannot be resized from {len(weight)} rows to {size}: resize the "
                "float model before it is quantized, or call model.dequantize() first"
            )
    return _transformers(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, **options)


def half(model: nn.Module) -> nn.Module:
    """`model.to(torch.float16)`, which transformers refuses for quantized models."""
    return nn.Module.half(model)


def to_float(model: nn.Module) -> nn.Module:
    """`model.to(torch.float32)`, which transformers refuses for quantized models."""
    return nn.Module.float(model)


_METHODS: Final[dict[str, Callable[..., Any]]] = {
    "save_pretrained": save_pretrained,
    "get_memory_footprint": get_memory_footprint,
    "dequantize": dequantize,
    "tie_weights": tie_weights,
    "resize_token_embeddings": resize_token_embeddings,
    "half": half,
    "float": to_float,
    "_prepare_cache_for_generation": prepare_cache,
    "_get_candidate_generator": candidate_generator,
}


def _forget_compiled(model: nn.Module) -> None:
    """Run the model as it is again: its call, its `generate`, and the decode step that transformers' compiles."""
    model._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage] - set by `module.compile()`
    for cached in ("_compiled_call", "_last_compile_config"):
        vars(model).pop(cached, None)
    if hasattr(vars(model).get("generate"), "__wrapped__"):  # not a loop that the model came with
        del vars(model)["generate"]
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.compile_config = None


def _transformers(model: nn.Module) -> Any:
    """The model's class, whose methods are transformers' own."""
    return type(model)


def _new_size(size: int, new: int | None, multiple: int | None) -> int:
    wanted = size if new is None else new
    return wanted if multiple is None else -(-wanted // multiple) * multiple


def _untied_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names that the config says are tied, but that are different tensors, at least one of them an MX weight."""
    tied = cast(Any, model).get_expanded_tied_weights_keys(all_submodels=True)
    own = dict(model.named_parameters(remove_duplicate=False))
    for target, source in tied.items():
        pair = own.get(target), own.get(source)
        if any(isinstance(value, MXWeight) for value in pair) and not _are_tied(*pair):
            yield target, source


def _are_tied(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two weights have the same bytes; their inputs may be prepared differently."""
    if one is other:
        return True
    if not isinstance(one, MXWeight) or not isinstance(other, MXWeight) or one.layout_.format != other.layout_.format:
        return False
    rows = one.to_row_major(), other.to_row_major()
    return all(torch.equal(*parts) for parts in zip(rows[0].parts[:2], rows[1].parts[:2], strict=True))


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is other:
        return True
    if isinstance(one, MXWeight) and isinstance(other, MXWeight):
        one, other = one.to_row_major(), other.to_row_major()
        same = one.layout_ == other.layout_ and one.dtype == other.dtype
        return same and all(torch.equal(*parts) for parts in zip(one.parts, other.parts, strict=True))
    if one is None or other is None or isinstance(one, MXWeight) or isinstance(other, MXWeight):
        return False
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other.to(one.device))


def _check_state(model: nn.Module, state_dict: Mapping[str, Any] | None) -> None:
    """Raise CheckpointError for a state dict that is not the model's own."""
    if state_dict is None:
        return
    own = model.state_dict()
    for name in (*own, *state_dict):
        if name not in own or name not in state_dict or not _are_equal(own[name], state_dict[name]):
            raise CheckpointError(
                f"the state_dict for save_pretrained has another {name} than the model: load it into the model "
                "(model.load_state_dict), and leave state_dict out"
            )
