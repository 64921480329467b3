"""Rounding for searches gives the reference's values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile import reference
from mxcompile.formats import FORMATS
from mxcompile.nearest import round_steps_in_place, unit


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
