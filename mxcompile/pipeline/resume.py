"""Finished parts of a long run in a folder: a run that was killed goes on from the last one, to the same result.

A part is a safetensors file, written under a temporary name and renamed when it is whole. `run.txt` says which run the
folder belongs to: the pipeline, the program with the hash of every tensor, and the calibration data.
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
    """The folder of one run; made if it does not exist. place: the pass at work, in front of the name of each part.

    Raises InputError if the folder holds the parts of another run, or is not empty and no such folder.
    """

    def __init__(self, folder: str | Path, pipeline: str, program: Program) -> None:
        self.folder = Path(folder)
        self.place = ""
        self.folder.mkdir(parents=True, exist_ok=True)
        run = f"{pipeline}\n{_digest(print_program(program).encode(), program.batches)}\n"
        known = self.folder / _RUN
        if known.exists() and known.read_text() != run:
            raise InputError(
                f"{self.folder} belongs to another run (another pipeline, model or calibration data): name another "
                "folder, or delete this one"
            )
        if not known.exists():
            if any(self.folder.iterdir()):
                raise InputError(f"{self.folder} holds other files: name an empty folder")
            with atomic_file(known) as staged:
                staged.write_bytes(run.encode())
        discard_unfinished(self.folder)

    def load(self, part: str) -> tuple[dict[str, Tensor], list[str]] | None:
        """Tensors and notes of a finished part, None if it is not finished."""
        path = self._path(part)
        if not path.exists():
            return None
        return load_file(path), json.loads(path.with_suffix(".json").read_text())

    def save(self, part: str, tensors: dict[str, Tensor], notes: list[str]) -> None:
        """Keep a finished part: all of it or nothing."""
        path = self._path(part)
        with atomic_file(path.with_suffix(".json")) as staged:
            staged.write_bytes(json.dumps(notes).encode())
        with atomic_file(path) as staged:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, staged)

    def _path(self, part: str) -> Path:
        return self.folder / f"{self.place}-{part}.safetensors"


def _digest(text: bytes, batches: tuple[Inputs, ...]) -> str:
    digest = hashlib.sha256(text)
    for batch in batches:
        for tensor in batch.tensors():
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
