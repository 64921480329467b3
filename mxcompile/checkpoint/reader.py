"""Read a checkpoint folder: everything is checked before the first tensor is returned."""

from pathlib import Path
from typing import Final

from torch import Tensor

from mxcompile.checkpoint import shards
from mxcompile.checkpoint.checked_json import read_json, sha256
from mxcompile.checkpoint.config_json import CONFIG, CheckpointConfig
from mxcompile.checkpoint.hub import find_folder
from mxcompile.checkpoint.index import CheckpointIndex
from mxcompile.checkpoint.save_transaction import finish_interrupted
from mxcompile.checkpoint.stored_tensors import TensorNames, unflatten_tensors
from mxcompile.errors import CheckpointError, warn

_GENERATION: Final = "generation_config.json"


class Checkpoint:
    """A saved model, in a folder or on the hub (`owner/name`).

    verify: False checks structure and sizes only, not checksums.

    Raises CheckpointError if the folder does not hold an unchanged saved model.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = find_folder(folder)
        self.verify = verify
        while True:
            self._version = self._version_now()
            self.config = CheckpointConfig.read(self.folder, verify=verify)
            try:
                digest = self.config.index_sha256 if verify else None
                self.index = CheckpointIndex.read(self.folder / self.config.index, digest)
                break
            except CheckpointError:
                if not self.was_replaced():
                    raise
        try:
            finish_interrupted(self.folder, self.config.files)
        except OSError as error:
            raise CheckpointError(f"{folder}: a save was interrupted and cannot be finished ({error})") from error

    @property
    def names(self) -> TensorNames:
        """How the module's tensors are stored."""
        return self.index.names

    def tensors(self) -> dict[str, Tensor]:
        """The module's tensors, memory-mapped. Raises CheckpointError if one of their bytes has changed."""
        self._check_generation_config()
        self._warn_of_changes()
        stored: dict[str, Tensor] = {}
        for name, shard in self.index.shards.items():
            stored.update(shards.read(self.folder / name, shard, verify=self.verify))
        try:
            return unflatten_tensors(self.names, stored)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder} is inconsistent: {error}") from error

    def was_replaced(self) -> bool:
        """Whether a save to the folder has been completed since the checkpoint was read, even one of the same model."""
        return self._version_now() != self._version

    def _version_now(self) -> tuple[int, int] | None:
        """What tells `config.json` from the one of any other save: each writes a new file, even of the same content."""
        try:
            status = (self.folder / CONFIG).stat()
        except OSError:  # whoever reads it says why
            return None
        return status.st_ino, status.st_mtime_ns

    def _check_generation_config(self) -> None:
        """Raise CheckpointError if it is no JSON: transformers would silently generate with other settings."""
        if (path := self.folder / _GENERATION).is_file():
            read_json(path)

    def _warn_of_changes(self) -> None:
        """Only warn of changed or missing auxiliary files: people edit a chat template or a generation config."""
        files = {self.folder / name: digest for name, digest in self.config.files.items() if self.verify}
        missing = [path for path in files if not path.is_file()]
        changed = [path for path in files if path.is_file() and sha256(path.read_bytes()) != files[path]]
        if self.was_replaced():
            raise CheckpointError(f"{self.folder} was replaced while it was being read: load it again")
        for path in changed:
            warn(f"{path} has changed since it was saved")
        for path in missing:
            warn(f"{path} is missing: it was saved with the model")
