"""A pipeline: passes in a fixed order, checked when built, printed and parsed as text, run with instruments."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mxcompile.arguments import checked
from mxcompile.calibration.finished_parts import load_part, save_part
from mxcompile.calibration.ranks.exchange import Ranks, ranks_of
from mxcompile.calibration.ranks.process_group import joined
from mxcompile.calibration.runs.not_finite import check_inputs, check_requests
from mxcompile.calibration.runs.run import Request, gather_statistics, visible_batches
from mxcompile.errors import InputError, PipelineError, PreservationError
from mxcompile.formats import MXFormat
from mxcompile.graph import error_location, verify
from mxcompile.graph.callers_modes import without_callers_modes
from mxcompile.graph.inputs import as_batches, check_batches
from mxcompile.graph.name_patterns import Overrides
from mxcompile.graph.program import Program, Stage
from mxcompile.graph.records import PassRecord, PassResult
from mxcompile.graph.traceable_copy import no_values
from mxcompile.pipeline import text_form
from mxcompile.pipeline.interfaces import Instrument, Pass, PipelineStep
from mxcompile.pipeline.options import check_options
from mxcompile.pipeline.preservation import check_preserved, record_outputs
from mxcompile.pipeline.resume import open_folder
from mxcompile.pipeline.together import end_together, start_together
from mxcompile.pipeline.unfinished import History, Unfinished, how_to_go_on, work_kept

_OVERRIDES, _STATISTICS = "overrides", "statistics"


class Pipeline:
    """An ordered tuple of passes, `Pipeline([SmoothQuant(), LowerMX(weight=MXINT4)])`.

    Raises PipelineError for an option out of range and for an order that cannot work; passes are never reordered.
    Raises MXCompileError for a format that has a built-in name but other values.
    """

    def __init__(self, passes: Iterable[Pass]) -> None:
        self.passes = _as_passes(passes)
        stage, origin = Stage.FLOAT, "trace"
        for current in self.passes:
            check_options(current.name, current)
            text_form.check_formats(current)
            if stage not in current.accepts:
                raise PipelineError(_wrong_stage(current, stage, origin))
            if current.gives is not None and current.gives != stage:
                stage, origin = current.gives, current.name

    def __str__(self) -> str:
        return " | ".join(map(str, self.passes))

    @property
    def reads_calibration(self) -> bool:
        """Whether the result of any pass can depend on calibration data."""
        return any(current.reads_calibration for current in self.passes)

    def __repr__(self) -> str:
        return f"Pipeline.parse({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)

    @classmethod
    @checked
    def parse(cls, text: str, passes: Iterable[type[Pass]] = ()) -> "Pipeline":
        """Parse `smooth-quant{alpha=0.5} | lower-mx{weight=mxint4}`. passes: your own, beside the built-in ones."""
        from mxcompile.passes import PASSES  # the one import upwards: pass names are looked up here

        table: dict[str, type[Pass]] = {**PASSES, **{p.name: p for p in passes}}
        return cls(text_form.parse_call(part, "pass", table) for part in text.split("|"))

    @checked
    def with_overrides(self, overrides: Mapping[str, MXFormat | str | None]) -> "Pipeline":
        """The same pipeline with `overrides` added after those of every pass that gives weights a format.

        Raises PipelineError if there is no such pass. Patterns: see `name_patterns.py`.
        """
        accepting = [current for current in self.passes if isinstance(getattr(current, _OVERRIDES, None), Overrides)]
        if not accepting:
            raise PipelineError(
                f"no pass of {self} takes overrides: add one that gives weights a format, like lower-mx"
            )
        changed = {id(p): replace(p, overrides={**getattr(p, _OVERRIDES), **overrides}) for p in accepting}  # pyright: ignore
        return Pipeline(changed.get(id(current), current) for current in self.passes)

    @without_callers_modes()
    @checked
    def run(
        self,
        program: Program,
        calibration: object = None,
        instruments: Sequence[Instrument] = (),
        resume: str | Path | None = None,
    ) -> Program:
        """Run the passes on a copy of the program and return the copy.

        calibration: a batch or an iterable of batches, in the forms that `trace` accepts; None: the example inputs.
        resume: a folder in which slow passes (gptq) save finished segments; the same run, started again, continues
            from there.

        In an initialized process group of torch.distributed, every process must make this call with the same arguments:
        they deal out the batches and end with the same program (`calibration/ranks/`). The first one alone calls the
        instruments and writes to the folder. Raises RankError if a process has ended or does something else.

        Raises InputError, which names the batch, if NaN in calibration data, or NaN or Inf computed from them, reaches
        a statistic.
        An error, or a KeyboardInterrupt, after the first finished pass has `unfinished`: the program after the last
        finished pass and the passes that are left (`unfinished.py`).
        """
        if self.passes and program.stage not in self.passes[0].accepts:
            raise PipelineError(_wrong_stage(self.passes[0], program.stage, "the passes that ran before"))
        # The caller's default device must not reach observers; a graph states its devices.
        with torch.device("cpu"), joined(_device_of(program)) as ranks:
            return self._run(program, calibration, instruments if ranks.first else (), resume, ranks)

    def _run(
        self,
        program: Program,
        calibration: object,
        instruments: Sequence[Instrument],
        resume: str | Path | None,
        ranks: Ranks,
    ) -> Program:
        source, program = program, program.copy()
        program.origin = source.origin or source
        program.batches = (program.example,) if calibration is None else tuple(as_batches(calibration))
        if without := [name for name in program.parameter_names() if program.stored(name).is_meta]:
            raise InputError(no_values(without))
        check_batches(program.example, program.batches)
        check_inputs(program, program.batches)
        start_together(ranks, str(self), program)
        program.resume = folder = None if resume is None else open_folder(resume, str(self), program, ranks)
        history = History(program)
        with ExitStack() as ending, self._work_kept(history, resume):
            for instrument in instruments:
                ending.callback(instrument.close)
                instrument.start(program, self.passes)
            for index, current in enumerate(self.passes, start=1):
                if folder is not None:
                    folder.current_pass = f"{index:02}-{current.name}"
                step = PipelineStep(index, current, self.passes)
                record, result = _run_one(step, program, instruments)
                history.add(current, program, result)
                for instrument in instruments:
                    instrument.after(program, step, record)
            end_together(ranks, program)
            program.batches, program.report, program.resume = (program.example,), None, None
            for instrument in instruments:
                instrument.finish(program)
        return program

    def _work_kept(self, history: History, resume: str | Path | None) -> AbstractContextManager[None]:
        def unfinished() -> Unfinished | None:
            return Unfinished(history.rebuild, self.passes[len(history.finished) :]) if history.finished else None

        def note() -> str:
            return how_to_go_on(history.finished, self.passes[len(history.finished) :], resume)

        return work_kept(unfinished, note)


def _as_passes(passes: object) -> tuple[Pass, ...]:
    """The passes of an iterable; raises PipelineError for anything else, a text form and a class of passes included."""
    iterable = isinstance(passes, Iterable) and not isinstance(passes, str | Tensor)
    items = tuple(cast(Iterable[object], passes)) if iterable else (passes,)
    for item in items:
        if iterable and isinstance(item, Pass):
            continue
        if isinstance(item, str):
            reason = f"the text {item!r}: Pipeline.parse reads the text form"
        elif isinstance(item, type) and issubclass(item, Pass):
            reason = f"the class {item.__name__}: write {item.__name__}(...)"
        else:
            reason = f"a single {type(item).__name__}: put it in a list" if isinstance(item, Pass) else f"{item!r}"
        raise PipelineError(f"a pipeline is made of passes, Pipeline([SmoothQuant(), ...]), not of {reason}")
    return cast(tuple[Pass, ...], items)


def _wrong_stage(current: Pass, stage: Stage, origin: str) -> str:
    reason = f"it needs a {_names(current.accepts)} program, and {origin} leaves a {stage.name.lower()} one"
    if stage < min(current.accepts):
        needed = min(current.accepts).name.lower()
        return (
            f"{current.name} cannot run after {origin}: {reason}. Put a pass before it that leaves a {needed} program."
        )
    return f"{current.name} cannot run after {origin}: {reason}. Move {current.name} before {origin}."


def _run_one(step: PipelineStep, program: Program, instruments: Sequence[Instrument]) -> tuple[PassRecord, PassResult]:
    current = step.current
    for instrument in instruments:
        instrument.before(program, step)
    program.report, program.loss = partial(_report, instruments, program, step), None
    started = time.perf_counter()
    try:
        with program.state_kept():
            if current.reads_calibration:
                visible_batches(program, program.batches)
            requests = current.requests(program)
            _gather(program, requests)
            check_requests(program, requests)
            if current.preserves_function:
                result, preserved = _preserving(current, program)
            else:
                result, preserved = current.run(program), None
        program.stage = current.gives if current.gives is not None else program.stage
        if result.rewrites:
            program.statistics.clear()
            program.outputs = program.outputs if current.preserves_function else None
        verify.check(program)
        program.graph_module.recompile()
        seconds = time.perf_counter() - started
        with program.state_kept():
            measured = [m for i in instruments if (m := i.measure(program, step, result)) is not None]
    except Exception as error:
        failure = error_location.add_location(error, current.name)
        for instrument in instruments:
            instrument.failed(program, step, failure)
        if failure is error:
            raise
        raise failure from error
    record = PassRecord(
        current.name,
        str(current),
        result.rewrites,
        result.misses,
        seconds,
        result.numbers,
        preserved,
        program.stored_bytes(),
        measured[-1] if measured else None,
        result.expert_tokens,
        result.allocation,
        result.curves,
    )
    record = ranks_of(program).from_first(record)  # it alone has measured, and times differ
    program.ledger.append(record)
    return record, result


def _gather(program: Program, requests: Sequence[Request]) -> None:
    """Gather the statistics that a pass asks for, unless an interrupted run has saved them."""
    wanted = {" ".join(request.key): request.key for request in requests}
    missing = {name: key for name, key in wanted.items() if key not in program.statistics}
    saved = load_part(program, _STATISTICS) if missing else None
    if saved is not None:
        device = next(map(program.device, program.parameter_names()), torch.device("cpu"))
        program.statistics |= {missing[name]: value.to(device) for name, value in saved[0].items()}
        return
    gather_statistics(program, requests)
    if missing:
        gathered = {n: program.statistics[key] for n, key in missing.items() if key in program.statistics}
        save_part(program, _STATISTICS, gathered)


def _report(instruments: Sequence[Instrument], program: Program, step: PipelineStep, done: int, total: int) -> None:
    for instrument in instruments:
        instrument.segment(program, step, done, total)


def _preserving(current: Pass, program: Program) -> tuple[PassResult, float]:
    """Run a pass that must preserve the function; check the outputs, and undo the pass if they changed."""
    record_outputs(program)
    before, required_db = program.copy(), current.required_db(program)
    result = current.run(program)
    program.graph_module.recompile()
    try:
        return result, check_preserved(program, before, result.folds, current.name, required_db)
    except PreservationError:
        program.graph_module = before.graph_module
        program.set_state(before.state())
        raise


def _device_of(program: Program) -> torch.device:
    """The device of the program's tensors: a GPU if one of them is there."""
    devices = {program.device(name) for name in program.parameter_names()}
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _names(stages: Iterable[Stage]) -> str:
    return " or ".join(stage.name.lower() for stage in sorted(stages))
