"""What `import mxcompile` and the command line cost: they leave out what only those need who compile."""

import subprocess
import sys
from functools import cache

import pytest

LOADED = "import sys, {}; print(*sorted(name for name in sys.modules if name.startswith({!r})))"
HEAVY = ("torch._inductor", "torch._dynamo", "transformers", "triton", "sympy")


@cache
def loaded(module: str) -> set[str]:
    """The heavy modules that another process has after importing that one."""
    code = LOADED.format(module, HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["mxcompile", "mxcompile.cli.app", "mxcompile.passes.writing"])
def test_nothing_heavy_is_loaded(module):
    assert loaded(module) <= loaded("torch")
