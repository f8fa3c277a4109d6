"""A notebook's parameters, checked, and its profile, which says how much its runs cost."""

import ast
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from .. import checks
from ..files import can_hold_files, home
from ..models import check_name as check_model
from ..train.config import MOST_EPOCHS, TrainConfig
from ..train.sources import check_name as check_data


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network and how it is trained."""

    model: str  # a name of `models.build`
    training: TrainConfig
    model_args: tuple[tuple[str, int], ...] = ()  # keyword arguments of `models.build`
    subset: tuple[int, int] = (0, 0)  # training and test images, 0 for all
    image_size: int = 0  # pixels a side, 0 for the data set's own
    held_out: int = 0  # training images that are evaluated in place of test images, see `Dataset.validation`


@dataclass(frozen=True, kw_only=True)
class Profile(Setting):
    """The network, the training and the amount of data behind every notebook."""

    name: str
    repeats: int  # seeds
    lengths: tuple[int, ...]  # epochs of the runs of an accuracy-against-cost curve
    coreset_epochs: int  # of runs that compare coresets, which need more epochs than a scoring phase has
    coreset_subset: tuple[int, int]  # training and test images of those runs, 0 for all
    vit: Setting
    imagenet: Setting
    fair: Setting  # of comparisons in which each method is tuned, on a validation split
    fair_epochs: int  # of comparisons of coresets, on that split
    fair_lengths: tuple[int, ...]  # epochs of Any-Precision, tuned; the recipe gets as many passes
    fair_longer: tuple[int, ...]  # further ones, which take hours
    fair_control: int  # the one of `fair_lengths` for which the recipe is trained on all data too, and changed
    cost_subset: tuple[int, int] = (1280, 500)  # images of runs that measure cost alone
    bit_counts: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)  # numbers of bit-widths over which cost is measured
    dataset: str = ""  # in place of every experiment's own


_TINY_RESNET = (("width", 4),)
_TINY_VIT = (("patch_size", 8), ("width", 16), ("depth", 1), ("heads", 1))
_VIT = (("patch_size", 8), ("width", 64), ("depth", 4), ("heads", 2))

_SMOKE = TrainConfig(epochs=4, batch_size=32, lr=0.05)
_CPU = TrainConfig(autocast="bfloat16")
_GPU = TrainConfig(autocast="bfloat16", compile="auto")
_STEPS = replace(_GPU, schedule="step")
_SMOKE_VIT = replace(_SMOKE, epochs=5, optimizer="adamw", lr=1e-3)
_SMALL_VIT = TrainConfig(epochs=8, optimizer="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=1, clip_grad_norm=1.0)
_SMALL_IMAGENET = replace(_CPU, epochs=5, batch_size=32, lr=0.05, warmup_epochs=1)
_FAIR = Setting(
    model="preact_resnet20",
    model_args=(("width_factor", 1),),
    training=replace(_CPU, epochs=4, warmup_epochs=0.5),
    held_out=5000,
)
# what Any-Precision publishes for CIFAR-10 (SHI-Labs/Any-Precision-DNNs, train_cifar10.sh)
_PAPER = replace(_STEPS, epochs=200, optimizer="adamw", lr=1e-3, weight_decay=0, milestones=(100, 150, 180))
# DeiT's schedule (arXiv 2012.12877, table 9), its learning rate of 1e-3 for batches of 1,024 scaled to 128
_DEIT = replace(_GPU, epochs=300, optimizer="adamw", lr=1.25e-4, weight_decay=0.05, warmup_epochs=5)
# Any-Precision's schedule for ImageNet
_IMAGENET = replace(_STEPS, epochs=80, batch_size=256, lr=0.5, weight_decay=1e-5, milestones=(45, 60, 70))

PROFILES = {
    # shows in seconds and without a download that everything runs
    "smoke": Profile(
        name="smoke",
        dataset="digits",
        subset=(96, 48),
        model="resnet8",
        model_args=_TINY_RESNET,
        training=_SMOKE,
        repeats=1,
        lengths=(4, 5),
        coreset_epochs=5,
        coreset_subset=(96, 48),
        vit=Setting(model="vit_tiny", model_args=_TINY_VIT, training=_SMOKE_VIT, subset=(96, 48)),
        imagenet=Setting(model="resnet8", model_args=_TINY_RESNET, training=_SMOKE, image_size=32),
        fair=Setting(model="resnet8", model_args=_TINY_RESNET, training=_SMOKE, subset=(96, 48), held_out=24),
        fair_epochs=20,
        fair_lengths=(2,),
        fair_longer=(3,),
        fair_control=2,
        cost_subset=(96, 48),
        bit_counts=(2, 3),
    ),
    # real data and a small network, for a laptop's CPU
    "small": Profile(
        name="small",
        model="resnet8",
        model_args=(("width", 16),),
        training=replace(_CPU, epochs=4, warmup_epochs=0.5),
        repeats=3,
        lengths=(4, 8),
        coreset_epochs=8,
        coreset_subset=(10000, 5000),
        vit=Setting(model="vit_tiny", model_args=_VIT, training=_SMALL_VIT, subset=(10000, 5000)),
        imagenet=Setting(model="torchvision.resnet18", training=_SMALL_IMAGENET, image_size=224),
        fair=_FAIR,
        fair_epochs=30,
        fair_lengths=(2, 6, 13),  # 0.3, 0.9 and 1.95 million passes of three bit-widths
        fair_longer=(26,),  # 3.9 million
        fair_control=6,
    ),
    "paper": Profile(
        name="paper",
        model="preact_resnet20",
        model_args=(("width_factor", 5),),
        training=replace(_PAPER, compile="graphs"),
        repeats=1,
        lengths=(50, 100, 200),
        coreset_epochs=200,
        coreset_subset=(0, 0),
        vit=Setting(model="vit_tiny", model_args=(("patch_size", 4),), training=replace(_DEIT, label_smoothing=0.1)),
        imagenet=Setting(model="torchvision.resnet50", training=_IMAGENET, image_size=224),
        fair=replace(_FAIR, model_args=(("width_factor", 5),), training=replace(_GPU, epochs=20, compile="graphs")),
        fair_epochs=200,
        fair_lengths=(20,),
        fair_longer=(40, 80),
        fair_control=20,
    ),
}


def _profile(name: str, value: Any) -> Profile:
    if isinstance(value, Profile):
        return value
    if checks.choice(name, value, [*PROFILES, "auto"]) == "auto":
        value = checks.choice(name, os.environ.get("EMQ_PROFILE") or "auto", [*PROFILES, "auto"])
    on_gpu = torch.cuda.device_count() > 0  # asked of the driver alone: processes forked afterwards can still use it
    return PROFILES[("paper" if on_gpu else "small") if value == "auto" else value]


def _listed(name: str, value: Any) -> list[Any] | tuple[Any, ...]:
    """A list or tuple; papermill makes a string of "[2,4,8]", and a number of 2."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise checks.invalid(name, value, 'a list, for example "[2, 4, 8]"') from None
    return value if isinstance(value, (list, tuple)) else [value]


