"""Read a checkpoint folder: everything is checked before the first tensor is returned."""

import warnings
from pathlib import Path

from torch import Tensor

from mxcompile.checkpoint import shards
from mxcompile.checkpoint.checked_json import sha256
from mxcompile.checkpoint.config_json import CheckpointConfig
from mxcompile.checkpoint.hub import find_folder
from mxcompile.checkpoint.index import CheckpointIndex
from mxcompile.checkpoint.save_transaction import finish_interrupted
from mxcompile.checkpoint.stored_tensors import TensorNames, unflatten_tensors
from mxcompile.errors import CheckpointError


class Checkpoint:
    """A saved model, in a folder or on the hub (`owner/name`).

    verify: False checks structure and sizes only, not checksums.

    Raises CheckpointError if the folder does not hold an unchanged saved model.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = find_folder(folder)
        self.verify = verify
        self.config = CheckpointConfig.read(self.folder, verify=verify)
        while True:
            try:
                digest = self.config.index_sha256 if verify else None
                self.index = CheckpointIndex.read(self.folder / self.config.index, digest)
                break
            except CheckpointError:
                if not self.was_replaced():
                    raise
                self.config = CheckpointConfig.read(self.folder, verify=verify)
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
        self._warn_of_changes()
        stored: dict[str, Tensor] = {}
        for name, shard in self.index.shards.items():
            stored.update(shards.read(self.folder / name, shard, verify=self.verify))
        try:
            return unflatten_tensors(self.names, stored)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder} is inconsistent: {error}") from error

    def was_replaced(self) -> bool:
        """Whether another save to the folder has been completed since the checkpoint was read."""
        return CheckpointConfig.read(self.folder, verify=self.verify) != self.config

    def _warn_of_changes(self) -> None:
        """Only warn of changed auxiliary files: people edit a chat template or a generation config."""
        for name, digest in self.config.files.items():
            path = self.folder / name
            if self.verify and path.is_file() and sha256(path.read_bytes()) != digest:
                warnings.warn(f"{path} has changed since it was saved", stacklevel=3)
