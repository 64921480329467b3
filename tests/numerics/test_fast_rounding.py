"""fast_rounding gives the values of the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.errors import MXCompileError
from mxcompile.formats import FORMATS, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.fast_rounding import in_steps, quantize_dequantize, round_steps_in_place, unit


def rounded(v, fmt):
    return round_steps_in_place(v / unit(fmt), fmt) * unit(fmt)


floats = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-8, 8, width=32)


@pytest.mark.parametrize("name", FORMATS)
@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(values=st.lists(floats, min_size=1, max_size=50))
def test_equals_the_reference(name, values):
    v = torch.tensor(values)
    assert torch.equal(rounded(v, FORMATS[name]), reference.round_elements(v, FORMATS[name]))


@pytest.mark.parametrize("name", FORMATS)
def test_ties_and_every_midpoint(name):
    """Elements, the middles between them, and their neighbours in float32."""
    table = torch.tensor(reference.element_table(FORMATS[name]))
    table = table[torch.isfinite(table)].unique()
    middles = (table[1:] + table[:-1]) / 2
    points = torch.cat(
        (table, middles, middles.nextafter(torch.tensor(torch.inf)), middles.nextafter(-torch.tensor(torch.inf)))
    )
    points = torch.cat((points, 2 * points))
    assert torch.equal(rounded(points, FORMATS[name]), reference.round_elements(points, FORMATS[name]))


any_floats = st.floats(width=32) | st.floats(-8, 8, width=32) | st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-130)])


@pytest.mark.parametrize("name", FORMATS)
@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(
    values=st.lists(any_floats, min_size=1, max_size=80),
    rule=st.sampled_from(ScaleRule),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_whole_blocks_equal_the_reference_bit_for_bit(name, values, rule, dtype):
    x, fmt = torch.tensor(values, dtype=torch.float64).to(dtype), FORMATS[name]
    try:
        wanted = reference.quantize_dequantize(x, fmt, rule)
    except MXCompileError:  # a rule that is not for this format
        return
    found = quantize_dequantize(x, fmt, rule)
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert torch.equal(found.nan_to_num().signbit(), wanted.nan_to_num().signbit())


def test_shapes_and_the_users_tensor():
    x = torch.randn(3, 5, 700, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    for fmt in (FORMATS["mxint8"], FORMATS["mxfp4"].with_block(128)):
        for value in (x, x.transpose(0, 1), x[:, :0], torch.cat([x] * 16)):
            wanted = reference.quantize_dequantize(value, fmt, ScaleRule.FLOOR)
            assert torch.equal(quantize_dequantize(value, fmt, ScaleRule.FLOOR), wanted)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_steps_without_a_look_at_the_scales_round_alike(fmt):
    """Also those far below a step."""
    values = torch.cat([torch.randn(512) * 2.0 ** torch.randint(-140, 4, (512,)), torch.zeros(1)])
    for exponent in (-126, -3, 0, 5, 120):
        scaled, power = (values.double() * 2.0**exponent).float(), torch.tensor(exponent, dtype=torch.int32)
        looked, unseen = (in_steps(scaled, power, fmt, unseen=unseen) for unseen in (False, True))
        assert torch.equal(round_steps_in_place(looked, fmt), round_steps_in_place(unseen, fmt))
