"""The benchmark of architectures: every one has a line, and its own function works on one of each sort."""

import json

import pytest
from zoo import RESULTS, first_sentence, measure
from zoo_models import ZOO

from mxcompile.errors import InputError


def test_every_architecture_has_a_line_in_the_record():
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert [(record["architecture"], record["kind"]) for record in records] == [(n, e.kind) for n, e in ZOO.items()]


def test_reasons_name_errors_that_are_not_ours():
    assert first_sentence(InputError("x is empty. Give more.\nmore")) == "x is empty"
    assert first_sentence(KeyError("x")) == "KeyError: 'x'"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "bert_answers", "llava", "transformer_encoder"])
def test_an_architecture_end_to_end(name):
    record = measure(name)
    assert record["reasons"] == {}
    assert record["quantized"] > 0.9
    assert record["w8a8_db"] > 20
    assert record["w4a8_db"] > record["w4a8_quick_db"]
    assert record["saved"] is True
    assert record["generated"] is (True if name in ("qwen2", "llava") else None)
