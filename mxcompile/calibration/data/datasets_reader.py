"""Rows of .parquet files and of Hugging Face data sets, by libraries that users install: pyarrow and datasets.

A data set is a name on the hub (`owner/name`, `owner/name/config`) or a folder: what `save_to_disk` wrote, or one with
.parquet or .jsonl files. Its rows are streamed: nothing is downloaded that is not read.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mxcompile.errors import InputError

_LONGEST = 300
_SAVED = ("dataset_dict.json", "dataset_info.json")
_FILES = (".txt", ".jsonl", ".parquet", ".json", ".csv")


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a .parquet file, with those of the columns that it has; raises InputError if it has none of them."""
    parquet = _imported("pyarrow.parquet", "pyarrow", f"reading {path}")
    try:
        file = parquet.ParquetFile(path)
        names: list[str] = list(file.schema_arrow.names)
        wanted = [name for name in columns if name in names]
        for batch in file.iter_batches(batch_size=64, columns=wanted or None):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as parquet: {_in_one_line(error)}") from error


def rows(name: str, split: str | None) -> Iterator[Mapping[str, Any]]:
    """Rows of a split of a data set. split: None for its only one, or `train`.

    Raises InputError if `datasets` is not installed, or the data set, the split or a file does not exist.
    """
    is_folder = Path(name).is_dir()
    if not is_folder and (name.endswith(_FILES) or name.count("/") > 2 or name.startswith((".", "/", "~"))):
        raise InputError(f"{name} cannot be read: there is no such file or folder")
    place = f"reading the folder {name}" if is_folder else f"there is no file or folder {name} here; as a data set, it"
    datasets = _imported("datasets", "datasets", place)
    try:
        yield from _split(name, split, _load(datasets, name))
    except (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, InputError):
            raise
        advice = "" if is_folder else f"; there is no file or folder {name} here, either"
        raise InputError(f"the data set {name} cannot be read: {_in_one_line(error)}{advice}") from error


def _load(datasets: Any, name: str) -> Any:
    """A data set, or several by the name of their split."""
    if any((Path(name) / file).is_file() for file in _SAVED):
        return datasets.load_from_disk(name)
    if Path(name).is_dir():
        return datasets.load_dataset(name, streaming=True)
    owner, _, rest = name.partition("/")
    title, _, config = rest.partition("/")
    return datasets.load_dataset(f"{owner}/{title}" if title else owner, config or None, streaming=True)


def _split(name: str, split: str | None, loaded: Any) -> Any:
    if not isinstance(loaded, Mapping):
        if split is not None:
            raise InputError(f"{name} has no splits: leave out :{split}")
        return loaded
    splits = cast(Mapping[str, Any], loaded)
    chosen = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if chosen not in splits:
        what = f"no split {split!r}" if split else "several splits"
        raise InputError(f"{name} has {what}: it has {', '.join(map(str, splits))} (NAME:split chooses one)")
    return splits[chosen]


def _imported(module: str, package: str, place: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{place} needs {package}, which is not installed: pip install {package}") from error


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__
