"""The tensors in a model's weight files: their names, shapes and dtypes at once, their values one at a time.

Safetensors files are memory-mapped for each tensor anew, so that the pages of one that is no longer used are given
back. `pytorch_model.bin` files are mapped as a whole.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mxcompile.checkpoint.checked_json import file_name, read_json, take_map
from mxcompile.errors import CheckpointError
from mxcompile.tensor.dtypes import SAFETENSORS_NAMES
from mxcompile.tensor.weight import MXWeight

_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
_DTYPES: Final = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()} | {"F8_E8M0": torch.float8_e8m0fnu}
_ADVICE: Final = "copy the checkpoint again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    file: the weight file that holds it. read: returns its values, on the CPU. packed: of a weight that is stored in an
    MX format, returns it as it is; None for any other. note: how it is stored, if `read` decodes it; encoded: its bytes
    then, with those of its scales. offset: the byte of the file from which on its values lie in row-major order; None
    if they do not lie there so, or it is not known.
    """

    shape: torch.Size
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]
    packed: Callable[[], MXWeight] | None = None
    note: str = ""
    offset: int | None = None
    encoded: int | None = None

    @property
    def stored_bytes(self) -> int:
        """Its bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize if self.encoded is None else self.encoded


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder's weight files by name, in the order of the files; no values are read.

    Raises CheckpointError, naming the file, if one is missing, truncated or damaged, or holds what cannot be read.
    """
    files = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for path, listed in files.items():
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {_ADVICE}")
        own = dict(_in_safetensors(path) if path.suffix == ".safetensors" else _in_pickle(path))
        missing = sorted(listed - own.keys())
        if missing:
            raise CheckpointError(f"{path} does not hold {missing[0]}, which the index lists there: {_ADVICE}")
        tensors |= {name: tensor for name, tensor in own.items() if not listed or name in listed}
    return tensors


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The weight files, as `from_pretrained` finds them, and the tensors that an index lists for each."""
    for single in _WEIGHTS:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return {folder / single: set()}
        if index.is_file():
            try:
                weight_map = take_map(read_json(index)[1], "weight_map", str)
                files = {name: folder / file_name(file, Path(single).suffix) for name, file in weight_map.items()}
            except CheckpointError as error:
                raise CheckpointError(f"{index} is damaged: {error}") from error
            return {path: {name for name, own in files.items() if own == path} for path in sorted(set(files.values()))}
    others = sorted(folder.glob("*.safetensors"))
    if not others:
        raise CheckpointError(f"{folder} holds no weights: it has neither {' nor '.join(_WEIGHTS)}")
    return {path: set[str]() for path in others}


def _in_safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            offsets = _offsets(path)
            for name in file.keys():  # noqa: SIM118 - not a mapping
                entry = file.get_slice(name)
                dtype = _DTYPES.get(entry.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{path}: {name} is {entry.get_dtype()}, which mxcompile cannot read")
                shape, read = torch.Size(entry.get_shape()), partial(_read, path, name)
                yield name, StoredTensor(shape, dtype, path, read, offset=offsets[name])
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _offsets(path: Path) -> dict[str, int]:
    """Where the values of each tensor begin. The file has been opened, so its header is known to be intact."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"}


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _in_pickle(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of the unpickler, of the archive, of the mapping
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} cannot be mapped into memory ({reason[0] if reason else type(error).__name__}): if it is whole, "
            "it has the format of torch before 1.6; load the model with transformers and save it as safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(each, Tensor) for each in cast(Any, loaded).values()):
        raise CheckpointError(f"{path} holds no state dict of tensors: save the model as safetensors")
    for name, tensor in cast(dict[str, Tensor], loaded).items():
        yield name, StoredTensor(tensor.shape, tensor.dtype, path, lambda tensor=tensor: tensor)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error}): {_ADVICE}")
