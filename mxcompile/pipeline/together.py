"""Several processes begin a run with the same model and data, and end it with the same program."""

import re
import zlib
from collections.abc import Iterable

from torch import Tensor, fx

from mxcompile.calibration.ranks.dealing import warn_if_idle
from mxcompile.calibration.ranks.exchange import Ranks
from mxcompile.graph.program import Program
from mxcompile.pipeline.resume import digest_of
from mxcompile.tensor.digest import tensor_bytes
from mxcompile.tensor.weight import MXWeight

_SAMPLE = 64  # numbers of each tensor that are compared before a run


def start_together(ranks: Ranks, pipeline: str, program: Program) -> None:
    """Let the processes share the program's run.

    Raises RankError if they have other pipelines, models or calibration data.
    """
    program.ranks = ranks
    if ranks.count > 1:
        samples = {name: program.stored(name) for name in program.parameter_names()}
        same = {
            "pipeline": pipeline,
            "calibration data": digest_of(program.batches),
            "graph": graph_text(program.graph),
        }
        ranks.check_same(same | {"model": _checksum(samples.items(), _SAMPLE)}, "before the first pass")
        warn_if_idle(ranks, len(program.batches))


def end_together(ranks: Ranks, program: Program) -> None:
    """Raise RankError if the processes have come to other programs."""
    if ranks.count > 1:
        same = {"graph": graph_text(program.graph)}
        sums = {f"tensor {name!r}": _whole_checksum(program, name) for name in program.parameter_names()}
        ranks.check_same(same | sums, "after the last pass")
    program.ranks = None


def graph_text(graph: fx.Graph) -> str:
    """The graph's text without the index of a device: each process has a GPU of its own."""
    return re.sub(r"\b(cuda|xpu):\d+\b", r"\1", str(graph))


def _whole_checksum(program: Program, name: str) -> int:
    """Of all numbers of a tensor, whose memory is given up if they lie in a file."""
    stored = program.stored(name)
    result = _checksum([(name, stored)])
    if program.mapped is not None:
        program.mapped.give_up(stored)
    return result


def _checksum(tensors: Iterable[tuple[str, Tensor]], numbers: int | None = None) -> int:
    """Of names, shapes, and all or the first numbers of each tensor."""
    result = 0
    for name, tensor in tensors:
        for part in tensor.parts if isinstance(tensor, MXWeight) else (tensor.detach(),):
            result = zlib.crc32(f"{name} {part.dtype} {tuple(part.shape)}".encode(), result)
            result = zlib.crc32(tensor_bytes(part.flatten()[:numbers]), result)
    return result
