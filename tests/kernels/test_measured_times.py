"""Tables of measured times: lines through the measured shapes, named devices, clear refusals."""

import json
from importlib.resources import files

import pytest
import torch

from mxcompile.errors import InputError
from mxcompile.formats import MXFP4, MXINT4, MXINT6, MXINT8, parse_format
from mxcompile.kernels.measured_times import table_names, times_of, times_on


@pytest.mark.parametrize("name", table_names())
def test_the_lines_are_near_every_measured_time(name):
    """At most 5 % off, on the four shapes of a layer of Llama-3.1-8B."""
    table = times_of(name)
    text = files("mxcompile.kernels").joinpath("times", f"{name}.jsonl").read_text()
    for line in list(map(json.loads, text.splitlines()))[1:]:
        fmt = None if line["weight"] == "float" else parse_format(line["weight"])
        assert table.microseconds(fmt, line["n"], line["k"], line["m"]) == pytest.approx(line["us"], rel=0.05)


def test_one_token_takes_the_longer_the_more_bytes_a_weight_has():
    times = [times_of("sm90").microseconds(fmt, 28672, 4096, 1) for fmt in (MXINT4, MXINT6, MXINT8, None)]
    assert times == sorted(times)
    assert times[0] < 0.65 * times[2] < 0.65 * 0.6 * times[3]


def test_what_was_not_measured_is_named():
    table = times_of("sm90")
    with pytest.raises(InputError, match="no times of mxint3 were measured for 1 tokens on NVIDIA H100"):
        table.microseconds(parse_format("mxint3"), 64, 64, 1)
    with pytest.raises(InputError, match="for 3 tokens"):
        table.microseconds(MXFP4, 64, 64, 3)
    with pytest.raises(InputError, match="no times were measured for 'sm75': there are tables for sm90"):
        times_of("sm75")
    with pytest.raises(InputError, match=r"no times were measured on cpu: name the GPU .* \(sm90\)"):
        times_on(torch.device("cpu"))
