"""The decode step of Hugging Face's `generate` on a GPU: a CUDA graph, captured once per static cache.

torch's own CUDA graphs for compiled models spend about 1 ms of Python a step on guards, and give up after 128 captures.
Here the captured step is replayed at once, and Dynamo's guards are checked while the GPU runs; if they fail, the step
is rolled back and run again.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

import torch

from mxcompile.inductor.captured_step import CapturedStep, CudaGraph, NotCapturableError, StepInputs
from mxcompile.inductor.compiled_forward import CompiledForward

_MOST_CAPTURES: Final = 4
logger = logging.getLogger(__name__)


class DecodeStep:
    """A decode step of a module: captured and replayed where that is possible.

    forward: compiled without CUDA graphs; it is captured. fallback: runs all other calls. graph: makes a CUDA graph.
    """

    def __init__(
        self, forward: CompiledForward, fallback: CompiledForward, graph: Callable[[], Any] = CudaGraph
    ) -> None:
        self.forward, self.fallback, self.graph = forward, fallback, graph
        self.refusal: str | None = None
        """Why steps of this module are not captured, once that is known."""
        self._captures: list[CapturedStep] = []  # the most recently used first
        self._known_guards: list[Any] = []  # of graphs that have run once, so that nothing is left to initialize

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        is_traced, step = torch.compiler.is_compiling(), StepInputs.of(kwargs)
        if args or is_traced or step is None or self.refusal is not None or torch.is_grad_enabled():
            return self.fallback(*args, **kwargs)
        if (captured := next((one for one in self._captures if one.fits(step)), None)) is not None:
            self._captures.remove(captured)
            if captured.can_start(step):
                result = captured.replay(step)
                if captured.was_right(step):
                    self._captures.insert(0, captured)
                    return result
                step.roll_back()
        self.forward.prepare()
        if (guards := self.forward.find_guards(**kwargs)) in self._known_guards:
            captured = self._capture(step, guards)
            return self.fallback(**kwargs) if captured is None else captured.replay(step)
        result = self.forward(**kwargs)
        self._remember_guards(kwargs)
        return result

    def is_captured(self, step: StepInputs) -> bool:
        """Whether inputs like these, or any, are served without compiling or capturing first."""
        return self.refusal is not None or any(one.fits(step) for one in self._captures)

    def captured(self, step: StepInputs) -> CapturedStep | None:
        """The captured step that takes inputs like these and computes what the model computes now.

        None if steps of this module are not captured. The model may run once; the cache is as before.
        """
        if self.refusal is not None:
            return None
        known = next((one for one in self._captures if one.fits(step)), None)
        if known is not None:
            self._captures.remove(known)
            if known.can_start(step) and known.was_right(step):
                self._captures.insert(0, known)
                return known
        self.forward.prepare()
        if (guards := self.forward.find_guards(**step.kwargs)) not in self._known_guards:
            self.forward(**step.kwargs)
            step.roll_back()
            self._remember_guards(step.kwargs)
            guards = self.forward.find_guards(**step.kwargs)
        return None if self.refusal is not None else self._capture(step, guards)

    def _capture(self, step: StepInputs, guards: Any) -> CapturedStep | None:
        del self._captures[_MOST_CAPTURES - 1 :]
        try:
            captured = CapturedStep(step, guards, self.forward, self.graph())
        except NotCapturableError as error:
            self.refusal = str(error)
            logger.info("decode steps are not captured: %s", error)
            return None
        self._captures.insert(0, captured)
        return captured

    def _remember_guards(self, kwargs: dict[str, Any]) -> None:
        if (guards := self.forward.find_guards(**kwargs)) is None:
            self.refusal = "the model has graph breaks"
        else:
            self._known_guards.append(guards)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeStep":
        return DecodeStep(self.forward.__deepcopy__(memo), self.fallback.__deepcopy__(memo), self.graph)

    def __reduce__(self) -> Any:
        return DecodeStep, (self.forward, self.fallback, self.graph)
