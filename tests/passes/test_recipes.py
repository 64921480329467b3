"""recipes: allocate in front of a recipe's rounding, for a budget of bits."""

import pytest

from mxcompile.errors import PipelineError, UnknownNameError
from mxcompile.formats import MXINT4, MXINT6, MXINT8
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.passes.recipes import weight_formats, with_bits, with_cache


def test_with_bits_puts_it_in_front_of_the_rounding():
    assert str(with_bits("w4a8-mxint", 4.5)).startswith(
        "awq-fold{weight=mxint4,activation=mxint8} | "
        "allocate{formats=[mxint4,mxint6,mxint8],bits=4.5,activation=mxint8,rounding=gptq} | gptq{"
    )
    assert "activation=mxint8} | round-weights" in str(with_bits("w4a8-mxint-quick", 4.5))
    assert "formats=[mxfp4:64,mxfp6_e2m3:64,mxfp8_e4m3:64],bits=5}" in str(with_bits("lower-mx{weight=mxfp4:64}", 5))
    assert weight_formats(with_bits("w4a16-mxint-quick", 5)) == {MXINT4, MXINT6, MXINT8}
    for text, reason in (("awq-fold{weight=mxfp4}", "has no lower-mx"), (str(with_bits("w4a16-mxfp", 5)), "already")):
        with pytest.raises(PipelineError, match=reason):
            with_bits(text, 5)


def test_with_bits_gives_inputs_the_bits_of_their_weights():
    formats = "[mxfp4,mxfp6_e2m3,mxfp8_e4m3]"
    text = str(with_bits("w4a4-mxfp", 4.75))
    assert f"allocate{{formats={formats},bits=4.75,activations={formats}}} | gptq" in text
    assert "activations=[mxint6,mxint6,mxint8]" in str(with_bits("w6a6-mxint", 5))


def test_with_cache_goes_first():
    text = str(with_cache("w4a8-mxint-quick", "key=mxint8,value=mxint4,window=32,rotate=head"))
    assert text.startswith("quantize-cache{value=mxint4,window=32,rotate=head} | round-weights{format=mxint4} | ")
    assert str(with_cache("lower-mx{weight=mxint8}", CacheFormat(MXINT4, None))).startswith(
        "quantize-cache{key=mxint4,value=none} | "
    )
    assert str(with_bits(with_cache("w4a8-mxint", "mxint8"), 4.5)).startswith("quantize-cache | awq-fold")
    with pytest.raises(PipelineError, match="has a quantize-cache already"):
        with_cache(text, "mxint8")
    with pytest.raises(UnknownNameError, match="unknown part of a cache format"):
        with_cache("lower-mx{weight=mxint8}", "keys=mxint4")
