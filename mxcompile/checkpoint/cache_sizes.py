"""Bytes of a token in a key/value cache, from a model's configuration."""

from collections.abc import Mapping
from typing import Any

from mxcompile.numerics.cache_format import CacheFormat

_FLOAT = CacheFormat(None, None)


def cache_line(config: Mapping[str, Any], cache: CacheFormat) -> str:
    """The format of a cache in a line, with its bytes a token where the configuration of a decoder states its heads.

    Layers with a sliding window are not counted: they stay as they are.
    """
    sizes = _sizes(config)
    if sizes is None:
        return f"key/value cache: {cache}"
    layers, *heads = sizes
    stored, plain = (layers * form.bytes_per_token(*heads) for form in (cache, _FLOAT))
    return f"key/value cache: {cache}, {stored:,} bytes a token ({plain:,} in half precision)"


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """(layers of full attention, KV heads, size of a key, size of a value)."""
    kinds = config.get("layer_types")
    layers = config.get("num_hidden_layers") if kinds is None else sum(kind == "full_attention" for kind in kinds)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    kv_heads = config.get("num_key_value_heads") or heads
    if not layers or not heads or not hidden or not kv_heads:
        return None
    size = config.get("head_dim") or hidden // heads
    if config.get("kv_lora_rank"):
        return layers, kv_heads, config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
    return layers, kv_heads, size, size
