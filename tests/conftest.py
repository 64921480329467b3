"""What every test file may use: traced programs of the tiny models, one thread, and a fixed seed.

The models themselves are plain functions in `models.py`.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from models import build, inputs

from mxcompile.program import Program
from mxcompile.trace import trace


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors in tests are small: on a busy machine torch's threads wait for each other, at many times the cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def traced() -> Callable[[str], Program]:
    """traced("llama") is a float Program of that model of `models.py`; every call gives a copy of one trace."""
    programs: dict[str, Program] = {}

    def get(name: str) -> Program:
        if name not in programs:
            programs[name] = trace(build(name), inputs(name))
        return programs[name].copy()

    return get
