"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Argument(help="a local path or hub id; SmolLM2-135M by default")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="print one line of JSON")]
Format = Annotated[
    str | None,
    typer.Option("--format", help="mxcompile, compressed-tensors, or gguf (a file); derived from the name by default"),
]
TextFile = Annotated[Path | None, typer.Option(help='.txt, or .jsonl of {"text": ...}; default: Python\'s help topics')]
Length = Annotated[int, typer.Option(min=2, help="tokens per window of the text")]
SpecialTokens = Annotated[
    bool, typer.Option(help="begin every window with what the tokenizer puts before a text, such as BOS")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE_OR_NAME[:SPLIT][:WINDOWS]",
        help="what to calibrate on: .txt, .jsonl, .parquet, or a data set, and how many windows of it (32); a number "
        "alone: so many of the text's first half",
    ),
]
CalibrationText = Annotated[Path | None, typer.Option(hidden=True, help="the same as --calibration FILE")]
CalibrationLength = Annotated[
    str | None, typer.Option(metavar="TOKENS", help="tokens of a window, 512 by default; several: 128,512,2048")
]
CalibrationLike = Annotated[
    Path | None, typer.Option(help="a file with a task's inputs: windows get the lengths of its lines")
]
CalibrationSelf = Annotated[
    Path | None,
    typer.Option(help="let the model write the calibration text, and save it in this .jsonl file, or read it there"),
]
