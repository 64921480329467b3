"""When `generate` stops: what each step reports is looked at some steps later, so that the host never waits for the
step that it has just started.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from mxcompile.inductor.generation.sequences import Ends, Sequences

_STEPS_LATE: Final = 2  # one would do if the host were never interrupted
_INVALID: Final = "probability tensor contains either `inf`, `nan` or element < 0"  # what torch.multinomial says


class Reports:
    """Reports of steps on their way to the host, first in, first out. On the CPU they are there at once."""

    def __init__(self, like: Tensor) -> None:
        self._is_async = like.is_cuda
        count = _STEPS_LATE + 2 if self._is_async else 0
        self._free = [(torch.empty_like(like, device="cpu", pin_memory=True), torch.cuda.Event()) for _ in range(count)]
        self._pending = deque[tuple[Tensor, Any]]()

    def send(self, report: Tensor) -> None:
        """Start to copy a report to the host, after all that the current stream has been given."""
        if not self._is_async:
            self._pending.append((report, None))
            return
        room, event = self._free.pop()
        room.copy_(report, non_blocking=True)
        event.record()
        self._pending.append((room, event))

    def arrived(self, most: int = _STEPS_LATE) -> Iterator[Tensor]:
        """The reports that have arrived; waits until at most `most` are pending."""
        while self._pending:
            room, event = self._pending[0]
            if event is not None and len(self._pending) <= most and not event.query():
                return
            self._pending.popleft()
            if event is not None:
                event.synchronize()
                self._free.append((room, event))
            yield room


class Verdicts:
    """Stopping criteria, streamer and ends of sequences, applied to one report after the other.

    criteria: those of `generate` but the maximum length and the end tokens; they are called as transformers calls them,
    once for each length.
    """

    def __init__(self, sequences: Sequences, ends: Ends, criteria: Any, streamer: Any, length: int) -> None:
        self.sequences, self.criteria, self.streamer = sequences, criteria, streamer
        self.pads = ends.tokens is not None
        self.length = length
        """Of the sequences, up to the last report that was looked at."""
        self._ended_at: list[int | None] = [None] * len(sequences.tokens)  # rows that a criterion has ended
        device = sequences.tokens.device
        self._stream = torch.cuda.Stream(device) if criteria and device.type == "cuda" else None

    def go_on_from(self, told: "Verdicts") -> None:
        """Take over what others, on a copy of the sequences, have said so far."""
        self.length, self._ended_at = told.length, told._ended_at
        self.sequences.report.copy_(told.sequences.report)

    def is_last(self, report: Tensor) -> bool:
        """Whether all sequences have ended with this report's tokens. Raises RuntimeError as torch.multinomial does."""
        token, goes_on, is_valid = report
        if not is_valid.all():
            raise RuntimeError(_INVALID)
        self.length += 1
        has_ended = all(self._apply_criteria(goes_on.bool())) if self.criteria else not goes_on.any()
        if self.streamer is not None:
            self.streamer.put(self._padded(token.clone()[:, None], self.length - 1)[:, 0])
        return has_ended

    def tokens(self) -> Tensor:
        """All tokens up to the last report, [batch, length], in memory of their own."""
        return self._padded(self.sequences.tokens[:, : self.length].clone(), 0)

    def _apply_criteria(self, goes_on: Tensor) -> list[bool]:
        """Which rows have ended. The criteria run beside the steps that have been started since."""
        with torch.cuda.stream(self._stream):
            done = self.criteria(self.tokens(), None).cpu()
        ended = (done | ~goes_on).tolist()
        news = [row for row, is_done in enumerate(done.tolist()) if is_done and self._ended_at[row] is None]
        for row in news:
            self._ended_at[row] = self.length
        if news and self.pads and not all(ended):
            self.sequences.end(torch.tensor([at is None for at in self._ended_at], dtype=torch.int64))
        return [is_done or at is not None for is_done, at in zip(ended, self._ended_at, strict=True)]

    def _padded(self, tokens: Tensor, first: int) -> Tensor:
        """Padding in place of what rows got after a criterion had ended them. first: place of the first column."""
        for row, at in enumerate(self._ended_at) if self.pads else ():
            if at is not None and at < first + tokens.shape[1]:
                tokens[row, max(at - first, 0) :] = self.sequences.pad
        return tokens
