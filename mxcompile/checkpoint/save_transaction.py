"""Replace the checkpoint in a folder atomically: at any moment the folder holds the old one or the new one, whole.

1. Everything is written to a staging folder inside: weights and their index under names that the existing checkpoint
   does not use (`model` and `model-2` alternate), auxiliary files (tokenizer, generation config), `config.json`.
2. Weights and index are moved into place.
3. `config.json`, which names the index, is renamed into place: this commits the save.
4. The auxiliary files are moved into place. If that is interrupted, the next load or save finishes it.
5. Weight files that `config.json` no longer names are deleted.

No existing file is ever overwritten: another process may have it mapped into memory. Savers of one folder take turns.
"""

import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from mxcompile.atomic_files import check_writable, folder_lock, real_path, sync, write_durably
from mxcompile.checkpoint import shards
from mxcompile.checkpoint.checked_json import sha256
from mxcompile.checkpoint.config_json import CONFIG, CheckpointConfig
from mxcompile.checkpoint.index import CheckpointIndex
from mxcompile.errors import CheckpointError

_STAGE: Final = ".mxcompile-save"
_WEIGHT_FILE: Final = re.compile(r"model(-2)?(-\d{5}-of-\d{5}\.safetensors|\.safetensors\.index\.json)")
_OTHER_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")


@contextmanager
def save_transaction(folder: Path) -> Generator["SaveTransaction"]:
    """A save to a folder that no other saver can touch meanwhile. If it fails, the folder is as it was before.

    Raises CheckpointError if the folder holds another model, or cannot be written.
    """
    folder = real_path(folder)
    replaces, made = False, list[Path]()
    try:
        _check_no_file(folder)
        check_writable(folder, is_folder=True)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        with folder_lock(folder):
            saving = SaveTransaction(folder)
            replaces = saving.replaces
            try:
                yield saving
            finally:
                saving.close()
    except OSError as error:
        state = "the checkpoint before it is unchanged" if replaces else "nothing is saved"
        raise CheckpointError(f"{folder} cannot be written ({error}): {state}") from error
    finally:
        _remove_empty(made)


class SaveTransaction:
    """A save in progress, made by `save_transaction`.

    stage: the staging folder for auxiliary files. stem: prefix of the names of the weight files and their index.
    replaces: whether the folder holds a checkpoint of mxcompile.
    """

    def __init__(self, folder: Path) -> None:
        previous = check_destination(folder)
        self.folder = folder
        self.stage = folder / _STAGE
        self.stem = "model-2" if previous is not None and previous.index.startswith("model.") else "model"
        self.replaces = previous is not None
        self._names: list[str] = []
        self._moved: list[Path] = []
        self._committed = False
        if previous is not None:
            _move_staged(folder, previous.files)
        for path in _uncommitted(folder):
            path.unlink()
        if self.stage.exists():
            shutil.rmtree(self.stage)
        self.stage.mkdir()

    def close(self) -> None:
        """Delete what was written, unless it was committed."""
        if self._committed:
            return
        for path in self._moved:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.stage)

    def new_file(self, name: str) -> Path:
        """The path at which to write a file of weights or the index, which is moved to `name` when committed."""
        self._names.append(name)
        return self.stage / name

    def auxiliary_files(self) -> dict[str, str]:
        """SHA-256 of each auxiliary file, by its path in the folder; they are on the disk afterwards."""
        digests: dict[str, str] = {}
        for path in sorted(self.stage.rglob("*")):
            name = path.relative_to(self.stage).as_posix()
            if path.is_file() and name not in self._names:
                sync(path)
                digests[name] = sha256(path.read_bytes())
        return digests

    def commit(self, config: CheckpointConfig) -> None:
        """Replace the old checkpoint by the new one, and delete the old one's weight files."""
        write_durably(self.stage / CONFIG, config.to_json())
        sync(self.stage)
        for name in self._names:
            self._moved.append(self.folder / name)
            (self.stage / name).replace(self.folder / name)
        sync(self.folder)
        self._committed = True
        try:
            (self.stage / CONFIG).replace(self.folder / CONFIG)
        except OSError:
            self._committed = False
            raise
        try:
            self._clear_up(config)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} holds the new checkpoint, but not all that belongs to it is in place ({error}): the "
                "next load or save there finishes it"
            ) from error

    def _clear_up(self, config: CheckpointConfig) -> None:
        sync(self.folder)
        _move_staged(self.folder, config.files)
        for path in self.folder.iterdir():
            if _WEIGHT_FILE.fullmatch(path.name) and path not in self._moved:
                path.unlink()
        shutil.rmtree(self.stage)


def finish_interrupted(folder: Path, files: Mapping[str, str]) -> None:
    """Move auxiliary files into place that an interrupted save has left in the staging folder. files: their SHA-256."""
    if any(_is_staged(folder, *file) for file in files.items()):
        with folder_lock(folder):  # the save may be about to finish it itself
            _move_staged(folder, files)


def check_destination(folder: Path) -> CheckpointConfig | None:
    """The checkpoint that a save would replace, None if there is none.

    Raises CheckpointError if the folder holds a model that mxcompile did not save.
    """
    _check_no_file(folder)
    try:
        return CheckpointConfig.read(folder, verify=False)
    except CheckpointError as error:
        models = {path for pattern in (CONFIG, *_OTHER_WEIGHTS) for path in folder.glob(pattern)}
        others = sorted(models - set(_uncommitted(folder)), key=lambda path: (path.name != CONFIG, path.name))
        if others:
            raise CheckpointError(
                f"{folder} holds files of another model ({others[0].name}): name a new folder, or delete that one"
            ) from error
        return None


def _check_no_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: name a folder")


def _move_staged(folder: Path, files: Mapping[str, str]) -> None:
    for name, digest in files.items():
        if _is_staged(folder, name, digest):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / _STAGE / name).replace(folder / name)


def _is_staged(folder: Path, name: str, digest: str) -> bool:
    try:
        return sha256((folder / _STAGE / name).read_bytes()) == digest
    except FileNotFoundError:
        return False


def _uncommitted(folder: Path) -> list[Path]:
    """Files that a save has moved into place before it was killed: those of the staged config's index, unchanged."""
    stage = folder / _STAGE
    try:
        config = CheckpointConfig.read(stage)
        index = stage if (stage / config.index).exists() else folder
        written = CheckpointIndex.read(index / config.index, config.index_sha256).shards
    except CheckpointError:
        return []
    moved = [folder / name for name, shard in written.items() if shards.is_unchanged(folder / name, shard)]
    return moved if index == stage else [*moved, folder / config.index]


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # the first that holds something ends it
        for folder in folders:
            folder.rmdir()
