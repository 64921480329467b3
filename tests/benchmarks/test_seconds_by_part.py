"""Seconds by part: each part's own, in a tree of calls with a clock that is set by hand."""

from types import SimpleNamespace

import pytest
import seconds_by_part
from seconds_by_part import SecondsByPart, watch_quantization


def test_own_seconds_of_nested_parts(monkeypatch):
    now, synchronized = [0.0], [0]

    def take(seconds):
        now[0] += seconds

    def synchronize():
        synchronized[0] += 1

    def outer():
        take(1)
        owner.inner(2)
        owner.inner(3)
        take(4)
        return "result"

    monkeypatch.setattr(seconds_by_part.time, "perf_counter", lambda: now[0])
    owner = SimpleNamespace(outer=outer, inner=take)
    parts = SecondsByPart(synchronize)
    parts.watch(owner, "outer", "outside")
    parts.watch(owner, "inner", "inside")
    assert owner.outer() == "result"
    assert {name: (part.seconds, part.calls) for name, part in parts.parts.items()} == {
        "inside": (5, 2),
        "outside": (5, 1),
    }
    assert synchronized[0] == 6
    assert parts.table().splitlines()[0] == "    5.00 s       2 calls  inside"


def test_a_part_that_fails_is_counted():
    owner = SimpleNamespace(fail=lambda: 1 / 0)
    parts = SecondsByPart(int)
    parts.watch(owner, "fail", "failing")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            owner.fail()
    assert parts.parts["failing"].calls == 2
    assert not parts._inside


def test_every_watched_name_is_there(monkeypatch):
    parts, names = SecondsByPart(int), list[str]()

    def watch(_, owner, name, part):
        names.append(f"{part}: {getattr(owner, name).__name__}")

    monkeypatch.setattr(SecondsByPart, "watch", watch)
    watch_quantization(parts)
    assert {"new files: keep", "tensors of files to the device: use", "saving: save"} <= set(names)
