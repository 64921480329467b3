"""The options that `mxcompile quantize` alone has."""

from pathlib import Path
from typing import Annotated

import typer

MinRecovery = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="write nothing if recovery is below this")]
Bits = Annotated[
    float | None,
    typer.Option(min=0.0, help="stored bits a weight: each gets one of several formats, where they matter most"),
]
Cache = Annotated[
    str | None,
    typer.Option(help="format of the key/value cache: mxint8, or key=mxint8,value=mxint4,window=32,rotate=head"),
]
Resume = Annotated[
    Path | None, typer.Option(help="folder for finished parts: the same command, started again, goes on from there")
]
Dump = Annotated[
    Path | None,
    typer.Option(help="folder for the graph after each pass, and what it did to each layer (mxcompile show)"),
]
LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="for a model larger than memory: from files to files, not compared")
]
Memory = Annotated[
    float, typer.Option(min=0.0, help="low-memory: GB of weights, and of hidden states, that stay in memory")
]
Scratch = Annotated[Path | None, typer.Option(help="low-memory: folder for temporary files; that of --out by default")]
ModelFree = Annotated[
    bool, typer.Option("--model-free", help="from files to files, tensor by tensor, without calibration or comparison")
]
Workers = Annotated[int, typer.Option(min=1, help="model-free: tensors in work at the same time")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="model-free: print what would be done to each tensor, and stop")
]
Include = Annotated[list[str] | None, typer.Option(help="model-free: quantize these too (name patterns)")]
Exclude = Annotated[list[str] | None, typer.Option(help="model-free: keep these in float (name patterns)")]
