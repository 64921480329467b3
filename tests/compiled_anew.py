"""Inductor without its caches of graphs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def graphs_compiled_anew() -> Iterator[None]:
    """Each graph is rewritten and lowered again, whatever was compiled before. C++ code that was compiled before, byte
    for byte, is not compiled again, as it would be in `fresh_cache`."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
