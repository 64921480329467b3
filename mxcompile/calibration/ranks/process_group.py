"""Which processes share a run: those that torchrun has started, or those of torch.distributed's default group."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mxcompile.calibration.ranks.exchange import ALONE, Ranks
from mxcompile.errors import RankError
from mxcompile.tensor.devices import find_device

_ARRIVAL = timedelta(minutes=5)  # for all processes to make the call
_WORK = timedelta(days=7)  # between two meetings; a process that ends is noticed at once
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def launched() -> bool:
    """Whether torchrun has started this process together with others."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def is_first() -> bool:
    """Whether this process writes and prints: one that is alone, or the first of those that share a run."""
    if _alone.get():
        return True
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def launched_group(device: str) -> Generator[str]:
    """The process group of the processes that torchrun has started, in the block; nothing for a process alone.

    Yields the device to use: for "cuda" each process of a machine has a GPU of its own. CPU tensors are exchanged by
    gloo, those of GPUs by NCCL.
    """
    if not launched():
        yield device
        return
    if on_gpu := device.startswith("cuda"):
        device = f"cuda:{dist.get_node_local_rank()}" if device == "cuda" else device
        torch.cuda.set_device(find_device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def alone() -> Generator[None]:
    """Within the block, calls of mxcompile are this process's own, although a process group is initialized."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def check_alone(what: str) -> None:
    """Raise RankError if other processes make this call too, which only one of them can.

    what: the call, as the message names it.
    """
    if not _alone.get() and (launched() or _in_group()):
        raise RankError(
            f"{what} runs in one process, and here several would write the same files: call it in one of them within "
            "`with mxcompile.alone():`"
        )


@contextmanager
def joined(device: torch.device) -> Generator[Ranks]:
    """The processes of torch.distributed's default group, which must all enter the block; this one if there is none.

    An error in one of them is raised in all. Raises RankError if not all enter within five minutes.
    """
    if _alone.get() or not _in_group():
        yield ALONE
        return
    try:
        arrival: Any = dist.new_group(backend="gloo", timeout=_ARRIVAL)
        control: Any = dist.new_group(backend="gloo", timeout=_WORK)
    except RuntimeError as error:
        raise RankError(
            f"not all {dist.get_world_size()} processes of the process group made this call within five minutes: make "
            "it in each of them, or in one within `with mxcompile.alone():`"
        ) from error
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, control)
    try:
        yield ranks
        ranks.end()
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        dist.destroy_process_group(control)
        dist.destroy_process_group(arrival)


def _in_group() -> bool:
    """Whether this process has a process group with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
