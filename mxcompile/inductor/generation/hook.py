"""`generate` of a compiled model: transformers' own, with our decode loop in place of its `_sample` where that serves.

transformers takes a decoding method as `custom_generate`. It then drops the streamer, the tokenizer and the assistant,
hence they are looked at before.
"""

import functools
import inspect
import logging
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from mxcompile.inductor.captured_step import is_plain_static
from mxcompile.inductor.decode_step import DecodeStep
from mxcompile.inductor.generation.loop import CACHE_NAMES, Options, decode
from mxcompile.inductor.generation.scores import Scores
from mxcompile.inductor.generation.sequences import Ends

SERVED: Final = (
    "generate, greedy or sampled, decodes in a loop of its own, on a GPU with a static cache only; with beams, "
    "assistants, stop strings, scores as results, or processors that look at the text, in transformers'"
)
_MODES: Final = ("greedy_search", "sample")
_METHODS: Final = (
    "generate",
    "_sample",
    "_prefill",
    "_update_model_kwargs_for_generation",
    "_optimize_model_for_decode",
    "_prepare_generation_config",
    "prepare_inputs_for_generation",
)
_INPUTS: Final = ("attention_mask", "position_ids")
_OUTPUTS: Final = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_ARGUMENTS: Final = ("custom_generate", "assistant_model", "synced_gpus")
logger = logging.getLogger(__name__)


