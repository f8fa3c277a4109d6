"""Coresets: which samples a child model trains on until the next re-sampling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks

SCORES = ("random",)


@dataclass(frozen=True, kw_only=True)
class CoresetConfig:
    """Which part of the training set each child trains on. ValueError names the field, its value and what is allowed.

    score: how samples are ranked; "random" draws them uniformly. pruning_rate: fraction of the training set a child
    does NOT see, in [0, 1). resample_every: epochs between two draws, 0 to keep the first (1 is RS2, arXiv 2305.18424).
    """

    score: str = "random"
    pruning_rate: float = 0.8
    resample_every: int = 1

    def __post_init__(self) -> None:
        checks.choice("score", self.score, SCORES)
        # plain float and int: NumPy's do not go into JSON
        object.__setattr__(self, "pruning_rate", checks.pruning_rate(self.pruning_rate))
        object.__setattr__(self, "resample_every", checks.integer("resample_every", self.resample_every, 0))

    def draw_of(self, epoch: int) -> int:
        """The number of the draw that `epoch` (from 0) trains on."""
        return epoch // self.resample_every if self.resample_every else 0


def select(scores: Tensor, pruning_rate: float, how: str = "top", generator: torch.Generator | None = None) -> Tensor:
    """Sorted indices (K,) of the round((1 - pruning_rate) N) samples to keep, at least one; scores: (N,).

    how: "top" keeps the highest scores, of equal ones the first; "sample" draws without replacement, scores being
    weights >= 0 (equal ones: uniformly), from `generator` and no other source.
    ValueError: scores of another shape, not finite, or negative when sampling; an unknown `how`; sampling without a
    CPU generator; fewer positive weights than samples to keep.

    >>> select(torch.tensor([0.1, 0.9, 0.5, 0.7]), pruning_rate=0.5)
    tensor([1, 3])
    """
    checks.choice("how", how, ("top", "sample"))
    rate = checks.pruning_rate(pruning_rate)
    if not isinstance(scores, Tensor) or scores.dim() != 1 or len(scores) == 0 or not bool(scores.isfinite().all()):
        raise checks.invalid("scores", scores, "a tensor (N,) of finite numbers, N >= 1")
    keep = max(1, round((1 - rate) * len(scores)))
    if how == "top":
        return scores.argsort(descending=True, stable=True)[:keep].sort().values
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise checks.invalid("generator", generator, 'a torch.Generator of the CPU when how="sample"')
    if bool((scores < 0).any()) or int((scores > 0).sum()) < keep:
        raise checks.invalid("scores", scores, f"weights >= 0, at least {keep} of them positive")
    # the K smallest of independent exponential times with rates w are a weighted draw without replacement
    # (Efraimidis and Spirakis 2006), at any N, where torch.multinomial stops at 2**24
    times = torch.empty(len(scores), dtype=torch.float64).exponential_(generator=generator) / scores.double().cpu()
    return times.argsort(stable=True)[:keep].sort().values.to(scores.device)
