"""What a failed or interrupted run leaves: the program after the last finished pass, and the passes that are left.

    Pipeline([a, b, c]) fails in c    ->    error.unfinished.program: after b; error.unfinished.passes: (c,)

The program is rebuilt when it is asked for. Folds are replayed on the program from before them, so that no copy of the
folded weights is kept while a later pass replaces them.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

from torch import nn

from mxcompile.graph.program import Program
from mxcompile.graph.records import Fold, PassResult
from mxcompile.pipeline.interfaces import Pass


class Unfinished:
    """`error.unfinished` of an error, or a KeyboardInterrupt, that ended a run after some of its work.

    passes: those that are left, in order. model: the deployed module, if the run came so far.
    """

    def __init__(
        self, rebuild: Callable[[], Program], passes: Sequence[Pass] = (), model: nn.Module | None = None
    ) -> None:
        self._rebuild, self.passes, self.model = rebuild, tuple(passes), model

    @cached_property
    def program(self) -> Program:
        """The Program after the last finished pass: `Pipeline(unfinished.passes).run(unfinished.program, data)`."""
        return self._rebuild()


class History:
    """The finished passes of a run, so that the program after the last of them can be rebuilt."""

    def __init__(self, program: Program) -> None:
        self.finished: list[str] = []
        self._base, self._folds, self._state = program.copy(), list[Fold](), program.state()

    def add(self, current: Pass, program: Program, result: PassResult) -> None:
        """Note a finished pass. One that has done nothing but the folds of its result is replayed; else a copy is
        kept."""
        self.finished.append(current.name)
        self._state = program.state()
        if current.preserves_function and result.rewrites == len(result.folds):
            self._folds += result.folds
        else:
            self._base, self._folds = program.copy(), []

    def rebuild(self) -> Program:
        """A Program as it was after the last finished pass."""
        program = self._base.copy()
        for fold in self._folds:
            fold.apply(program)
        program.graph_module.recompile()
        program.set_state(self._state)
        program.batches, program.ranks = (program.example,), None
        return program


@contextmanager
def work_kept(unfinished: Callable[[], Unfinished | None], note: Callable[[], str]) -> Generator[None]:
    """Give an exception that leaves the block `unfinished`, and a note that says how to go on from there."""
    try:
        yield
    except BaseException as error:
        left = unfinished()
        with suppress(AttributeError):  # an exception class with slots
            if left is not None and getattr(error, "unfinished", None) is None:
                error.unfinished = left  # pyright: ignore[reportAttributeAccessIssue]
                error.add_note(note())
        raise


def how_to_go_on(finished: Sequence[str], passes: Sequence[Pass], resume: object) -> str:
    """The note of an error in a run. passes: those that are left. resume: its folder of finished parts, or None."""
    lines = [
        f"The work of {', '.join(finished)} is not lost: error.unfinished.program is the program after {finished[-1]}."
    ]
    if passes:
        rest = " | ".join(map(str, passes))
        run = "Pipeline(error.unfinished.passes).run(error.unfinished.program, calibration)"
        lines.append(f"Go on with program = {run}, which runs {rest}; then mxcompile.deploy(program, model).")
    else:
        lines.append("mxcompile.deploy(error.unfinished.program, model) makes the module.")
    if resume is not None:
        lines.append(f"The same call with resume={str(resume)!r} also goes on, after the last part saved there.")
    return " ".join(lines)
