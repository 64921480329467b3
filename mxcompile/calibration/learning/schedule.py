"""How long tensors train, and the optimizer that does it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from mxcompile.calibration.finished_parts import load_part, save_part
from mxcompile.calibration.learning.trained_tensors import TrainedTensors
from mxcompile.graph.program import Program

_ADAM: Final = ("step", "exp_avg", "exp_avg_sq")
_SNAPSHOTS, _LARGEST_EPOCHS = 4, 5


@dataclass(frozen=True)
class Schedule:
    """steps: of `batch` batches each; at most so many that `epochs` go through the data, if that is not None. rate:
    Adam's at first; it decays to zero along a cosine. snapshots: how often the held-out batches are looked at. guard:
    how many of the last batches are of another domain: they are not trained on, and no state is taken that has more
    loss there than at first."""

    steps: int
    rate: float
    snapshots: int = _SNAPSHOTS
    epochs: int | None = _LARGEST_EPOCHS
    guard: int = 0
    batch: int = 1

    def of(self, batches: int) -> "Schedule":
        """The steps and snapshots for so many batches."""
        most = self.steps if self.epochs is None else max(1, self.epochs * batches // self.batch)
        steps = min(self.steps, most)
        return replace(self, steps=steps, snapshots=min(self.snapshots, steps))


class Training:
    """An optimizer, its schedule, and what it trains."""

    def __init__(self, trained: TrainedTensors, steps: int, rate: float) -> None:
        self.trained = trained
        self.optimizer = torch.optim.Adam(trained.parameters, lr=rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def save(self, program: Program, part: str, notes: Mapping[str, Any]) -> None:
        """Save the state in the resume folder. notes: to be saved with it."""
        tensors: dict[str, Tensor] = {f"move.{name}": move.detach() for name, move in self.trained.named.items()}
        for name, move in self.trained.named.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[move].items()}
        rate = self.optimizer.param_groups[0]["lr"]
        save_part(program, part, tensors, [{"lr": rate, "schedule": self.schedule.state_dict()}, dict(notes)])

    def load(self, program: Program, part: str) -> dict[str, Any] | None:
        """Go back to a saved state; returns what was saved with it, None if there is none."""
        saved = load_part(program, part)
        if saved is None:
            return None
        tensors, (state, notes) = saved
        for name, move in self.trained.named.items():
            with torch.no_grad():
                move.copy_(tensors[f"move.{name}"])
            own = {key: tensors[f"{key}.{name}"] for key in _ADAM if f"{key}.{name}" in tensors}
            self.optimizer.state[move] = {k: v if k == "step" else v.to(move.device) for k, v in own.items()}
        self.schedule.load_state_dict(state["schedule"])
        self.optimizer.param_groups[0]["lr"] = state["lr"]
        return notes
