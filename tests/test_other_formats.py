"""Formats constructed from their names, `mxint3` or `mxfp5_e3m1`: elements, rounding, and no kernels.

Elements are checked with gfloat, which supports any exponent and mantissa widths.
"""

import gfloat
import numpy as np
import pytest
import torch
from gfloat.types import Domain
from models import build, inputs

import mxcompile
from mxcompile.errors import MXCompileError
from mxcompile.formats import (
    BLOCK_SIZES,
    FORMATS,
    MXFP4,
    MXFP6_E2M3,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT4,
    MXINT8,
    MXFormat,
    ScaleRule,
    floating,
    integer,
    parse_format,
)
from mxcompile.kernels import dispatch
from mxcompile.kernels.cpu import linears
from mxcompile.kernels.layout import planes
from mxcompile.numerics import fast_rounding, reference

FLOATS = [floating(e, m) for e in range(1, 6) for m in range(8 - e)]
OTHERS = [fmt for fmt in (*map(integer, range(2, 9)), *FLOATS) if fmt.name not in FORMATS]
RULES = [rule for rule in ScaleRule if rule is not ScaleRule.T725]
each_format = pytest.mark.parametrize("fmt", OTHERS, ids=str)


def test_there_are_as_many_as_there_can_be():
    assert len({fmt.name for fmt in OTHERS}) == len(OTHERS) == 7 + 25 - len(FORMATS)
    assert (floating(4, 3), floating(5, 2), floating(2, 3), floating(2, 1)) == (
        MXFP8_E4M3,
        MXFP8_E5M2,
        MXFP6_E2M3,
        MXFP4,
    )
    assert (integer(4), integer(8)) == (MXINT4, MXINT8)


@each_format
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_the_name_says_it_all(fmt, block):
    blocked = fmt.with_block(block)
    assert parse_format(f"{fmt.name.upper()}:{block}") == parse_format(str(blocked)) == blocked


@each_format
def test_elements_are_those_of_gfloat(fmt):
    values = np.array(reference.element_table(fmt))
    if fmt.is_integer:
        wanted = np.array([code - 2**fmt.bits * (code >= 2 ** (fmt.bits - 1)) for code in range(2**fmt.bits)])
        assert np.array_equal(values, wanted * 2.0 ** (2 - fmt.bits))
        return
    special = fmt.exponent_bits == 5
    info = gfloat.FormatInfo(
        fmt.name, fmt.bits, fmt.mantissa_bits + 1, bias=1 - fmt.emin, is_signed=True, has_nz=True,
        domain=Domain.Extended if special else Domain.Finite, num_high_nans=2**fmt.mantissa_bits - 1 if special else 0,
        has_subnormals=True, is_twos_complement=False,
    )  # fmt: skip
    wanted = gfloat.decode_ndarray(info, np.arange(2**fmt.bits))
    assert np.array_equal(values, wanted, equal_nan=True)
    numbers = ~np.isnan(wanted)
    assert np.array_equal(np.signbit(values)[numbers], np.signbit(wanted)[numbers])
    assert fmt.max_value == values[np.isfinite(values)].max() == values[fmt.max_code]


@each_format
def test_rounding_takes_the_nearest_element_and_of_two_the_even_one(fmt):
    table = torch.tensor(reference.element_table(fmt), dtype=torch.float64)
    codes = torch.arange(len(table))[table.isfinite() & (table.abs() <= fmt.max_value)]
    middles = (table[codes].sort().values[:-1] + table[codes].sort().values[1:]) / 2
    v = torch.cat(
        [torch.randn(2000) * fmt.max_value / 2, middles.float(), middles.float() * 1.001, table[codes].float()]
    )
    distances = (v.double().unsqueeze(1) - table[codes]).abs()
    given = reference.round_elements(v, fmt)
    assert torch.equal((given.double() - v.double()).abs(), distances.min(1).values)
    ties = (distances == distances.min(1, keepdim=True).values).sum(1) > 1
    tied = given[ties & (given != 0)]  # zero itself is there twice
    if fmt.is_integer or fmt.mantissa_bits:
        assert not (reference.encode(tied, fmt) & 1).any()
    else:
        assert torch.equal(tied.abs(), v[ties & (given != 0)].abs() * 4 / 3)
    assert torch.equal(reference.decode(reference.encode(given, fmt), fmt), given)


