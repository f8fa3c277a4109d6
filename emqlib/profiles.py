"""What a notebook is asked for: its profile, which says what a run costs, and its parameters, checked."""

import ast
import inspect
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checks
from .config import MOST_EPOCHS, TrainConfig
from .data import check_name as check_data
from .devices import has_cuda
from .files import can_hold_files, home
from .models import check_name as check_model


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network, how it is trained, on how many (train, test) images, (0, 0) for all, and of how many pixels a side."""

    model: str
    training: TrainConfig
    model_args: tuple[tuple[str, int], ...] = ()
    subset: tuple[int, int] = (0, 0)
    image_size: int = 0  # the data set's own


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a run costs: the data, the network and the schedule behind every notebook."""

    name: str
    model: str
    training: TrainConfig
    repeats: int
    lengths: tuple[int, ...]  # epochs of the runs of an accuracy-against-cost curve
    coreset_epochs: int  # of runs that compare coresets: longer than a scoring phase
    coreset_subset: tuple[int, int]  # (train, test) images of those runs, (0, 0) for all
    vit: Setting
    imagenet: Setting
    cost_subset: tuple[int, int] = (1280, 500)  # of runs that measure cost alone
    bit_counts: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)  # numbers of bit-widths over which cost is measured
    model_args: tuple[tuple[str, int], ...] = ()
    dataset: str | None = None  # in place of the experiment's own
    subset: tuple[int, int] = (0, 0)


