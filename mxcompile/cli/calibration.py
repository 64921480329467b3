"""The options of commands for calibration data: what they say together, and the batches that they mean.

--calibration FILE_OR_NAME[:split][:windows]     --calibration 64                --calibration-self FILE
--calibration-length 128,512,2048                --calibration-like FILE
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from mxcompile.calibration.data.batches import (
    LENGTH,
    calibration_batches,
    planned_windows,
    windows_in_words,
)
from mxcompile.calibration.data.self_generated import check_new, generate_documents, save_documents
from mxcompile.calibration.data.sources import Documents, SourceName, read_documents, shuffled
from mxcompile.cli.progress import waiting
from mxcompile.errors import InputError
from mxcompile.graph.inputs import WeightedBatch

_TWO = "{} and {} both name the text to calibrate on: leave out one of them"


@dataclass(frozen=True)
class CalibrationOptions:
    """source: where the text is; None: not named. windows: how many; None: as many as there are, 32 at most.

    length: tokens of a window, one number or several. like: a file whose lengths they get. own: the file for a text
    that the model writes itself; if it is there, it is read, so that a command that is started again goes on.
    seed: another than 0 shuffles the source's documents, or the paragraphs of a text, so that windows are others.
    """

    source: SourceName | None = None
    windows: int | None = None
    length: tuple[int, ...] = (LENGTH,)
    like: Path | None = None
    own: Path | None = None
    seed: int = 0

    @classmethod
    def parse(
        cls, calibration: str | None, text: Path | None, length: str | None, like: Path | None, own: Path | None
    ) -> "CalibrationOptions":
        """The options as they are written. text: that of `--calibration-text FILE`, an older way to name a source."""
        number = int(calibration) if calibration is not None and calibration.isdecimal() else None
        if number == 0:
            raise InputError("--calibration 0: the number of windows is at least 1")
        source = None if calibration is None or number is not None else SourceName.parse(calibration)
        if text is not None and source is not None:
            raise InputError(_TWO.format("--calibration-text", "--calibration"))
        source = source if text is None else SourceName(str(text))
        if own is not None:
            if source is not None:
                raise InputError(_TWO.format("--calibration-self", f"--calibration {source.name}"))
            if not own.exists():
                check_new(own)
        if length is not None and like is not None:
            raise InputError(
                "--calibration-length and --calibration-like both say how long the windows are: leave out one"
            )
        windows = number if source is None or source.windows is None else source.windows
        return cls(source, windows, (LENGTH,) if length is None else _lengths(length), like, own)

    @property
    def named(self) -> bool:
        """Whether they name a text."""
        return self.source is not None or self.own is not None

    def same_file(self, text: Path | None) -> bool:
        """Whether the text to calibrate on is that file, all of it."""
        if self.source is None or text is None or self.source.split is not None:
            return False
        return Path(self.source.name).resolve() == text.resolve()

    def read(self) -> Documents | None:
        """The documents of the source, if a file or name is there to read; raises InputError if there are none."""
        if self.own is not None and self.own.exists():
            return read_documents(SourceName(str(self.own)))
        if self.source is None:
            return None
        documents = read_documents(self.source)
        return shuffled(documents, self.seed) if self.seed else documents

    def batches(
        self, documents: Documents, tokenizer: Any, special_tokens: bool, device: str
    ) -> tuple[str, list[WeightedBatch]]:
        """A description of the calibration data, and the batches."""
        batches = calibration_batches(
            documents,
            tokenizer,
            length=self.length,
            like=self.like,
            windows=self.windows,
            special_tokens=special_tokens,
            device=device,
        )
        return f"{documents.label}, {windows_in_words(batches)}", batches

    def write_own(self, console: Console, model: nn.Module, tokenizer: Any, special_tokens: bool) -> Documents:
        """Let the model write the text, and save it."""
        assert self.own is not None
        planned = planned_windows(
            tokenizer, length=self.length, like=self.like, windows=self.windows, special_tokens=special_tokens
        )
        with waiting(console, "the model writes its calibration text"):
            documents = generate_documents(model, tokenizer, sum(planned), max(planned), 0)
        save_documents(documents, tokenizer, self.own)
        console.print(f"the model's own text is in {self.own} (--calibration {self.own} reads it)", markup=False)
        return Documents("the model's own text", documents)


def _lengths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--calibration-length {text}: write tokens of a window, or several: 128,512,2048")
    return tuple(map(int, parts))
