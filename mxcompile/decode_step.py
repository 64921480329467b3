"""The decode step of Hugging Face's `generate` on a GPU: a CUDA graph, recorded once for each static cache.

torch's own CUDA graphs for compiled models take about a millisecond of Python a step on their way from guard to guard,
and give up after 128 calls of `generate`, each of which has its cache elsewhere. Here a step is replayed at once, and
what Dynamo guards is checked while the GPU runs; where it no longer holds, the step is taken back and done again.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from mxcompile.forward import Forward
from mxcompile.recording import CudaGraph, NotRecordedError, Recording, Step

logger = logging.getLogger(__name__)


class DecodeStep:
    """A decode step of a module: recorded and replayed where that is possible.

    forward: compiled without CUDA graphs, which is recorded; otherwise: for all other calls.
    """

    def __init__(self, forward: Forward, otherwise: Forward, graph: Callable[[], Any] = CudaGraph) -> None:
        self.forward, self.otherwise, self.graph = forward, otherwise, graph
        self.refusal: str | None = None
        """Why steps of this module are not recorded, once that is known."""
        self._recording: Recording | None = None
        self._known_guards: list[Any] = []  # of what was compiled and has run: nothing is left to be made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result."""
        is_traced, step = torch.compiler.is_compiling(), Step.of(kwargs)
        if args or is_traced or step is None or self.refusal is not None or torch.is_grad_enabled():
            return self.otherwise(*args, **kwargs)
        if (recording := self._recording) is not None and recording.fits(step):
            result = recording.replay(step)
            if self.forward.do_hold(recording.guards, **kwargs):
                return result
            step.take_back()
        self._recording = None
        self.forward.prepare()
        if (found := self.forward.find_guards(**kwargs)) in self._known_guards:
            try:
                self._recording = Recording.of(step, found, self.forward, self.graph())
                return self._recording.replay(step)
            except NotRecordedError as error:
                self.refusal = str(error)
                logger.info("decode steps are not recorded here: %s", error)
                return self.otherwise(**kwargs)
        result = self.forward(**kwargs)
        self._learn(kwargs)
        return result

    def _learn(self, kwargs: dict[str, Any]) -> None:
        if (found := self.forward.find_guards(**kwargs)) is None:
            self.refusal = "the model is not compiled in one piece"
        else:
            self._known_guards.append(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeStep":
        return DecodeStep(self.forward.__deepcopy__(memo), self.otherwise.__deepcopy__(memo), self.graph)

    def __reduce__(self) -> Any:
        return DecodeStep, (self.forward, self.otherwise, self.graph)
