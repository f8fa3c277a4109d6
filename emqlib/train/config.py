"""What a training run is asked for, checked before it starts."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch

from .. import checks
from ..checks import Own, Range
from ..layers import QuantSpec
from . import distributed

Score = Literal["random", "entropy", "forgetting", "el2n", "grand", "moderate", "tdds"]
SCORES = get_args(Score)
MOST_EPOCHS = 100_000  # all are planned before the first one starts


def _score(name: str, value: Any) -> str:
    what = "of p (B, C), labels (B,) and features (B, D) or None that gives finite numbers (B,)"
    return checks.choice_or_own(name, value, SCORES, what, _try)


def _try(score: Callable[..., Any]) -> None:
    """Call a score of one's own with a small batch. ValueError: it does not give what it should."""
    scores = score(torch.full((2, 4), 0.25), torch.tensor([0, 3]), torch.ones(2, 3))
    if scores.shape != (2,) or not bool(scores.isfinite().all()):
        raise ValueError(f"it gives {scores}")


@dataclass(frozen=True, kw_only=True)
class CoresetConfig:
    """Which part of the training set each child trains on. Resampling every epoch with "random" is RS2 (2305.18424).

    ValueError: names the field, its value and what is allowed.
    """

    score: Annotated[Score | Own, _score] = "random"  # how samples are ranked; or your own f(p, labels, features)
    pruning_rate: Annotated[float, Range(0, 1, high_open=True)] = 0.8  # fraction of the training set left out
    resample_every: Annotated[int, Range(0)] = 1  # epochs between two draws; 0 keeps the first one
    scoring_epochs: Annotated[int, Range(0)] = 0  # first epochs, on all candidates; 0: as few as the score needs
    scoring: Literal["bitwise", "joint"] = "bitwise"  # the scheme of the scoring epochs
    candidates: Annotated[float, Range(0, 1)] = 1.0  # fraction of the training set that a bit-width scores
    window: Annotated[int, Range(3, 10_000)] = 3  # epochs in one window of TDDS
    decay: Annotated[float, Range(0, 1, low_open=True)] = 0.9  # of TDDS: the weight of the latest window
    how: Literal["top", "sample"] = "top"  # the highest scores, or a draw by rank
    power: Annotated[float, Range(0)] = 1.0  # the weights of that draw are 0.1 + 0.9 (rank / N) ** power
    unscored: bool = False  # "sample" also draws samples that are no candidates, at the candidates' mean weight
    across_bits: Literal["independent", "identical", "disjoint"] = "independent"  # own scores, mean rank, no overlap
    unbiased: bool = False  # "sample" weights losses by 1 / inclusion probability, scaled to a mean of one
    max_weight: Annotated[float, Range(1)] = 5.0  # the largest of these loss weights

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.candidates < 1 - self.pruning_rate - 1e-9:
            expected = f"a number in [{1 - self.pruning_rate:.3g}, 1], which leaves enough for a coreset"
            raise checks.invalid("candidates", self.candidates, expected)
        if self.scoring_epochs and self.scoring_epochs < self._least_epochs:
            expected = f"at least {self._least_epochs} for score={self.score!r}, or 0"
            raise checks.invalid("scoring_epochs", self.scoring_epochs, expected)
        if self.unscored and self.how != "sample":
            raise checks.invalid("unscored", True, 'how="sample"')
        every_sample_has_a_chance = self.how == "sample" and (self.candidates == 1 or self.unscored)
        if self.unbiased and not (every_sample_has_a_chance and self.across_bits != "disjoint"):
            expected = 'how="sample", all as candidates or unscored=True, and coresets not "disjoint"'
            raise checks.invalid("unbiased", True, expected)
        if self.score == "random" and (self.scoring_epochs or self.candidates < 1):
            raise checks.invalid("score", "random", "a score, where scoring_epochs or candidates are given")

    @property
    def _least_epochs(self) -> int:
        return {"random": 0, "tdds": self.window, "forgetting": 2}.get(self.score, 1)

    @property
    def warmup(self) -> int:
        """Epochs of the scoring phase: scoring_epochs, or as few as the score needs."""
        return (self.scoring_epochs or self._least_epochs) if self.pruning_rate else 0

    def check_epochs(self, epochs: int) -> int:
        """`epochs`, if there are more of them than in the scoring phase."""
        if epochs <= self.warmup:
            raise checks.invalid("epochs", epochs, f"more than the {self.warmup} of the coreset's scoring phase")
        return epochs


def _milestones(name: str, value: Any) -> tuple[int, ...]:
    checks.instance(name, value, (tuple, list), "a tuple of epochs, for example (100, 150)")
    return tuple(checks.integer(name, milestone, 1) for milestone in value)


