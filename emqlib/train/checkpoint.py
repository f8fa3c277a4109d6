"""Where training stops and goes on: checkpoints, each a whole file or none, and the time it may take."""

import json
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, Self

from torch import Tensor, nn

from .. import checks, files
from ..layers import QuantSpec
from .config import TrainConfig
from .data import Dataset
from .distributed import Place
from .sources import ImageFiles

VERSION = 3
_STATE = {"model", "optimizer", "scaler", "sampler", "damaged"}


class OutOfTime(Exception):
    """A budget is spent and work is left. What is `done`, in words, is kept; the same call goes on from there."""

    def __init__(self, done: str) -> None:
        super().__init__(f"{done}; time is up, call again to go on")
        self.done = done


class Deadline:
    """The moment at which a budget, in seconds from now, is spent; with None there is no such moment.

    ValueError: anything but None and a finite number > 0.
    """

    def __init__(self, budget: float | None) -> None:
        expected = "a number of seconds > 0, or None"
        if budget is not None and checks.real("budget", budget, expected, low=0) == 0:
            raise checks.invalid("budget", budget, expected)
        self.end = None if budget is None else monotonic() + float(budget)

    @classmethod
    def of(cls, budget: float | Self | None) -> Self:
        """The deadline of a budget that starts now, or a deadline that several calls share, as it is."""
        return budget if isinstance(budget, cls) else cls(budget)

    def passed(self, place: Place) -> bool:
        """Whether it is past by the clock of the main process. All processes ask together, so all stop together."""
        return self.end is not None and place.share(monotonic() >= self.end)


def checked(checkpoint: Any) -> Path | None:
    """The path of a checkpoint, or None; ValueError for a place where no file can be."""
    if checkpoint is None:
        return None
    path = checks.file_name("checkpoint", checkpoint)
    if not files.can_hold_files(path.absolute().parent):
        raise checks.invalid("checkpoint", checkpoint, "a file in a folder that can be written to, or None")
    return path


def identity(model: nn.Module, data: Dataset, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that goes on from it, as it stands in JSON."""
    asked = {k: v for k, v in asdict(config).items() if k != "device"}
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    net = files.digest(json.dumps(shapes))
    kinds = {name: f"{type(m).__name__} {_arguments(m)}" for name, m in model.named_modules()}
    d = model.emq.decided
    decided = [d.signed, sorted(d.kept), sorted(d.absorbed), d.activation_range]
    modules = files.digest(json.dumps([kinds, decided], sort_keys=True))
    spec = {f"spec.{k}": v for k, v in asdict(model.emq.spec).items()}
    seen = {f"data.{name}": getattr(data, name) for name in ("mean", "std", "flip", "crop_padding")}
    if isinstance(getattr(data.train, "items", None), ImageFiles):  # whose transforms say what they are
        seen["data.transform"] = repr(data.train.items.transform)
    return json.loads(json.dumps(asked | spec | seen | {"net": net, "modules": modules, "data": data.sha256}))


def _arguments(module: nn.Module) -> str:
    """What a layer of PyTorch's, or of a class derived from it, tells of itself: stride, slope, or probability."""
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):  # which tell the device
        return ""
    kind = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    try:
        return kind.extra_repr(module)
    except AttributeError:  # of a derived class that has not called its constructor
        return ""


def save(path: Path, own: dict[str, Any], history: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Write `state`, plain containers of tensors and numbers, with the run's `identity` and history, atomically."""
    tensors: dict[str, Tensor] = {}
    told = {"identity": json.dumps(own), "history": json.dumps(history)}  # as texts: a loss may be infinite
    files.write(path, told | {"version": VERSION, "state": files.flattened(state, tensors)}, tensors)


def load(path: Path, own: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history and the state that `save` was given, for a run of this `identity`.

    ValueError: the file is damaged, of another version, or of another run.
    """
    expected = "a whole checkpoint of this library"
    about, tensors = files.read(path, VERSION, expected, "checkpoint")
    with checks.expecting("checkpoint", str(path), expected):
        theirs, history = json.loads(about["identity"]), json.loads(about["history"])
        state = files.restored(about["state"], tensors)
        missing = _STATE - set(state)
    if missing:
        raise checks.invalid("checkpoint", str(path), f"{expected}, which has {', '.join(sorted(missing))} too")
    _refuse_another(path, theirs, own)
    return history, state


def _refuse_another(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    defaults = asdict(TrainConfig()) | {f"spec.{k}": v for k, v in asdict(QuantSpec(bits=(8,))).items()}
    # an option that is younger than the checkpoint was at its default
    theirs = {"modules": ours.get("modules")} | json.loads(json.dumps(defaults)) | theirs
    differing = [f"{k}: {theirs.get(k)!r} there, {v!r} here" for k, v in ours.items() if theirs.get(k) != v]
    unknown = [k for k in theirs if k not in ours and k not in defaults]  # options of a later version
    differing += [f"{k}: {theirs[k]!r} there, not known here" for k in unknown]
    if differing:
        raise checks.invalid("checkpoint", str(path), "one of the same run, but " + "; ".join(differing))
