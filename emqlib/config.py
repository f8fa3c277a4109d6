"""What a training run is asked for, checked before it starts."""

import math
from dataclasses import dataclass
from typing import Any

from . import checks, devices
from .sampling import CoresetConfig

SCHEMES = ("dedicated", "joint", "bitwise")
MOST_EPOCHS = 100_000  # all are planned before the first one starts


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a converted network is trained. ValueError names the field, its value and what is allowed.

    scheme: "dedicated" (a network with one bit-width), "joint" (every batch at every bit-width, one optimizer step) or
    "bitwise" (each step trains one child on a batch of its own coreset). epochs: passes over the training set, or over
    the coresets. optimizer: "sgd", with momentum and nesterov, or "adamw". lr: peak learning rate, after warmup_epochs
    of linear increase; schedule: "cosine" towards zero, or "step" (times gamma after each of milestones, in epochs);
    each step takes the rate at its middle (see `learning_rate`). weight_decay: on convolution and linear weights alone.
    label_smoothing: of the cross entropy with labels, in [0, 1). distillation, joint only: the highest bit-width learns
    the labels, each lower one the softmax of the next higher. clip_grad_norm: the largest gradient norm, 0 for any.
    autocast: "none", "bfloat16" (float32 on a CPU that has no fast bfloat16, see `devices.autocast_used`) or "float16".
    channels_last: the memory format of images and weights, where that is safe (see `devices.memory_format`). compile:
    True runs the network through torch.compile where that is safe (see `devices.compiled`), "auto" only where the run
    has 500 steps or more for each layer, since compiling costs more than it saves before; "graphs": as CUDA graphs, on
    one GPU alone, which need no compiling.
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
            devices.device(self.device)

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
