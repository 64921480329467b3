"""Run each script of docs/examples as a user would, and check what it prints."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.fixture
def shown(capsys):
    """shown("custom_pass") returns what that script prints."""

    def run(name: str) -> str:
        runpy.run_path(str(ROOT / "docs" / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def number(text: str, row: str) -> float:
    """The last number of a row."""
    (line,) = (line for line in text.splitlines() if re.match(rf"{re.escape(row)}\s", line))
    return float(line.split()[-1])


def test_there_are_these():
    assert [path.stem for path in EXAMPLES] == ["custom_format", "custom_pass", "mixed_precision"]


def test_custom_pass_keeps_the_layer_with_outliers_and_gains_by_it(shown):
    text = shown("custom_pass")
    assert number(text, "worst-layers") > number(text, "round-weights{format=mxint4}") + 0.5
    assert number(text, "model.layers.2.mlp.down_proj.weight") < 15
    assert text.count("model.layers") == 2  # 5 % of 28, rounded up


def test_custom_format_takes_formats_without_a_kernel(shown):
    text = shown("custom_format")
    errors = [number(text, name) for name in ("mxint8", "mxint4", "mxint3", "mxint2")]
    assert errors == sorted(errors, reverse=True)
    assert 10 < number(text, "mxfp5_e3m1") < number(text, "mxfp6_e3m2")
    assert number(text, "mxint3:128") > 10


def test_mixed_precision_spends_bytes_on_what_needs_them(shown):
    text = shown("mixed_precision")
    assert number(text, "attention in mxfp8") < number(text, "all in mxint4")
    assert "model.layers.0.self_attn.v_proj=none" in text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_has_a_docstring_and_is_named_where_passes_are_explained(path):
    assert path.read_text().startswith('"""')
    assert f"`{path.name}`" in (ROOT / "passes" / "README.md").read_text()
