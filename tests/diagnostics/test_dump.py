"""Dumps: a folder that shows what every pass did, can be written again, and keeps the error of a failed pass."""

import json
import re
from pathlib import Path

import pytest
import torch
from models import build, inputs
from rich import filesize

import mxcompile
from mxcompile import Ledger, Pipeline
from mxcompile.diagnostics.distributions import Distributions
from mxcompile.diagnostics.dump import Dump
from mxcompile.diagnostics.dump_reader import DumpReader, FailedPass
from mxcompile.errors import DumpError, PassError, UnknownNameError
from mxcompile.graph.printer import print_program

TEXT = "smooth-quant | round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxint8}"


def dump(folder, text=TEXT):
    program = mxcompile.trace(build("mlp"), inputs("mlp"))
    return program, Pipeline.parse(text).run(program, instruments=[Dump(folder)])


def test_writes_the_graph_and_its_diff_for_every_pass(tmp_path):
    traced, lowered = dump(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00-trace.txt",
        "01-smooth-quant.diff",
        "01-smooth-quant.txt",
        "02-round-weights.diff",
        "02-round-weights.txt",
        "03-lower-mx.diff",
        "03-lower-mx.txt",
        "distributions.json",
        "index.html",
        "ledger.json",
        "pipeline.txt",
        "summary.txt",
    ]
    assert (tmp_path / "out" / "00-trace.txt").read_text() == print_program(traced)
    assert (tmp_path / "out" / "03-lower-mx.txt").read_text() == print_program(lowered)
    diff = (tmp_path / "out" / "02-round-weights.diff").read_text()
    assert len(re.findall(r'^\+%.* tensor "(?:up|down)\.weight"', diff, re.MULTILINE)) == 2


def test_pipeline_text_parses_back(tmp_path):
    dump(tmp_path)
    first, *rest = (tmp_path / "pipeline.txt").read_text().splitlines()
    assert first == "# mxcompile pipeline"
    assert Pipeline.parse(" ".join(rest)) == Pipeline.parse(TEXT)


def test_ledger_holds_what_the_passes_did(tmp_path):
    _, lowered = dump(tmp_path)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert (ledger["schema"], ledger["pipeline"]) == (3, TEXT)
    assert [p["name"] for p in ledger["passes"]] == [r.name for r in lowered.ledger]
    assert ledger["passes"][0]["preserved_db"] > 100
    assert ledger["passes"][1]["preserved_db"] is None
    assert ledger["passes"][1]["numbers"]["up.weight"]["weight_sqnr_db"] > 15
    assert ledger["passes"][0]["misses"] == [
        {
            "where": "%linear_1 in down",
            "reason": "its input is made by a linear, not by a norm: ask for it with through_linears=true",
            "bytes": 0,
        }
    ]


def test_distributions_are_those_measured(tmp_path):
    program = mxcompile.trace(build("mlp"), inputs("mlp"))
    lowered = Pipeline.parse(TEXT).run(program, instruments=[Dump(tmp_path), mxcompile.Measure()])
    found = Distributions.load(tmp_path).passes
    assert list(found) == [record.measured.distributions for record in lowered.ledger]
    assert set(found[0]) == {"up.weight", "down.weight"}


def test_numbers_without_a_json_form_are_words(tmp_path):
    program = mxcompile.trace(build("mlp"), inputs("mlp"))
    program.set_tensor("up.weight", torch.zeros(128, 64))
    Pipeline.parse("round-weights{format=mxint4}").run(program, instruments=[Dump(tmp_path)])
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["passes"][0]["numbers"]["up.weight"] == {"weight_sqnr_db": "inf"}


