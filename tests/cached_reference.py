"""Generation with the reference operator of a rounded cache, `numerics/cached_attention.py`, as a model's attention.

The model keeps exact keys and values in transformers' own cache, and each call rounds what it reads.
"""

from contextlib import contextmanager

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mxcompile.numerics.cached_attention import cached_attention

NAME = "cached_reference"


@contextmanager
def reference_attention(model, form, prompt_length):
    """Let the model attend as if its cache held keys and values in a `CacheFormat`."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        is_causal = mask is None and query.shape[2] > 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        result = cached_attention(query, key, value, mask, scale, is_causal, form, prompt_length)
        return result.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
