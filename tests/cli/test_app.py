"""The command line: tables and graphs, their JSON, and one-line errors."""

import errno
import inspect
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from models import build, inputs
from typer.testing import CliRunner

import mxcompile
from mxcompile import Ledger, Pass, Pipeline
from mxcompile.cli.app import app, main
from mxcompile.diagnostics.dump import Dump
from mxcompile.errors import PassError, UnknownNameError, warn
from mxcompile.formats import FORMATS, parse_format
from mxcompile.passes import PASSES
from mxcompile.passes.recipes import RECIPES

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def run(*arguments: str, terminal: int | None = None) -> str:
    """The output of a command in a pipe, or on a terminal with that many columns."""
    env = {"COLUMNS": None, "FORCE_COLOR": None, "NO_COLOR": None}
    env = env if terminal is None else env | {"COLUMNS": str(terminal), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    result = CliRunner().invoke(app, arguments, env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: str) -> dict:
    """The JSON line of a command."""
    output = run(*arguments, "--json", terminal=80)
    assert output.count("\n") == 1
    return json.loads(output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "out"
    mxcompile.quantize_and_compile(build("mlp"), inputs("mlp"), dump=path, compile=False, recipe="w4a8-mxint-quick")
    return path


@pytest.fixture
def gpt2(monkeypatch) -> None:
    """`groups` loads a tiny GPT-2."""

    def load(source):
        assert source is None
        return build("gpt2")

    monkeypatch.setattr("mxcompile.cli.commands.lists.load_weights", load)


# What there is


@pytest.mark.parametrize(("command", "names"), [("recipes", RECIPES), ("passes", PASSES), ("formats", FORMATS)])
def test_lists_what_there_is(command, names):
    output = run(command)
    assert all(re.search(rf"^ {name}\s", output, re.MULTILINE) for name in names)
    assert list(names) == [record["name"] for record in run_json(command)[command]]


def test_recipes():
    for record in run_json("recipes")["recipes"]:
        assert set(record) == {"name", "pipeline", "reads_calibration", "default"}
        assert record["pipeline"] == RECIPES[record["name"]]
        assert record["reads_calibration"] == ("gptq" in record["pipeline"])
    assert re.search(rf"^ w8a8-mxint-quick +{re.escape(RECIPES['w8a8-mxint-quick'])} *$", run("recipes"), re.MULTILINE)


def test_formats():
    for record in run_json("formats")["formats"]:
        fmt = parse_format(record["name"])
        assert set(record) == {"name", "bits", "bits_per_value", "largest", "activation_rule"}
        assert (record["bits"], record["bits_per_value"], record["largest"]) == (
            fmt.bits,
            fmt.bits_per_value,
            fmt.max_value,
        )


def test_a_pass_with_all_that_its_options_may_be():
    output = run("passes", "gptq")
    assert "takes a float or rounded program, returns it rounded" in output
    assert re.search(r"^ format +a format +required *$", output, re.MULTILINE)
    assert re.search(r"^ order +none, columns, blocks +blocks *$", output, re.MULTILINE)
    assert "preserves the function, which is checked" in run("passes", "awq-fold")
    (record,) = run_json("passes", "lower-mx")["passes"]
    assert set(record) == {"name", "rewrite", "accepts", "gives", "preserves_function", "options"}
    assert (record["accepts"], record["gives"]) == (["float", "rounded", "lowered"], "lowered")
    assert record["options"][0] == {"name": "weight", "values": "a format", "default": None}
    assert record["options"][1] == {"name": "activation", "values": "a format, none", "default": "none"}
    with pytest.raises(UnknownNameError, match="unknown pass 'gptk': did you mean gptq"):
        run("passes", "gptk")


def test_groups_prints_who_divides_and_who_multiplies(gpt2):
    output = run("groups")
    assert "3 scale groups" in output
    assert "3 order groups" in output
    names = r"transformer.h.0.ln_1.weight +transformer.h.0.attn.c_attn.weight"
    assert re.search(rf"^ %\w+ +{names} +64 *$", output, re.MULTILINE)
    assert re.search(r"%addmm_3 in transformer.h.0.mlp.c_proj +%view_9 is read by %pow_1, aten.pow", output)
    found = run_json("groups")
    assert set(found) == {"groups", "unfoldable", "orders", "unordered"}
    assert {order["kind"] for order in found["orders"]} == {"hidden", "heads", "stream"}
    assert set(found["orders"][0]) == {"value", "kind", "channels", "cells", "parameters"}
    assert found["unordered"] == []
    assert len(found["groups"]) == 3
    assert set(found["groups"][0]) == {"value", "factors", "divided", "multiplied"}
    assert found["groups"][0]["divided"] == ["transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias"]
    assert found["unfoldable"][0]["where"] == "%addmm_3 in transformer.h.0.mlp.c_proj"


LISTS = """
import sys
import warnings
from mxcompile.cli.app import app
for command in ("--help", "recipes", "passes", "formats"):
    app([command], standalone_mode=False)
print(*sys.modules)
"""


def test_help_and_lists_load_no_compiler_and_no_transformers():
    done = subprocess.run([sys.executable, "-c", LISTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert "mxcompile.cli.commands.demo" in loaded
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "transformers"))]


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.callback.__name__)
def test_help_breaks_no_sentence(command):
    """The terminal breaks lines where it ends, and none ends where a line of the source did."""
    assert command.help.split() == inspect.getdoc(command.callback).split()
    assert not [line for line in command.help.splitlines() if line and line[-1] not in ".:"]


# Dumps


