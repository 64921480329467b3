"""`mxcompile study`: cells are those of quantize and eval to the bit, shared work changes nothing, studies resume."""

import json
import math
from pathlib import Path

import pytest
import torch
from models import build
from typer.testing import CliRunner

import mxcompile
from mxcompile.atomic_files import folder_lock
from mxcompile.cli.app import app
from mxcompile.cli.study import run as run_module
from mxcompile.cli.study.processes import gpu_of, take, threads
from mxcompile.cli.study.results import Difference, groups
from mxcompile.cli.study.run import Finished, SharedFolds, bundles, common_folds
from mxcompile.cli.study.study_file import StudyFile
from mxcompile.errors import InputError, MXCompileError
from mxcompile.pipeline.pipeline import Pipeline

FAILS = """
from dataclasses import dataclass
from mxcompile.errors import PassError
from mxcompile.pipeline.interfaces import Pass

@dataclass(frozen=True)
class Fails(Pass):
    name = "fails"

    def run(self, program):
        raise PassError("this one fails")
"""
WORDS = ["The", "capital", "of", "France", "is", "Germany", "Italy", "Paris", "Berlin", "."]
FORMATS = "weight=mxint4,activation=mxint8"
LEARNED = f"awq-fold{{{FORMATS}}} | gptq{{format=mxint4,activation=mxint8}} | lower-mx{{{FORMATS}}}"


