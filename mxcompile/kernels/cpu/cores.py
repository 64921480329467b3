"""Cores that other processes want, too: then torch's parallel regions are slower with several threads than with one.

At the end of a region each thread waits for all others, and one that has lost its core comes back after milliseconds.
A decode step of a small model has hundreds of regions.
"""

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mxcompile.kernels.cpu.build import BuildError, recording_library

_LOAD: Final = Path("/proc/loadavg")
_SECONDS: Final = 0.05
_last: list[tuple[float, bool]] = [(0.0, False)]


@contextmanager
def alone_if_busy() -> Generator[None]:
    """Run torch's parallel regions of this thread on one core, if others want the cores.

    Not for matmuls of torch: oneDNN divides its work among the threads that it expects, and a region with fewer leaves
    some of it undone. Recorded graphs call theirs as they come, and for a while after a call replay kernels on one core
    by themselves. Others do if so many threads are runnable, or if the last replays of a recording waited for threads
    without a core. Nothing changes that Dynamo guards on, unlike with `torch.set_num_threads`.
    """
    try:
        library = recording_library()
    except BuildError:
        yield
        return
    levels = library.mx_begin_alone(others_want_cores())
    try:
        yield
    finally:
        library.mx_end_alone(levels)


def others_want_cores() -> bool:
    """Whether more than twice as many threads as there are cores are runnable: half of them at least are not ours.

    Asked again every 50 ms. False where the system does not say (it is Linux that does).
    """
    asked, answer = _last[0]
    now = time.monotonic()
    if now - asked > _SECONDS:
        answer = runnable_threads() > 2 * len(os.sched_getaffinity(0)) if _LOAD.exists() else False
        _last[0] = (now, answer)
    return answer


def runnable_threads() -> int:
    """How many threads of all processes run or wait for a core."""
    return int(_LOAD.read_text().split()[3].partition("/")[0])
