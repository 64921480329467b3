"""Save a quantized module: `mxcompile.save`."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from mxcompile.arguments import checked
from mxcompile.atomic_files import check_writable, write_durably
from mxcompile.checkpoint import shards
from mxcompile.checkpoint.checked_json import sha256
from mxcompile.checkpoint.config_json import CheckpointConfig
from mxcompile.checkpoint.index import CheckpointIndex
from mxcompile.checkpoint.interop import foreign
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.checkpoint.save_transaction import SaveTransaction, save_transaction
from mxcompile.checkpoint.save_transaction import check_destination as check_own
from mxcompile.checkpoint.stored_tensors import Stored, TensorNames, flatten_module
from mxcompile.checkpoint.wrappers import unwrap
from mxcompile.errors import CheckpointError, UnknownNameError
from mxcompile.formats import MXFormat
from mxcompile.tensor.modules import is_pretrained

_OWN: Final = "mxcompile"
SHARD_SIZE: Final = "5GB"
SOURCE_CONFIG: Final = "_mxcompile_source_config"
"""Attribute of a module without a known class: the `config.json` of the files that it was read from."""
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@checked
def save(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    max_shard_size: int | str = SHARD_SIZE,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a quantized model to a folder, from which `load` (and transformers' `from_pretrained`) reads it.

    model: what `deploy` or `quantize_and_compile` returned, compiled or in a DataParallel or not; it is not changed.
    path: a new folder, one with a checkpoint to replace, or one without any model in it. Replacing is atomic: a save
        that is interrupted, even killed, leaves the old checkpoint or the new one.
    tokenizer, processor: written to the same folder by their own `save_pretrained`; "gguf": the tokenizer alone, in the
        same file. Without one, llama.cpp runs the file on token ids alone, and a warning says so.
    max_shard_size: the largest size of a weight file, in bytes or as text ("5GB").
    format: "mxcompile" (the default), or a format of other programs: "compressed-tensors", written to a new folder, or
        "gguf", written to a file (also chosen by a path that ends in .gguf). These cannot hold every quantized model;
        one that does not fit is refused, with all reasons. What another program will do otherwise is a warning.
    progress: called with how many of how many tensors are being written, in our own format.

    Several threads or processes may save to one path: they take turns. A symlink stays one.
    Raises CheckpointError if nothing is quantized, the module holds something that a checkpoint cannot (adapters of
    peft, say), the folder holds another model, or it cannot be written.
    """
    largest = shard_bytes(max_shard_size)
    module = unwrap(model)
    names, tensors = flatten_module(module)
    if not names.weights:
        raise CheckpointError(
            f"{type(module).__name__} has no MX weights: quantize it first, only quantized models are saved"
        )
    shards.check_dtypes(tensors.items())
    folder, processors = Path(path), (tokenizer, processor)
    for name, value in (("tokenizer", tokenizer), ("processor", processor)):
        if value is not None and (isinstance(value, type) or not callable(getattr(value, "save_pretrained", None))):
            kind = type(value).__name__
            raise CheckpointError(f"{name} is of type {kind}, which has no save_pretrained: give transformers' object")
    other = foreign_format(format, folder)
    if other is not None:

        def auxiliary(to: Path) -> dict[str, Any]:
            return write_auxiliary(module, to, names, processors)

        vocabulary = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
        foreign.save(folder, other, module, names, largest, auxiliary, vocabulary)
        return
    with save_transaction(folder) as saving:

        def write(files: Sequence[str]) -> dict[str, shards.ShardChecksums]:
            return {file: shards.write(saving.new_file(file), group) for file, group in zip(files, groups, strict=True)}

        groups = shards.split(tensors if progress is None else dict(_reporting(tensors, progress)), largest)
        write_checkpoint(saving, module, names, processors, len(groups), write)


def _reporting(
    tensors: Mapping[str, Stored], progress: Callable[[int, int], None]
) -> Iterator[tuple[str, shards.PendingTensor]]:
    """The tensors, each of which reports when it is written how many were before it."""
    written = count()

    def made(tensor: Stored) -> Tensor:
        progress(next(written), len(tensors))
        return tensor.make() if isinstance(tensor, shards.PendingTensor) else tensor

    for name, tensor in tensors.items():
        yield name, shards.PendingTensor(tensor.dtype, tensor.shape, partial(made, tensor))


def write_checkpoint(
    saving: SaveTransaction,
    module: nn.Module,
    names: TensorNames,
    processors: tuple[Any, ...],
    files: int,
    write: Callable[[Sequence[str]], Mapping[str, shards.ShardChecksums]],
) -> None:
    """Write all files of a checkpoint, and commit it. write: writes the `files` weight files of these names."""
    config = write_auxiliary(module, saving.stage, names, processors)
    written = write([f"{saving.stem}-{n:05}-of-{files:05}.safetensors" for n in range(1, files + 1)])
    index = f"{saving.stem}.safetensors.index.json"
    data = CheckpointIndex(names, written).to_json().encode()
    write_durably(saving.new_file(index), data)
    kind = type(module).__name__
    saving.commit(CheckpointConfig(kind, Provenance.of(module), index, sha256(data), saving.auxiliary_files(), config))


def check_destination(path: str | Path, format: str | None = None) -> None:
    """Raise CheckpointError if `save` to that path would refuse to replace what is there, or cannot write there."""
    folder = Path(path)
    other = foreign_format(format, folder)
    try:
        if other is not None:
            foreign.check_destination(folder, other)
        else:
            check_own(folder)
            check_writable(folder, is_folder=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}): name another place") from error


def check_model(path: str | Path, model: nn.Module, weights: Iterable[MXFormat], format: str | None = None) -> None:
    """Raise CheckpointError if `save` would refuse the model once it is quantized to these formats."""
    other = foreign_format(format, Path(path))
    if other is not None:
        foreign.check_model(other, model, weights)


def foreign_format(format: str | None, path: Path) -> str | None:
    """Another project's format, by its name or by the path's suffix; None for our own."""
    if format is None:
        return foreign.GGUF if path.suffix == ".gguf" else None
    if format not in (_OWN, *foreign.WRITABLE_FORMATS):
        raise UnknownNameError("checkpoint format", format, (_OWN, *foreign.WRITABLE_FORMATS))
    return None if format == _OWN else format


def write_auxiliary(module: nn.Module, stage: Path, names: TensorNames, processors: tuple[Any, ...]) -> dict[str, Any]:
    """Write the files that belong to a model besides its weights; returns its configuration.

    processors: whatever has a `save_pretrained`. A module that is none of transformers may have one
    as its attribute `SOURCE_CONFIG`.
    """
    for processor in processors:
        if processor is not None:
            _save_processor(processor, stage)
    if not is_pretrained(module):
        return dict(getattr(module, SOURCE_CONFIG, {}))
    from mxcompile.checkpoint.hf import models  # imports transformers

    models.save_generation(module, stage)  # pyright: ignore[reportArgumentType]
    return models.configuration(module, names, stage)  # pyright: ignore[reportArgumentType]


def _save_processor(processor: Any, folder: Path) -> None:
    try:
        processor.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # tokenizers, written in Rust, raises no OSError where it cannot write


def shard_bytes(size: int | str) -> int:
    """A size in bytes, or as text such as 5GB. Raises CheckpointError for anything else."""
    match = _SIZE.fullmatch(f"{size}B" if isinstance(size, int) else size.strip())
    number = 0 if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
    if number < 1:
        raise CheckpointError(f"max_shard_size is {size!r}: give a number of bytes, or text such as 5GB")
    return number