def test_show_prints_the_summary_and_the_stages(folder):
    output = run("show", str(folder))
    assert output.startswith("round-weights{format=mxint4}\n| lower-mx{weight=mxint4,activation=mxint8}\n")
    assert re.search(r"^ lower-mx +2 +0 +\d+\.\d\d +0\.\d +\d+\.\d *$", output, re.MULTILINE)
    assert "00-trace, 01-round-weights, 02-lower-mx" in output


def test_show_prints_the_numbers_of_all_layers(folder):
    output = run("show", str(folder), "--layers")
    assert re.search(r"^ up.weight +mxint4 +mxint8( +\d+\.\d){4} *$", output, re.MULTILINE)


def test_show_for_machines_is_the_ledger(folder):
    record = run_json("show", str(folder))
    assert record.pop("graphs") == ["00-trace", "01-round-weights", "02-lower-mx"]
    assert record.pop("failure") is None
    assert record == json.loads((folder / "ledger.json").read_text()) == Ledger.load(folder).record()


def test_show_prints_a_graph_whole_and_unwrapped(folder):
    text = (folder / "02-lower-mx.txt").read_text()
    assert run("show", str(folder), "lower-mx") == text + "\n"
    coloured = run("show", str(folder), "lower-mx", terminal=80)
    assert coloured != ANSI.sub("", coloured) == text + "\n"
    assert run_json("show", str(folder), "2") == {"pass": "02-lower-mx", "graph": text}


def test_show_tells_of_the_pass_that_failed(tmp_path, traced):
    class Broken(Pass):
        name = "broken"

        def run(self, program):
            raise PassError("broken [is] no pass")

    with pytest.raises(PassError):
        Pipeline([Broken()]).run(traced("mlp"), instruments=[Dump(tmp_path)])
    assert "pass 1 failed: broken [is] no pass" in run("show", str(tmp_path))
    failure = run_json("show", str(tmp_path))["failure"]
    assert failure == {"pass": 1, "error": "broken [is] no pass", "rest": "nothing"}


def test_diff_prints_what_changed(folder):
    output = run("diff", str(folder), "trace", "lower-mx")
    assert re.search(r'^\+%up_weight_elements .* tensor "up.weight_elements"', output, re.MULTILINE)
    added = len(re.findall(r"^\+%", output, re.MULTILINE))
    assert f"00-trace to 02-lower-mx: 4 lines removed, {added} added" in output
    coloured = run("diff", str(folder), "trace", "lower-mx", terminal=80)
    assert coloured != ANSI.sub("", coloured) == output
    record = run_json("diff", str(folder), "0", "2")
    assert (record["first"], record["second"]) == ("00-trace", "02-lower-mx")
    assert (record["removed"], record["added"]) == (4, added)
    assert record["diff"] in output


def test_no_difference(folder):
    assert run("diff", str(folder), "1", "1") == "no difference\n"
    record = run_json("diff", str(folder), "1", "1")
    assert (record["removed"], record["added"], record["diff"]) == (0, 0, "")


# Terminals and pipes


@pytest.mark.parametrize("command", ["show", "layers", "passes", "passes gptq", "recipes", "formats", "groups"])
def test_colours_on_a_terminal_plain_and_whole_in_a_pipe(folder, gpt2, command):
    known = {"show": ["show", str(folder)], "layers": ["show", str(folder), "--layers"]}
    arguments = known.get(command, command.split())
    piped, narrow = run(*arguments), run(*arguments, terminal=80)
    assert "\x1b" not in piped
    assert "\x1b[" in narrow
    plain = ANSI.sub("", narrow)
    assert "…" not in piped + plain
    tables = [line for line in plain.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= 80
    assert sorted("".join(piped.split()).replace("─", "")) == sorted("".join(plain.split()).replace("─", ""))


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


class Failing(Pass):
    name = "failing"

    def run(self, program):
        raise PassError("no more")


@pytest.mark.parametrize(
    ("pipeline", "notes"),
    [
        ([Failing()], []),
        ([*Pipeline.parse("smooth-quant").passes, Failing()], ["in Python: The work of smooth-quant is not lost"]),
    ],
    ids=["at once", "after another pass"],
)
def test_the_note_of_a_failed_run_is_printed(pipeline, notes, monkeypatch, capsys):
    program = mxcompile.trace(build("mlp"), inputs("mlp"))
    monkeypatch.setattr("mxcompile.cli.app.app", lambda: Pipeline(pipeline).run(program))
    with pytest.raises(SystemExit):
        main()
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "error: pass 'failing': no more"
    assert [line.partition(": error")[0] for line in rest] == notes


def test_notes_of_other_errors_are_printed(monkeypatch, capsys):
    def fail():
        error = PassError("no more")
        error.add_note("seen at noon")
        raise error

    monkeypatch.setattr("mxcompile.cli.app.app", fail)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: no more\nnote: seen at noon\n"


def test_a_full_disk_is_one_message(monkeypatch, capsys):
    """As when results are written to a file on it."""

    def write():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mxcompile.cli.app.app", write)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == f"error: [Errno {errno.ENOSPC}] No space left on device\n"


def test_versions():
    assert re.fullmatch(r"mxcompile \S+, torch \S+, transformers \S+\n", run("--version"))


def test_warnings_are_messages(monkeypatch, capsys):
    """Ours, and others' of that kind; those for programmers stay as Python shows them."""

    def give():
        warn("a part is damaged [again]")
        warnings.warn("old", FutureWarning, stacklevel=1)

    monkeypatch.setattr("mxcompile.cli.app.app", give)
    with pytest.warns(FutureWarning, match="old") as others:
        main()
    assert [str(other.message) for other in others] == ["old"]
    assert capsys.readouterr().err == "warning: a part is damaged [again]\n"
