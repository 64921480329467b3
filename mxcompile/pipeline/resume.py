"""Resume a long run: finished parts are saved in a folder, and an interrupted run continues to the same result.

    run.txt                          identifies the run
    01-gptq-0000.safetensors, .json  a part: its tensors; its notes, the run, and the SHA-256 of the tensors' file

A file is written under a temporary name and renamed when complete; the .json comes last. A part that is damaged, or of
another run, is computed again. A run is identified by its pipeline, hashes of the program with its tensors and of the
calibration data, the kind of device, and the versions of mxcompile and torch.
"""

import hashlib
import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxcompile.atomic_files import atomic_file, check_writable, contents, folder_lock, real_path
from mxcompile.calibration.ranks.exchange import Ranks
from mxcompile.checkpoint.provenance import installed_versions
from mxcompile.errors import InputError, warn
from mxcompile.graph.inputs import Inputs, named_leaves
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Program
from mxcompile.tensor.digest import tensor_bytes

_RUN: Final = "run.txt"
_VERSIONS: Final = ("mxcompile", "torch")


class ResumeFolder:
    """The folder of one run; created if missing. current_pass: prefix of the names of parts, set by the pipeline.

    Raises InputError if the folder belongs to another run, holds files but no run, or cannot be written.
    """

    def __init__(self, folder: str | Path, pipeline: str, program: Program, processes: int = 1) -> None:
        self.folder = real_path(Path(folder))
        self.current_pass = ""
        check_folder(self.folder)
        run = _describe(pipeline, program) | ({"processes": str(processes)} if processes > 1 else {})
        text = "".join(f"{key}: {value}\n" for key, value in run.items())
        self._run = hashlib.sha256(text.encode()).hexdigest()
        with _explained(self.folder), folder_lock(self.folder):
            if self._claimed(run):
                return
            with atomic_file(self.folder / _RUN) as staged:
                staged.write_bytes(text.encode())

    def load(self, part: str) -> tuple[dict[str, Tensor], list[str]] | None:
        """Tensors and notes of a finished part; None if it is not finished, or damaged, of which a warning tells."""
        path = self._path(part)
        if not path.with_suffix(".json").exists():
            return None
        try:
            entry = json.loads(path.with_suffix(".json").read_bytes())
            notes, run, digest = list(map(str, entry["notes"])), entry["run"], entry["sha256"]
            if (run, digest) != (self._run, _file_digest(path)):
                raise ValueError("it is not what was written")
            return load_file(path), notes
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            warn(f"{path} is damaged ({type(error).__name__}: {error}): it is computed again")
            return None

    def save(self, part: str, tensors: dict[str, Tensor], notes: list[str]) -> None:
        """Save a finished part, complete or not at all."""
        path = self._path(part)
        with _explained(self.folder):
            with atomic_file(path) as staged:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, staged)
                digest = _file_digest(staged)
            with atomic_file(path.with_suffix(".json")) as staged:
                staged.write_text(json.dumps({"notes": notes, "run": self._run, "sha256": digest}))

    def _claimed(self, run: dict[str, str]) -> bool:
        """Whether the folder says that it belongs to this run; False if it is empty, or does not say it readably."""
        if not (self.folder / _RUN).exists():
            if contents(self.folder):
                raise InputError(f"{self.folder} holds other files: choose an empty folder")
            return False
        lines = (self.folder / _RUN).read_text(errors="replace").splitlines()
        stated = {key: value for key, _, value in (line.partition(": ") for line in lines)}
        if stated.keys() != run.keys():
            warn(f"{self.folder / _RUN} is damaged: only what belongs to this run is used")
            return False
        if different := [key for key in run if stated[key] != run[key]]:
            causes = [
                f"{key} {stated[key]}, not {run[key]}" if key in _VERSIONS else f"another {key}" for key in different
            ]
            raise InputError(
                f"{self.folder} belongs to another run ({', '.join(causes)}): choose another folder, or delete this one"
            )
        return True

    def _path(self, part: str) -> Path:
        return self.folder / f"{self.current_pass}-{part}.safetensors"


class SharedFolder:
    """The folder of a run of several processes: the first one alone reads and writes it, `folder`, and tells others."""

    def __init__(self, ranks: Ranks, folder: ResumeFolder | None) -> None:
        self._ranks, self._folder = ranks, folder
        self.current_pass = ""

    def load(self, part: str) -> tuple[dict[str, Tensor], list[str]] | None:
        """As `ResumeFolder.load`."""
        return self._ranks.from_first(None if self._folder is None else self._at_pass(self._folder).load(part))

    def save(self, part: str, tensors: dict[str, Tensor], notes: list[str]) -> None:
        """As `ResumeFolder.save`."""
        if self._folder is not None:
            self._at_pass(self._folder).save(part, tensors, notes)

    def _at_pass(self, folder: ResumeFolder) -> ResumeFolder:
        folder.current_pass = self.current_pass
        return folder


def open_folder(folder: str | Path, pipeline: str, program: Program, ranks: Ranks) -> ResumeFolder | SharedFolder:
    """The folder of a run, of several processes opened by the first one."""
    opened = ResumeFolder(folder, pipeline, program, ranks.count) if ranks.first else None
    return opened if opened is not None and ranks.count == 1 else SharedFolder(ranks, opened)


def check_folder(folder: str | Path) -> None:
    """Raise InputError if nothing can be written in that folder."""
    with _explained(Path(folder)):
        check_writable(Path(folder), is_folder=True)


@contextmanager
def _explained(folder: Path) -> Generator[None]:
    """OSErrors as InputErrors."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the resume folder {folder} cannot be written ({error}): make room or name another one; finished parts "
            "are kept"
        ) from error


def _describe(pipeline: str, program: Program) -> dict[str, str]:
    """All that the result depends on."""
    devices = {tensor.device.type for tensor in program.graph_module.state_dict().values()}
    selection = program.selection
    chosen = f"{selection.include} {selection.exclude} {sorted(program.output_heads)}"
    return {
        "pipeline": pipeline,
        "model": hashlib.sha256(print_program(program).encode()).hexdigest(),
        "choice of layers": hashlib.sha256(chosen.encode()).hexdigest(),
        "calibration data": digest_of(program.batches),
        "device": " ".join(sorted(devices)) or "none",
        **{name: version for name, version in installed_versions().items() if name in _VERSIONS},
    }


def digest_of(batches: Iterable[Inputs]) -> str:
    """The SHA-256 of all batches."""
    digest = hashlib.sha256()
    for batch in batches:
        if batch.weight != 1:
            digest.update(f"weight {batch.weight!r}\n".encode())
        for path, value in named_leaves((batch.args, batch.kwargs)):
            if isinstance(value, Tensor):
                digest.update(f"{path} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(tensor_bytes(value))
            else:
                kind, plain = type(value).__name__, isinstance(value, bool | int | float | str | None)
                digest.update(f"{path} {kind} {value if plain else ''}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
