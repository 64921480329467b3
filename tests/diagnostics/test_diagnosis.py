"""The diagnosis of a ledger: values, advice with its number, table, JSON and the section of the report page."""

import json
from io import StringIO

import pytest
import torch
from models import outliers
from rich.console import Console
from typer.testing import CliRunner

import mxcompile
from mxcompile.cli.app import app
from mxcompile.diagnostics.diagnosis import Advice, Diagnosis, advise, three_digits
from mxcompile.diagnostics.dump import Dump
from mxcompile.graph.records import PassRecord
from mxcompile.pipeline.pipeline import Pipeline

INPUT = {
    "input_channel_ratio": 50.0,
    "input_channel_kurtosis": 12.0,
    "input_token_kurtosis": 0.1,
    "input_top_share": 0.9,
    "input_in_block": 28.0,
    "input_first_token": 0.0,
    "imbalance": 900.0,
    "sqnr_db": 14.0,
    "bits_db": 20.0,
    "fold_db": 6.0,
}
PLAIN = INPUT | {"imbalance": 3.0, "sqnr_db": 18.0, "fold_db": 0.2}


def record(name, numbers):
    return PassRecord(name, name, 0, (), 0.0, numbers)


def diagnosis():
    outputs = {"output_in_block": 5.0}
    numbers = {"a.q.weight": INPUT | outputs, "a.k.weight": INPUT | {"output_in_block": 6.0}, "a.o.weight": PLAIN}
    return Diagnosis.of([record("diagnose", {}), record("diagnose", numbers), record("gptq", {})])


def test_layers_that_read_the_same_value_are_one_entry():
    first, second = diagnosis().values
    assert (first.layers, first.name, second.layers) == (("a.q.weight", "a.k.weight"), "a.q, k", ("a.o.weight",))
    assert first.outputs == {"a.q.weight": {"in_block": 5.0}, "a.k.weight": {"in_block": 6.0}}
    assert (diagnosis().outliers, second.advice) == (("a.q.weight", "a.k.weight"), None)
    assert Diagnosis.of([record("gptq", {})]) is None


@pytest.mark.parametrize(
    ("changed", "typical", "step"),
    [
        ({}, 15.0, Advice("fold", "imbalance 900", 6.0)),
        ({"rotate_db": 6.9}, 15.0, Advice("fold", "imbalance 900", 6.0)),  # costs no run time
        ({"rotate_db": 7.1}, 15.0, Advice("rotate", "in-block ratio 28", 7.1)),
        ({"permute_db": 6.9}, 15.0, Advice("fold", "imbalance 900", 6.0)),
        ({"permute_db": 7.1, "rotate_db": 8.0}, 15.0, Advice("permute", "in-block ratio 28", 7.1)),
        ({"fold_db": 0.9, "permute_db": 1.1}, 15.0, Advice("permute", "in-block ratio 28", 1.1)),
        ({"fold_db": 0.9}, 15.0, None),
        ({"fold_db": 0.9}, 21.0, Advice("bits", "SQNR 14.0 dB at best, 21.0 in the median", 20.0)),
        ({}, 27.0, Advice("bits", "SQNR 20.0 dB at best, 27.0 in the median", 20.0)),
        ({"bits_db": 0.0}, 27.0, Advice("fold", "imbalance 900", 6.0)),
    ],
)
def test_the_recommended_step(changed, typical, step):
    assert advise(INPUT | changed, typical) == step


def test_what_is_printed():
    console = Console(width=160, record=True, file=StringIO())
    diagnosis().print_to(console)
    text = console.export_text()
    assert "fold: imbalance 900, saves 6.0 dB" in text
    assert "outlier channels in the inputs of 2 of 3 layers" in text
    assert "for 1 of 2 values, which saves 6.0 dB (median)" in text
    assert [three_digits(x) for x in (0.12345, 12.345, 5841.7)] == ["0.123", "12.3", "5842"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dump")
    batch = {"input_ids": torch.arange(64).reshape(4, 16)}
    program = mxcompile.trace(outliers(), batch)
    Pipeline.parse("diagnose").run(program, [batch], [Dump(path)])
    return path


def test_the_page_has_a_table_and_plots_of_it(folder):
    page = (folder / "index.html").read_text()
    assert 'href="#diagnosis"' in page
    assert 'id="profiles"' in page
    assert "model.layers.0.self_attn.q_proj, k_proj, v_proj" in page
    content = json.loads(page.partition('id="content">')[2].partition("</script>")[0])
    assert [value["outliers"] for value in content["diagnosis"]] == [True, False, True, False]


def test_a_page_without_one(tmp_path):
    program = mxcompile.trace(torch.nn.Linear(32, 32), torch.randn(2, 32))
    Pipeline.parse("round-weights{format=mxint4}").run(program, instruments=[Dump(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    assert 'href="#diagnosis"' not in page
    assert '"diagnosis":null' in page


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160"})


def test_the_command(local_model, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("The capital of France is Paris. " * 60)
    options = ("--text", text, "--length", 32, "--windows", 2)
    printed = run("diagnose", local_model, *options, "--dump", tmp_path / "dump", "--layers")
    assert printed.exit_code == 0, printed.output
    assert "outlier channels in the inputs of 0 of 7 layers" in printed.stdout
    assert "down_proj" in printed.stdout
    assert (tmp_path / "dump" / "index.html").is_file()
    as_json = json.loads(run("diagnose", local_model, *options, "--json", "--recipe", "w4a4-mxfp").stdout)
    assert as_json["pass"] == "diagnose{weight=mxfp4,activation=mxfp4}"
    assert len(as_json["values"]) == 4
    assert {"input_in_block", "sqnr_db"} <= as_json["values"][0]["numbers"].keys()
    refused = run("diagnose", local_model, *options, "--recipe", "round-weights{format=mxint4}")
    assert "it has no lower-mx" in str(refused.exception)