def words(path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(len(WORDS), (1200,), generator=generator).tolist()
    path.write_text("\n\n".join(" ".join(WORDS[i] for i in indices[k : k + 60]) for k in range(0, 1200, 60)))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(the text to calibrate on, the text to evaluate on)"""
    folder = tmp_path_factory.mktemp("texts")
    return words(folder / "calibration.txt", 0), words(folder / "test.txt", 1)


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def study_text(model, texts, head="", tail=""):
    calibration, test = texts
    return f"""
{head}
models = ["{model}"]
formats = ["mxint4/mxint8", "mxint8/mxint8"]
{tail}
[pipelines]
rtn = "round-weights{{format=W}} | lower-mx{{weight=W,activation=A}}"
learned = "awq-fold{{weight=W,activation=A}} | gptq{{format=W,activation=A}} | lower-mx{{weight=W,activation=A}}"
folded = "awq-fold{{weight=W,activation=A}} | round-weights{{format=W}} | lower-mx{{weight=W,activation=A}}"
[[calibration]]
source = "{calibration}"
windows = 4
length = 64
[[evaluation]]
text = "{test}"
length = 32
windows = 5
"""


@pytest.fixture(scope="module")
def finished(local_model, texts, tmp_path_factory):
    """(the study's file, its folder, the records that it printed)"""
    folder = tmp_path_factory.mktemp("study")
    file = folder / "small.toml"
    file.write_text(study_text(local_model, texts))
    records = json.loads(run("study", file, "--resume", folder / "out", "--json").stdout)["cells"]
    return file, folder / "out", records


def test_a_line_for_each_cell(finished):
    _, folder, records = finished
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert len(records) == len(lines) == 6
    assert sorted(line["key"] for line in lines) == sorted(record["key"] for record in records)
    names = [(record["recipe"], record["weight"]) for record in records]
    assert names == [(name, fmt) for name in ("rtn", "learned", "folded") for fmt in ("mxint4", "mxint8")]
    for record in records:
        assert record["tokens"] == 5 * 31 == sum(tokens for tokens, *_ in record["windows"])
        assert record["kl"] == pytest.approx(sum(kl for _, _, kl, _, _ in record["windows"]) / record["tokens"])
        assert record["seconds"] > 0
        assert record["versions"]["torch"] == torch.__version__


def test_a_cell_is_quantize_and_eval_of_the_same_text_to_the_bit(finished, local_model, texts, tmp_path):
    calibration, test = texts
    data = ("--text", test, "--length", 32, "--windows", 5)
    learn = ("--calibration", f"{calibration}:4", "--calibration-length", 64)
    (cell,) = (r for r in finished[2] if (r["recipe"], r["weight"]) == ("learned", "mxint4"))
    made = run("quantize", local_model, "--recipe", LEARNED, *data, *learn, "--out", tmp_path / "new", "--json").stdout
    made = json.loads(made)
    assert (made["kl"], made["top1"], made["tokens"]) == (cell["kl"], cell["top1"], cell["tokens"])
    assert (made["model"]["nll"], made["model"]["bytes"]) == (cell["nll"], cell["bytes"])
    assert (made["reference"]["nll"], made["calibration"]) == (cell["reference_nll"], cell["calibrated_on"])
    again = json.loads(run("eval", tmp_path / "new", *data, "--json").stdout)
    assert again["model"]["nll"] == cell["nll"]


def test_what_a_pipeline_makes_is_scored_on_all_texts(finished, texts, tmp_path, monkeypatch):
    """The cells of two texts are those of each alone, and every pipeline runs once."""
    file = tmp_path / "two.toml"
    file.write_text(f'{finished[0].read_text()}\n[[evaluation]]\ntext = "{texts[0]}"\nlength = 32\nwindows = 2')
    deployed = []
    monkeypatch.setattr(run_module, "deploy", lambda *given: deployed.append(mxcompile.deploy(*given)) or deployed[-1])
    records = json.loads(run("study", file, "--resume", tmp_path / "out", "--json").stdout)["cells"]
    assert (len(records), len(deployed)) == (12, 6)
    varying = ("seconds", "peak_bytes")
    known = [{**each, **dict.fromkeys(varying)} for each in finished[2]]
    assert [{**each, **dict.fromkeys(varying)} for each in records if each["tokens"] == 5 * 31] == known
    (own,) = (r for r in records if (r["recipe"], r["weight"], r["tokens"]) == ("learned", "mxint4", 2 * 31))
    data = ("--text", texts[0], "--length", 32, "--windows", 2, "--calibration", f"{texts[0]}:4", "--json")
    alone = json.loads(run("eval", own_model(file), "--recipe", LEARNED, *data, "--calibration-length", 64).stdout)
    assert (own["kl"], own["nll"]) == (alone["kl"], alone["model"]["nll"])


def own_model(file):
    """The model of a study's file."""
    return StudyFile.load(file).content["models"][0]


def test_finished_cells_are_not_run_again(finished, monkeypatch):
    file, folder, records = finished
    before = (folder / "cells.jsonl").read_text()

    def none(*_):
        raise AssertionError("nothing is left to load a model for")

    monkeypatch.setattr(run_module, "load_model", none)
    printed = run("study", file, "--resume", folder)
    assert "6 cells, 6 of them finished" in printed.stderr
    assert (folder / "cells.jsonl").read_text() == before
    assert len(records) == 6


def test_a_killed_study_resumes_after_its_last_whole_line(finished, tmp_path):
    file, folder, records = finished
    lines = (folder / "cells.jsonl").read_text().splitlines()
    (tmp_path / "cells.jsonl").write_text("\n".join([*lines[:4], lines[4][:50]]))
    again = json.loads(run("study", file, "--resume", tmp_path, "--json").stdout)["cells"]
    numbers = ("key", "nll", "kl", "top1", "bytes", "windows")
    assert [[r[name] for name in numbers] for r in again] == [[r[name] for name in numbers] for r in records]
    readable = []
    for line in (tmp_path / "cells.jsonl").read_text().splitlines():
        try:
            readable.append(json.loads(line)["key"])
        except ValueError:
            continue
    assert sorted(readable) == sorted(record["key"] for record in records)


def test_what_is_printed_and_drawn(finished):
    file, folder, records = finished
    printed = run("study", file, "--resume", folder).stdout
    best = min(records, key=lambda record: record["kl"])
    assert f"{best['kl']:.4f}" in printed
    assert "front of bytes and KL: " in printed
    assert printed.count(" ± ") == 5 + 1  # all but the best, and the explanation
    page = (folder / "index.html").read_text()
    content = json.loads(page.partition('id="content">')[2].partition("</script>")[0])
    (group,) = content["groups"]
    assert next(cell["label"] for cell in group["cells"]) == "rtn mxint4/mxint8"
    front = [cell for cell in group["cells"] if cell["front"]]
    assert {cell["bytes"] for cell in front} <= {record["bytes"] for record in records}


def test_the_front_and_paired_differences():
    def cell(name, size, *kls):
        windows = [[10, 0.0, 10 * kl, 5, 0.0] for kl in kls]
        mean = sum(kls) / len(kls)
        return {"model": "m", "evaluation": "e", "recipe": name, "bytes": size, "kl": mean, "windows": windows}

    cells = [cell("a", 10, 0.5, 0.9), cell("b", 20, 0.1, 0.5), cell("c", 20, 0.6, 0.8), cell("d", 5, 1.0, 2.0)]
    (group,) = groups(cells)
    assert [record["recipe"] for record in group.front] == ["d", "a", "b"]
    assert group.best["recipe"] == "b"
    steady = Difference.of(cells[0], cells[1])
    assert steady.mean == pytest.approx(0.4)
    assert steady.error == pytest.approx(0, abs=1e-12)
    unsteady = Difference.of(cells[2], cells[1])
    assert (unsteady.mean, unsteady.error) == (pytest.approx(0.4), pytest.approx(0.1))
    assert unsteady.is_clear
    assert Difference.of(cells[1], cells[1]) is None


def test_shared_folds_change_nothing(monkeypatch):
    """A pipeline after another that begins like it: the fold runs once, and the weights are the same bits."""
    batch = {"input_ids": torch.arange(96).reshape(3, 32)}
    program = mxcompile.trace(build("llama"), batch)
    fold, rest = f"awq-fold{{{FORMATS}}}", f"round-weights{{format=mxint4}} | lower-mx{{{FORMATS}}}"
    first, second = Pipeline.parse(LEARNED), Pipeline.parse(f"{fold} | {rest}")
    assert (common_folds(first, second), common_folds(second, second)) == (1, 1)
    gptq = Pipeline.parse(LEARNED.partition("| ")[2])
    assert common_folds(gptq, gptq) == 0  # a rounded program is no start for a pipeline
    alone = [pipeline.run(program, [batch]) for pipeline in (first, second)]
    shared = SharedFolds()
    together = [shared.run(program, first, [batch], second), shared.run(program, second, [batch], None)]
    for one, other in zip(alone, together, strict=True):
        assert [record.spec for record in one.ledger] == [record.spec for record in other.ledger]
        for name in one.parameter_names():
            assert torch.equal(one.stored(name), other.stored(name))
    assert together[0].ledger[0] is together[1].ledger[0]


CODE = """
import torch
from dataclasses import dataclass
from mxcompile.passes.writing import Pass, PassResult, Program, Stage

def halve(model):
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    return model

@dataclass(frozen=True)
class AsFloat(Pass):
    name = "as-float"
    accepts = frozenset({Stage.ROUNDED})
    gives = Stage.FLOAT

    def run(self, program):
        program.rounded.clear()
        return PassResult(1)
"""


def test_changed_models_own_passes_seeds_and_what_is_skipped(local_model, texts, tmp_path):
    (tmp_path / "code.py").write_text(CODE)
    file = tmp_path / "own.toml"
    late = f"round-weights{{format=mxint4}} | as-float | smooth-quant | lower-mx{{{FORMATS}}}"
    file.write_text(f"""
models = ["{local_model}", {{name = "halved", source = "{local_model}", change = "code.py:halve"}}]
recipes = ["w4a8-mxint-quick"]
passes = ["code.py:AsFloat"]
skip = [{{model = "halved", recipe = "late"}}]
[pipelines]
late = "{late}"
[[calibration]]
source = "{texts[0]}"
windows = 2
length = 32
seed = [0, 1]
[[evaluation]]
text = "{texts[1]}"
half = "first"
length = 16
windows = 2
""")
    cells = StudyFile.load(file).cells()
    assert [(Path(c.model.name).name == "halved", c.recipe, c.calibration and c.calibration.seed) for c in cells] == [
        (False, "w4a8-mxint-quick", None),  # calibrates on nothing
        (False, "late", 0),
        (False, "late", 1),
        (True, "w4a8-mxint-quick", None),
    ]
    records = json.loads(run("study", file, "--resume", tmp_path / "out", "--json").stdout)["cells"]
    assert records[0]["reference_nll"] != records[3]["reference_nll"]
    assert records[1]["nll"] != records[2]["nll"]
    assert all("the first half of test.txt" in record["evaluation"] for record in records)
    assert math.isfinite(records[1]["kl"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = [", "cannot be read as a study"),
        ('recipe = ["rtn"]', "unknown key 'recipe'"),
        ('models = ["smollm2"]', "neither recipes nor pipelines"),
        ('recipes = ["w4a8-mxint-quik"]', "w4a8-mxint-quik"),
        ('pipelines = {a = "lower-mx{weight=W}"}', "there are no formats to fill in"),
        ('recipes = ["w4a8-mxint"]\n[[evaluation]]\nhalf = "third"', "neither first nor second"),
        ('recipes = ["w4a8-mxint"]\n[[evaluation]]\nhalf = "first"', "leaves its second half"),
        ('recipes = ["w4a8-mxint"]\n[[calibration]]\nseed = 1', "name one"),
        ('recipes = ["w4a8-mxint"]\nskip = [{recipe = "*"}]', "skip leaves no cell"),
        ('recipes = ["w4a8-mxint"]\npasses = ["nowhere.py:A"]', "is not FILE.py:NAME"),
        ('recipes = ["w4a8-mxint"]\nmodels = [{source = "a"}]', "needs a name"),
    ],
)
def test_what_is_no_study(text, message, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(MXCompileError, match=message.replace("[", r"\[")):
        StudyFile.load(file).cells()


def test_a_folder_of_something_else_is_refused(finished, tmp_path):
    (tmp_path / "cells.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="is not of a study"):
        run("study", finished[0], "--resume", tmp_path)


def test_one_study_at_a_time_in_a_folder(finished):
    file, folder, _ = finished
    with folder_lock(folder), pytest.raises(InputError, match="another study is running"):
        run("study", file, "--resume", folder)


def test_cells_that_share_folds_are_a_bundle(finished):
    cells = StudyFile.load(finished[0]).cells()
    names = [[(cell.recipe, cell.weight) for cell in bundle] for bundle in bundles(cells)]
    assert sorted(names) == [
        [("learned", "mxint4"), ("folded", "mxint4")],
        [("learned", "mxint8"), ("folded", "mxint8")],
        [("rtn", "mxint4")],
        [("rtn", "mxint8")],
    ]
    assert [len(bundle) for bundle in bundles(cells, most=1)] == [1] * 6


def test_a_bundle_is_taken_once_and_none_after_a_failure(finished, tmp_path):
    first, second, *_ = StudyFile.load(finished[0]).cells()
    assert [take(tmp_path, first), take(tmp_path, first), take(tmp_path, second)] == [True, False, True]
    other = tmp_path / "other"
    other.mkdir()
    (other / "failed").touch()
    assert not take(other, first)


def test_processes_add_their_records_in_turns(tmp_path):
    one, other = (Finished(tmp_path, tmp_path / "turns") for _ in range(2))
    one.add({"key": "a"})
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"key": "ha')  # what a killed process has left
    other.add({"key": "b"})
    one.add({"key": "c"})
    assert [*Finished(tmp_path).records] == ["a", "b", "c"]


def test_a_process_has_its_share_of_cores_and_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 14)
    assert [threads(4), threads(20)] == [3, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(4) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu_of(1) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [gpu_of(number) for number in range(3)] == ["5", "7", "5"]


@pytest.mark.slow  # each process imports everything and loads the model
def test_several_processes_make_the_same_cells(finished, tmp_path):
    file, _, records = finished
    shared = json.loads(run("study", file, "--resume", tmp_path, "--processes", 2, "--json").stdout)["cells"]
    assert [(r["key"], r["bytes"]) for r in shared] == [(r["key"], r["bytes"]) for r in records]
    assert [r["kl"] for r in shared] == pytest.approx([r["kl"] for r in records], rel=1e-4)  # other numbers of threads
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == len(records)


@pytest.mark.slow
def test_the_cell_that_fails_in_a_process_is_named(local_model, texts, tmp_path):
    file = tmp_path / "failing.toml"
    file.write_text(study_text(local_model, texts, "passes = ['fails.py:Fails']").replace('rtn = "', 'rtn = "fails | '))
    (tmp_path / "fails.py").write_text(FAILS)
    with pytest.raises(InputError, match=r"this one fails.*in the cell .*'recipe': 'rtn'"):
        run("study", file, "--resume", tmp_path / "out", "--processes", 2)
