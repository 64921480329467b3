"""A checkpoint's folder, for reading: everything is checked before the first tensor is handed out."""

import warnings
from pathlib import Path

from torch import Tensor

from mxcompile.checkpoint import shards
from mxcompile.checkpoint.atomic_folder import complete
from mxcompile.checkpoint.checked_json import sha256
from mxcompile.checkpoint.config_json import Card
from mxcompile.checkpoint.index import Index
from mxcompile.checkpoint.stored_tensors import Names, put_together
from mxcompile.errors import CheckpointError


class Checkpoint:
    """A saved model. verify: False looks at structure and sizes only, not at checksums.

    Raises CheckpointError if the folder does not hold a model as it was saved.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.verify = verify
        self.card = Card.read(self.folder, verify=verify)
        self.index = Index.read(self.folder / self.card.index, self.card.index_sha256 if verify else None)
        try:
            complete(self.folder, self.card.files)
        except OSError as error:
            raise CheckpointError(f"{folder}: a save was interrupted and cannot be completed ({error})") from error

    @property
    def names(self) -> Names:
        """What the module's tensors are."""
        return self.index.names

    def tensors(self) -> dict[str, Tensor]:
        """The module's tensors, on mapped files. Raises CheckpointError if a byte of theirs is not what was written."""
        self._warn_of_changes()
        stored: dict[str, Tensor] = {}
        for name, shard in self.index.shards.items():
            stored.update(shards.read(self.folder / name, shard, verify=self.verify))
        try:
            return put_together(self.names, stored)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder} contradicts itself: {error}") from error

    def _warn_of_changes(self) -> None:
        """Of files that came along; people edit a chat template or a generation config."""
        for name, digest in self.card.files.items():
            path = self.folder / name
            if self.verify and path.is_file() and sha256(path.read_bytes()) != digest:
                warnings.warn(f"{path} has been changed since it was saved", stacklevel=3)
