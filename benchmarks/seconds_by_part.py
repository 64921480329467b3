"""Seconds of a run by part: what each part took itself, without the parts that it called.

    parts = SecondsByPart(synchronize)
    parts.watch(MappedTensors, "keep", "new files")
    ...
    print(parts.table())

Before and after each watched call the device finishes its work, so that a part's seconds are those of its own work.
That costs time: compare parts with parts, and whole runs without it.
"""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Part:
    """seconds: without those of parts called inside."""

    seconds: float = 0.0
    calls: int = 0


@dataclass
class SecondsByPart:
    """synchronize: returns once the device has finished."""

    synchronize: Callable[[], None]
    parts: dict[str, Part] = field(default_factory=dict[str, Part])
    _inside: list[float] = field(default_factory=list[float])  # seconds of parts called by each part that runs now

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Measure a function of a module, or a method of a class, from now on."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.synchronize()
            began = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self.synchronize()
                seconds = time.perf_counter() - began
                own = self.parts.setdefault(part, Part())
                own.seconds += seconds - self._inside.pop()
                own.calls += 1
                if self._inside:
                    self._inside[-1] += seconds

        setattr(owner, name, watched)

    def table(self) -> str:
        """A line for each part, the longest first."""
        ordered = sorted(self.parts.items(), key=lambda item: -item[1].seconds)
        return "\n".join(f"{part.seconds:8.2f} s {part.calls:7} calls  {name}" for name, part in ordered)


def watch_quantization(parts: SecondsByPart) -> None:
    """Watch what `quantize_checkpoint` and `quantize_and_compile` consist of."""
    import transformers

    import mxcompile
    from mxcompile import api, checkpoint
    from mxcompile.calibration.runs.run import Runner
    from mxcompile.calibration.statistics.second_moments import SecondMoments
    from mxcompile.passes import gptq
    from mxcompile.passes.lower_mx import LowerMX
    from mxcompile.tensor.mapped_tensors import MappedTensors

    parts.watch(transformers.AutoModelForCausalLM, "from_pretrained", "loading")
    parts.watch(api, "trace", "tracing")
    parts.watch(api, "trace_without_values", "tracing")
    parts.watch(api, "mapped_model", "mapping the files")
    parts.watch(MappedTensors, "use", "tensors of files to the device")
    parts.watch(MappedTensors, "keep", "new files")
    parts.watch(MappedTensors, "return_freed", "returning freed memory")
    parts.watch(Runner, "run_nodes", "running nodes")
    parts.watch(SecondMoments, "update", "second moments")
    parts.watch(gptq, "round_columns", "rounding")
    parts.watch(gptq.Gptq, "run", "rest of gptq")
    parts.watch(LowerMX, "run", "rest of lower-mx")
    parts.watch(sys.modules["mxcompile.deploy"], "_check_agreement", "check of the deployed model")
    parts.watch(api, "deploy", "rest of deploying")
    parts.watch(api, "deploy_in_files", "rest of deploying")
    parts.watch(checkpoint, "save", "saving")
    parts.watch(mxcompile, "save", "saving")
