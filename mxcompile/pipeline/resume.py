"""Resume a long run: finished parts are saved in a folder, and an interrupted run continues to the same result.

A part is a safetensors file, written under a temporary name and renamed when complete. `run.txt` identifies the run by
its pipeline and a hash of the program, its tensors and the calibration data.
"""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from mxcompile.checkpoint.atomic_files import atomic_file, discard_unfinished
from mxcompile.errors import InputError
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Program
from mxcompile.tensor.digest import tensor_bytes

_RUN = "run.txt"


class ResumeFolder:
    """The folder of one run; created if missing. current_pass: prefix of the names of parts, set by the pipeline.

    Raises InputError if the folder belongs to another run, or holds files but no run.
    """

    def __init__(self, folder: str | Path, pipeline: str, program: Program) -> None:
        self.folder = Path(folder)
        self.current_pass = ""
        self.folder.mkdir(parents=True, exist_ok=True)
        run = f"{pipeline}\n{_digest(print_program(program).encode(), program.batches)}\n"
        run_file = self.folder / _RUN
        if run_file.exists() and run_file.read_text() != run:
            raise InputError(
                f"{self.folder} belongs to another run (another pipeline, model or calibration data): choose another "
                "folder, or delete this one"
            )
        if not run_file.exists():
            if any(self.folder.iterdir()):
                raise InputError(f"{self.folder} holds other files: choose an empty folder")
            with atomic_file(run_file) as staged:
                staged.write_bytes(run.encode())
        discard_unfinished(self.folder)

    def load(self, part: str) -> tuple[dict[str, Tensor], list[str]] | None:
        """Tensors and notes of a finished part; None if it is not finished."""
        path = self._path(part)
        if not path.exists():
            return None
        return load_file(path), json.loads(path.with_suffix(".json").read_text())

    def save(self, part: str, tensors: dict[str, Tensor], notes: list[str]) -> None:
        """Save a finished part, complete or not at all."""
        path = self._path(part)
        with atomic_file(path.with_suffix(".json")) as staged:
            staged.write_bytes(json.dumps(notes).encode())
        with atomic_file(path) as staged:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, staged)

    def _path(self, part: str) -> Path:
        return self.folder / f"{self.current_pass}-{part}.safetensors"


def _digest(text: bytes, batches: tuple[Inputs, ...]) -> str:
    digest = hashlib.sha256(text)
    for batch in batches:
        for tensor in batch.tensors():
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
