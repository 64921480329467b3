"""The ledger: its file is read back, another schema is refused; and its tables."""

import json
import math
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, inputs
from rich.console import Console

import mxcompile
from mxcompile import Ledger, Miss
from mxcompile.diagnostics.ledger import SCHEMA
from mxcompile.errors import DumpError
from mxcompile.graph.records import Allocation, ItemFormat, LayerMeasurements, LossCurve, ModelMeasurements, PassRecord

examples = settings(derandomize=True, deadline=None, database=None, max_examples=60)
numbers = st.none() | st.floats(allow_nan=False)
texts = st.text(max_size=8)
layers = st.builds(LayerMeasurements, st.none() | texts, st.none() | texts, numbers, numbers, numbers, numbers)
measured = st.builds(
    ModelMeasurements,
    st.floats(allow_nan=False),
    numbers,
    numbers,
    st.dictionaries(st.text(min_size=1), layers, max_size=3),
)
records = st.builds(
    PassRecord,
    texts,
    texts,
    st.integers(0),
    st.lists(st.builds(Miss, texts, texts), max_size=2).map(tuple),
    st.floats(0, 1e6),
    st.dictionaries(texts, st.dictionaries(texts, st.floats(allow_nan=False), max_size=2), max_size=2),
    numbers,
    st.integers(0),
    st.none() | measured,
    st.dictionaries(st.text(min_size=1), st.lists(st.integers(0), min_size=1, max_size=3).map(tuple), max_size=2),
)
ledgers = st.builds(Ledger, texts, st.integers(0), st.lists(records, max_size=3).map(tuple))

LAYER = {
    "weight": "mxint4",
    "activation": "mxint8",
    "weight_db": 18.5,
    "local_db": 17.25,
    "accumulated_db": "inf",
    "output_error": 0.0,
}
FILE = {
    "schema": 3,
    "pipeline": "lower-mx{weight=mxint4}",
    "bytes": 800,
    "passes": [
        {
            "name": "lower-mx",
            "spec": "lower-mx{weight=mxint4}",
            "rewrites": 1,
            "misses": [{"where": "%conv", "reason": "a convolution", "bytes": 4608}],
            "seconds": 0.5,
            "numbers": {"up.weight": {"weight_sqnr_db": "inf"}},
            "preserved_db": None,
            "bytes": 106,
            "measured": {"output_db": 17.5, "kl": 0.25, "top1": 0.5, "layers": {"up.weight": LAYER}},
            "expert_tokens": {"experts.up": [3, 0, 5]},
            "allocation": {
                "score": "fisher",
                "solver": "scipy.optimize.milp",
                "limit": "4.5 bits a weight",
                "bits": 4.25,
                "kl": 0.5,
                "price": 0.25,
                "items": [
                    {
                        "weights": ["up.weight"],
                        "format": "mxint4",
                        "activation": None,
                        "bytes": 106,
                        "cost": 0.5,
                        "costs": {"mxint4": 0.5, "float": 0.0},
                        "fixed": False,
                    }
                ],
                "unit": "bit",
                "microseconds": None,
                "rounding": "to nearest",
            },
            "curves": {"all weights": {"training": [[1, 0.5], [2, 0.25]], "held_out": [[0, 0.5], [2, "inf"]]}},
        }
    ],
}
UP = LayerMeasurements("mxint4", "mxint8", 18.5, 17.25, math.inf, 0.0)
ITEM = ItemFormat(("up.weight",), "mxint4", None, 106, 0.5, {"mxint4": 0.5, "float": 0.0})
READ = Ledger(
    "lower-mx{weight=mxint4}",
    800,
    (
        PassRecord(
            "lower-mx",
            "lower-mx{weight=mxint4}",
            1,
            (Miss("%conv", "a convolution", 4608),),
            0.5,
            {"up.weight": {"weight_sqnr_db": math.inf}},
            None,
            106,
            ModelMeasurements(17.5, 0.25, 0.5, {"up.weight": UP}),
            {"experts.up": (3, 0, 5)},
            Allocation("fisher", "scipy.optimize.milp", "4.5 bits a weight", 4.25, 0.5, 0.25, (ITEM,)),
            {"all weights": LossCurve(((1, 0.5), (2, 0.25)), ((0, 0.5), (2, math.inf)))},
        ),
    ),
)