def _device(name: str, value: Any) -> str:
    checks.instance(name, value, str, "the name of a device, for example auto, cpu or cuda")
    if value != "auto":  # "auto" would touch a GPU, before other processes may have been forked
        distributed.device_named(value)
    return value


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a converted network is trained.

    Schemes: "dedicated" trains a network with one bit-width. "joint" takes every batch at every bit-width, then makes
    one optimizer step. In "bitwise" each step trains one child model on a batch of its own coreset.

    ValueError: names the field, its value and what is allowed.
    """

    scheme: Literal["dedicated", "joint", "bitwise"] = "bitwise"  # how the child models share steps, see above
    epochs: Annotated[int, Range(1, MOST_EPOCHS)] = 10  # passes over the training set, or over the coresets
    batch_size: Annotated[int, Range(1)] = 128  # images in a step, over all processes
    accumulate: Annotated[int, Range(1)] = 1  # parts of a process's share of a step; batch norm sees one at a time
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Range(0, low_open=True)] = 0.1  # the highest learning rate
    momentum: Annotated[float, Range(0, 1, high_open=True)] = 0.9  # of SGD
    nesterov: bool = True  # whether SGD takes Nesterov's momentum
    weight_decay: Annotated[float, Range(0)] = 5e-4  # of convolution and linear weights alone
    schedule: Literal["cosine", "step"] = "cosine"  # towards zero, or times gamma after each milestone
    milestones: Annotated[tuple[int, ...], _milestones] = ()  # epochs after which "step" lowers the learning rate
    gamma: Annotated[float, Range(0)] = 0.1  # factor of the learning rate at each milestone
    warmup_epochs: Annotated[float, Range(0)] = 0.0  # first epochs, in which the learning rate rises linearly
    label_smoothing: Annotated[float, Range(0, 1, high_open=True)] = 0.0  # of the cross entropy with labels
    clip_grad_norm: Annotated[float, Range(0)] = 0.0  # the largest norm of a step's gradient; 0 for any
    # Each bit-width but the highest learns another one's softmax in place of labels. Where a step trains all, that is
    # the next higher one; where it trains one, the highest one (`soft_targets`), so that fewer steps see a label, which
    # cost accuracy in short trainings (notebook 14). Not for "dedicated".
    distillation: bool = False
    autocast: Literal["none", "bfloat16", "float16"] = "none"  # type of products, see `distributed.autocast_used`
    channels_last: bool = True  # memory format of images and weights, see `distributed.memory_format`
    # torch.compile; "auto": in a long run; "blocks": each residual block by itself, which starts sooner; "graphs": CUDA
    # graphs, for one process on a GPU; elsewhere the network runs as it is.
    compile: Literal[True, False, "auto", "blocks", "graphs"] = False
    device: Annotated[str, _device] = "auto"  # "auto" takes CUDA where there is one
    seed: Annotated[int, Range(0)] = 0  # of shuffling, augmentation, dropout and coresets
    coreset: CoresetConfig | None = None  # None trains on the full data

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.accumulate > self.batch_size:
            raise checks.invalid("accumulate", self.accumulate, f"at most batch_size={self.batch_size} parts")
        if self.distillation and self.scheme == "dedicated":
            raise checks.invalid("distillation", True, 'another scheme than "dedicated", which has one child alone')
        if self.nesterov and self.momentum == 0 and self.optimizer == "sgd":
            raise checks.invalid("nesterov", True, "False when momentum is 0")
        if self.warmup_epochs >= self.epochs:
            raise checks.invalid("warmup_epochs", self.warmup_epochs, f"less than epochs={self.epochs}")
        if self.coreset is not None:
            self.coreset.check_epochs(self.epochs)


def learning_rate(progress: float, config: TrainConfig) -> float:
    """The learning rate after `progress` epochs, a fraction of one included.

    Training asks for it at the middle of each step: step i of n in epoch e, counted from 1, has made progress of
    e - 1 + (i - 1/2) / n. So a milestone of 5 gives exactly five epochs at the first rate, and neither the first step
    of a warm-up nor the last of a cosine has a rate of zero.
    """
    if progress < config.warmup_epochs:
        return config.lr * progress / config.warmup_epochs
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(progress >= m for m in config.milestones)
    span = config.epochs - config.warmup_epochs
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - config.warmup_epochs) / span))


def recipe(
    bits: Iterable[int] = (2, 4, 8), epochs: int = 30, pruning_rate: float = 0.8, **training: Any
) -> tuple[QuantSpec, TrainConfig]:
    """The way that we recommend to convert and train a network at a fraction of the passes, beyond the paper.

    The first epoch takes all data and scores it by EL2N. Then each bit-width draws a new coreset for each epoch, by its
    scores. Batches are small, because a bit-width on a fifth of the data has few steps. Each trained bit-width keeps
    running statistics of its own, and output correction serves the untrained ones, so nothing is calibrated. Notebook
    07 measures combinations of these parts. Notebook 14 chooses the size of batches and the learning rate on held-out
    images, for bit-wise training on all data.

    Args:
        bits: the bit-widths to train.
        epochs: the number of epochs, the first one on all data and the others on coresets.
        pruning_rate: the fraction of the training set that a bit-width leaves out in an epoch; 0 trains on all data.
        **training: other fields of `TrainConfig`, such as lr, optimizer or compile.

    Returns:
        What `convert` and `train` take.

    Examples:
        >>> spec, config = recipe(bits=(2, 4, 8), epochs=30)
        >>> spec.norm, config.batch_size, config.lr, config.coreset.score
        ('shared_affine', 42, 0.05, 'el2n')
    """
    rate = checks.pruning_rate(pruning_rate)
    coreset = CoresetConfig(score="el2n", how="sample", pruning_rate=rate) if rate else None
    config = TrainConfig(**{"batch_size": 42, "lr": 0.05, "epochs": epochs, "coreset": coreset} | training)
    return QuantSpec(bits=checks.bit_widths("bits", bits), norm="shared_affine", output_correction=True), config
