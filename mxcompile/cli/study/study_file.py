"""Read a study from TOML: the axes, and the cells of their cross product.

    models = ["smollm2", {name = "planted", source = "smollm2", change = "variants.py:plant"}]
    recipes = ["w4a8-mxint"]
    formats = ["mxint4/mxint8"]          fill W and A of pipelines
    blocks = [32, 16]
    passes = ["as_float.py:AsFloat"]     passes of your own
    skip = [{recipe = "gptq", weight = "mxint8*"}]
    [pipelines]
    gptq = "gptq{format=W,activation=A} | lower-mx{weight=W,activation=A}"
    [[calibration]]
    source = "c4.jsonl"                  windows, length and seed may be lists, too
    [[evaluation]]
    text = "test.txt"

Code is searched beside the study's file, texts from the current folder.
"""

import importlib.util
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, cast

from mxcompile.calibration.data.batches import LENGTH
from mxcompile.calibration.data.sources import SourceName
from mxcompile.cli.calibration import CalibrationOptions
from mxcompile.cli.study.cell import Cell, StudiedModel, StudiedText
from mxcompile.errors import InputError
from mxcompile.formats import parse_format
from mxcompile.passes.recipes import RECIPES, as_pipeline
from mxcompile.pipeline.interfaces import Pass
from mxcompile.pipeline.pipeline import Pipeline

_KEYS: Final = frozenset(
    {"models", "recipes", "pipelines", "formats", "blocks", "passes", "skip", "calibration", "evaluation"}
    | {"device", "special_tokens"}
)
_OF_CALIBRATION: Final = frozenset({"source", "windows", "length", "like", "seed"})
_OF_EVALUATION: Final = frozenset({"text", "half", "length", "windows"})
_OF_MODEL: Final = frozenset({"name", "source", "change"})
_PLACEHOLDER: Final = re.compile(r"=(W|A)\b")


