"""A forward over whole texts that reads keys and values as generation with the model's cache would.

A model whose pipeline had `quantize-cache` computes in float without a cache. Inside `reading_its_cache` its attention
is `numerics.cached_attention`, so that evaluation counts what the cache loses: every token is read as if it had been
generated, which is the most that a cache loses on a text.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor, nn

from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import warn
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import cached_attention

_PLAIN: Final = "sdpa"
_UNKNOWN: Final = ("position_bias", "s_aux", "sliding_window", "softcap")
"""Arguments of attention that change what it computes, or which of its layers an MXCache holds."""


def cache_of(model: nn.Module) -> CacheFormat | None:
    """The format of the cache that a model generates with; None: transformers' own, in float."""
    provenance = Provenance.of(model)
    return None if provenance is None else provenance.cache


@contextmanager
def reading_its_cache(model: Any, cache: CacheFormat) -> Generator[None]:
    """Let a transformers model attend to all tokens through its cache. Layers with a sliding window stay exact.

    Warns if no attention could be reached, so that results are those of a float cache. The model must run uncompiled.
    """
    attention = _Attention(cache)
    is_replaced = getattr(getattr(model, "config", None), "_attn_implementation", None) == _PLAIN
    name = f"mxcompile cache {cache}"
    try:
        if is_replaced:
            _register(name, attention)
            model.set_attn_implementation(name)
        yield
    finally:
        if is_replaced:
            model.set_attn_implementation(_PLAIN)
    if not attention.calls:
        warn(
            f"{type(model).__name__} is evaluated with keys and values in float, not as {cache}: its attention is not "
            "transformers' sdpa; load it with attn_implementation='sdpa'"
        )


def _register(name: str, attention: "_Attention") -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


class _Attention:
    """What transformers calls for attention, over a cache of `form`."""

    def __init__(self, form: CacheFormat) -> None:
        self.form, self.calls = form, 0

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """As `sdpa_attention_forward`: query `[batch, heads, tokens, size]` to `[batch, tokens, heads, size]`."""
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        is_text = query.shape[2] == key.shape[2] and (causal or attention_mask is not None)
        if not is_text or any(options.get(name) is not None for name in _UNKNOWN):
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            options |= {"scaling": scaling, "is_causal": is_causal}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        self.calls += 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        hides_later = causal and attention_mask is None
        result = cached_attention(query, key, value, attention_mask, scale, hides_later, self.form)
        return result.transpose(1, 2), None
