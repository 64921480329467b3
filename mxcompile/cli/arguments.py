"""Options and arguments that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Argument(help="a local path or hub id; SmolLM2-135M if left out")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="print one line of JSON")]
Format = Annotated[
    str | None,
    typer.Option("--format", help="mxcompile, compressed-tensors, or gguf (to a file); by the name if left out"),
]
TextFile = Annotated[Path | None, typer.Option(help='.txt, or .jsonl of {"text": ...}; else Python\'s help topics')]
Length = Annotated[int, typer.Option(min=2, help="tokens a window of the text")]
CalibrationText = Annotated[
    Path | None, typer.Option(help="for recipes that calibrate; else the first half of the text")
]
Calibration = Annotated[int, typer.Option(min=1, help="windows of 512 tokens to calibrate with")]
