"""A cell of a study: one model, pipeline, calibration and text; its key is a hash of the contents of all of them."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mxcompile.calibration.data.sources import SourceName
from mxcompile.cli import smollm2
from mxcompile.cli.calibration import CalibrationOptions
from mxcompile.cli.compare import EvalOptions
from mxcompile.cli.texts import HELP_TOPICS
from mxcompile.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class StudiedModel:
    """name: in tables. source: as `mxcompile eval` takes it. change: `FILE:FUNCTION` that changes the loaded model."""

    name: str
    source: str | None
    change: str | None = None


@dataclass(frozen=True)
class StudiedText:
    """What to evaluate on: a text file (None: Python's help topics), one half of its tokens, windows."""

    text: Path | None
    half: str | None
    length: int
    windows: int

    def __str__(self) -> str:
        name = HELP_TOPICS if self.text is None else self.text.name
        half = "" if self.half is None else f", {self.half} half"
        return f"{name}{half}, {self.windows or 'all'} x {self.length}"


@dataclass(frozen=True)
class Cell:
    """recipe: the name of the pipeline in tables. weight, activation: the formats that fill its placeholders.

    calibration: None for a pipeline that reads none.
    """

    model: StudiedModel
    recipe: str
    pipeline: Pipeline
    weight: str
    activation: str
    calibration: CalibrationOptions | None
    evaluation: StudiedText
    device: str
    special_tokens: bool
    code: tuple[Path, ...] = ()

    @property
    def options(self) -> EvalOptions:
        """The options of `mxcompile eval --recipe ...` for the same numbers."""
        return EvalOptions(
            self.model.source,
            None,
            self.pipeline,
            self.evaluation.text,
            self.evaluation.length,
            self.evaluation.windows,
            self.calibration or CalibrationOptions(),
            self.device,
            self.special_tokens,
            self.evaluation.half,
        )

    def check(self) -> None:
        """Raise InputError, before any model is loaded, for data or a device that cannot be used."""
        _ = self.options

    @property
    def key(self) -> str:
        """A hash of all that the numbers depend on, but for versions and hardware."""
        return hashlib.sha256(json.dumps(self._contents(), sort_keys=True).encode()).hexdigest()[:16]

    def described(self) -> dict[str, Any]:
        """The cell in its record."""
        calibration = None if self.calibration is None else calibration_in_words(self.calibration)
        return {
            "model": self.model.name,
            "recipe": self.recipe,
            "pipeline": str(self.pipeline),
            "weight": self.weight,
            "activation": self.activation,
            "calibration": calibration,
            "evaluation": str(self.evaluation),
            "device": self.device,
        }

    def _contents(self) -> list[Any]:
        of_model = [_content(self.model.source or smollm2.PACKAGE), self.model.change]
        data = self.calibration
        calibration = None
        if data is not None:
            name = None if data.source is None else replace_name(data.source)
            calibration = [name, data.windows, list(data.length), data.like and _content(str(data.like)), data.seed]
        text = self.evaluation
        evaluation = [text.text and _content(str(text.text)), text.half, text.length, text.windows]
        code = [_content(str(path)) for path in self.code]
        return [of_model, str(self.pipeline), calibration, evaluation, self.device, self.special_tokens, code]


def calibration_in_words(data: CalibrationOptions) -> str:
    """Source, windows, length and seed, in a table."""
    source = "the text's first half" if data.source is None else data.source.label
    length = f"like {data.like.name}" if data.like else "/".join(map(str, data.length))
    seed = f", seed {data.seed}" if data.seed else ""
    return f"{source}, {data.windows or 'up to 32'} x {length}{seed}"


def replace_name(source: SourceName) -> list[Any]:
    """A source with the content of its file in place of its name."""
    named = replace(source, name=_content(source.name))
    return [named.name, named.split, named.windows]


@cache
def _content(name: str) -> str:
    """A hash of a file, or of the files of a folder; anything else is a name that stands for itself."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in (file for file in files if file.is_file()):
        if path.is_dir():
            digest.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest() if path.exists() else name
