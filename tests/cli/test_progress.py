"""Progress: a bar with the time left on a terminal, one line per pass elsewhere."""

import sys
from io import StringIO
from types import SimpleNamespace

import pytest
from models import build, inputs
from rich.console import Console

import mxcompile
from mxcompile import Pass, PassResult, Pipeline
from mxcompile.cli.progress import Progress, track, waiting
from mxcompile.pipeline.interfaces import Instrument

QUICK = "round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxint8}"


def screen(terminal: bool) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, width=100, color_system=None)


def written(console: Console) -> str:
    return console.file.getvalue()


@pytest.fixture
def program(traced):
    return traced("mlp")


def test_elsewhere_than_on_a_terminal_a_line_for_every_pass_is_all(program):
    console = screen(terminal=False)
    with Progress(console) as progress:
        Pipeline.parse(QUICK).run(program, instruments=[progress])
        progress.report("anything", 1, 2)
    lines = written(console).splitlines()
    assert [line.partition(",")[0] for line in lines] == ["  round-weights: 2 rewrites", "  lower-mx: 2 rewrites"]
    assert "\x1b" not in written(console)


def test_on_a_terminal_all_that_takes_time_is_named_and_gone_in_the_end(program):
    console = screen(terminal=True)
    with Progress(console) as progress:
        Pipeline.parse(QUICK).run(program, instruments=[progress, mxcompile.Measure()])
    text = written(console)
    steps = ("tracing", "[1/2] round-weights", "[1/2] round-weights, measuring", "[2/2] lower-mx", "deploying")
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back and the last line erased


def test_a_pass_that_fails_leaves_the_terminal_as_it_was(program):
    class Broken(Pass):
        name = "broken"

        def run(self, program):
            raise RuntimeError

    console = screen(terminal=True)
    progress = Progress(console)
    with pytest.raises(mxcompile.errors.PassError):
        Pipeline([Broken()]).run(program, instruments=[progress])
    assert written(console).count("\x1b[?25l") == written(console).count("\x1b[?25h") == 1


@pytest.mark.parametrize(
    ("done", "total", "told", "now", "shown"),
    [
        (0, None, 0, 12, "work 0:12"),
        (0, 30, 0, 12, "0 of 30 0:12"),
        (3, 30, 10, 10, "3 of 30 1:30 left"),
        (3, 30, 10, 13, "3 of 30 1:27 left"),
        (1, 3, 3600, 3600, "1 of 3 2:00:00 left"),
        (1, 2, 10, 25, "1 of 2 0:00 left"),
    ],
)
def test_the_time_left_is_told_once_it_can_be(done, total, told, now, shown, monkeypatch):
    """`done` steps were finished at second `told`; the bar is drawn at second `now`. The memory in use is last."""
    monkeypatch.setattr("mxcompile.cli.progress.memory_in_use", lambda: "1.2 GB, GPU 3.4 GB")
    clock = SimpleNamespace(now=0.0)
    progress = Progress(screen(terminal=True))
    progress.report("work", 0, total)
    bars = progress._bars
    start = bars.tasks[0].start_time
    bars.tasks[0]._get_time = lambda: start + clock.now
    clock.now = told
    progress.report("work", done, total)
    clock.now = now
    console = screen(terminal=True)
    console.print(bars.get_renderable())
    bars.stop()
    line = written(console).replace("━", "").replace("╸", "").replace("╺", "")
    assert " ".join(line.split()).endswith(f"{shown} 1.2 GB, GPU 3.4 GB")


def test_the_loss_of_a_pass_that_trains_is_shown_while_it_runs(program):
    console = screen(terminal=True)
    progress = Progress(console)
    batches = [inputs("mlp", 2, seed=seed) for seed in range(4)]
    text = "round-weights{format=mxint4} | tune-vectors{steps=6}"
    trained = Pipeline.parse(text).run(program, batches, instruments=[progress])
    losses = [loss for _, loss in trained.ledger[1].curves["all vectors"].training]
    progress.report("tuning", 1, 6, losses[0])
    bars = progress._bars
    console.print(bars.get_renderable())
    progress._stop()
    assert f"loss {losses[0]:.3g}" in written(console)
    assert trained.loss == losses[-1]


def test_every_pass_that_loops_says_how_far_it_is(traced):
    class Parts(Instrument):
        def __init__(self):
            self.seen = {}

        def segment(self, program, step, done, total):
            self.seen.setdefault(step.current.name, []).append((done, total))

    parts = Parts()
    text = "awq-fold{weight=mxint4} | gptq{format=mxint4} | tune-vectors{steps=2} | lower-mx{weight=mxint4}"
    batches = [inputs("llama", 2, 16), inputs("llama", 2, 16)]
    Pipeline.parse(f"smooth-quant | {text}").run(traced("llama"), batches, [parts])
    assert list(parts.seen) == ["smooth-quant", "awq-fold", "gptq", "tune-vectors", "lower-mx"]
    for seen in parts.seen.values():
        assert seen == [(done, len(seen)) for done in range(len(seen))]
    assert len(parts.seen["smooth-quant"]) == len(batches)


def test_parts_go_through_unwatched(program):
    assert list(program.track("abc")) == ["a", "b", "c"]


def test_track_gives_all_items_on_a_terminal_and_elsewhere():
    for terminal in (True, False):
        console = screen(terminal)
        assert list(track(console, [1, 2, 3], "counting")) == [1, 2, 3]
        assert ("counting" in written(console)) == terminal


def test_bars_of_other_libraries_are_left_out_and_their_messages_are_not(monkeypatch):
    monkeypatch.setattr(sys, "stderr", StringIO())
    with waiting(screen(terminal=False), "loading"):
        for text in ("\rLoading: 50%", "\rLoading: 100%", "\n", "a warning\n"):
            sys.stderr.write(text)
        sys.stderr.flush()
    assert sys.stderr.getvalue() == "a warning\n"


def test_a_terminal_shows_the_bar_and_the_messages_but_not_the_bars_of_others(monkeypatch):
    """The console itself writes to stderr, as those of all commands do."""
    real = StringIO()
    monkeypatch.setattr(sys, "stderr", real)
    with waiting(Console(stderr=True, force_terminal=True, width=80), "loading"):
        for text in ("\rtheirs: 50%", "\rtheirs: 100%", "\n", "a warning\n"):
            sys.stderr.write(text)
        sys.stderr.flush()
    assert sys.stderr is real
    assert "loading" in real.getvalue()
    assert real.getvalue().count("a warning") == 1
    assert "theirs" not in real.getvalue()


def test_bisect_says_how_far_it_is():
    seen = []
    recipe = "lower-mx{weight=mxint4,activation=mxint4}"
    x = inputs("llama", 4, 16)
    model = build("llama")
    total = mxcompile.bisect(model, x, recipe=recipe, kl=1e9).scores[-1]
    found = mxcompile.bisect(model, x, recipe=recipe, kl=total / 2, report=lambda *step: seen.append(step))
    titles = list(dict.fromkeys(title for title, _, _ in seen))
    assert titles == ["scoring each pass", "trying each change alone", "reducing the guilty set"]
    assert ("trying each change alone", 6, len(found.contributions)) in seen


def test_a_pass_without_calibration_is_not_slowed_down_by_its_statistics(program):
    """Nothing is gathered, and so nothing reported, for a pass that asks for nothing."""

    class Quiet(Pass):
        name = "quiet"

        def run(self, program):
            return PassResult(0)

    console = screen(terminal=True)
    Pipeline([Quiet()]).run(program, instruments=[Progress(console)])
    assert "of" not in written(console)
