"""Dumps for tests of the report page, some with module names that contain HTML."""

from itertools import chain

from torch import nn

import mxcompile
from mxcompile import Measure, Pass, Pipeline
from mxcompile.diagnostics.dump import Dump
from mxcompile.pipeline.interfaces import FLOATING

ROUND = "round-weights{format=mxint4}"


TEXT = "smooth-quant | round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxint8}"


HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "%x = y # z")


class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
        for name in HOSTILE:
            self.add_module(name, nn.Linear(64, 64))

    def forward(self, x):
        for name in HOSTILE:
            x = getattr(self, name)(x).relu()
        return x


class Own(Pass):
    """A pass whose `run` is a given function."""

    name = "own"
    accepts = FLOATING

    def __init__(self, run):
        self.run = run

    def run(self, program):
        raise NotImplementedError

    def __str__(self):
        return "own"


def fail(program):
    raise ValueError(f"no fuel in {HOSTILE[0]}")


def dump(folder, model, x, *passes):
    """Run a pipeline with a dump and measurements. passes: pipeline texts, or functions for passes of our own."""
    found = [Pipeline.parse(each).passes if isinstance(each, str) else [Own(each)] for each in passes or [TEXT]]
    program = mxcompile.trace(model, x)
    return Pipeline(chain(*found)).run(program, instruments=[Dump(folder), Measure()])
