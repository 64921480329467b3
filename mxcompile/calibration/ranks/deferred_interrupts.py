"""Interrupts (Ctrl-C) that come while processes exchange something take effect after it."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def interrupts_deferred() -> Generator[None]:
    """Defer an interrupt to the end of the block, so that no process leaves an exchange that others are in."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        signal.raise_signal(signal.SIGINT)
