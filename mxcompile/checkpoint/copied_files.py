"""The files that belong to a model in a folder besides its weights, to be saved with another one."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mxcompile.checkpoint.config_json import CONFIG
from mxcompile.errors import warn

_PROCESSORS: Final = ("preprocessor_config.json", "processor_config.json")
_SUFFIXES: Final = frozenset({".json", ".jinja", ".txt", ".model", ".py", ".tiktoken"})
_WEIGHTS: Final = (".index.json",)


@dataclass(frozen=True)
class CopiedFiles:
    """Files of a folder as they are."""

    folder: Path
    names: tuple[str, ...]

    def save_pretrained(self, to: Path) -> None:
        """Copy them."""
        for name in self.names:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, to / name)


def tokenizer_files(folder: Path, *, everything: bool = False) -> tuple[Any, Any]:
    """The tokenizer and the processor of a folder, each None if it has none: objects with a `save_pretrained`.

    One that transformers cannot load is copied as it is, with a warning. everything: copy all auxiliary files instead,
    for a model that is not one of transformers.
    """
    if everything:
        return CopiedFiles(folder, _auxiliary(folder)), None
    from transformers import AutoProcessor, AutoTokenizer

    if any((folder / name).is_file() for name in _PROCESSORS):
        return None, _load(folder, AutoProcessor)
    tokenizer = (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
    return (_load(folder, AutoTokenizer) if tokenizer else None), None


def _load(folder: Path, kind: Any) -> Any:
    try:
        return kind.from_pretrained(folder)
    except Exception as error:  # of several libraries, some of which may be missing
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warn(f"{kind.__name__} cannot load what {folder} holds ({reason}): its files are copied as they are")
        kept = tuple(name for name in _auxiliary(folder) if name != "generation_config.json")
        return CopiedFiles(folder, kept)


def _auxiliary(folder: Path) -> tuple[str, ...]:
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _SUFFIXES)
    return tuple(path.name for path in files if path.name != CONFIG and not path.name.endswith(_WEIGHTS))
