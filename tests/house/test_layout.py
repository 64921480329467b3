"""The house: imports between rooms point one way, files stay small, nothing shadows the passes."""

import ast
import re
import subprocess
from pathlib import Path

import networkx
import pytest
from rooms import EXCEPTIONS, FLOORS, PRODUCT, ROOT, arrows, room

FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def test_every_room_has_a_floor():
    assert {room(path) for path in PRODUCT} == set(FLOOR_OF)


def test_imports_point_downwards():
    pairs = {(path, target) for path in PRODUCT for target in arrows(path) if target != room(path)}
    upwards = {(path, target) for path, target in pairs if FLOOR_OF[target] >= FLOOR_OF[room(path)]}
    assert {(str(path.relative_to(ROOT)), target) for path, target in upwards} <= EXCEPTIONS


def test_the_exceptions_are_needed():
    assert all(target in arrows(ROOT / source) for source, target in EXCEPTIONS)


def test_files_of_a_room_import_each_other_without_circles():
    files = networkx.DiGraph()
    modules = {path: ".".join(("mxcompile", *_parts(path))) for path in PRODUCT}
    named = {name: path for path, name in modules.items()}
    for path in PRODUCT:
        for target in arrows(path, whole=True) & set(named):
            if named[target] != path and named[target].name != "__init__.py":
                files.add_edge(str(path.relative_to(ROOT)), str(named[target].relative_to(ROOT)))
    assert not list(networkx.simple_cycles(files))


def _parts(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ("passes", *parts[1:]) if parts[0] == "passes" else parts[1:]


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("*.py")), ids=lambda p: p.name)
def test_passes_do_not_import_each_other(path):
    built_in = {file.stem for file in (ROOT / "passes").glob("*.py")} - {"__init__", "recipes", "writing"}
    allowed = {"recipes.py": set(), "__init__.py": built_in}
    names = set(re.findall(r"^from mxcompile\.passes\.(\w+)", path.read_text(), re.MULTILINE))
    assert names <= allowed.get(path.name, set())
    assert "import mxcompile\n" not in path.read_text()


def test_one_file_imports_dynamo_inductor_and_functorch():
    users = [path for path in PRODUCT if re.search(r"torch\._(inductor|functorch|dynamo)", path.read_text())]
    assert users == [ROOT / "mxcompile/inductor/private_api.py"]


def test_kernels_import_no_fx():
    assert not [path for path in PRODUCT if room(path) == "kernels" and "torch.fx" in path.read_text()]


def test_nothing_shadows_the_mapped_passes():
    assert not (ROOT / "mxcompile" / "passes").exists()


def test_files_and_functions_stay_small():
    for path in PRODUCT:
        text = path.read_text()
        assert text.count("\n") <= (500 if room(path) == "kernels" else 400), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 70, f"{path}: {node.name} has {lines} lines"


TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))


def test_no_test_file_is_imported():
    """What several of them use lies in support files beside the rooms; a support file imports no tests either."""
    refused = {file.stem for file in TEST_FILES if file.name.startswith("test_")} | {"tests", "conftest"}
    for path in TEST_FILES:
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module or "", *(alias.name for alias in node.names)}
        assert not {name for name in names if {*name.split(".")} & refused}, path


def test_no_test_reads_a_clock():
    """How long something takes depends on what else the machine does: benchmarks measure that."""
    clocks = re.compile(r"time\.(time|perf_counter|monotonic|process_time)\(\)")
    assert [path.name for path in TEST_FILES if clocks.search(path.read_text())] == []


def test_top_level_holds_what_it_should():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    files = {"pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert top <= {"mxcompile", "passes", "tests", "benchmarks", "docs", *files}
