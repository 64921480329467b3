"""Replace the checkpoint in a folder atomically: at any moment the folder holds the old one or the new one, whole.

1. Weights and their index are written under names that the existing checkpoint does not use (`model` and `model-2`
   alternate). Auxiliary files (tokenizer, generation config) go to a staging folder inside.
2. `config.json`, which names the index, is renamed into place: this commits the save.
3. The auxiliary files are moved into place. If that is interrupted, the next load or save finishes it.
4. Weight files that `config.json` no longer names are deleted.

No existing file is ever overwritten: another process may have it mapped into memory.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from mxcompile.checkpoint.atomic_files import sync, write_durably
from mxcompile.checkpoint.checked_json import sha256
from mxcompile.checkpoint.config_json import CONFIG, CheckpointConfig
from mxcompile.errors import CheckpointError

_STAGE: Final = ".mxcompile-save"
_WEIGHT_FILE: Final = re.compile(r"model(-2)?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_OTHER_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")


class SaveTransaction:
    """A save in progress; if it fails, the files that it has written are deleted.

    stage: the staging folder for auxiliary files. stem: prefix of the names of the weight files and their index.
    """

    def __init__(self, folder: Path) -> None:
        previous = check_destination(folder)
        self.folder = folder
        self.stage = folder / _STAGE
        self.stem = "model-2" if previous is not None and previous.index.startswith("model.") else "model"
        self._is_new = not folder.exists()
        self._written: list[Path] = []
        self._committed = False
        if previous is not None:
            finish_interrupted(folder, previous.files)
        if self.stage.exists():
            shutil.rmtree(self.stage)
        self.stage.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._committed:
            return
        for path in self._written:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.stage)
        if self._is_new and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def new_file(self, name: str) -> Path:
        """The path at which to write a new file; the existing checkpoint does not use its name."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        self._written.append(path)
        return path

    def auxiliary_files(self) -> dict[str, str]:
        """SHA-256 of each auxiliary file, by its path in the folder; they are on the disk afterwards."""
        digests: dict[str, str] = {}
        for path in sorted(self.stage.rglob("*")):
            if path.is_file():
                sync(path)
                digests[path.relative_to(self.stage).as_posix()] = sha256(path.read_bytes())
        return digests

    def commit(self, config: CheckpointConfig) -> None:
        """Replace the old checkpoint by the new one, and delete the old one's weight files."""
        write_durably(self.stage / CONFIG, config.to_json())
        sync(self.folder)
        self._committed = True
        (self.stage / CONFIG).replace(self.folder / CONFIG)
        sync(self.folder)
        finish_interrupted(self.folder, config.files)
        for path in self.folder.iterdir():
            if _WEIGHT_FILE.fullmatch(path.name) and path not in self._written:
                path.unlink()
        shutil.rmtree(self.stage)


def finish_interrupted(folder: Path, files: Mapping[str, str]) -> None:
    """Move auxiliary files into place that an interrupted save has left in the staging folder. files: their SHA-256."""
    for name, digest in files.items():
        staged = folder / _STAGE / name
        if staged.is_file() and sha256(staged.read_bytes()) == digest:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            staged.replace(folder / name)


def check_destination(folder: Path) -> CheckpointConfig | None:
    """The checkpoint that a save would replace, None if there is none.

    Raises CheckpointError if the folder holds a model that mxcompile did not save.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: name a folder")
    try:
        return CheckpointConfig.read(folder, verify=False)
    except CheckpointError as error:
        others = [path.name for pattern in (CONFIG, *_OTHER_WEIGHTS) for path in folder.glob(pattern)]
        if others and not (folder / _STAGE).is_dir():
            raise CheckpointError(
                f"{folder} holds files of another model ({others[0]}): name a new folder, or delete that one"
            ) from error
        return None
