"""The cache that `generate` makes for a model whose pipeline had `quantize-cache`: an `MXCache`, growing or static.

transformers makes its own first, under the name that its version has for it; where that is a plain one, ours takes its
place. A cache that the caller gives, an offloaded one and `use_cache=False` are left alone.

Assisted decoding sends the first candidates along with the prompt, and they would read its tokens exactly, as the
prompt does: over an MXCache its first call is without candidates, so that its tokens are those of decoding alone.
"""

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, nn

from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import InputError, warn
from mxcompile.numerics.cache_format import CacheFormat

_NAMES: Final = ("cache", "past_key_values")


def prepare_cache(
    model: nn.Module, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """As transformers' `_prepare_cache_for_generation`, which `generate` calls, and then `MXCache` in place of its own.

    Warns if the model's layers have states that an MXCache cannot hold; transformers' cache then stays. Raises
    InputError if a static cache that the caller gives has no room for the longest text: compiled, a step would write
    outside of it.
    """
    given = {name for name in _NAMES if model_kwargs.get(name) is not None}
    for name in given:
        _check_room(model_kwargs[name], generation_config.max_length)
    kind: Any = type(model)
    result = kind._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    provenance = Provenance.of(model)
    form = None if provenance is None else provenance.cache
    made = next((name for name in _NAMES if model_kwargs.get(name) is not None), None)
    for name in given:
        _end_assisted_decoding(model_kwargs[name])
    if form is not None and made is not None and not given:
        cache = _in_place_of(model_kwargs[made], model, form)
        if generation_config.is_assistant:
            _let_take_back(cache)
        model_kwargs[made] = cache
    return result


def candidate_generator(model: nn.Module, **kwargs: Any) -> Any:
    """As transformers' `_get_candidate_generator`; over an MXCache without candidates for the first call."""
    from mxcompile.tensor.cache import MXCache  # imports transformers

    kind: Any = type(model)

    def make(**others: Any) -> Any:
        generator = kind._get_candidate_generator(model, **{**kwargs, **others})
        return _within(kwargs["generation_config"].max_length, generator)

    generator = make()
    is_packed = any(isinstance(kwargs["model_kwargs"].get(name), MXCache) for name in _NAMES)
    # One that reads what the model returned has none for the first call anyway.
    is_late = getattr(generator, "requires_model_outputs", False)
    return _AfterPrompt(make) if is_packed and not is_late else generator


def _within(longest: int, generator: Any) -> Any:
    """Without candidates past the maximum length, for which a static cache has no room: prompt lookup proposes them."""
    if type(generator).__name__ == "PromptLookupCandidateGenerator":
        propose = generator.get_candidates

        def get_candidates(input_ids: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
            ids, logits = propose(input_ids, **options)
            return ids[:, : max(longest - 1, input_ids.shape[1])], logits

        generator.get_candidates = get_candidates
    return generator


class _AfterPrompt:
    """A generator of candidates that is made, and asked, from the second call on: then for a prompt of one token more.

    make: a function of `input_ids`, whose other arguments `generate` keeps up to date.
    """

    requires_model_outputs = False

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make, self.calls, self.generator = make, 0, None

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tokens `[1, tokens]` with candidates behind them, logits of these)"""
        self.calls += 1
        if self.calls == 1:
            return input_ids, None
        self.generator = self.generator or self.make(input_ids=input_ids)
        return self.generator.get_candidates(input_ids)

    def update_candidate_strategy(self, *args: Any) -> None:
        """Learn from how many candidates were right, if there were any."""
        if self.generator is not None:
            self.generator.update_candidate_strategy(*args)


def _let_take_back(cache: Any) -> None:
    """As `activate_past_recording`, but an MXCache's own layers go on reading several tokens as a part of a prompt:
    what an assistant reads decides what it proposes, not what is generated."""
    cache.activate_past_recording()
    _end_assisted_decoding(cache)


def _check_room(cache: Any, longest: int | None) -> None:
    from transformers.cache_utils import StaticLayer

    layers = getattr(cache, "layers", ())
    rooms = [layer.max_cache_len for layer in layers if isinstance(layer, StaticLayer) and not layer.is_sliding]
    if longest is not None and rooms and longest - 1 > min(rooms):
        raise InputError(
            f"the cache has room for {min(rooms)} tokens, and a text of {longest}, the longest that this call may "
            f"make, needs {longest - 1}: give a larger cache, or a smaller max_new_tokens (or max_length)"
        )


def _end_assisted_decoding(cache: Any) -> None:
    """A later call of several tokens is a part of a prompt again: transformers leaves the recording of the past on."""
    from mxcompile.tensor.cache_layers import FixedLayer, GrowingLayer  # imports transformers

    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, FixedLayer | GrowingLayer):
            layer.record_past = False


def _in_place_of(cache: Any, model: Any, form: CacheFormat) -> Any:
    from transformers.cache_utils import DynamicCache, StaticCache

    from mxcompile.tensor.cache import MXCache  # imports transformers

    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        return cache
    length = cache.get_max_length() if type(cache) is StaticCache else None
    try:
        return MXCache.of(model.config.get_text_config(decoder=True), form, length)
    except InputError as error:
        warn(f"generate keeps keys and values in float: {error}")
        return cache