@each_format
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_quick_rounding_is_the_references(fmt, rule):
    x = torch.randn(16, 70) * torch.exp2(torch.randint(-20, 20, (16, 70)))
    assert torch.equal(fast_rounding.quantize_dequantize(x, fmt, rule), reference.quantize_dequantize(x, fmt, rule))


@pytest.mark.parametrize("fmt", [integer(3), floating(3, 1), floating(5, 1), floating(3, 0), integer(2)], ids=str)
@pytest.mark.parametrize("model", ["mlp", "gpt2"])
def test_a_pipeline_runs_with_it(fmt, model):
    text = f"round-weights{{format={fmt}:64}} | lower-mx{{weight={fmt}:64,activation={fmt}:16}}"
    pipeline = mxcompile.Pipeline.parse(text)
    assert str(pipeline) == text
    module = build(model)
    lowered = pipeline.run(mxcompile.trace(module, inputs(model)))
    deployed = mxcompile.deploy(lowered, module)  # compares the two
    weight = next(p for p in deployed.parameters() if isinstance(p, mxcompile.MXWeight))
    values = weight.elements.numel() * 8 / fmt.bits
    assert values == weight.numel()
    assert weight.dequantize().isfinite().all()


def test_gptq_rounds_to_it():
    pipeline = mxcompile.Pipeline.parse("gptq{format=mxint3} | lower-mx{weight=mxint3,activation=mxint8}")
    record = pipeline.run(mxcompile.trace(build("mlp"), inputs("mlp"))).ledger[0]
    assert [numbers["weight_sqnr_db"] > 8 for numbers in record.numbers.values()] == [True, True]


@each_format
def test_no_kernel_serves_it(fmt):
    missing = f"there is no kernel for {fmt.name}"
    x = torch.randn(2, 64)
    assert dispatch.choices(x, fmt, 64)["cpu"] == linears.supports_rounding(x, fmt, ScaleRule.FLOOR) == missing
    assert planes.why_format_not_planar(fmt) == missing


def test_no_triton_kernel_serves_it():
    pytest.importorskip("triton")
    from mxcompile.kernels.triton import quantize, rows_linear

    x = torch.randn(2, 64)
    assert rows_linear.supports(x, integer(3)) == "there is no kernel for mxint3"
    assert quantize.supports(x, integer(3), ScaleRule.FLOOR) == "there is no kernel for mxint3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mxint1", "an integer element has 2 to 8 bits, not 1"),
        ("mxint9", "an integer element has 2 to 8 bits, not 9"),
        ("mxfp9_e4m4", "a floating element of 4 exponent and 4 mantissa bits: give 1 to 5 exponent bits"),
        ("mxfp7_e6m0", "6 exponent and 0 mantissa bits"),
        ("mxfp4_e0m3", "0 exponent and 3 mantissa bits"),
        ("mxfp5_e3m2", "format 'mxfp5_e3m2' has 6 bits with its sign: write mxfp6_e3m2"),
        ("mxint3:48", "block size 48 is not one of"),
        ("mxint3:", "after ':' comes the block size, as in mxint3:64"),
    ],
)
def test_nonsense_is_refused(text, message):
    with pytest.raises(MXCompileError, match=message):
        parse_format(text)


def test_a_format_that_is_not_what_its_name_says_is_refused():
    """Graphs store only names: another format would run."""
    wrong = MXFormat("mxint4", 3, 0, 1, 0, 0, 1.5)
    with pytest.raises(MXCompileError, match=r"is not what 'mxint4' means: make formats with integer\("):
        mxcompile.Pipeline([mxcompile.passes.LowerMX(weight=wrong)])
    with pytest.raises(MXCompileError, match="unknown format 'mine'"):
        mxcompile.Pipeline.parse("lower-mx{weight=mxint4}").with_overrides({"*": MXFormat("mine", 3, 0, 1, 0, 0, 1.5)})
