"""The house: imports point one way, files stay small, nothing shadows the passes, nothing names a place of its own."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = [*sorted((ROOT / "mxcompile").rglob("*.py")), *sorted((ROOT / "passes").glob("*.py"))]

# Lower floors know nothing of higher ones. A file imports from its own floor or below.
FLOORS = [
    {"errors"},
    {"formats"},
    {"numerics"},
    {"kernels"},
    {"ops"},
    {"tensor"},
    {"graph", "checkpoint"},
    {"analysis", "inductor"},
    {"calibration", "deploy", "export"},
    {"pipeline"},
    {"passes"},
    {"diagnostics"},
    {"api"},
    {"texts", "progress", "smollm2"},
    {"demo", "options", "screen", "comparison", "commands", "listing", "viewing", "cli", "__init__", "__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "passes" if parts[0] == "passes" else parts[1]


def imports(path: Path) -> set[str]:
    """Rooms of mxcompile that a file imports outside functions and type checking."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "mxcompile":
            modules = [f"mxcompile.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        found |= {module.split(".")[1] for module in modules if module.startswith("mxcompile.")}
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    upwards = {name for name in imports(path) - {room(path)} if FLOOR_OF[name] > FLOOR_OF[room(path)]}
    assert not upwards


def test_every_room_has_a_floor():
    assert {room(path) for path in PRODUCT} == set(FLOOR_OF)


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("*.py")), ids=lambda p: p.name)
def test_passes_do_not_import_each_other(path):
    built_in = {file.stem for file in (ROOT / "passes").glob("*.py")} - {"__init__", "recipes"}
    allowed = {"recipes.py": set(), "__init__.py": built_in}
    names = set(re.findall(r"^from mxcompile\.passes\.(\w+)", path.read_text(), re.MULTILINE))
    assert names <= allowed.get(path.name, set())
    assert "import mxcompile\n" not in path.read_text()


def test_one_room_imports_what_torch_compile_is_made_of():
    users = {path for path in PRODUCT if re.search(r"torch\._(inductor|functorch|dynamo)", path.read_text())}
    assert {room(path) for path in users} == {"inductor"}


def test_kernels_import_no_fx():
    assert not [path for path in PRODUCT if room(path) == "kernels" and "torch.fx" in path.read_text()]


def test_nothing_shadows_the_mapped_passes():
    assert not (ROOT / "mxcompile" / "passes").exists()


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= (500 if room(path) == "kernels" else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 70, f"{node.name} has {lines} lines"


def test_top_level_holds_what_it_should():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    assert top <= {"mxcompile", "passes", "tests", "benchmarks", "docs", "pyproject.toml", "README.md"}
