"""Formats and scale rules as values: their text, their sizes, and helpful errors."""

from dataclasses import FrozenInstanceError

import pytest

from mxcompile.errors import MXCompileError, UnknownNameError
from mxcompile.formats import (
    BLOCK_SIZES,
    FORMATS,
    MXFP4,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT4,
    MXINT8,
    ScaleRule,
    activation_rule,
    as_format,
    as_scale_rule,
    parse_format,
    parse_scale_rule,
)

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
each_block = pytest.mark.parametrize("block", BLOCK_SIZES)


@each_format
@each_block
def test_text_round_trip(fmt, block):
    blocked = fmt.with_block(block)
    assert parse_format(str(blocked)) == blocked
    assert parse_format(f"{fmt.name}:{block}") == blocked


def test_the_usual_block_is_not_written():
    assert [str(MXINT4.with_block(block)) for block in BLOCK_SIZES] == [
        "mxint4:16",
        "mxint4",
        "mxint4:64",
        "mxint4:128",
    ]


@pytest.mark.parametrize(
    ("text", "fmt"),
    [
        ("mxfp8", MXFP8_E4M3),
        ("mxfp6", MXFP6_E3M2),
        ("mxfp4_e2m1", MXFP4),
        ("mxfp8:64", MXFP8_E4M3.with_block(64)),
        (" MXINT8 ", MXINT8),
        ("MXFP8_E5M2:128", MXFP8_E5M2.with_block(128)),
    ],
)
def test_aliases_case_and_spaces(text, fmt):
    assert parse_format(text) == fmt


@pytest.mark.parametrize(
    ("text", "near"),
    [("mxint", "mxint"), ("int4", "mxint4"), ("mxfp8_e4", "mxfp8_e4m3"), ("mxpf4", "mxfp4"), ("mxint4x:64", "mxint")],
)
def test_an_unknown_format_names_the_nearest(text, near):
    with pytest.raises(UnknownNameError, match=f"unknown format '{text}': did you mean .*{near}"):
        parse_format(text)


@pytest.mark.parametrize("text", ["", "q", ":64"])
def test_with_nothing_near_all_are_listed(text):
    with pytest.raises(UnknownNameError, match=r"known: .*mxfp4.*mxint8"):
        parse_format(text)


@pytest.mark.parametrize("text", ["mxint4:", "mxint4:x", "mxint4:-32", "mxint4:32:64", "mxint4:1e2"])
def test_a_bad_block_text_is_refused_with_an_example(text):
    with pytest.raises(MXCompileError, match="after ':' comes the block size, as in mxint4:64"):
        parse_format(text)


@pytest.mark.parametrize("block", [0, 1, 8, 31, 48, 256])
def test_other_block_sizes_are_refused(block):
    message = f"block size {block} is not one of 16, 32, 64, 128"
    with pytest.raises(MXCompileError, match=message):
        MXINT8.with_block(block)
    with pytest.raises(MXCompileError, match=message):
        parse_format(f"mxint8:{block}")


@each_format
@each_block
def test_sizes(fmt, block):
    f = fmt.with_block(block)
    assert f.bits_per_value == fmt.bits + 8 / block
    assert f.block_bytes * 8 == fmt.bits * block
    assert f.storage_bytes(3, 5 * block) == 3 * 5 * (f.block_bytes + 1)
    assert f.storage_bytes(3, 5 * block + 1) == 3 * 6 * (f.block_bytes + 1)
    assert [f.blocks(size) for size in (0, 1, block, block + 1)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("mxfp4", 4.25),
        ("mxint4:16", 4.5),
        ("mxint4:128", 4.0625),
        ("mxint6", 6.25),
        ("mxfp6:64", 6.125),
        ("mxfp8", 8.25),
    ],
)
def test_bits_per_value(text, bits):
    assert parse_format(text).bits_per_value == bits


@each_format
def test_names_say_what_a_format_is(fmt):
    assert FORMATS[fmt.name] is fmt
    assert fmt.block_size == 32
    assert fmt.is_integer == fmt.name.startswith("mxint")
    assert fmt.is_integer or fmt.bits == 1 + fmt.exponent_bits + fmt.mantissa_bits


def test_formats_are_values():
    assert MXINT8.with_block(64).with_block(32) == MXINT8
    assert len({MXINT8, MXINT8.with_block(32), MXINT8.with_block(64)}) == 2
    with pytest.raises(FrozenInstanceError):
        MXINT8.bits = 7


@pytest.mark.parametrize("rule", ScaleRule, ids=str)
def test_scale_rule_round_trip(rule):
    assert parse_scale_rule(str(rule)) is rule
    assert parse_scale_rule(f" {str(rule).upper()} ") is rule


def test_an_unknown_scale_rule_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown scale rule 'flor': did you mean floor"):
        parse_scale_rule("flor")
    with pytest.raises(UnknownNameError, match=r"known: 7\.25, ceil, even, floor, mse, rceil"):
        parse_scale_rule("xyz")


@each_format
def test_threshold_lies_between_one_and_two(fmt):
    for rule in ScaleRule:
        if rule is not ScaleRule.T725:
            assert 1 <= rule.threshold(fmt) <= 2


def test_7_25_is_refused_elsewhere():
    assert ScaleRule.T725.threshold(MXFP4.with_block(64)) == 7.25 / 4
    with pytest.raises(MXCompileError, match=r"7\.25 is a threshold of mxfp4, not of mxint4"):
        ScaleRule.T725.threshold(MXINT4)


def test_errors_are_also_value_errors():
    """So that a caller who does not know mxcompile's errors still catches a bad name."""
    with pytest.raises(ValueError, match="unknown format"):
        parse_format("nope")


@pytest.mark.parametrize("wrong", [None, 4, ["mxint4"], object])
def test_formats_and_rules_are_values_or_their_text(wrong):
    assert as_format("mxint4") == as_format(MXINT4) == MXINT4
    assert as_scale_rule("floor") == as_scale_rule(ScaleRule.FLOOR) == ScaleRule.FLOOR
    assert activation_rule("mxfp4") == ScaleRule.T725
    with pytest.raises(MXCompileError, match=r"is not a format: give .*'mxint4'"):
        as_format(wrong)
    with pytest.raises(MXCompileError, match=r"is not a scale rule: give .*'floor'"):
        as_scale_rule(wrong)
