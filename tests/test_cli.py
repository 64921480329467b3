"""The command line: readable tables and graphs, one-line errors, and a demo that runs on a local model."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import build, inputs
from typer.testing import CliRunner

import mxcompile
from mxcompile.cli import app, main
from mxcompile.formats import FORMATS
from mxcompile.passes import PASSES
from mxcompile.passes.recipes import RECIPES


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "out"
    mxcompile.quantize_and_compile(build("mlp"), inputs("mlp"), dump=path, compile=False, recipe="w4a8-mxint-quick")
    return path


@pytest.mark.parametrize(("command", "names"), [("recipes", RECIPES), ("passes", PASSES), ("formats", FORMATS)])
def test_lists_what_there_is(command, names):
    output = run(command)
    assert all(name in output for name in names)


def test_groups_prints_who_divides_and_who_multiplies(monkeypatch):
    def load(source):
        assert source is None
        return build("gpt2"), lambda text, **_: SimpleNamespace(**inputs("gpt2"))

    monkeypatch.setattr("mxcompile.cli.load_model", load)
    output = run("groups")
    assert "3 scale groups" in output
    assert re.search(r"64 +│ transformer.h.0.ln_1.weight +│ transformer.h.0.attn.c_attn.weight", output)
    assert "not foldable: %addmm_3 in transformer.h.0.mlp.c_proj: %view_9 is read by %pow_1, aten.pow" in output


def test_show_prints_the_summary_and_the_stages(folder):
    output = run("show", str(folder))
    assert re.search(r"lower-mx\{weight=mxint4,activation=mxint8\}\s+│\s+2 │", output)
    assert "00-trace, 01-round-weights, 02-lower-mx" in output


def test_show_prints_the_numbers_of_all_layers(folder):
    output = run("show", str(folder), "--layers")
    assert re.search(r"up.weight +│ mxint4 +│ mxint8 +│ +\d+\.\d dB │ +\d+\.\d dB │", output)
    assert "after lower-mx" in output


def test_show_prints_a_graph_whole_and_unwrapped(folder):
    assert run("show", str(folder), "lower-mx") == (folder / "02-lower-mx.txt").read_text() + "\n"


def test_diff_prints_what_changed(folder):
    output = run("diff", str(folder), "trace", "lower-mx")
    assert re.search(r'^\+%up_weight_elements .* tensor "up.weight_elements"', output, re.MULTILINE)
    assert run("diff", str(folder), "1", "1") == "no difference\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere"], "error: nowhere is not an mxcompile dump folder"),
        (["show", "{folder}", "lower"], "error: unknown pass of the dump 'lower': did you mean 02-lower-mx?"),
    ],
)
def test_errors_are_one_message(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["mxcompile", *(a.format(folder=folder) for a in arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err.replace("\n", " ").startswith(message)
