"""What processes that share a run exchange: values, sums, rows and errors, in the order of the processes."""

import io
import itertools
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mxcompile import errors
from mxcompile.calibration.ranks.deferred_interrupts import interrupts_deferred
from mxcompile.errors import MXCompileError, RankError
from mxcompile.graph.program import Program

T = TypeVar("T")
R = TypeVar("R")
_CHUNK = 1 << 24  # numbers that are summed at a time
_MOST_DEVICES = 64


class Ranks:
    """number: of this process, from 0. count: of all. device: where tensors of this process are that it receives."""

    def __init__(
        self, number: int = 0, count: int = 1, device: torch.device | None = None, control: Any = None
    ) -> None:
        self.number, self.count, self.device = number, count, device or torch.device("cpu")
        self._control, self._over = control, False

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and measures."""
        return self.number == 0

    def share(self, costs: Sequence[float]) -> range:
        """The items that are this process's: consecutive ones, of about as much cost as any other process's."""
        ends, total = list(itertools.accumulate(costs)), sum(costs)
        middles = [(end - cost / 2) / total if total else 0.0 for end, cost in zip(ends, costs, strict=True)]
        mine = [i for i, middle in enumerate(middles) if min(int(middle * self.count), self.count - 1) == self.number]
        return range(mine[0], mine[-1] + 1) if mine else range(0)

    def rows(self, count: int) -> slice:
        """This process's rows, of so many: consecutive ones."""
        return slice(count * self.number // self.count, count * (self.number + 1) // self.count)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """For each piece of work the process that does it: the most costly first, to the one with the least so far."""
        owners, loads = [0] * len(costs), [0.0] * self.count
        for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
            owners[index] = loads.index(min(loads))
            loads[owners[index]] += costs[index]
        return owners

    def map(self, function: Callable[[T], R], items: Sequence[T], costs: Sequence[float] | None = None) -> list[R]:
        """The function's results for all items, each computed by one process; they must be picklable."""
        if self.count == 1:
            return [function(item) for item in items]
        owners = self.owners(costs or [1.0] * len(items))
        own = {index: function(items[index]) for index, owner in enumerate(owners) if owner == self.number}
        gathered = self.gather(own)
        return [gathered[owner][index] for index, owner in enumerate(owners)]

    def by_rows(self, function: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor) -> tuple[Tensor, ...]:
        """The results of a function that treats the first dimension's items independently; each process computes some.

        rows: `[rows, ...]`, as are the results, all of them in each process.
        """
        if self.count == 1 or len(rows) < self.count:
            return function(rows)
        return tuple(self.collect(part, len(rows)) for part in function(rows[self.rows(len(rows))]))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by their numbers; tensors on this process's device."""
        if self.count == 1:
            return [value]
        own = _saved(value)
        with self._exchange("exchange of values"):
            return [self._loaded(data) for data in self._all_objects(own)]

    def from_first(self, value: T) -> T:
        """The value of the first process; others may have any. Tensors on this process's device, as for `gather`."""
        if self.count == 1:
            return value
        sent = [_saved(value) if self.first else b""]
        with self._exchange("value of the first"):
            dist.broadcast_object_list(sent, 0, group=self._control)
        return value if self.first else self._loaded(sent[0])

    def any(self, value: bool) -> bool:
        """Whether the value is true in a process."""
        return any(self.gather(value))

    def sum(self, tensor: Tensor) -> None:
        """Add the tensors of all processes, in the order of the processes; in place."""
        if self.count == 1:
            return
        values = tensor.contiguous()
        self._sum(values.view(-1))
        if values.data_ptr() != tensor.data_ptr():
            tensor.copy_(values)

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of several tensors of equal dtype over all processes, in one exchange."""
        if self.count == 1 or not tensors:
            return list(tensors)
        joined = torch.cat([tensor.flatten() for tensor in tensors])
        self.sum(joined)
        parts = joined.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def sum_at(self, tensor: Tensor, owner: int) -> None:
        """`sum`, but only the owner gets the sum; the tensors of others keep their values."""
        if self.count == 1:
            return
        values = tensor.contiguous().view(-1)
        own, width = owner == self.number, min(_CHUNK, len(values))
        parts = [self._transport(values.new_empty(width)) for _ in range(self.count)] if own else None
        with self._exchange(f"sum of {list(tensor.shape)} at {owner}"):
            for start in range(0, len(values), _CHUNK):
                chunk = values[start : start + _CHUNK]
                received = None if parts is None else [part[: len(chunk)] for part in parts]
                dist.gather(self._transport(chunk), received, owner, group=self._group(chunk))
                if received is not None:
                    chunk.copy_(_ordered_sum(received))
        if own and values.data_ptr() != tensor.data_ptr():
            tensor.copy_(values.view(tensor.shape))

    def collect(self, part: Tensor, count: int) -> Tensor:
        """`[count, ...]` from the rows that each process has computed (`rows`)."""
        if self.count == 1:
            return part
        most = -(-count // self.count)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        sent = self._transport(_bytes(padded))
        received = [torch.empty_like(sent) for _ in range(self.count)]
        with self._exchange(f"rows of {count}, {list(part.shape[1:])}"):
            dist.all_gather(received, sent, group=self._group(padded))
        sizes = [count * (n + 1) // self.count - count * n // self.count for n in range(self.count)]
        whole = [r.view(part.dtype).view(padded.shape)[:size] for r, size in zip(received, sizes, strict=True)]
        return torch.cat(whole).to(part.device)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Give a contiguous tensor the owner's values, in place."""
        if self.count == 1:
            return
        sent = self._transport(_bytes(tensor))
        with self._exchange(f"broadcast of {list(tensor.shape)} from {owner}"):
            dist.broadcast(sent, owner, group=self._group(tensor))
        if sent.device != tensor.device:
            _bytes(tensor).copy_(sent)

    def check_same(self, values: Mapping[str, object], when: str) -> None:
        """Raise RankError, which names it, if a value is another one in another process."""
        for number, others in enumerate(self.gather(dict(values))):
            for name in (name for name in others if others[name] != values.get(name)):
                raise RankError(
                    f"{when}, process {number} has another {name} than process {self.number}: every process must make "
                    "the same calls with the same model and all of the data, which are dealt out among them"
                )

    def _sum(self, values: Tensor) -> None:
        """`sum` of `[numbers]`."""
        if self.count == 2:  # in any order
            sent = self._transport(values)
            with self._exchange(f"sum of {len(values)}"):
                dist.all_reduce(sent, group=self._group(values))
            if sent is not values:
                values.copy_(sent)
            return
        width = -(-min(_CHUNK, len(values)) // self.count)
        sent = self._transport(values.new_zeros(self.count * width))
        received = torch.empty_like(sent)
        with self._exchange(f"sum of {len(values)}"):
            for start in range(0, len(values), len(sent) or 1):
                chunk = values[start : start + len(sent)]
                sent[: len(chunk)] = chunk
                dist.all_to_all_single(received, sent, group=self._group(values))
                total = _ordered_sum(received.view(self.count, width).unbind())
                dist.all_gather(list(sent.view(self.count, width).unbind()), total.clone(), group=self._group(values))
                chunk.copy_(sent[: len(chunk)])

    def _group(self, tensor: Tensor) -> Any:
        """The group that exchanges a tensor: the caller's NCCL for one on a GPU, else gloo."""
        return None if self._by_nccl(tensor) else self._control

    def _transport(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy on the CPU if no group exchanges tensors on its device."""
        return tensor if self._by_nccl(tensor) else tensor.cpu()

    def _by_nccl(self, tensor: Tensor) -> bool:
        return tensor.is_cuda and "cuda:nccl" in dist.get_backend_config()

    def _loaded(self, data: bytes) -> Any:
        """A value that another process of this run has saved."""
        places = {f"cuda:{index}": str(self.device) for index in range(_MOST_DEVICES)}
        return torch.load(io.BytesIO(data), map_location=places, weights_only=False)

    @contextmanager
    def _exchange(self, what: str) -> Generator[None]:
        """The block in which all processes exchange something; none of them leaves it half way for an interrupt."""
        with interrupts_deferred():
            self._meet(what)
            yield

    def _all_objects(self, value: T) -> list[T]:
        dist.all_gather_object(values := [value] * self.count, value, group=self._control)
        return values

    def _meet(self, what: str) -> None:
        """Wait for all processes; raise the error of one that has failed, or RankError if one does something else."""
        if self._over:
            raise RankError("the processes no longer share this run")
        states = self._states(0, zlib.crc32(what.encode()))
        if any(failed for failed, _ in states) or len(set(states)) > 1:
            self._over = True
            self._raise(self._all_objects((None, what)))

    def _states(self, failed: int, doing: int) -> list[tuple[int, int]]:
        own = torch.tensor([failed, doing], device="cpu")
        states = [own.clone() for _ in range(self.count)]
        try:
            dist.all_gather(states, own, group=self._control)
        except RuntimeError as error:
            self._over = True
            raise RankError(
                f"process {self.number} has lost another process, which has ended: see what that one has printed"
            ) from error
        return [(int(state[0]), int(state[1])) for state in states]

    def _raise(self, reports: list[tuple[tuple[str, str] | None, str]]) -> None:
        """Raise the first error among the reports of all processes: (kind, message) of an error, and what one does."""
        for number, (report, _) in enumerate(reports):
            if report is not None:
                raise _as_raised(*report, f"process {number} of {self.count}")
        doing = "; ".join(f"process {number}: {what}" for number, (_, what) in enumerate(reports))
        raise RankError(f"the processes do different things ({doing}): every process must make the same calls")

    def fail(self, error: BaseException) -> None:
        """Let all processes end with this one's error, once each reaches its next meeting."""
        if self.count == 1 or self._over:
            return
        self._over = True
        with interrupts_deferred(), suppress(RuntimeError, RankError):  # others have ended already
            self._states(1, 0)
            self._all_objects(((type(error).__name__, str(error)), ""))

    def end(self) -> None:
        """Wait until all processes are done."""
        if self.count > 1:
            with self._exchange("the end"):
                pass


ALONE = Ranks()


def ranks_of(program: Program) -> Ranks:
    """The processes that share the program's run."""
    return program.ranks if isinstance(program.ranks, Ranks) else ALONE


def _saved(value: object) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def _as_raised(kind: str, message: str, origin: str) -> BaseException:
    """The error of another process: of its class if that is mxcompile's or an interrupt."""
    own = getattr(errors, kind, None)
    if kind == KeyboardInterrupt.__name__:
        error: BaseException = KeyboardInterrupt(message)
    elif isinstance(own, type) and issubclass(own, MXCompileError):
        error = own.__new__(own, message)  # constructors differ
        error.args = (message,)
    else:
        error = RankError(f"{origin} failed: {kind}: {message}")
    error.add_note(f"raised in {origin}")
    return error


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes `[bytes]`: groups do not exchange every dtype."""
    return tensor.view(-1).view(torch.uint8)


def _ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
