"""Formatting, lint and types: what the tools have to say is part of the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "format": ["-m", "ruff", "format", "--check", "."],
    "lint": ["-m", "ruff", "check", "."],
    "types": ["-m", "pyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("command", ["format", "lint", pytest.param("types", marks=pytest.mark.slow)])
def test_tools_have_nothing_to_say(command):
    pytest.importorskip("ruff" if command != "types" else "pyright", reason="install the test extra")
    done = subprocess.run([sys.executable, *COMMANDS[command]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
