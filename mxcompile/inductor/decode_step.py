"""The decode step of Hugging Face's `generate` on a GPU: a CUDA graph, recorded once for each place of a static cache.

torch's own CUDA graphs for compiled models take about a millisecond of Python a step on their way from guard to guard,
and after 128 recordings they are given up. Here a step is replayed at once, and what Dynamo guards is checked while the
GPU runs; where it no longer holds, the step is taken back and done again.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

import torch

from mxcompile.inductor.compiled_forward import Forward
from mxcompile.inductor.recorded_step import CudaGraph, NotRecordedError, Recording, Step

_MOST_RECORDINGS: Final = 4
logger = logging.getLogger(__name__)


class DecodeStep:
    """A decode step of a module: recorded and replayed where that is possible.

    forward: compiled without CUDA graphs, which is recorded; otherwise: for all other calls.
    """

    def __init__(self, forward: Forward, otherwise: Forward, graph: Callable[[], Any] = CudaGraph) -> None:
        self.forward, self.otherwise, self.graph = forward, otherwise, graph
        self.refusal: str | None = None
        """Why steps of this module are not recorded, once that is known."""
        self._recordings: list[Recording] = []  # the last one that was used is the first
        self._known_guards: list[Any] = []  # of what was compiled and has run: nothing is left to be made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result."""
        is_traced, step = torch.compiler.is_compiling(), Step.of(kwargs)
        if args or is_traced or step is None or self.refusal is not None or torch.is_grad_enabled():
            return self.otherwise(*args, **kwargs)
        if (recording := next((known for known in self._recordings if known.fits(step)), None)) is not None:
            self._recordings.remove(recording)
            if recording.can_start(step):
                result = recording.replay(step)
                if recording.was_right(step):
                    self._recordings.insert(0, recording)
                    return result
                step.take_back()
        self.forward.prepare()
        if (found := self.forward.find_guards(**kwargs)) in self._known_guards:
            return self._record(step, found)
        result = self.forward(**kwargs)
        self._learn(kwargs)
        return result

    def _record(self, step: Step, guards: Any) -> Any:
        del self._recordings[_MOST_RECORDINGS - 1 :]
        try:
            self._recordings.insert(0, Recording(step, guards, self.forward, self.graph()))
        except NotRecordedError as error:
            self.refusal = str(error)
            logger.info("decode steps are not recorded here: %s", error)
            return self.otherwise(**step.kwargs)
        return self._recordings[0].replay(step)

    def _learn(self, kwargs: dict[str, Any]) -> None:
        if (found := self.forward.find_guards(**kwargs)) is None:
            self.refusal = "the model is not compiled in one piece"
        else:
            self._known_guards.append(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeStep":
        return DecodeStep(self.forward.__deepcopy__(memo), self.otherwise.__deepcopy__(memo), self.graph)

    def __reduce__(self) -> Any:
        return DecodeStep, (self.forward, self.otherwise, self.graph)