def test_two_dumps_of_one_thing_differ_in_times_only(tmp_path):
    dump(tmp_path / "a")
    dump(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        if path.name not in ("ledger.json", "summary.txt", "index.html"):
            assert path.read_text() == (tmp_path / "b" / path.name).read_text()


def test_graph_files_hold_no_paths_ids_or_times(tmp_path):
    dump(tmp_path)
    for path in (*tmp_path.glob("*-*.txt"), *tmp_path.glob("*.diff")):
        assert not re.search(r"/\w+/\w+|0x[0-9a-f]{6}|\d\d:\d\d", path.read_text()), path.name


def test_summary_lists_each_miss_once_with_the_passes_that_met_it(tmp_path):
    program = mxcompile.trace(build("cnn"), inputs("cnn"))
    Pipeline.parse("round-weights{format=mxint4} | lower-mx{weight=mxint4}").run(program, instruments=[Dump(tmp_path)])
    misses = [line for line in (tmp_path / "summary.txt").read_text().splitlines() if "convolution" in line]
    assert len(misses) == 2
    sizes = [re.search(r"round-weights, lower-mx +([\d.]+ (?:bytes|kB))$", line.rstrip())[1] for line in misses]
    assert sizes == [filesize.decimal(miss.bytes) for miss in Ledger.load(tmp_path).misses() if "conv" in miss.reason]


def test_writes_over_its_own_dump_and_over_nothing_else(tmp_path):
    dump(tmp_path / "out")
    dump(tmp_path / "out")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("months of work")
    with pytest.raises(DumpError, match=r"theirs exists and is not an mxcompile dump"):
        dump(tmp_path / "theirs")
    with pytest.raises(DumpError, match=r"thesis.txt exists and is not"):
        dump(tmp_path / "theirs" / "thesis.txt")
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "months of work"


def test_a_bad_folder_is_refused_before_the_model_is_traced(tmp_path):
    (tmp_path / "theirs.txt").write_text("")
    with pytest.raises(DumpError):
        mxcompile.quantize_and_compile(torch.nn.Linear(2, 2), None, dump=tmp_path, recipe="w4a8-mxint-quick")


class Explode(mxcompile.Pass):
    name = "explode"

    def run(self, program):
        program.set_tensor("up.weight", torch.zeros(1))
        raise ValueError("no fuel\nat all")


def explode(folder):
    program = mxcompile.trace(build("mlp"), inputs("mlp"))
    pipeline = Pipeline([Explode(), *Pipeline.parse(TEXT).passes])
    with pytest.raises(PassError, match="'explode' failed: ValueError: no fuel"):
        pipeline.run(program, instruments=[Dump(folder)])
    return program


def test_a_failing_pass_leaves_what_it_was_given(tmp_path):
    program = explode(tmp_path)
    text = (tmp_path / "01-explode.FAILED.txt").read_text()
    assert (
        text
        == f"# pass 'explode' failed: ValueError: no fuel\nat all\n# still to run: {TEXT}\n# the graph before it:\n"
        + print_program(program)
    )


def test_reader_tells_a_failed_run_from_what_is_left_of_another(tmp_path):
    dump(tmp_path)
    assert DumpReader(tmp_path).failure() is None
    explode(tmp_path)
    reader = DumpReader(tmp_path)
    assert reader.failure() == FailedPass(1, "pass 'explode' failed: ValueError: no fuel\nat all", TEXT)
    assert reader.stages() == ["00-trace"]
    assert reader.pipeline() == ["explode", *TEXT.split(" | ")]
    dump(tmp_path)
    assert DumpReader(tmp_path).failure() is None
    assert not list(tmp_path.glob("*.FAILED.txt"))


def test_reader_finds_stages_by_name_and_number(tmp_path):
    traced, lowered = dump(tmp_path)
    reader = DumpReader(tmp_path)
    assert reader.stages() == ["00-trace", "01-smooth-quant", "02-round-weights", "03-lower-mx"]
    assert reader.text("trace") == reader.text("0") == reader.text("00-trace") == print_program(traced)
    assert reader.text("lower-mx") == print_program(lowered)
    assert reader.diff("2", "3") == (tmp_path / "03-lower-mx.diff").read_text().replace(
        "--- before", "--- 02-round-weights"
    )
    with pytest.raises(UnknownNameError, match=r"unknown pass of the dump 'lower': did you mean 03-lower-mx"):
        reader.text("lower")


def test_reader_refuses_what_is_no_dump(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DumpError, match="is not an mxcompile dump folder"):
        DumpReader(tmp_path)
    with pytest.raises(DumpError, match="is not an mxcompile dump folder"):
        DumpReader(tmp_path / "missing")


def test_the_call_that_compiles_says_which_kernels_serve(tmp_path):
    """`kernels.txt` has the conclusions of `explain`."""
    model = mxcompile.quantize_and_compile(
        build("mlp"), inputs("mlp"), recipe="w4a8-mxint-quick", dump=tmp_path / "out", compile=False
    )
    text = (tmp_path / "out" / "kernels.txt").read_text()
    for line in mxcompile.explain(model).conclusions():
        assert line in text.splitlines()
    assert re.search(r"^ *up +mxint4 +mxint8 ", text, re.MULTILINE)


def test_reader_refuses_half_a_dump(tmp_path):
    with pytest.raises(DumpError, match=r"has no pipeline\.txt that a dump wrote"):
        DumpReader(tmp_path)
    dump(tmp_path)
    (tmp_path / "03-lower-mx.txt").unlink()
    with pytest.raises(DumpError, match=r"03-lower-mx\.txt cannot be read .*: dump it again"):
        DumpReader(tmp_path).text("lower-mx")
    for content in ("", "[]", '{"schema": 3}', '{"schema": 3, "pipeline": "", "bytes": 0, "passes": [{}]}'):
        (tmp_path / "ledger.json").write_text(content)
        with pytest.raises(DumpError, match=r"ledger\.json is not a ledger .*: dump it again"):
            DumpReader(tmp_path).ledger()
    (tmp_path / "ledger.json").unlink()
    with pytest.raises(DumpError, match=r"its run was stopped before it had written ledger\.json"):
        DumpReader(tmp_path)


def test_a_killed_run_leaves_no_ledger_of_the_run_before(tmp_path):
    dump(tmp_path)
    Dump(tmp_path).start(mxcompile.trace(build("mlp"), inputs("mlp")), ())
    assert DumpReader(tmp_path).stages() == ["00-trace"]


def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    program = mxcompile.trace(build("mlp"), inputs("mlp"))
    pipeline = Pipeline.parse("round-weights{format=mxint4}")
    with pytest.raises(DumpError, match=f"another run is writing its dump to {tmp_path}: give each run a folder"):
        pipeline.run(program, instruments=[Dump(tmp_path), Dump(tmp_path)])
    pipeline.run(program, instruments=[Dump(tmp_path)])  # also one that failed has let go of it
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_a_place_that_cannot_be_written_is_known_before(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DumpError, match="cannot be written"):
        Dump(tmp_path / place)


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    program = mxcompile.trace(build("mlp"), inputs("mlp"))
    watcher = Dump(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(DumpError, match=r"pipeline\.txt cannot be written .*No space left"):
            Pipeline.parse("round-weights{format=mxint4}").run(program, instruments=[watcher])
