"""What has to stay finite while training: losses, weights and gradients."""

import math
from collections import deque

import torch
from torch import Tensor, nn

from .ranks import Ranks

STOPPED = "training stopped; the last checkpoint stays"
SMALLEST_SCALE = 2.0**-24  # of a loss in float16: 40 steps in a row without a finite gradient, from the scale at first


class LossWatch:
    """Stops a run at the first loss that is not finite; on CUDA some steps late, so as not to wait for each one."""

    def __init__(self, place: Ranks, model: nn.Module, device: torch.device) -> None:
        self.pending: deque[tuple[Tensor, float, str]] = deque()
        self.place, self.model, self.lag = place, model, 16 if device.type == "cuda" else 0
        self.total, self.weight = 0.0, 0.0

    def see(self, loss: Tensor, weight: float, where: str) -> None:
        """Take in a scalar loss, its weight in the mean and where it was. FloatingPointError: it is not finite."""
        self.pending.append((loss.detach(), weight, where))
        while len(self.pending) > self.lag:
            self._check()

    def flush(self) -> None:
        """Look at what still waits."""
        while self.pending:
            self._check()

    def mean(self) -> float:
        """The weighted mean of all losses, over all ranks."""
        self.flush()
        total, weight = self.place.sums(self.total, self.weight)
        return total / weight

    def _check(self) -> None:
        loss, weight, where = self.pending.popleft()
        value = float(loss)
        if not math.isfinite(value):
            broken = None if self.lag else _not_finite(self.model)  # steps later it may be this loss that broke it
            cause = f"{broken} was not finite before it, so a gradient of the step before was not; "
            raise FloatingPointError(f"loss={value} at {where}: {cause if broken else ''}{STOPPED}")
        self.total, self.weight = self.total + value * weight, self.weight + weight


def check_weights(model: nn.Module, scaler: torch.amp.GradScaler, where: str) -> None:
    """FloatingPointError: a parameter is not finite, or no gradient is; where: after which step, in words."""
    broken = _not_finite(model)  # a step can break them after a loss that was still finite
    if broken:
        raise FloatingPointError(f"{broken} is not finite after {where}: {STOPPED}")
    if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
        text = "no gradient is finite in float16, however small the loss is scaled, and no step is made"
        raise FloatingPointError(f"{text}, up to {where}: {STOPPED}")


def _not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter that holds a number that is not finite."""
    return next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)
