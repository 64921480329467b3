"""The studies in benchmarks/ and in the guide are read; there is a cell for every record that a script made before."""

from collections import Counter

from documents import ROOT, blocks
from records import results

from mxcompile.cli.study.study_file import StudyFile

OWN = {"": "smollm2", "planted": "smollm2 planted", "off-grid": "smollm2 off-grid"}


def cells(name):
    return StudyFile.load(ROOT / "benchmarks" / name).cells()


def test_the_study_of_accuracy():
    found = {(cell.model.name, cell.recipe, cell.weight, cell.activation) for cell in cells("accuracy.toml")}
    for row in results("accuracy.jsonl"):
        model = OWN[row["model"].removeprefix("SmolLM2-135M-Instruct").strip()]
        assert (model, row["recipe"], row["weight"], row["activation"]) in found


def test_the_study_of_the_paper():
    every = cells("study.toml")
    names = Counter((cell.recipe, cell.weight, cell.activation) for cell in every)
    assert names == Counter((row["recipe"], row["weight"], row["activation"]) for row in results("study-cells.jsonl"))
    late = [cell for cell in every if cell.recipe == "GPTQ, AWQ (paper)"]
    assert all("| as-float | awq-fold" in str(cell.pipeline) for cell in late)
    assert {cell.evaluation.half for cell in every} == {"second"}


def test_the_study_of_choices():
    """Each name says for which formats its pipeline is; names without a mark are baselines."""
    every = cells("choices.toml")
    marks = {"(a8)": ("mxint4", "mxint8"), "(a4)": ("mxfp4", "mxfp4")}
    for cell in every:
        of_name = [pair for mark, pair in marks.items() if cell.recipe.endswith(mark)]
        assert (cell.weight, cell.activation) in (of_name or marks.values())
        assert (cell.calibration is not None) == bool(of_name)
        assert str(cell.pipeline).endswith(f"lower-mx{{weight={cell.weight},activation={cell.activation}}}")
    halves = Counter(cell.evaluation.half for cell in every)
    assert halves == {"first": len(every) // 2, "second": len(every) // 2}
    assert any("random{seed=0}" in str(cell.pipeline) for cell in every)


def test_the_study_of_the_guide(tmp_path):
    (text,) = blocks(ROOT / "docs/studies.md", "toml")
    file = tmp_path / "formats.toml"
    file.write_text(text)
    found = StudyFile.load(file).cells()
    assert len(found) == 1 + 4 * 4  # a recipe without data; formats, blocks, windows and seeds of the pipeline
