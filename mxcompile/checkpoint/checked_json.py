"""Read JSON that may be damaged or hostile: a missing or mistyped entry or an unsafe file name is a CheckpointError."""

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from mxcompile.errors import CheckpointError

T = TypeVar("T")
_FILE_NAME = re.compile(r"\w[\w .+@=,()-]*", re.ASCII)


def read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a file, and the JSON object in it."""
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as JSON ({reason}): copy the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data, cast(dict[str, Any], content)


def sha256(data: bytes) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def take(content: Any, key: str, kind: type[T]) -> T:
    """The entry `key` of a JSON object; its type must be exactly `kind`."""
    value = cast(dict[str, Any], content).get(key) if isinstance(content, dict) else None
    if type(value) is not kind:
        raise CheckpointError(f"{key!r} is {'missing' if value is None else f'not of type {kind.__name__}'}")
    return value


def take_optional(content: Any, key: str, kind: type[T]) -> T | None:
    """Like `take`, but None if the key is missing."""
    return take(content, key, kind) if isinstance(content, dict) and key in content else None


def take_map(content: Any, key: str, kind: type[T]) -> dict[str, T]:
    """Like `take` for an object whose values are all of one type."""
    entries = take(content, key, dict)
    return {str(name): take(entries, name, kind) for name in cast(dict[str, Any], entries)}


def file_name(name: str, suffix: str = "") -> str:
    """The name, checked to be that of a file in the folder; raises CheckpointError if it could lead elsewhere."""
    if not _FILE_NAME.fullmatch(name) or not name.endswith(suffix):
        raise CheckpointError(f"{name!r} is not a valid name for a file of a checkpoint")
    return name


def relative_path(name: str) -> str:
    """Like `file_name` for the path of a file in the folder or below it."""
    for part in PurePosixPath(name).parts or (name,):
        file_name(part)
    return name
