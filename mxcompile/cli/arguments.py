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
CalibrationText = Annotated[
    Path | None, typer.Option(help="text for recipes that calibrate; the first half of the text by default")
]
Calibration = Annotated[int, typer.Option(min=1, help="windows of 512 tokens to calibrate with")]
