"""Finished parts of a long run in a folder: a run that was killed goes on from the last one, to the same result.

A part is a safetensors file, written under a temporary name and renamed when it is whole. `run.txt` says which run the
folder belongs to: the pipeline, the program with the hash of every tensor, and the calibration data.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxcompile.errors import InputError
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Program

_RUN = "run.txt"


class Resume:
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
            _write(known, run.encode())

    def load(self, part: str) -> tuple[dict[str, Tensor], list[str]] | None:
        """Tensors and notes of a finished part, None if it is not finished."""
        path = self._path(part)
        if not path.exists():
            return None
        return load_file(path), json.loads(path.with_suffix(".json").read_text())

    def save(self, part: str, tensors: dict[str, Tensor], notes: list[str]) -> None:
        """Keep a finished part: all of it or nothing."""
        path = self._path(part)
        _write(path.with_suffix(".json"), json.dumps(notes).encode())
        whole = path.with_suffix(".incomplete")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, whole)
        whole.replace(path)

    def _path(self, part: str) -> Path:
        return self.folder / f"{self.place}-{part}.safetensors"


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_bytes(data)
    temporary.replace(path)


def _digest(text: bytes, batches: tuple[Inputs, ...]) -> str:
    digest = hashlib.sha256(text)
    for batch in batches:
        for tensor in batch.tensors():
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
