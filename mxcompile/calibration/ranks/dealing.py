"""Calibration batches dealt among processes, and the statistics of each process's batches merged."""

import copy
import pickle
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

from torch.fx import Node

from mxcompile.calibration.ranks.exchange import Ranks, ranks_of
from mxcompile.calibration.statistics.observers import Observer, TokenSample, values_of
from mxcompile.errors import PassError, warn
from mxcompile.graph.binding import bind_inputs
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.masks import find_masks
from mxcompile.graph.program import Program


def own_batches(program: Program, batches: Iterable[Inputs]) -> tuple[range, float]:
    """Which batches are this process's, and how much comes before them (`TokenSample.follow`): how many batches with as
    many visible tokens as its first one has, or, if a mask hides that whole, the next that it does not.

    Each process has consecutive batches, of about as many elements as any other.
    """
    ranks, batches = ranks_of(program), tuple(batches)
    if ranks.count == 1:
        return range(len(batches)), 0.0
    sizes = [float(max((tensor.numel() for tensor in batch.tensors()), default=1)) for batch in batches]
    own = ranks.share(sizes)
    visible = [size * _visible(program, batch) for size, batch in zip(sizes[: own.stop], batches, strict=False)]
    first = next((count for count in visible[own.start :] if count), None) if own else None
    return own, 0.0 if first is None else sum(visible[: own.start]) / first


@contextmanager
def observing(
    program: Program, observers: Mapping[Node, Sequence[Observer]], before: float
) -> Generator[Mapping[Node, Sequence[Observer]]]:
    """Observers to feed with this process's batches; afterwards the given ones hold the statistics of all batches.

    before: as `own_batches` returns it. Raises PassError for observers that hold data already or cannot be pickled.
    """
    ranks = ranks_of(program)
    if ranks.count == 1 or not observers:
        yield observers
        return
    merged = [observer for kinds in observers.values() for observer in kinds]
    if any(values_of([observer]) for observer in merged):
        raise PassError("several processes merge their statistics: observe with observers that hold no data yet")
    own = {value: [copy.deepcopy(observer) for observer in kinds] for value, kinds in observers.items()}
    fed = [observer for kinds in own.values() for observer in kinds]
    for observer in fed:
        if isinstance(observer, TokenSample):
            observer.follow(before)
    yield own
    for of_process in _gathered(ranks, fed):
        for observer, other in zip(merged, of_process, strict=True):
            observer.merge(other)


def warn_if_idle(ranks: Ranks, batches: int) -> None:
    """Warn, in the first process, if there are fewer calibration batches than processes."""
    if ranks.first and batches < ranks.count:
        warn(f"{ranks.count} processes have {batches} calibration batches, and some none: give smaller batches")


def _visible(program: Program, batch: Inputs) -> float:
    """The share of a batch's tokens that no mask hides."""
    masks = find_masks(bind_inputs(program, batch))
    return float(masks[0].visible.double().mean()) if masks else 1.0


def _gathered(ranks: Ranks, observers: list[Observer]) -> list[list[Observer]]:
    try:
        return ranks.gather(observers)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise PassError(
            f"an observer cannot be sent to other processes ({error}): its class must be in a module"
        ) from (error)
