"""`mxcompile.MXCache`: a key/value cache of transformers that holds MX elements and scales.

This file imports transformers, so it is imported only where a cache is made or met.
"""

from typing import Any, Final, Self

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from mxcompile.arguments import checked
from mxcompile.errors import InputError
from mxcompile.formats import MXINT8, MXFormat, as_format
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.tensor.cache_layers import FixedLayer, GrowingLayer

_UNCHANGED: Final = ("DynamicSlidingWindowLayer", "StaticSlidingWindowLayer", "DummyLayer")


class MXCache(Cache):
    """A cache of keys and values in MX formats, for `generate(..., past_key_values=cache)` of any transformers model.

    config: of the model. key, value: their formats, or names of formats; None keeps floats. window: the newest
    tokens, a query's own one included, that are read exactly; sink: the first tokens, likewise. rotate: round keys
    after a Hadamard rotation of each head, which 4 bits need. shift: subtract the mean key of the first call, the
    prompt, from all keys, which changes no attention and takes out what all keys have in common. max_length: how many
    tokens there is room for; all memory is then allocated at the first call and stays in place, as a compiled decode
    step needs it. None: the cache grows.

    A token is rounded once, when it arrives. Tokens of a prompt attend to exact keys and values while it is read.
    Layers with a sliding window stay as they are.
    Raises InputError for a model with layers that have other states than keys and values.
    """

    @checked
    def __init__(
        self,
        config: PreTrainedConfig,
        key: MXFormat | str | None = MXINT8,
        value: MXFormat | str | None = MXINT8,
        window: int = 0,
        sink: int = 0,
        max_length: int | None = None,
        *,
        rotate: bool = False,
        shift: bool = False,
    ) -> None:
        key_format, value_format = (None if part is None else as_format(part) for part in (key, value))
        self.format = CacheFormat(key_format, value_format, window, sink, rotate, shift)
        self.max_length = max_length
        super().__init__(layers=_layers(config, self.format, max_length))

    @classmethod
    def of(cls, config: Any, form: CacheFormat, max_length: int | None = None) -> Self:
        """A cache of a format that is given as a value."""
        return cls(
            config, form.key, form.value, form.window, form.sink, max_length, rotate=form.rotate, shift=form.shift
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that it holds now."""
        return sum(_nbytes(layer) for layer in self.layers)

    def __repr__(self) -> str:
        room = "" if self.max_length is None else f", max_length={self.max_length}"
        return f"MXCache({self.format}{room})"


def _layers(config: Any, form: CacheFormat, max_length: int | None) -> list[Any]:
    """The layers that transformers would make, those of full attention replaced."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError("MXCache is for decoders: this model's decoder also caches what its encoder has read")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise InputError(
            "MXCache is for keys and values, and this model caches the latents that it makes them of (kv_lora_rank): "
            "generate with transformers' own cache"
        )
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length is a number of tokens, 1 or more, not {max_length}")
    plain: Any = DynamicCache(config=config) if max_length is None else StaticCache(config, max_cache_len=max_length)
    layers = [_replaced(index, layer, form, max_length) for index, layer in enumerate(plain.layers)]
    if not any(isinstance(layer, GrowingLayer | FixedLayer) for layer in layers):
        raise InputError("MXCache has nothing to round here: all layers have a sliding window, and these stay float")
    return layers


def _replaced(index: int, layer: Any, form: CacheFormat, max_length: int | None) -> Any:
    if type(layer) is DynamicLayer:
        return GrowingLayer(form)
    if type(layer) is StaticLayer and max_length is not None:
        return FixedLayer(max_length, form)
    if type(layer).__name__ not in _UNCHANGED:
        raise InputError(
            f"MXCache holds keys and values alone, and layer {index} of this model needs a {type(layer).__name__}: "
            "generate with transformers' own cache"
        )
    return layer


def _nbytes(layer: Any) -> int:
    if isinstance(layer, GrowingLayer | FixedLayer):
        return layer.nbytes
    states = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(part.nbytes for part in states if part is not None)
