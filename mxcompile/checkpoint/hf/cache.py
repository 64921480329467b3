"""The cache that `generate` makes for a model whose pipeline had `quantize-cache`: an `MXCache`, growing or static.

transformers makes its own first, under the name that its version has for it; where that is a plain one, ours takes its
place. A cache that the caller gives, an offloaded one and `use_cache=False` are left alone.
"""

from typing import Any, Final

from torch import nn

from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import InputError, warn
from mxcompile.numerics.cache_format import CacheFormat

_NAMES: Final = ("cache", "past_key_values")


def prepare_cache(
    model: nn.Module, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """As transformers' `_prepare_cache_for_generation`, which `generate` calls, and then `MXCache` in place of its own.

    Warns if the model's layers have states that an MXCache cannot hold; transformers' cache then stays.
    """
    given = {name for name in _NAMES if model_kwargs.get(name) is not None}
    kind: Any = type(model)
    result = kind._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    provenance = Provenance.of(model)
    form = None if provenance is None else provenance.cache
    made = next((name for name in _NAMES if model_kwargs.get(name) is not None), None)
    if form is not None and made is not None and not given:
        cache = _in_place_of(model_kwargs[made], model, form)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[made] = cache
    return result


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
