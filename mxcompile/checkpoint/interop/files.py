"""Read and write the folders and files of other projects' checkpoints, whole or not at all."""

import json
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mxcompile.atomic_files import atomic_file, atomic_folder, check_writable, real_path, write_durably
from mxcompile.checkpoint import shards
from mxcompile.checkpoint.checked_json import file_name, read_json, take_map
from mxcompile.checkpoint.config_json import CONFIG
from mxcompile.errors import CheckpointError
from mxcompile.tensor.dtypes import FLOAT_DTYPES

_SINGLE_FILE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


def quantization_of(path: Path) -> dict[str, Any]:
    """The `quantization_config` of a folder's `config.json`; empty if there is none."""
    if not (path / CONFIG).is_file():
        return {}
    config = read_json(path / CONFIG)[1].get("quantization_config")
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, memory-mapped.

    Raises CheckpointError if a file or tensor is missing or damaged.
    """
    file_of = _files(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())) or [_SINGLE_FILE]:
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: copy the checkpoint again")
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    if file_of.get(name, file) == file:
                        tensors[name] = opened.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): copy the checkpoint again") from error
    missing = sorted(set(file_of) - set(tensors))
    if missing:
        raise CheckpointError(f"{folder} does not hold {missing[0]}, which its index lists: copy the checkpoint again")
    return tensors


def dtype_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a model: that of all of its float tensors; if they differ, what its config.json states.

    If that states none, the dtype of most float values.
    """
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in FLOAT_DTYPES.values():
            counts[tensor.dtype] += tensor.numel()
    text = config.get("text_config")
    parts = (config, cast(Mapping[str, Any], text) if isinstance(text, dict) else {})
    stated = [str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.") for part in parts]
    known = [FLOAT_DTYPES[name] for name in stated if name in FLOAT_DTYPES]
    common = [dtype for dtype, _ in counts.most_common(1)]
    return next(iter([*(common if len(counts) == 1 else []), *known, *common]), torch.float32)


def _files(folder: Path) -> dict[str, str]:
    """The file of each tensor, from a folder's index; empty without an index."""
    if not (folder / _INDEX).is_file():
        return {}
    try:
        weight_map = take_map(read_json(folder / _INDEX)[1], "weight_map", str)
        return {name: file_name(file, ".safetensors") for name, file in weight_map.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{folder / _INDEX} is damaged: {error}") from error


def write_tensors(folder: Path, tensors: Mapping[str, shards.PendingTensor], largest: int) -> None:
    """Write safetensors files of at most `largest` bytes; if there are several, also Hugging Face's index of them."""
    groups = shards.split(tensors, largest)
    for file, group in zip(file_names(len(groups)), groups, strict=True):
        shards.write(folder / file, group)
    write_index(folder, groups)


def file_names(count: int) -> list[str]:
    """The names of a checkpoint's weight files."""
    if count == 1:
        return [_SINGLE_FILE]
    return [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def write_index(folder: Path, groups: Sequence[Mapping[str, shards.PendingTensor]]) -> None:
    """Write Hugging Face's index of several weight files; of one there is none. groups: the tensors of each."""
    if len(groups) == 1:
        return
    weight_map = {name: file for file, group in zip(file_names(len(groups)), groups, strict=True) for name in group}
    total = sum(tensor.nbytes for group in groups for tensor in group.values())
    write_durably(
        folder / _INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()
    )


def check_new(path: Path) -> None:
    """Raise CheckpointError unless the path is free or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already: name a new folder, or delete that one")
    if path.is_mount():
        raise CheckpointError(f"{path} is a mount point, which cannot be replaced: name a new folder inside")


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """`atomic_folder`, with errors as CheckpointErrors."""
    try:
        check_new(path)
        check_writable(real_path(path).parent, is_folder=True)
        with atomic_folder(path) as staged:
            check_new(path)  # now that no other writer can come first
            yield staged
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}): nothing is saved") from error


def replace_file(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a file with `fill`, atomically and durably; errors are CheckpointErrors."""
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder: name a file, such as {path / 'model.gguf'}")
        check_writable(path, is_folder=False)
        with atomic_file(path, durable=True) as staged:
            fill(staged)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}): the file before it is unchanged") from error
