"""Hub ids: the folder of a checkpoint on the Hugging Face hub, downloaded or from its cache."""

import re
from pathlib import Path
from typing import Final

from mxcompile.errors import CheckpointError

_ID: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def find_folder(
    source: str | Path, revision: str | None = None, files: str | None = None, cache: str | Path | None = None
) -> Path:
    """The path of a checkpoint: `source` itself, or, if it does not exist and looks like a hub id, the files of that.

    Of a hub id: `revision`, only `files` (a pattern), from or into another folder than Hugging Face's cache. Raises
    CheckpointError if it looks like one (`owner/name`) but is neither a folder nor in the cache or on the hub.
    """
    path = Path(source)
    if path.exists() or path.is_absolute() or not _ID.fullmatch(path.as_posix()) or ".." in path.parts:
        return path
    from huggingface_hub import snapshot_download  # slow to import

    try:
        return Path(snapshot_download(path.as_posix(), revision=revision, allow_patterns=files, cache_dir=cache))
    except Exception as error:  # of several libraries: no network, offline, no such repository, no access
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path.as_posix()} is not a folder here, and no model with that id is in the Hugging Face cache or can be "
            f"downloaded from the hub ({type(error).__name__}: {reason}): check the name, or download it first"
        ) from error