PROFILES = {
    # proves that everything runs, in seconds, with no download
    "smoke": Profile(
        name="smoke",
        dataset="digits",
        subset=(96, 48),
        model="resnet8",
        model_args=(("width", 4),),
        training=TrainConfig(epochs=4, batch_size=32, lr=0.05),
        repeats=1,
        lengths=(4, 5),
        coreset_epochs=5,
        coreset_subset=(96, 48),
        vit=Setting(
            model="vit_tiny",
            model_args=(("patch_size", 8), ("width", 16), ("depth", 1), ("heads", 1)),
            training=TrainConfig(epochs=5, batch_size=32, optimizer="adamw", lr=1e-3),
            subset=(96, 48),
        ),
        imagenet=Setting(
            model="resnet8",
            model_args=(("width", 4),),
            training=TrainConfig(epochs=4, batch_size=32, lr=0.05),
            image_size=32,
        ),
        cost_subset=(96, 48),
        bit_counts=(2, 3),
    ),
    # real data and a small network, for a laptop's CPU
    "small": Profile(
        name="small",
        model="resnet8",
        model_args=(("width", 16),),
        training=TrainConfig(epochs=4, batch_size=128, lr=0.1, warmup_epochs=0.5, autocast="bfloat16"),
        repeats=3,
        lengths=(4, 8),
        coreset_epochs=8,
        coreset_subset=(10000, 5000),
        vit=Setting(
            model="vit_tiny",
            model_args=(("patch_size", 8), ("width", 64), ("depth", 4), ("heads", 2)),
            training=TrainConfig(
                epochs=8, optimizer="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=1, clip_grad_norm=1.0
            ),
            subset=(10000, 5000),
        ),
        imagenet=Setting(
            model="torchvision.resnet18",
            training=TrainConfig(epochs=5, batch_size=32, lr=0.05, warmup_epochs=1, autocast="bfloat16"),
            image_size=224,
        ),
    ),
    # what Any-Precision publishes for CIFAR-10 (SHI-Labs/Any-Precision-DNNs, train_cifar10.sh)
    "paper": Profile(
        name="paper",
        model="preact_resnet20",
        model_args=(("width_factor", 5),),
        training=TrainConfig(
            epochs=200,
            batch_size=128,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.0,
            schedule="step",
            milestones=(100, 150, 180),
            autocast="bfloat16",
            compile="graphs",
        ),
        repeats=1,
        lengths=(50, 100, 200),
        coreset_epochs=200,
        coreset_subset=(0, 0),
        # DeiT's schedule (arXiv 2012.12877, table 9), its learning rate of 1e-3 for batches of 1,024 scaled to 128
        vit=Setting(
            model="vit_tiny",
            model_args=(("patch_size", 4),),
            training=TrainConfig(
                epochs=300,
                optimizer="adamw",
                lr=1.25e-4,
                weight_decay=0.05,
                warmup_epochs=5,
                label_smoothing=0.1,
                autocast="bfloat16",
                compile="auto",
            ),
        ),
        # Any-Precision's schedule for ImageNet, on torchvision's network
        imagenet=Setting(
            model="torchvision.resnet50",
            training=TrainConfig(
                epochs=80,
                batch_size=256,
                lr=0.5,
                weight_decay=1e-5,
                schedule="step",
                milestones=(45, 60, 70),
                autocast="bfloat16",
                compile="auto",
            ),
            image_size=224,
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A notebook's parameters, checked: see `parameters`, which makes them."""

    profile: Profile
    bits: tuple[int, ...]
    seeds: tuple[int, ...]
    results_dir: Path
    pruning_rates: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    dataset: str = ""
    model: str = ""
    processes: int = 1

    def output(self, name: str) -> Path:
        """Where a notebook's table and figure go, without suffix: `results_dir`/profile/name."""
        return self.results_dir / self.profile.name / name


def parameters(
    profile: str = "auto",
    bits: Any = (2, 4, 8),
    seed: Any = 0,
    repeats: Any = 0,
    results_dir: str | Path = "auto",
    pruning_rates: Any = (),
    lengths: Any = (),
    dataset: str = "",
    model: str = "",
    processes: Any = 1,
) -> Parameters:
    """Check a notebook's parameters, as Python values or as the strings that `papermill -p` makes of lists.

    profile: "smoke", "small", "paper", or "auto" for $EMQ_PROFILE, else paper with CUDA, else small. bits: the trained
    bit-widths. seed: the first of `repeats` seeds (0: as many as the profile has). results_dir: "auto" is `results`
    beside the package, or below the working directory where the package was installed without it, but
    `build/smoke` there for smoke. pruning_rates: fractions in [0, 1), none twice. lengths: numbers of
    epochs, none twice (empty: the profile's own). dataset, model: names of `data.load_dataset` and `models.build`
    (empty: the experiment's own). processes: that train together, one a GPU.
    ValueError: names the parameter, its value and what is allowed; also for a name papermill injected that no
    parameter of the notebook has.
    """
    _refuse_misspelt(set(inspect.signature(parameters).parameters))
    chosen = PROFILES[_profile_name(profile)]
    trained = checks.bit_widths("bits", _listed("bits", bits))
    first = checks.integer("seed", seed, 0)
    count = checks.integer("repeats", repeats, 0, 1000) or chosen.repeats
    return Parameters(
        profile=chosen,
        bits=trained,
        seeds=tuple(range(first, first + count)),
        results_dir=_results_dir(results_dir, chosen),
        pruning_rates=_rates(pruning_rates),
        lengths=_lengths(lengths) or chosen.lengths,
        dataset=_dataset(dataset),
        model="" if isinstance(model, str) and not model else check_model("model", model),
        processes=checks.integer("processes", processes, 1, 1024),
    )


def _profile_name(profile: str) -> str:
    name = checks.choice("profile", profile, [*PROFILES, "auto"])
    if name == "auto":
        name = checks.choice("profile", os.environ.get("EMQ_PROFILE") or "auto", [*PROFILES, "auto"])
    return ("paper" if has_cuda() else "small") if name == "auto" else name


def _listed(name: str, value: Any) -> Any:
    """A list or tuple; papermill makes a string of "[2,4,8]", and an int of 2."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise checks.invalid(name, value, 'a list, for example "[2, 4, 8]"') from None
    return value if isinstance(value, (list, tuple)) else [value]


def _rates(value: Any) -> tuple[float, ...]:
    items = _listed("pruning_rates", value)
    with suppress(ValueError):
        rates = tuple(checks.pruning_rate(item) for item in items)
        if len(set(rates)) == len(rates):
            return rates
    raise checks.invalid("pruning_rates", items, "fractions in [0, 1), none twice, for example [0.5, 0.8]")


def _lengths(value: Any) -> tuple[int, ...]:
    items = _listed("lengths", value)
    with suppress(ValueError):
        lengths = tuple(sorted(checks.integer("lengths", item, 1, MOST_EPOCHS) for item in items))
        if len(set(lengths)) == len(lengths):
            return lengths
    raise checks.invalid("lengths", items, "numbers of epochs, none twice, for example [4, 12]")


def _results_dir(value: str | Path, profile: Profile) -> Path:
    auto = home() / ("build/smoke" if profile.name == "smoke" else "results")
    given = checks.path("results_dir", value, "auto, or a folder")
    folder = auto if value == "auto" else Path(os.path.expanduser(given)).absolute()
    if not can_hold_files(folder):
        raise checks.invalid("results_dir", str(value), "a folder, there or to be made, that can be written to")
    return folder


def _dataset(value: Any) -> str:
    """The name of a data set; a folder by its absolute path, which names it from wherever the notebook is run."""
    if checks.instance("dataset", value, str, "the name of a data set, or imagefolder:PATH") == "":
        return value
    check_data("dataset", value)
    kind, colon, path = value.partition(":")
    if colon:
        checks.path("dataset", path, "imagefolder:PATH of a folder")
    return f"{kind}:{Path(os.path.expanduser(path)).absolute()}" if colon else value


def _refuse_misspelt(known: set[str]) -> None:
    """papermill injects `-p bitz 4` all the same, and only warns: look at the cell that it wrote, and refuse."""
    shell = sys.modules["IPython"].get_ipython() if sys.modules.get("IPython") else None
    cells = shell.user_ns.get("In", []) if shell else []
    injected = [cell for cell in cells if cell.startswith("# Parameters\n")][-1:]  # one corrected by hand replaces it
    own = set(re.findall(r"^(\w+) *:", "\n".join(cells), re.MULTILINE))  # declared with a type, as parameters are
    wrong = sorted(set(re.findall(r"^(\w+) *=", "".join(injected), re.MULTILINE)) - own)
    if wrong and own & known:
        raise checks.invalid("parameter", wrong[0], "one of " + ", ".join(sorted(own & known)))
