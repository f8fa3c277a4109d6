"""What a training run is asked for, checked before it starts."""

import math
from dataclasses import dataclass
from typing import Any

from .. import checks, coreset
from . import distributed as devices

SCORES = ("random", "entropy", "forgetting", "el2n", "grand", "moderate", "tdds")


@dataclass(frozen=True, kw_only=True)
class CoresetConfig:
    """Which part of the training set each child trains on. ValueError names the field, its value and what is allowed.

    score: how samples are ranked, by the recorder of each bit-width; "random" needs none. pruning_rate: fraction of
    the training set a child does NOT see, in [0, 1). resample_every: epochs between two draws, 0 to keep the first
    (1 with "random" is RS2, arXiv 2305.18424).
    scoring_epochs: the first epochs, in which each child trains on all its candidates and is scored; 0: as few as the
    score needs. scoring: the scheme of those epochs, "bitwise" or "joint". candidates: the fraction of the training set
    that a bit-width scores and selects from, a part of its own where less than 1: the price of the scoring epochs.
    window, decay: of TDDS. rescore: go on scoring what the coresets show, for the draws to come.
    how: "top"; "sample", by weights (rank / N)^power; "ccs", over strata of score below the `cut` highest fraction.
    unscored: whether how="sample" draws from what is no candidate too, at the mean weight of the candidates.
    balanced: the same fraction of each class. across_bits: "independent" coresets by each bit-width's own scores, one
    "identical" to all by their mean rank, or "disjoint" ones as far as the data goes; a joint scheme shares one.
    unbiased: weight losses by 1 / inclusion probability, of mean one and at most max_weight, how="sample" alone.
    full_epochs: the last epochs, on the full data again.
    """

    score: str = "random"
    pruning_rate: float = 0.8
    resample_every: int = 1
    scoring_epochs: int = 0
    scoring: str = "bitwise"
    candidates: float = 1.0
    window: int = 3
    decay: float = 0.9
    rescore: bool = False
    how: str = "top"
    power: float = 1.0
    unscored: bool = False
    cut: float = 0.0
    balanced: bool = False
    across_bits: str = "independent"
    unbiased: bool = False
    max_weight: float = 5.0
    full_epochs: int = 0

    def __post_init__(self) -> None:
        checks.choice("score", self.score, SCORES)
        checks.choice("scoring", self.scoring, ("bitwise", "joint"))
        checks.choice("how", self.how, coreset.HOW)
        checks.choice("across_bits", self.across_bits, ("independent", "identical", "disjoint"))
        for name in ("rescore", "balanced", "unbiased", "unscored"):
            checks.flag(name, getattr(self, name))
        self._take("pruning_rate", checks.pruning_rate(self.pruning_rate))
        for name in ("resample_every", "scoring_epochs", "full_epochs"):
            self._take(name, checks.integer(name, getattr(self, name), 0))
        self._check_numbers()
        if self.scoring_epochs and self.scoring_epochs < self._least_epochs:
            expected = f'at least {self._least_epochs} for score="{self.score}", or 0'
            raise checks.invalid("scoring_epochs", self.scoring_epochs, expected)
        if self.unscored and (self.how != "sample" or self.rescore):
            raise checks.invalid("unscored", True, 'how="sample" without rescore')
        reached = self.how == "sample" and (self.candidates == 1 or self.unscored) and self.across_bits != "disjoint"
        if self.unbiased and not reached:
            expected = 'how="sample", all as candidates or unscored=True, and coresets not "disjoint"'
            raise checks.invalid("unbiased", True, expected)
        if self.score == "random" and (self.scoring_epochs or self.rescore or self.candidates < 1):
            raise checks.invalid("score", "random", "a score, where scoring_epochs, rescore or candidates are given")

    def _take(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # plain int and float: NumPy's do not go into JSON

    def _check_numbers(self) -> None:
        window, decay = coreset.check_window(self.window, self.decay)
        self._take("window", window)
        self._take("decay", decay)
        self._take("power", checks.real("power", self.power, "a number >= 0", low=0))
        self._take("max_weight", checks.real("max_weight", self.max_weight, "a number >= 1", low=1))
        for name, low, high in (("candidates", 1 - self.pruning_rate, 1.0), ("cut", 0.0, self.pruning_rate)):
            expected = f"a fraction in [{low:.3g}, {high:.3g}]"
            self._take(name, checks.real(name, getattr(self, name), expected, low=low - 1e-9, high=high + 1e-9))

    @property
    def _least_epochs(self) -> int:
        return {"random": 0, "tdds": self.window, "forgetting": 2}.get(self.score, 1)

    @property
    def warmup(self) -> int:
        """Epochs of the scoring phase: scoring_epochs, or as few as the score needs."""
        return (self.scoring_epochs or self._least_epochs) if self.pruning_rate else 0

    def draw_of(self, epoch: int) -> int:
        """The number of the draw that `epoch` (from 0, after the scoring phase) trains on."""
        return (epoch - self.warmup) // self.resample_every if self.resample_every else 0


SCHEMES = ("dedicated", "joint", "bitwise")
MOST_EPOCHS = 100_000  # all are planned before the first one starts


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a converted network is trained. ValueError names the field, its value and what is allowed.

    scheme: "dedicated" (a network with one bit-width), "joint" (every batch at every bit-width, one optimizer step) or
    "bitwise" (each step trains one child on a batch of its own coreset). epochs: passes over the training set, or over
    the coresets. optimizer: "sgd", with momentum and nesterov, or "adamw". lr: peak learning rate, after warmup_epochs
    of linear increase; schedule: "cosine" to zero, or "step" (times gamma at each of milestones, epochs). weight_decay:
    on convolution and linear weights alone. label_smoothing: of the cross entropy with labels, in [0, 1).
    distillation, joint only: the highest bit-width learns the labels, each lower one the softmax of the next higher.
    clip_grad_norm: the largest gradient norm, 0 for any. autocast: "none", "bfloat16" or "float16". channels_last: the
    memory format of images and weights, where that is safe (see `devices.memory_format`). compile: True runs the
    network through torch.compile, "auto" only where the run has 500 steps or more for each layer, since compiling
    costs more than it saves before; "graphs": as CUDA graphs, on one GPU alone, which take no time to compile.
    device: "auto" takes CUDA if there is one. seed: of shuffling, augmentation, dropout and coresets. coreset: None
    for the full data. batch_size: of a step, of all ranks together. accumulate: in how many parts, one after the other,
    a rank takes its share of a step, for less memory; batch norm sees one part at a time.
    """

    scheme: str = "bitwise"
    epochs: int = 10
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    clip_grad_norm: float = 0.0
    distillation: bool = False
    autocast: str = "none"
    channels_last: bool = True
    compile: bool | str = False
    device: str = "auto"
    seed: int = 0
    coreset: CoresetConfig | None = None

    def __post_init__(self) -> None:
        checks.choice("scheme", self.scheme, SCHEMES)
        checks.choice("optimizer", self.optimizer, ("sgd", "adamw"))
        checks.choice("schedule", self.schedule, ("cosine", "step"))
        checks.choice("autocast", self.autocast, devices.AUTOCAST)
        for name, low in {"epochs": 1, "batch_size": 1, "accumulate": 1, "seed": 0}.items():
            most = MOST_EPOCHS if name == "epochs" else None
            self._take(name, checks.integer(name, getattr(self, name), low, most))
        for name in ("nesterov", "distillation", "channels_last"):
            checks.flag(name, getattr(self, name))
        known = self.compile in ("auto", "graphs") if isinstance(self.compile, str) else isinstance(self.compile, bool)
        if not known:
            raise checks.invalid("compile", self.compile, 'True, False, "auto" or "graphs"')
        checks.instance("device", self.device, str, "the name of a device, for example auto, cpu or cuda")
        self._check_numbers()
        if self.accumulate > self.batch_size:
            raise checks.invalid("accumulate", self.accumulate, f"at most batch_size={self.batch_size} parts")
        if self.distillation and self.scheme != "joint":
            raise checks.invalid("distillation", True, 'scheme="joint", where the children share a batch')
        if self.coreset is not None and not isinstance(self.coreset, CoresetConfig):
            raise checks.invalid("coreset", self.coreset, "a CoresetConfig, or None for the full data")
        if self.coreset is not None and self.coreset.pruning_rate:
            spent = self.coreset.warmup + self.coreset.full_epochs
            if spent >= self.epochs:
                expected = f"more than the {spent} that the coreset's scoring phase and full_epochs take"
                raise checks.invalid("epochs", self.epochs, expected)
        if self.device != "auto":  # which would touch a GPU, before other processes may have been forked
            devices.device_named(self.device)

    def _take(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # plain int and float: NumPy's do not go into JSON, 1 and 1.0 are equal

    def _check_numbers(self) -> None:
        self._take("lr", checks.real("lr", self.lr, "a number > 0", low=0))
        if self.lr == 0:
            raise checks.invalid("lr", self.lr, "a number > 0")
        for name in ("weight_decay", "gamma", "warmup_epochs", "clip_grad_norm"):
            self._take(name, checks.real(name, getattr(self, name), "a number >= 0", low=0))
        for name in ("momentum", "label_smoothing"):
            self._take(name, checks.real(name, getattr(self, name), "a number in [0, 1)", low=0, high=1))
            if getattr(self, name) == 1:
                raise checks.invalid(name, 1.0, "a number in [0, 1)")
        if self.nesterov and self.momentum == 0 and self.optimizer == "sgd":
            raise checks.invalid("nesterov", True, "False when momentum is 0")
        if self.warmup_epochs >= self.epochs:
            raise checks.invalid("warmup_epochs", self.warmup_epochs, f"less than epochs={self.epochs}")
        if not isinstance(self.milestones, (tuple, list)):
            raise checks.invalid("milestones", self.milestones, "a tuple of epochs, for example (100, 150)")
        self._take("milestones", tuple(checks.integer("milestones", m, 1) for m in self.milestones))


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