class Generate:
    """Takes the place of a module's `generate`, on the instance. A deep copy of the module gets its own."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        functools.update_wrapper(self, self._module.generate, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of transformers, with all its options."""
        module = self._module
        own = type(module).generate
        named = dict(inspect.signature(own).bind(module, *args, **kwargs).arguments)
        others = named.pop("kwargs", {})
        if (reason := why_not_this_call(module, named, others)) is not None:
            logger.debug("generate runs transformers' own loop: %s", reason)
            return own(module, *args, **kwargs)

        def custom_generate(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            return _decode(model, input_ids, named.get("streamer"), **prepared)

        del named["self"]
        return own(module, **{**named, **others, "custom_generate": custom_generate})

    def __deepcopy__(self, memo: dict[int, Any]) -> "Generate":
        return Generate(memo[id(self._module)])

    def __reduce__(self) -> Any:
        return Generate, (self._module,)


def use_our_loop(module: nn.Module) -> None:
    """Let `module.generate` decode in our loop, if there is a `generate` that it can serve."""
    if why_not_this_model(module) is None and "generate" not in vars(module):
        setattr(module, "generate", Generate(module))  # noqa: B010 - an nn.Module has no generate


def why_not_this_model(module: nn.Module) -> str | None:
    """None if our loop can decode for a model, else the reason, in a few words."""
    model: Any = module
    if not hasattr(model, "generation_config"):
        return "the model has no generate of transformers"
    from transformers import GenerationMixin  # only for transformers models

    for name in _METHODS:
        is_own = name != "generate" and name in vars(model)
        standard = getattr(GenerationMixin, name, None)
        if is_own or standard is None or getattr(type(model), name, None) is not standard:
            return f"{type(model).__name__} has a {name} of its own"
    if hasattr(model, "create_masks_for_generate"):
        return f"{type(model).__name__} makes masks of its own"
    if model.config.is_encoder_decoder:
        return "the model has an encoder and a decoder"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"the attention is {model.config._attn_implementation}"
    return None


def why_not_this_call(module: Any, named: dict[str, Any], others: dict[str, Any]) -> str | None:
    """None if our loop can decode with these arguments of `generate`, as far as they tell, else the reason.

    named: those in the signature of `generate`. others: options of its config, and inputs of the model.
    """
    if (reason := _why_not_here(named) or why_not_this_model(module)) is not None:
        return reason
    config, inputs = module._prepare_generation_config(named.get("generation_config"), **others)
    mode = config.get_generation_mode()
    if mode not in _MODES:
        return f"generation mode {mode.value}"
    cache = next((inputs[name] for name in CACHE_NAMES if name in inputs), None)
    is_static = config.cache_implementation == "static" or is_plain_static(cache, initialized=False)
    if not is_static and module.device.type != "cpu":
        return 'the cache is not static: cache_implementation="static" makes it so'
    return _why_not_these_options(config) or _why_not_this_step(module, config)


def _why_not_here(named: dict[str, Any]) -> str | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes"
    return next((name for name in _ARGUMENTS if named.get(name)), None)


def _why_not_these_options(config: Any) -> str | None:
    unserved = ["stop_strings", "token_healing", "disable_compile", "is_assistant", *_OUTPUTS[:2]]
    unserved += _OUTPUTS[2:] if config.return_dict_in_generate else ()
    if (found := next((name for name in unserved if getattr(config, name, None)), None)) is not None:
        return found
    return None if config.use_cache else "use_cache=False"


def _why_not_this_step(module: Any, config: Any) -> str | None:
    """Our compiled step must be the one that transformers would run."""
    if module.device.type == "cpu":
        return None
    if not isinstance(vars(module).get("_compiled_call"), DecodeStep):
        return "the decode step was compiled by transformers"
    return None if config.compile_config == vars(module).get("_last_compile_config") else "compile_config"


def _decode(
    module: Any,
    input_ids: Tensor,
    streamer: Any,
    logits_processor: Iterable[Any],
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """Our loop, or `_sample` of transformers for what only shows when `generate` has prepared the call."""
    options = _options(module, input_ids, streamer, logits_processor, stopping_criteria, generation_config)
    if isinstance(options, Options):
        reason = _why_not_these_inputs(module, input_ids, options, model_kwargs)
        if reason is None:
            return decode(module, input_ids, logits_processor, generation_config, options, model_kwargs)
    else:
        reason = options
    logger.debug("generate runs transformers' own loop: %s", reason)
    return type(module)._sample(
        module,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
        **model_kwargs,
    )


def _options(
    module: Any, input_ids: Tensor, streamer: Any, processors: Iterable[Any], criteria: Any, config: Any
) -> Options | str:
    from transformers.generation import stopping_criteria as kinds  # only for transformers models

    scores = Scores.of(processors, input_ids.device)
    if isinstance(scores, str):
        return scores
    longest, ends, others = list[int](), Ends(None, None), list[Any]()
    for one in criteria:
        if type(one) is kinds.MaxLengthCriteria:
            longest.append(one.max_length)
        elif type(one) is kinds.EosTokenCriteria and one.eos_token_id is config._eos_token_tensor:
            ends = Ends(one.eos_token_id, config._pad_token_tensor)
        elif hasattr(one, "eos_token_id"):
            return f"{type(one).__name__} among the stopping criteria"
        else:
            others.append(one)
    if not longest:
        return "no maximum length"
    late = kinds.StoppingCriteriaList(others)
    return Options(scores, config.do_sample is True, ends, min(longest), late, streamer)


def _why_not_this_cache(cache: Any, device: torch.device, longest: int) -> str | None:
    """On a CPU, where no step is started before the last one has ended, a cache may also grow."""
    from transformers.cache_utils import DynamicCache  # only for transformers models

    from mxcompile.tensor.cache import MXCache

    grows = type(cache) is DynamicCache or (type(cache) is MXCache and cache.max_length is None)
    if grows and device.type == "cpu":
        return "the cache is offloaded" if getattr(cache, "offloading", False) else None
    if not is_plain_static(cache, initialized=False):
        return "the layers of the cache are not all plain static ones"
    layers: Any = cache.layers
    if longest - 1 > layers[0].max_cache_len:
        return "the cache is shorter than the longest sequence"
    return None


def _why_not_these_inputs(module: Any, input_ids: Tensor, options: Options, model_kwargs: dict[str, Any]) -> str | None:
    rest = dict(model_kwargs)
    caches = [rest.pop(name) for name in CACHE_NAMES if name in rest]
    cache: Any = caches[0] if caches else None
    if (reason := _why_not_this_cache(cache, module.device, options.longest)) is not None:
        return reason
    for name, value in rest.items():
        is_known = isinstance(value, Tensor) and name in _INPUTS and value.dim() == 2
        if not is_known and not (value is None or isinstance(value, bool | int | float | str)):
            return f"the input {name}"
    if input_ids.device != module.device or input_ids.dim() != 2 or not input_ids.shape[1]:
        return "the prompt is not made of tokens on the model's device"
    return None
