"""Run every block of the guide in docs/, compare its tables with the code, and build the site offline."""

import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
from documents import ROOT, blocks, run_page

import mxcompile
from mxcompile.cli.model_source import load_model
from mxcompile.formats import FORMATS, ScaleRule
from mxcompile.passes import PASSES
from mxcompile.passes.recipes import RECIPES

DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.glob("*.md")) if blocks(path, "python") or blocks(path, "sh")]


@pytest.mark.filterwarnings("ignore:.*llama.cpp takes and returns token ids only:UserWarning")  # of whole words here
@pytest.mark.filterwarnings("ignore:this model is in float32, but compressed-tensors")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that transformers renamed and peft uses
@pytest.mark.filterwarnings("ignore:.*rounding has undone the adapters:UserWarning")  # 6 steps teach little
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # of Trainer without a GPU
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_block_runs(page, local_model, tmp_path, monkeypatch, capsys):
    if page.stem == "training":
        pytest.importorskip("peft")
        pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mxcompile.cli.smollm2.load", lambda: load_model(str(local_model)))
    run_page(page, local_model)
    if page.stem == "recipes":
        assert "w4a8-mxint-quick 7 weights, largest change of a logit" in capsys.readouterr().out


def test_the_table_of_formats_is_that_of_the_code():
    rows = re.findall(
        r"^\| `(mx\w+)` \| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([^|]+) \|",
        (DOCS / "formats.md").read_text(),
        re.MULTILINE,
    )
    assert {row[0] for row in rows} == set(FORMATS)
    for name, _, bits, largest, step in rows:
        fmt = FORMATS[name]
        assert float(bits) == fmt.bits_per_value
        assert float(largest) == pytest.approx(fmt.max_value, rel=1e-3)
        assert _value(step) == 2.0 ** (fmt.emin - fmt.mantissa_bits)


def test_names_that_the_guide_uses_exist():
    text = "".join(path.read_text() for path in (*DOCS.glob("*.md"), ROOT / "README.md"))
    assert set(re.findall(r"`(w\da\d+-\w+(?:-quick)?)`", text)) <= set(RECIPES)
    rules = re.findall(
        r"^\| (`[^|]+`) \|", (DOCS / "formats.md").read_text().partition("## Scale rules")[2], re.MULTILINE
    )
    assert {name for cell in rules for name in re.findall(r"`([^`]+)`", cell)} == {str(rule) for rule in ScaleRule}
    reference = (DOCS / "api" / "passes.md").read_text()
    for kind in PASSES.values():
        assert f"autoclass:: {kind.__module__}.{kind.__name__}\n" in reference


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    missing = [name for name in ("sphinx", "furo", "myst_parser") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'mxcompile[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(folder / "trees"), str(DOCS), str(folder / "html")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//", text), path
        assert not re.findall(r"<link[^>]+rel=\"(?:stylesheet|preload|preconnect)\"[^>]+href=\"(?:https?:)?//", text), (
            path
        )
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text()), path
    assert str(ROOT) not in "".join(path.read_text() for path in site.rglob("*.html"))


@pytest.mark.slow
def test_the_reference_has_every_public_name(site):
    reference = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    public = [name for name in mxcompile.__all__ if not isinstance(getattr(mxcompile, name), types.ModuleType)]
    assert [name for name in public if f'id="mxcompile.{name}"' not in reference] == []


def _value(text: str) -> float:
    if "^" in text:
        base, _, exponent = text.partition("^")
        return float(base) ** float(exponent)
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator)
