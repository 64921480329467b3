"""Records of measurements in benchmarks/results, and the pages whose numbers are compared with them."""

import json
import re

from documents import ROOT

SMOLLM2 = "SmolLM2-135M-Instruct"


def page(name):
    """A page's text with single spaces, one line a table row."""
    return re.sub(r"[ ]*\n(?!\|)[ ]*", " ", (ROOT / name).read_text())


def results(name):
    return [json.loads(line) for line in (ROOT / "benchmarks/results" / name).read_text().splitlines()]


def percent(share):
    return f"{share:.0%}".replace("%", " %")


def accuracy(weight, activation, recipe, model=SMOLLM2):
    """The one record of these."""
    (row,) = (
        row
        for row in results("accuracy.jsonl")
        if (row["weight"], row["activation"], row["recipe"], row["model"]) == (weight, activation, recipe, model)
    )
    return row
