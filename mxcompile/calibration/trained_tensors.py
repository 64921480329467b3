"""Tensors in training: what an optimizer moves, and the tensors of the model that result."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from mxcompile.calibration.finished_parts import load_part, save_part
from mxcompile.calibration.latent_weights import LatentWeight
from mxcompile.graph.program import Program

SCALES = " scales"
_SMALLEST_UNIT = 1e-3
_ADAM = ("step", "exp_avg", "exp_avg_sq")


class TrainedTensors(ABC):
    """parameters: what an optimizer moves, by name; float32, with gradients after `collect_gradients`."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.named = dict(parameters)

    @property
    def parameters(self) -> list[Tensor]:
        """What an optimizer moves."""
        return list(self.named.values())

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors as they are trained so far, by name; a loss that reads them can be differentiated."""

    def collect_gradients(self) -> None:  # noqa: B027 - autograd has given them already
        """Give the parameters their gradients, once the loss is differentiated by what `tensors` has returned."""

    def keep_bounds(self) -> None:  # noqa: B027 - there may be none
        """Move parameters that an optimizer has moved too far back to their bounds."""

    def detached(self) -> dict[str, Tensor]:
        """`tensors` without gradients; of rounded weights also the scales, as `name scales`."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}


class TrainedVectors(TrainedTensors):
    """Float tensors, each moved in units of its mean magnitude. bound: the largest move in these units, if any."""

    def __init__(self, tensors: Mapping[str, Tensor], bound: float | None = None) -> None:
        self._tensors, self._bound = tensors, bound
        self._units = {name: t.abs().float().mean().clamp(min=_SMALLEST_UNIT) for name, t in tensors.items()}
        super().__init__(
            {name: torch.zeros_like(t, dtype=torch.float32, requires_grad=True) for name, t in tensors.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """Each tensor plus its move."""
        return {n: (t.float() + self._units[n] * self.named[n]).to(t.dtype) for n, t in self._tensors.items()}

    @torch.no_grad()
    def keep_bounds(self) -> None:
        """Bound every move."""
        if self._bound is not None:
            for move in self.parameters:
                move.clamp_(-self._bound, self._bound)


class TrainedWeights(TrainedTensors):
    """Rounded weights. axes: the dimension of each that is contracted, by name; latents: what they are rounded from."""

    def __init__(self, latents: Mapping[str, LatentWeight], axes: Mapping[str, int]) -> None:
        self._latents, self._axes = latents, axes
        self._rows: dict[str, Tensor] = {}
        super().__init__({name: latent.parameter for name, latent in latents.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The weights as they are rounded now."""
        self._rows = {name: latent.values().requires_grad_() for name, latent in self._latents.items()}
        return {name: self._stored(name, rows) for name, rows in self._rows.items()}

    def collect_gradients(self) -> None:
        """Pass the gradients of the rounded weights on to their latents, and free those."""
        for name, rows in self._rows.items():
            self._latents[name].backward(torch.zeros_like(rows) if rows.grad is None else rows.grad)
        self._rows = {}

    def keep_bounds(self) -> None:
        """Bound all moves."""
        for latent in self._latents.values():
            latent.keep_bound()

    def detached(self) -> dict[str, Tensor]:
        """The weights, and their scales."""
        values = {name: self._stored(name, latent.values()) for name, latent in self._latents.items()}
        return values | {f"{name}{SCALES}": latent.scales() for name, latent in self._latents.items()}

    def _stored(self, name: str, rows: Tensor) -> Tensor:
        return rows if self._axes[name] == -1 else rows.transpose(-1, -2)


class Training:
    """An optimizer, its schedule, and what it trains."""

    def __init__(self, trained: TrainedTensors, steps: int, rate: float) -> None:
        self.trained = trained
        self.optimizer = torch.optim.Adam(trained.parameters, lr=rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def save(self, program: Program, part: str, left_out: Mapping[str, str]) -> None:
        """Save the state in the resume folder. left_out: to be saved with it."""
        tensors: dict[str, Tensor] = {f"move.{name}": move.detach() for name, move in self.trained.named.items()}
        for name, move in self.trained.named.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[move].items()}
        rate = self.optimizer.param_groups[0]["lr"]
        save_part(program, part, tensors, [{"lr": rate, "schedule": self.schedule.state_dict()}, dict(left_out)])

    def load(self, program: Program, part: str) -> dict[str, str] | None:
        """Go back to a saved state; returns what was saved with it, None if there is none."""
        saved = load_part(program, part)
        if saved is None:
            return None
        tensors, (state, left_out) = saved
        for name, move in self.trained.named.items():
            with torch.no_grad():
                move.copy_(tensors[f"move.{name}"])
            own = {key: tensors[f"{key}.{name}"] for key in _ADAM if f"{key}.{name}" in tensors}
            self.optimizer.state[move] = {k: v if k == "step" else v.to(move.device) for k, v in own.items()}
        self.schedule.load_state_dict(state["schedule"])
        self.optimizer.param_groups[0]["lr"] = state["lr"]
        return left_out
