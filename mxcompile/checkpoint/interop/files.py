"""Folders and files of other projects' checkpoints: read whole or not at all, and put in place at one moment."""

import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mxcompile.checkpoint import shards
from mxcompile.checkpoint.atomic_folder import sync, write
from mxcompile.checkpoint.checked_json import file_name, read_json, take_map
from mxcompile.checkpoint.config_json import CONFIG
from mxcompile.errors import CheckpointError

_ONE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


def quantization_of(path: Path) -> dict[str, Any]:
    """What a folder's `config.json` says of how the model was quantized; empty if nothing, or there is no such file."""
    if not (path / CONFIG).is_file():
        return {}
    found = read_json(path / CONFIG)[1].get("quantization_config")
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder, mapped. Raises CheckpointError if one is missing or damaged."""
    named = _files(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(named.values())) or [_ONE]:
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: copy the checkpoint again")
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    if named.get(name, file) == file:
                        tensors[name] = opened.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): copy the checkpoint again") from error
    gone = sorted(set(named) - set(tensors))
    if gone:
        raise CheckpointError(f"{folder} does not hold {gone[0]}, which its index names: copy the checkpoint again")
    return tensors


def _files(folder: Path) -> dict[str, str]:
    """The file of each tensor, by a folder's index; empty without one."""
    if not (folder / _INDEX).is_file():
        return {}
    try:
        named = take_map(read_json(folder / _INDEX)[1], "weight_map", str)
        return {name: file_name(file, ".safetensors") for name, file in named.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{folder / _INDEX} is damaged: {error}") from error


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], largest: int) -> None:
    """Write safetensors files, and if there are several the index that Hugging Face's libraries follow."""
    groups = shards.split(tensors, largest)
    if len(groups) == 1:
        shards.write(folder / _ONE, groups[0])
        return
    files = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    for file, group in zip(files, groups, strict=True):
        shards.write(folder / file, group)
    named = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write(folder / _INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": named}, indent=2).encode())


def check_new(path: Path) -> None:
    """Raise CheckpointError unless a folder can be made there: nothing of it yet, or an empty one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is there already: name a new folder, or delete that one")


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A folder to write to, which takes its name when all of it is on the disk, or disappears."""
    check_new(path)
    stage = path.parent / f".{path.name}.mxcompile-save"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        for written in stage.rglob("*"):
            sync(written)
        sync(stage)
        stage.replace(path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error})") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def replace_file(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a file beside its place, and put it there when all of it is on the disk."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file")
    stage = path.parent / f".{path.name}.{os.getpid()}.mxcompile-save"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(stage)
        sync(stage)
        stage.replace(path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}): what was there before is whole") from error
    finally:
        stage.unlink(missing_ok=True)
