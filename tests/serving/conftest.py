"""Tiny checkpoints for engines, each made once."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from served import CHECKPOINTS
from torch import nn

import mxcompile

Checkpoint: TypeAlias = tuple[Path, nn.Module]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Checkpoint]:
    """The folder of a checkpoint of `served.CHECKPOINTS`, and the model in it. Do not change either."""
    root, made = tmp_path_factory.mktemp("served"), dict[str, Checkpoint]()

    def make(kind: str) -> Checkpoint:
        if kind not in made:
            model, format = CHECKPOINTS[kind]()
            folder = root / kind
            if format == "float":
                model.save_pretrained(folder)
            else:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "vLLM ignores on Hopper")
                    mxcompile.save(model, folder, format=format)
            made[kind] = folder, model
        return made[kind]

    return make
