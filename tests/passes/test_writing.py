"""mxcompile.passes.writing: it has every name that a pass needs, and the guide's passes import from nowhere else."""

import ast
import re

import pytest
from documents import ROOT, blocks

import mxcompile
from mxcompile.passes import PASSES, writing

PLACES = {"mxcompile", "mxcompile.passes.writing", "mxcompile.formats", "mxcompile.errors"}
GUIDE = ROOT / "passes" / "README.md"


def imported(text: str) -> set[str]:
    """The modules of mxcompile that a script imports from."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
    return {name for name in modules if name.partition(".")[0] == "mxcompile"}


def test_every_name_exists_and_is_documented():
    for name in writing.__all__:
        assert hasattr(writing, name)
        assert re.search(rf"`{name}`", writing.__doc__), name
    assert len(set(writing.__all__)) == len(writing.__all__)


def test_names_of_the_package_are_the_same_objects():
    shared = set(writing.__all__) & set(mxcompile.__all__)
    assert shared >= {"Miss", "Pass", "PassResult", "Program", "Request", "Rule", "apply_rules", "choose", "observers"}
    for name in shared:
        assert getattr(writing, name) is getattr(mxcompile, name)


def test_it_is_no_pass():
    assert writing.__name__ not in {kind.__module__ for kind in PASSES.values()}


@pytest.mark.parametrize("block", blocks(GUIDE, "python"), ids=lambda block: block.split("\n")[0])
def test_the_guide_imports_from_public_places(block):
    assert imported(block) <= PLACES


def test_the_example_of_a_pass_imports_from_public_places():
    assert imported((ROOT / "docs" / "examples" / "custom_pass.py").read_text()) <= PLACES
