"""Kernels that were compiled without a GPU are found again in a folder that has moved."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import sys
from pathlib import Path
from tuning import carried_cache, compile_ahead
carried_cache.use(Path(sys.argv[1]))
carried_cache.compile_only()
from mxcompile.kernels.gluon import planes_linear as gluon
from mxcompile.kernels.triton import planes_linear as triton
for config in (triton.Config(8, 64, 4, 2, 3), gluon.Config(16, 64, 8, split=4)):
    compile_ahead._run(compile_ahead._weight("mxint4", 512, "cpu"), config)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles on a machine without a GPU")
def test_kernels_are_found_in_a_folder_that_has_moved(tmp_path: Path) -> None:
    def compile_into(folder: Path) -> set[str]:
        """Run the program, and name the intermediate files of kernels that it compiled."""
        command = [sys.executable, "-c", PROGRAM, str(folder)]
        subprocess.run(command, cwd=BENCHMARKS, check=True, timeout=300)
        return {file.parent.name for file in folder.rglob("*.ptx")}

    compiled = compile_into(tmp_path / "here")
    assert len(compiled) == 2
    for file in (tmp_path / "here").rglob("*"):  # what is carried
        if file.is_file() and file.suffix not in (".cubin", ".json"):
            file.unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    assert compile_into(tmp_path / "there") == set()
