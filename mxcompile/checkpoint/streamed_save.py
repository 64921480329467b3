"""Save a quantized model that is never in memory as a whole: tensors come one by one, files are written in between.

    with StreamedSave("out", key="what is being done") as saving:
        saving.add("segment 0", {"q_proj.weight": weight})    # kept on the disk; a later run finds it in `finished`
        weight = saving.read("q_proj.weight")                  # memory-mapped
        saving.commit(module)                                  # the checkpoint, as `save` writes it

    OUT/.mxcompile-stream/key.json              what is being done; another key begins anew
    OUT/.mxcompile-stream/part-0.safetensors    tensors that were added together, with part-0.json: it is finished
    OUT/.mxcompile-stream/shard-0.safetensors   a weight file of the checkpoint to be, with shard-0.json

A file counts once its .json is there, which is written last. A run that is killed leaves all that is finished: the next
one with the same key goes on from there. The checkpoint itself is committed at once, like one of `save`.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from torch import Tensor, nn

from mxcompile.atomic_files import atomic_file, folder_lock, real_path
from mxcompile.checkpoint import shards
from mxcompile.checkpoint.checked_json import read_json, take, take_map
from mxcompile.checkpoint.index import parse_packing, write_packing
from mxcompile.checkpoint.interop import compressed_tensors
from mxcompile.checkpoint.interop.files import file_names, new_folder, write_index
from mxcompile.checkpoint.interop.foreign import GGUF
from mxcompile.checkpoint.pending_values import PendingValues, Values
from mxcompile.checkpoint.save import (
    SHARD_SIZE,
    check_destination,
    foreign_format,
    shard_bytes,
    write_auxiliary,
    write_checkpoint,
)
from mxcompile.checkpoint.save_transaction import save_transaction
from mxcompile.checkpoint.shards import PendingTensor, ShardChecksums
from mxcompile.checkpoint.stored_tensors import (
    TensorNames,
    WeightPacking,
    flatten_module,
    flatten_tensor,
    packing_of,
    unflatten_tensors,
)
from mxcompile.errors import CheckpointError
from mxcompile.tensor.weight import MXWeight

STAGE: Final = ".mxcompile-stream"


class StreamedSave:
    """A save in progress, to a folder as for `save`. One process at a time works on a folder.

    key: what is being done (source, recipe, options): what an earlier run with another key has left is deleted.
    resumed: whether one with the same key has left something. format: as for `save`; "compressed-tensors" needs a new
    folder, and what is kept for it lies beside.

    Raises CheckpointError if the folder holds another model, cannot be written, or another process works on it.
    """

    def __init__(
        self, folder: str | Path, key: str, *, max_shard_size: int | str = SHARD_SIZE, format: str | None = None
    ) -> None:
        self.folder = real_path(Path(folder))
        self._foreign = foreign_format(format, self.folder)
        if self._foreign == GGUF:
            raise CheckpointError(
                "a GGUF file cannot be written tensor by tensor: write a folder, then mxcompile convert it to GGUF"
            )
        self.stage = self.folder.with_name(f".{self.folder.name}{STAGE}") if self._foreign else self.folder / STAGE
        self.resumed = False
        self._key = key
        self._largest = shard_bytes(max_shard_size)
        self._parts: dict[str, tuple[Path, ShardChecksums, dict[str, WeightPacking]]] = {}
        self._part_of: dict[str, str] = {}
        self._held = ExitStack()

    def __enter__(self) -> Self:
        try:
            check_destination(self.folder, self._foreign)
            self.stage.parent.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(folder_lock(self.stage, wait=False))
            self._open()
        except BlockingIOError as error:
            raise CheckpointError(
                f"{self.folder}: another process writes to it: wait, or name another folder"
            ) from error
        except OSError as error:
            self._held.close()
            raise self._cannot_write(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    @property
    def finished(self) -> Collection[str]:
        """Names of the parts that are on the disk."""
        return self._parts.keys()

    def add(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of the module (plain ones or MX weights) by their names; all are there afterwards, or none.

        part: a name for them together. A tensor that an earlier part has is replaced.
        """
        stored = {name: own for each in tensors.items() for name, own in flatten_tensor(*each).items()}
        shards.check_dtypes(stored.items())
        packings = {name: packing_of(value) for name, value in tensors.items() if isinstance(value, MXWeight)}
        earlier = self._parts.get(part)
        path = self.stage / f"part-{max(map(_number, self.stage.glob('part-*')), default=-1) + 1}.safetensors"
        checksums = self._write(path, stored, {"part": part, "names": list(tensors), "weights": packings})
        self._register(part, path, list(tensors), checksums, packings)
        if earlier is not None:
            self._delete((earlier[0].with_suffix(".json"), earlier[0]))

    def read(self, name: str) -> Tensor:
        """A tensor that was added, in this run or an earlier one, memory-mapped. Raises KeyError for any other."""
        path, checksums, packings = self._parts[self._part_of[name]]
        own = {name: packings[name]} if name in packings else {}
        plain = () if own else (name,)
        names = TensorNames(plain, own, {}, frozenset())
        wanted = names.stored()
        stored = {part: value for part, value in shards.read(path, checksums, verify=False) if part in wanted}
        return unflatten_tensors(names, stored)[name]

    def commit(
        self,
        module: nn.Module,
        *,
        tokenizer: Any = None,
        processor: Any = None,
        values: Values | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write the checkpoint of a module, file by file, and delete what was kept for it.

        module: as it would be saved (MX weights in place, its recipe on it), but its tensors may be on the meta device:
            their values are those that were added, under their names or other names of the same tensor.
        values: returns them instead. progress: called with how many of how many tensors are written.
        Files that an earlier run has finished are not written again.
        """
        names, tensors = flatten_module(module, with_values=False)
        reading = PendingValues(values or (lambda _: self._value), progress)
        try:
            if self._foreign:
                self._commit_foreign(module, names, (tokenizer, processor), reading)
            else:
                self._commit_own(module, names, (tokenizer, processor), reading.pending(names, tensors), reading)
            self._clear()
        except OSError as error:
            raise self._cannot_write(error) from error

    def _commit_own(
        self,
        module: nn.Module,
        names: TensorNames,
        processors: tuple[Any, ...],
        tensors: Mapping[str, Tensor | PendingTensor],
        reading: PendingValues,
    ) -> None:
        groups = shards.split(tensors, self._largest)
        written = self._shards(groups, reading)
        with save_transaction(self.folder) as saving:

            def move(files: Sequence[str]) -> dict[str, ShardChecksums]:
                self._move(written, [saving.new_file(file) for file in files])
                return {file: checksums for file, (_, checksums) in zip(files, written, strict=True)}

            write_checkpoint(saving, module, names, processors, len(groups), move)

    def _commit_foreign(
        self, module: nn.Module, names: TensorNames, processors: tuple[Any, ...], reading: PendingValues
    ) -> None:
        with new_folder(self.folder) as stage:
            config = write_auxiliary(module, stage, names, processors)
            groups = shards.split(compressed_tensors.write(stage, module, names, config, reading.read), self._largest)
            written = self._shards(groups, reading)
            self._move(written, [stage / file for file in file_names(len(groups))])
            write_index(stage, groups)

    def _shards(
        self, groups: Sequence[Mapping[str, Tensor | PendingTensor]], reading: PendingValues
    ) -> list[tuple[Path, ShardChecksums]]:
        """The weight files of the checkpoint, each written unless an earlier run has finished it."""
        reading.total = sum(map(len, groups))
        return [self._shard(number, group, reading) for number, group in enumerate(groups)]

    def _move(self, written: Iterable[tuple[Path, ShardChecksums]], targets: Iterable[Path]) -> None:
        for (path, _), target in zip(written, targets, strict=True):
            path.with_suffix(".json").unlink()
            path.replace(target)

    def _value(self, name: str) -> Tensor:
        """A tensor that was added under one of its names."""
        if name not in self._part_of:
            raise CheckpointError(f"{name} has no values yet: add it before the checkpoint is committed")
        return self.read(name)

    def _shard(
        self, number: int, group: Mapping[str, Tensor | PendingTensor], reading: PendingValues
    ) -> tuple[Path, ShardChecksums]:
        path = self.stage / f"shard-{number}.safetensors"
        earlier = _read_finished(path)
        if earlier is not None and set(earlier[0].tensors) == set(group):
            reading.skip(len(group))
            return path, earlier[0]
        with reading.of(group) as ordered:
            return path, self._write(path, ordered, {})

    def _write(self, path: Path, tensors: Mapping[str, Any], note: Mapping[str, Any]) -> ShardChecksums:
        """Write a file, and then the .json with which it counts."""
        path.with_suffix(".json").unlink(missing_ok=True)
        try:
            checksums = shards.write(path, tensors)
            content = {"bytes": checksums.bytes, "header": checksums.header, "crc32": dict(checksums.tensors), **note}
            content["weights"] = {name: write_packing(own) for name, own in note.get("weights", {}).items()}
            with atomic_file(path.with_suffix(".json"), durable=True) as staged:
                staged.write_text(json.dumps(content))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self._cannot_write(error, path) from error
        return checksums

    def _open(self) -> None:
        """Take up what an earlier run with the same key has left; delete anything else."""
        path = self.stage / "key.json"
        earlier = None
        if path.is_file():
            try:
                earlier = read_json(path)[1].get("key")
            except CheckpointError:  # damaged: begin anew
                earlier = None
        if earlier != self._key:
            self._delete(path for path in self.stage.iterdir() if path.suffix in (".safetensors", ".json"))
            with atomic_file(path, durable=True) as staged:
                staged.write_text(json.dumps({"key": self._key}))
        for path in sorted(self.stage.glob("*.safetensors"), key=_number):
            finished = _read_finished(path)
            self.resumed |= finished is not None
            if finished is not None and path.name.startswith("part-"):
                checksums, note = finished
                packings = {name: parse_packing(each) for name, each in take_map(note, "weights", dict).items()}
                self._register(take(note, "part", str), path, take(note, "names", list), checksums, packings)

    def _register(
        self,
        part: str,
        path: Path,
        names: Iterable[str],
        checksums: ShardChecksums,
        packings: dict[str, WeightPacking],
    ) -> None:
        self._parts[part] = path, checksums, packings
        self._part_of |= dict.fromkeys(names, part)

    def _delete(self, paths: Iterable[Path]) -> None:
        for path in list(paths):
            path.unlink()

    def _clear(self) -> None:
        self._parts.clear()
        self._part_of.clear()
        self._held.close()
        shutil.rmtree(self.stage)

    def _cannot_write(self, error: OSError, path: Path | None = None) -> CheckpointError:
        where = path or error.filename or self.folder
        return CheckpointError(
            f"{where} cannot be written ({error.strerror or error}): what is finished is kept in {self.stage}, and the "
            "same command goes on from there"
        )


def _number(path: Path) -> int:
    """The number in a file's name."""
    return int(path.stem.rpartition("-")[2])


def _read_finished(path: Path) -> tuple[ShardChecksums, dict[str, Any]] | None:
    """The checksums of a file and what was noted with it; None if it is not finished, or not as it was written."""
    try:
        content = read_json(path.with_suffix(".json"))[1]
        checksums = ShardChecksums(
            take(content, "bytes", int), take(content, "header", int), take_map(content, "crc32", int)
        )
    except CheckpointError:
        return None
    return (checksums, content) if shards.is_unchanged(path, checksums) else None
