"""Where training stops and goes on: checkpoints, each a whole file or none, and the time it may take."""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from time import monotonic
from typing import Any, Self

from torch import Tensor, nn

from .. import checks
from .. import files as container
from ..files import can_hold_files
from ..layers import QuantSpec
from .config import TrainConfig
from .data import Dataset
from .distributed import Ranks

VERSION = 2
_STATE = {"model", "optimizer", "scaler", "sampler", "damaged", "paused"}


class OutOfTime(Exception):
    """A budget is spent and work is left: `done`, in words, is kept, and the same call, made again, goes on from it."""

    def __init__(self, done: str) -> None:
        super().__init__(done)
        self.done = done

    def __str__(self) -> str:
        return f"{self.done}; time is up, call again to go on"


class Deadline:
    """The moment at which a budget, in seconds from now, is spent; never, of None.

    ValueError: anything but None and a finite number > 0.
    """

    def __init__(self, budget: float | None) -> None:
        expected = "a number of seconds > 0, or None"
        if budget is not None and checks.real("budget", budget, expected, low=0) == 0:
            raise checks.invalid("budget", budget, expected)
        self.end = None if budget is None else monotonic() + float(budget)

    @classmethod
    def of(cls, budget: float | Self | None) -> Self:
        """That of a budget which starts now, or one which has started before and which several calls share."""
        return budget if isinstance(budget, cls) else cls(budget)

    def passed(self, place: Ranks) -> bool:
        """Whether it is past by the clock of the first rank, so that all stop at the same step; all ask together."""
        return self.end is not None and place.share(monotonic() >= self.end)


def checked(checkpoint: Any) -> Path | None:
    """The path of a checkpoint, or None; ValueError: a place where no file can be."""
    if checkpoint is None:
        return None
    path = checks.file_name("checkpoint", checkpoint)
    if not can_hold_files(path.absolute().parent):
        raise checks.invalid("checkpoint", checkpoint, "a file in a folder that can be written to, or None")
    return path


def identity(model: nn.Module, data: Dataset, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it."""
    asked = {k: v for k, v in asdict(config).items() if k != "device"}
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    net = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    spec = {f"spec.{k}": v for k, v in asdict(model.emq.spec).items()}
    return asked | spec | {"net": net, "data": data.sha256}


def _defaults() -> dict[str, Any]:
    spec = {f"spec.{f.name}": f.default for f in fields(QuantSpec)}
    return spec | {f.name: f.default for f in fields(TrainConfig) if f.name != "device"}


def save(path: Path, own: dict[str, Any], history: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Write `state`, plain containers of tensors and numbers, with the run's own `identity` and history, atomically."""
    tensors: dict[str, Tensor] = {}
    told = {"identity": json.dumps(own), "history": json.dumps(history)}  # which may hold what is not a number
    container.write(path, told | {"version": VERSION, "state": container.flattened(state, tensors)}, tensors)


def load(path: Path, own: dict[str, Any], ranks: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history and the state that `save` was given, for a run of this `identity` on so many ranks.

    ValueError: a file that is damaged or of another version, another run's, or one stopped in the middle of an epoch
    that more or fewer ranks shared.
    """
    expected = "a whole checkpoint of this library"
    about, tensors = container.read(path, VERSION, expected, "checkpoint")
    try:
        theirs, history = json.loads(about["identity"]), json.loads(about["history"])
        state = container.restored(about["state"], tensors)
        missing = _STATE - set(state)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise checks.invalid("checkpoint", str(path), f"{expected} ({error!r})") from error
    if missing:
        raise checks.invalid("checkpoint", str(path), f"{expected}, which has {', '.join(sorted(missing))} too")
    _refuse_another(path, _defaults() | theirs, json.loads(json.dumps(own)))  # what is not named is at its default
    parts = len(state["paused"]["ranks"]) if state["paused"] else ranks
    if parts != ranks:  # each has random numbers and losses of its own
        expected = f"one of {ranks} process(es), or of a whole epoch: it is {parts} that stopped in the middle of one"
        raise checks.invalid("checkpoint", str(path), expected)
    return history, state


def _refuse_another(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    differing = [f"{k}: {theirs.get(k)!r} there, {v!r} here" for k, v in ours.items() if theirs.get(k) != v]
    differing += [f"{k}: {v!r} there, not known here" for k, v in theirs.items() if k not in ours]  # a later version's
    if differing:
        raise checks.invalid("checkpoint", str(path), "one of the same run, but " + "; ".join(differing))