def printed(table) -> str:
    text = StringIO()
    Console(file=text, width=160).print(table)
    return text.getvalue()


def test_the_schema_as_written_down(tmp_path):
    """A change here is a change of the schema: give it a new number."""
    assert json.loads(READ.to_json()) == FILE
    (tmp_path / "ledger.json").write_text(json.dumps(FILE))
    assert Ledger.load(tmp_path / "ledger.json") == Ledger.load(str(tmp_path)) == READ
    assert SCHEMA == 3


@examples
@given(ledgers)
def test_what_is_written_is_read(tmp_path_factory, ledger):
    path = tmp_path_factory.mktemp("ledger") / "any name"
    path.write_text(ledger.to_json(), encoding="utf-8")
    assert Ledger.load(path) == ledger


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.json is not a ledger"),
        ("[1]", "x.json is not a ledger"),
        ("{}", "is not a ledger .*schema"),
        ('{"schema": 1}', "has schema 1, this version of mxcompile reads 3: dump it again"),
    ],
)
def test_what_is_no_ledger_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DumpError, match=message):
        Ledger.load(tmp_path / "x.json")
    with pytest.raises(DumpError, match="is not a ledger"):
        Ledger.load(tmp_path)


def cells(table, name: str) -> list[str]:
    (line,) = [line for line in printed(table).splitlines() if line.strip().startswith(name)]
    return line.split()


def test_tables_of_what_was_measured():
    numbers = ["1", "1", "0.50", "0.0", "17.5", "0.2500", "50.0%"]
    assert cells(READ.to_table(), "lower-mx") == ["lower-mx", *numbers]
    assert cells(READ.to_layer_table(), "up.weight") == ["up.weight", "mxint4", "mxint8", "18.5", "17.2", "exact"]
    assert cells(READ.to_miss_table(), "%conv") == ["%conv", "a", "convolution", "lower-mx", "4.6", "kB"]


def test_the_worst_layers_come_first(tmp_path):
    text = "smooth-quant | round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxint8}"
    mxcompile.quantize_and_compile(build("llama"), inputs("llama"), recipe=text, dump=tmp_path, compile=False)
    ledger = Ledger.load(tmp_path)
    found = ledger.passes[-1].measured.layers
    assert ledger.pipeline == text
    assert ledger.layers() == tuple(found)
    assert ledger.worst(3) == sorted(found, key=lambda name: found[name].local_db)[:3]
    lines = printed(ledger.to_layer_table(worst=3)).splitlines()
    assert [words.split() for words in lines[2:5]] == [
        ["after", "after", "after"],
        ["of", "smooth-", "round-", "lower-"],
        ["layer", "weight", "input", "weight", "local", "quant", "weights", "mx"],
    ]
    assert [name for line in lines for name in found if name in line] == ledger.worst(3)


def test_tables_of_nothing():
    empty = Ledger("", 0, ())
    assert "pass" in printed(empty.to_table())
    assert "layer" in printed(empty.to_layer_table(worst=3))
    assert empty.worst(2) == []


def test_experts_have_a_table_of_their_tokens():
    """A row for every layer: its weights see the same tokens, but where they do not."""
    first = PassRecord("gptq", "gptq", 1, (), 0.5, {}, expert_tokens={"0.experts.up": (9, 9, 9)})
    counts = {"0.experts.up": (3, 0, 5), "0.experts.down": (3, 0, 5), "1.up": (2, 2), "1.down": (1, 3), "weight": (4,)}
    ledger = Ledger("gptq", 0, (first, PassRecord("gptq", "gptq", 1, (), 0.5, {}, expert_tokens=counts)))
    assert ledger.expert_tokens() == {
        "0.experts": (3, 0, 5),
        "1.up": (2, 2),
        "1.down": (1, 3),
        "weight": (4,),
    }
    lines = [line.split() for line in printed(ledger.to_expert_table()).splitlines() if line.strip()]
    assert lines[0] == ["calibration", "tokens", "of", "an", "expert"]
    assert lines[4] == ["0.experts", "3", "1", "0", "3", "5"]
    assert lines[5] == ["1.up", "2", "0", "2", "2", "2"]