@dataclass(frozen=True)
class StudyFile:
    """The content of a study's file. folder: where it lies."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> "StudyFile":
        """Read a file; raises InputError, which names the key, for what is not a study."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a study ({error}): it is a TOML file") from error
        _check_keys(content, _KEYS, str(path))
        if not content.get("recipes") and not content.get("pipelines"):
            raise InputError(f'{path} has neither recipes nor pipelines: add recipes = ["w4a8-mxint-quick"]')
        return cls(path, content)

    def cells(self, device: str | None = None) -> list[Cell]:
        """The cells in order, each once. device: instead of the file's."""
        device = str(device or self.content.get("device", "cpu"))
        special = bool(self.content.get("special_tokens", True))
        found: dict[str, Cell] = {}
        axes = itertools.product(self._models(), self._evaluations(), self._pipelines(), self._calibrations())
        for model, evaluation, (recipe, pipeline, weight, activation), data in axes:
            calibrates = pipeline.reads_calibration
            on_text = any(other.source is None or other.same_file(evaluation.text) for other in self._calibrations())
            text = replace(evaluation, half="second") if on_text and not calibrates else evaluation
            code = self._code(model)
            cell = Cell(
                model, recipe, pipeline, weight, activation, data if calibrates else None, text, device, special, code
            )
            if not any(_matches(cell, condition) for condition in self._list("skip")):
                found.setdefault(cell.key, cell)
        if not found:
            raise InputError(f"{self.path}: skip leaves no cell")
        for cell in found.values():
            cell.check()
        return list(found.values())

    def change_of(self, model: StudiedModel) -> Any:
        """The function that changes a model, None if there is none."""
        return None if model.change is None else self._loaded(model.change)

    def _models(self) -> Iterator[StudiedModel]:
        for entry in self._list("models") or ["smollm2"]:
            if isinstance(entry, str):
                yield StudiedModel(entry, entry)
                continue
            _check_keys(entry, _OF_MODEL, "a model")
            if "name" not in entry:
                raise InputError(f"{self.path}: a model that is a table needs a name")
            yield StudiedModel(entry["name"], entry.get("source"), entry.get("change"))

    def _pipelines(self) -> list[tuple[str, Pipeline, str, str]]:
        """(name, pipeline, weight format, activation format), filled with every pair of formats and block size."""
        texts = {name: name for name in self._list("recipes")} | dict(self.content.get("pipelines", {}))
        own = [cast(type[Pass], self._loaded(name)) for name in self._list("passes")]
        found: list[tuple[str, Pipeline, str, str]] = []
        for name, text in texts.items():
            if text in RECIPES:
                found.append((name, as_pipeline(text), "", ""))
            elif not _PLACEHOLDER.search(text):
                found.append((name, Pipeline.parse(text, own), "", ""))
            elif not self._list("formats"):
                raise InputError(f"{self.path}: the pipeline {name} has W or A, and there are no formats to fill in")
            else:
                found += [(name, Pipeline.parse(_filled(text, *pair), own), *pair) for pair in self._formats()]
        return found

    def _formats(self) -> Iterator[tuple[str, str]]:
        for pair, block in itertools.product(self._list("formats"), self._list("blocks") or [None]):
            weight, _, activation = str(pair).partition("/")
            names = [name and _with_block(name, block) for name in (weight, activation)]
            yield names[0], names[1] or "none"

    def _calibrations(self) -> list[CalibrationOptions]:
        found: list[CalibrationOptions] = []
        for entry in self._list("calibration") or [{}]:
            _check_keys(entry, _OF_CALIBRATION, "calibration")
            source = SourceName.parse(entry["source"]) if "source" in entry else None
            like = Path(entry["like"]) if "like" in entry else None
            choices = (_several(entry, "windows", None), _several(entry, "length", LENGTH), _several(entry, "seed", 0))
            for windows, length, seed in itertools.product(*choices):
                if seed and source is None:
                    raise InputError(f"{self.path}: a seed shuffles the documents of a source: name one")
                lengths = tuple(length) if isinstance(length, list) else (int(length),)
                found.append(CalibrationOptions(source, windows, lengths, like, seed=int(seed)))
        return found

    def _evaluations(self) -> Iterator[StudiedText]:
        for entry in self._list("evaluation") or [{}]:
            _check_keys(entry, _OF_EVALUATION, "evaluation")
            text = Path(entry["text"]) if "text" in entry else None
            if entry.get("half") not in (None, "first", "second"):
                raise InputError(f"{self.path}: half = {entry['half']!r} is neither first nor second")
            yield StudiedText(text, entry.get("half"), entry.get("length", 2048), entry.get("windows", 4))

    def _list(self, key: str) -> list[Any]:
        value = self.content.get(key, [])
        if isinstance(value, list):
            return cast(list[Any], value)
        raise InputError(f"{self.path}: {key} is a list, not {value!r}")

    def _code(self, model: StudiedModel) -> tuple[Path, ...]:
        names = [name for name in (model.change, *self._list("passes")) if name is not None]
        return tuple(dict.fromkeys(self._file(name) for name in names))

    def _file(self, name: str) -> Path:
        return self.path.parent / name.rpartition(":")[0]

    def _loaded(self, name: str) -> Any:
        """What `FILE:NAME` names; runs the file."""
        path = self._file(name)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise InputError(f"{self.path}: {name!r} is not FILE.py:NAME with a file in {self.path.parent}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = getattr(module, name.rpartition(":")[2], None)
        if found is None:
            raise InputError(f"{path} has no {name.rpartition(':')[2]!r}")
        return found


def _filled(text: str, weight: str, activation: str) -> str:
    return _PLACEHOLDER.sub(lambda match: f"={weight if match.group(1) == 'W' else activation}", text)


def _with_block(name: str, block: int | None) -> str:
    fmt = parse_format(name)
    return str(fmt if block is None else fmt.with_block(block))


def _several(entry: Mapping[str, Any], key: str, default: object) -> Sequence[Any]:
    """A value, or a list of values to try: of `length`, a list in the list is windows of several lengths."""
    value = entry.get(key, default)
    return cast(list[Any], value) if isinstance(value, list) else [value]


def _matches(cell: Cell, condition: Mapping[str, Any]) -> bool:
    """Whether all patterns of a condition match the cell's description."""
    described = cell.described()
    _check_keys(condition, frozenset(described), "skip")
    return all(fnmatchcase(str(described[key]), str(pattern)) for key, pattern in condition.items())


def _check_keys(entry: Any, known: frozenset[str], place: str) -> None:
    if not isinstance(entry, Mapping):
        raise InputError(f"{place}: {entry!r} is no table")
    if unknown := sorted(set(cast(Mapping[str, Any], entry)) - known):
        raise InputError(f"{place}: unknown key {unknown[0]!r}, known are {', '.join(sorted(known))}")
