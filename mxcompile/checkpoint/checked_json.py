"""Reading files that others may have written: what is not there, or not what it should be, is a CheckpointError."""

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from mxcompile.errors import CheckpointError

T = TypeVar("T")
_FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


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
    """In hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def take(content: Any, key: str, kind: type[T]) -> T:
    """An entry of an object, of exactly that type."""
    value = cast(dict[str, Any], content).get(key) if isinstance(content, dict) else None
    if type(value) is not kind:
        raise CheckpointError(f"{key!r} is {'missing' if value is None else 'not of its type'}")
    return value


def take_some(content: Any, key: str, kind: type[T]) -> T | None:
    """The same, or None if it is not there."""
    return take(content, key, kind) if isinstance(content, dict) and key in content else None


def take_map(content: Any, key: str, kind: type[T]) -> dict[str, T]:
    """An object whose values are of one type."""
    entries = take(content, key, dict)
    return {str(name): take(entries, name, kind) for name in cast(dict[str, Any], entries)}


def file_name(name: str, suffix: str = "") -> str:
    """The name of a file of the folder; raises CheckpointError for anything that could lead out of it."""
    if not _FILE_NAME.fullmatch(name) or not name.endswith(suffix):
        raise CheckpointError(f"{name!r} is not a name that a file of a checkpoint can have")
    return name


def relative_path(name: str) -> str:
    """The path of a file in the folder or below it, with the same care."""
    for part in PurePosixPath(name).parts or (name,):
        file_name(part)
    return name
