"""Several kinds of running statistics from one training, whose weights do not depend on them.

A batch norm trains by the statistics of its batch. So one network with statistics of each bit-width's own can also keep
what shared ones would have been, and be evaluated with each kind.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from .. import checks
from ..norms import MultiBitBatchNorm
from ..train.data import Dataset
from ..train.evaluate import batch_norms, evaluate

# Of each trained bit-width's own; shared, in the order of steps, the highest bit-width first; shared, as if each turn
# of the bit-widths had been the other way round; shared, with a tenth of the momentum; the mean of each one's own.
KINDS = ("own", "shared", "reversed", "slow", "even")
_TRACKED = KINDS[1:4]


def track(model: nn.Module) -> None:
    """Let the batch norms of `model` keep all KINDS from now on, in a buffer that checkpoints hold.

    ValueError: statistics that are not each bit-width's own, that is another norm than "shared_affine".
    """
    for norm in batch_norms(model):
        if norm.norm != "shared_affine":
            raise checks.invalid("norm", norm.norm, '"shared_affine", which keeps statistics of each bit-width')
        shared = torch.stack([norm.running_mean[norm.SHARED], norm.running_var[norm.SHARED]])
        norm.register_buffer("tracked", shared.repeat(len(_TRACKED), 1, 1))
        _Follower(norm)


class _Follower:
    """Updates the buffer `tracked` of one batch norm, (kinds, mean and variance, C), in each step."""

    def __init__(self, norm: MultiBitBatchNorm) -> None:
        self.before: Tensor | None = None  # the bit-width's own statistics (2, C)
        self.turn: list[Tensor] = []  # statistics of the batches of a turn of all bit-widths
        norm.register_forward_pre_hook(self.remember)
        norm.register_forward_hook(self.follow)

    def remember(self, norm: MultiBitBatchNorm, _: tuple[Tensor, ...]) -> None:
        self.before = _own(norm, norm.bits).clone() if norm.training else None

    def follow(self, norm: MultiBitBatchNorm, _: tuple[Tensor, ...], __: Tensor) -> None:
        if self.before is None:
            return
        batch = self.before + (_own(norm, norm.bits) - self.before) / norm.momentum
        shared, reverse, slow = norm.tracked
        shared.lerp_(batch, norm.momentum)
        slow.lerp_(batch, norm.momentum / 10)
        self.turn.append(batch)
        if len(self.turn) == len(norm.trained):
            for batch in reversed(self.turn):
                reverse.lerp_(batch, norm.momentum)
            self.turn.clear()


def _own(norm: MultiBitBatchNorm, bits: int) -> Tensor:
    """Running mean and variance (2, C) of a bit-width's own."""
    row = checks.BIT_WIDTHS.index(bits)
    return torch.stack([norm.running_mean[row], norm.running_var[row]])


@contextmanager
def using(model: nn.Module, kind: str) -> Iterator[None]:
    """Within the block the network that `track` was called with runs with that one of KINDS."""
    checks.choice("kind", kind, KINDS)
    norms = [] if kind == "own" else batch_norms(model)
    states = [norm.get_extra_state() for norm in norms]
    for norm in norms:
        even = torch.stack([_own(norm, b) for b in norm.trained]).mean(0)
        found = even if kind == "even" else norm.tracked[_TRACKED.index(kind)]
        norm.running_mean[norm.SHARED], norm.running_var[norm.SHARED] = found
        norm.norm = "shared"
        norm.set_extra_state(torch.empty(0, dtype=torch.long))
    try:
        yield
    finally:
        for norm, state in zip(norms, states, strict=True):
            norm.norm = "shared_affine"
            norm.set_extra_state(state)


def evaluate_each(model: nn.Module, data: Dataset, bits: Iterable[int]) -> pd.DataFrame:
    """The rows of `evaluate` for each kind of statistics, which a column names."""
    tables = []
    for kind in KINDS:
        with using(model, kind):
            tables.append(evaluate(model, data, bits).assign(statistics=kind))
    return pd.concat(tables, ignore_index=True)