def _each(name: str, value: Any, expected: str, check: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Every item of a list as `check` gives it; ValueError: one that it refuses, or one that stands there twice."""
    items = _listed(name, value)
    with suppress(ValueError):
        found = tuple(check(item) for item in items)
        if len(set(found)) == len(found):
            return found
    raise checks.invalid(name, items, expected)


def _bits(name: str, value: Any) -> tuple[int, ...]:
    return checks.bit_widths(name, _listed(name, value))


def _lengths(name: str, value: Any) -> tuple[int, ...]:
    length = partial(checks.integer, name, low=1, high=MOST_EPOCHS)
    return tuple(sorted(_each(name, value, "numbers of epochs, none twice, for example [4, 12]", length)))


def _dataset(name: str, value: Any) -> str:
    """The name of a data set; a folder by its absolute path, which names it from wherever the notebook is run."""
    if checks.instance(name, value, str, "the name of a data set, or imagefolder:PATH") == "":
        return value
    check_data(name, value)
    kind, colon, path = value.partition(":")
    if not colon:
        return value
    checks.path(name, path, "imagefolder:PATH of a folder")
    return f"{kind}:{Path(os.path.expanduser(path)).absolute()}"


def _model(name: str, value: Any) -> str:
    return value if isinstance(value, str) and not value else check_model(name, value)


_rates = partial(_each, expected="fractions in [0, 1), none twice, for example [0.5, 0.8]", check=checks.pruning_rate)
_folder = partial(checks.path, expected="auto, or a folder")


@dataclass(frozen=True)
class Parameters:
    """A notebook's parameters, checked. Lists may also be the strings that `papermill -p` makes of them.

    A ValueError names the parameter, its value and what is allowed.
    """

    profile: Annotated[Any, _profile] = "auto"  # "smoke", "small", "paper"; auto: $EMQ_PROFILE, else by the machine
    bits: Annotated[Any, _bits] = (2, 4, 8)  # the trained bit-widths
    seed: Annotated[int, checks.Range(0)] = 0  # the first seed
    repeats: Annotated[int, checks.Range(0, 1000)] = 0  # how many seeds, 0 for the profile's number
    results_dir: Annotated[Any, _folder] = "auto"  # auto: results/ beside the package or here; for smoke build/smoke/
    pruning_rates: Annotated[Any, _rates] = ()  # fractions in [0, 1); empty for the experiment's own
    lengths: Annotated[Any, _lengths] = ()  # numbers of epochs; empty for the profile's own
    dataset: Annotated[str, _dataset] = ""  # a name of `load_dataset`; empty for the experiment's own
    model: Annotated[str, _model] = ""  # a name of `models.build`; empty for the profile's own

    def __post_init__(self) -> None:
        asked = self.results_dir
        checks.fields(self)
        auto = home() / ("build/smoke" if self.profile.name == "smoke" else "results")
        folder = auto if asked == "auto" else Path(os.path.expanduser(self.results_dir)).absolute()
        if not can_hold_files(folder):
            raise checks.invalid("results_dir", str(asked), "a folder, there or to be made, that can be written to")
        object.__setattr__(self, "results_dir", folder)
        object.__setattr__(self, "lengths", self.lengths or self.profile.lengths)

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds."""
        return tuple(range(self.seed, self.seed + (self.repeats or self.profile.repeats)))

    def output(self, name: str) -> Path:
        """Where a notebook's table and figure go, without suffix: `results_dir`/profile/name."""
        return self.results_dir / self.profile.name / name


parameters = Parameters  # as notebooks call it
