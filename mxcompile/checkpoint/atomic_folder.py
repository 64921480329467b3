"""How new files come into a folder, so that at any moment the old checkpoint or the new one is there, whole.

1. Weights and their index are written under names that the present checkpoint does not use (`model`, `model-2` in
   turn), files that come along (tokenizer, generation) into a folder of their own inside.
2. `config.json`, which names the index, is renamed into place. From then on the new checkpoint is the one there.
3. The files that came along are moved into place. If that is interrupted, the next load or save does the rest.
4. What `config.json` does not name any more is deleted.

Nothing is ever written into a file that has a name already: other processes may have it mapped into memory.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from mxcompile.checkpoint.checked_json import sha256
from mxcompile.checkpoint.config_json import CONFIG, Card
from mxcompile.errors import CheckpointError

_STAGE: Final = ".mxcompile-save"
_OWN_FILE: Final = re.compile(r"model(-2)?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_FOREIGN: Final = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")


class Saving:
    """A save at work; one that fails takes back what it has written.

    stage: a folder for files that come along. stem: how the names of weight files and their index begin.
    """

    def __init__(self, folder: Path) -> None:
        present = check_free(folder)
        self.folder = folder
        self.stage = folder / _STAGE
        self.stem = "model-2" if present is not None and present.index.startswith("model.") else "model"
        self._is_new = not folder.exists()
        self._written: list[Path] = []
        self._committed = False
        if present is not None:
            complete(folder, present.files)
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

    def new(self, name: str) -> Path:
        """Where to write a file of a name that the present checkpoint does not use."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        self._written.append(path)
        return path

    def staged(self) -> dict[str, str]:
        """Files that come along, by their path in the folder, with their SHA-256; they are on the disk afterwards."""
        found: dict[str, str] = {}
        for path in sorted(self.stage.rglob("*")):
            if path.is_file():
                sync(path)
                found[path.relative_to(self.stage).as_posix()] = sha256(path.read_bytes())
        return found

    def commit(self, card: Card) -> None:
        """Make the new checkpoint the one that is there, and delete the old one."""
        write(self.stage / CONFIG, card.to_json())
        sync(self.folder)
        self._committed = True
        (self.stage / CONFIG).replace(self.folder / CONFIG)
        sync(self.folder)
        complete(self.folder, card.files)
        for path in self.folder.iterdir():
            if _OWN_FILE.fullmatch(path.name) and path not in self._written:
                path.unlink()
        shutil.rmtree(self.stage)


def complete(folder: Path, files: Mapping[str, str]) -> None:
    """Move files that came along to where they belong, if the save that wrote them was interrupted before it did."""
    for name, digest in files.items():
        staged = folder / _STAGE / name
        if staged.is_file() and sha256(staged.read_bytes()) == digest:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            staged.replace(folder / name)


def check_free(folder: Path) -> Card | None:
    """The checkpoint that a save would replace; raises CheckpointError if there is something else it would destroy."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: name a folder")
    try:
        return Card.read(folder, verify=False)
    except CheckpointError as error:
        others = [path.name for pattern in (CONFIG, *_FOREIGN) for path in folder.glob(pattern)]
        if others and not (folder / _STAGE).is_dir():
            raise CheckpointError(
                f"{folder} holds something else ({others[0]}): name a new folder, or delete that one"
            ) from error
        return None


def write(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    path.write_bytes(data)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such thing
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
