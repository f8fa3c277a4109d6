"""A run is one network, trained once. Its configuration has a hash, which names the file of its rows."""

import json
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from .. import checks, models
from ..convert import convert
from ..files import Busy, alone, can_hold_files, canonical_json, digest, remove_parts, software, write_text
from ..layers import QuantSpec
from ..train import distributed
from ..train.checkpoint import Deadline, OutOfTime
from ..train.config import CoresetConfig, TrainConfig
from ..train.coresets import generator
from ..train.data import Dataset
from ..train.evaluate import ADAPTATION_SAMPLES, batch_norms, evaluate
from ..train.loop import train
from ..train.sources import check_name as check_data
from ..train.sources import load_dataset
from .statistics import evaluate_each, track

Records = list[dict[str, Any] | None]  # of runs, None for what is not finished
_SUMMED = ("sample_passes", "scoring_passes", "steps", "seconds")  # columns of a history, of which rows hold the sums


@dataclass(frozen=True, kw_only=True)
class Run:
    """One network that is trained once and evaluated at every bit-width."""

    profile: str  # its name
    dataset: str  # a name of `load_dataset`
    model: Annotated[str, models.check_name]  # a name of `models.build`
    spec: QuantSpec
    config: TrainConfig
    model_args: tuple[tuple[str, int], ...] = ()  # keyword arguments of `models.build`
    subset: tuple[int, int] = (0, 0)  # training and test images, 0 for all
    eval_bits: Annotated[tuple[int, ...], checks.bit_widths] = tuple(range(1, 9))  # to evaluate, trained or not
    image_size: Annotated[int, checks.Range(0)] = 0  # pixels a side, 0 for the data set's own
    held_out: Annotated[int, checks.Range(0)] = 0  # training images that are evaluated in place of test images
    every_statistics: bool = False  # whether it is evaluated with each of `statistics.KINDS`
    stream: bool = False  # whether images are read from files while training, see `load_dataset`

    def __post_init__(self) -> None:
        checks.fields(self)
        check_data("dataset", self.dataset)
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.model_args):
            raise checks.invalid("model_args", self.model_args, "a tuple of pairs, a name and its value")
        if len([checks.integer("subset", number, 0) for number in self.subset]) != 2:
            raise checks.invalid("subset", self.subset, "two numbers of images")

    @property
    def method(self) -> str:
        """The name of the method in the paper's tables."""
        if self.config.scheme == "dedicated":
            return "Dedicated"
        if self.config.scheme == "joint" and self.spec.norm == "switchable":
            return "Any-Precision" if self.config.distillation else "Any-Precision, no distillation"
        norms = {"shared": "", "shared_affine": ", own statistics", "switchable": ", switchable norm"}
        steps = ", joint steps" if self.config.scheme == "joint" else ""
        return f"Ours{norms[self.spec.norm]}{steps}" + (", distillation" if self.config.distillation else "")

    @property
    def correction(self) -> str:
        """What is corrected: of weights, and of layers' outputs."""
        gradient = "" if self.spec.correction_gradient else ", no gradient"
        return self.spec.correction + gradient + (", output" if self.spec.output_correction else "")

    @property
    def pruning_rate(self) -> float:
        """The fraction of the training set that a child model does not see in an epoch."""
        return 0.0 if self.config.coreset is None else self.config.coreset.pruning_rate

    @property
    def coreset(self) -> str:
        """What selects coresets, and which options differ from the defaults."""
        if not self.pruning_rate:
            return "full data"
        options = _asked(self.config.coreset)
        name = options.pop("score", "random")
        if name == "random" and options.get("resample_every") == 0:
            del options["resample_every"]
        elif name == "random":  # drawn anew, each epoch by default
            every = options.pop("resample_every", 1)
            name = "RS2" if every == 1 else f"RS2 every {every} epochs"
        if options.pop("unscored", False):
            name += f", {options.pop('how')} of all"
        named = [f"{k}={v}" for k, v in options.items() if k not in ("pruning_rate", "candidates", "scoring_epochs")]
        return ", ".join([name, *named])

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 of what differs from the defaults, the device left out.

        An option that a later version adds does not rename the runs that never asked for it.
        """
        return digest(canonical_json(_asked(self)))[:12]


def _asked(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from their defaults, those of nested configurations likewise."""
    values = [(f.name, getattr(config, f.name), f.default) for f in fields(config) if f.name != "device"]
    return {name: _asked(v) if is_dataclass(v) else v for name, v, default in values if v != default}


def run_all(
    runs: Iterable[Run], results_dir: str | Path, progress: bool = True, budget: float | Deadline | None = None
) -> pd.DataFrame:
    """Finish all `runs` and return their rows: one a run, bit-width and adaptation, with its provenance.

    A finished run is read and never trained again. A stopped run goes on from its last epoch. Calls with the same
    `results_dir` share the work: a run that another process is training comes last, and is waited for.

    Args:
        runs: what to train and evaluate.
        results_dir: the folder of runs/, the rows, and of checkpoints/.
        progress: whether a bar is shown.
        budget: the seconds after which the call stops at the end of an epoch; it always makes some progress.

    Raises:
        OutOfTime: the budget is spent. The same call goes on from here.
        ValueError: no runs; a folder that cannot be written to; a stored file that is damaged, or whose configuration
            or images are not those of the run.
    """
    runs, deadline = _listed(runs), Deadline.of(budget)
    results_dir = checks.path("results_dir", results_dir, "a folder")
    checks.flag("progress", progress)
    records = [_stored(run, results_dir) for run in runs]  # a damaged file is found now, not after hours of training
    if None in records and not all(can_hold_files(results_dir.absolute() / name) for name in ("runs", "checkpoints")):
        raise checks.invalid("results_dir", str(results_dir), "a folder in which runs/ and checkpoints/ can be written")
    _refuse_other_data(runs, records, {})
    try:
        _finish(runs, records, results_dir, progress, deadline)
    except OutOfTime as stop:
        finished, done = sum(_stored(run, results_dir) is not None for run in runs), stop.done
        raise OutOfTime(f"{finished} of {len(runs)} runs finished{done and f', of the next one {done}'}") from None
    return pd.concat(map(_frame, runs, records), ignore_index=True)


def _listed(runs: Any) -> list[Run]:
    """Each run once; ValueError: anything else than runs, or none."""
    found = list(runs) if isinstance(runs, Iterable) and not isinstance(runs, str) else []
    if not found or not all(isinstance(run, Run) for run in found):
        raise checks.invalid("runs", found or runs, "at least one Run" if not found else "a Run each")
    return list(dict.fromkeys(found))


def _finish(runs: list[Run], records: Records, results_dir: Path, progress: bool, deadline: Deadline) -> None:
    """Replace each None in `records` by the record of its run."""
    loaded: dict[tuple, Dataset] = {}
    worked = False  # a call always makes some progress before it stops, or a small budget would never end
    patience = 0  # seconds to wait for another process: in the first round other runs come before that
    while None in records:
        for i, run in enumerate(runs):
            place = distributed.current(run.config.device)
            if records[i] is None:
                records[i] = place.share(_stored(run, results_dir))  # another process may have finished it meanwhile
            if records[i] is not None:
                continue
            if worked and deadline.passed(place):
                raise OutOfTime("")
            with place.first():  # a download is not for all processes at once
                data = data_of(run, loaded)
            _refuse_other_data(runs, records, {_data_key(run): (data.sha256, "the images there are now")})
            label = f"run {i + 1} of {len(runs)}: {run.method}, {run.spec.bits} bits, seed {run.config.seed}"
            with _claimed(run, results_dir, place, patience) as ours:
                if ours:
                    records[i] = place.share(_stored(run, results_dir))
                if ours and records[i] is None:
                    records[i] = _execute(run, data, results_dir, progress and label, place, deadline)
                    worked = True
            if not ours and progress and place.main and patience == 0:
                tqdm.write(f"{label}: another process is at work on it; the others first", file=sys.stderr)
        patience, worked = 10, True  # having waited for another process counts as progress


def _refuse_other_data(runs: list[Run], records: Records, seen: dict[tuple, tuple[str, str]]) -> None:
    """ValueError if records differ in the images of a data set; seen: checksums known before, and of what they are."""
    for run, record in zip(runs, records, strict=True):
        if record is not None:
            found = record["provenance"]["data_sha256"]
            sha256, where = seen.setdefault(_data_key(run), (found, f"runs/{run.hash}.json"))
            if sha256 != found:
                expected = f"rows of the same images as {where}, unlike runs/{run.hash}.json; delete the rows of one"
                raise checks.invalid("dataset", run.dataset, expected)


@contextmanager
def _claimed(run: Run, results_dir: Path, place: distributed.Place, patience: float) -> Iterator[bool]:
    """Whether nobody else is at work on `run`, nor will be within the block; asked for by all processes together."""
    with ExitStack() as stack:
        ours = True
        if place.main:
            try:
                stack.enter_context(alone(checkpoint_file(run, results_dir), patience))
                remove_parts(rows_file(run, results_dir))
            except Busy:
                ours = False
        yield place.share(ours)


def _execute(
    run: Run, data: Dataset, results_dir: Path, progress: bool | str, place: distributed.Place, deadline: Deadline
) -> dict[str, Any]:
    """Train and evaluate `run`, and write its record."""
    model = build(run, data.num_classes)
    history = train(model, data, run.config, checkpoint_file(run, results_dir), progress, budget=deadline)
    switchable = run.spec.norm == "switchable" and batch_norms(model)  # which knows the trained bit-widths alone
    evaluated = evaluate_each if run.every_statistics else evaluate
    rows = evaluated(model, data, run.spec.bits if switchable else run.eval_bits).assign(adapted=False)
    if batch_norms(model):
        adapted = evaluate(model, data, bits=run.eval_bits, adapt_norm=True)
        rows = pd.concat([rows, adapted.assign(adapted=True)])
    record = {
        "run": run.hash,
        "config": json.loads(canonical_json(asdict(run))),
        "provenance": provenance(data, place.device(run.config.device), place.count, run.config.autocast),
        "history": history.to_dict("records"),
        "coresets": history.attrs["coresets"],
        "n_train": len(data.train),
        "calibration_passes": min(ADAPTATION_SAMPLES, len(data.train)),
        "rows": rows.to_dict("records"),
    }
    if place.main:
        write_text(rows_file(run, results_dir), json.dumps(record, indent=1) + "\n")
    return record


def provenance(data: Dataset, device: torch.device, processes: int = 1, autocast: str = "none") -> dict[str, Any]:
    """Where a number came from: the software, the device, the processor, the type of autocast and the data's checksum.

    `processes` trained the network together. `autocast` is what was asked for; the row has the type that was used.
    """
    cpu = f"cpu, {torch.get_num_threads()} threads"
    name = cpu if device.type == "cpu" else torch.cuda.get_device_name(device)
    device_name = f"{processes} x {name}" if processes > 1 else name
    machine = {"device": device_name, "processor": _processor()}
    machine["instructions"] = torch.backends.cpu.get_cpu_capability()
    return software() | machine | {"autocast": distributed.autocast_used(autocast, device), "data_sha256": data.sha256}


@cache
def _processor() -> str:
    """The processor's model, as the system names it."""
    with suppress(OSError):  # only Linux has this file, and not on every processor a model in it
        if found := re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def _data_key(run: Run) -> tuple:
    return run.dataset, run.image_size, run.stream, run.subset, run.held_out


def data_of(run: Run, loaded: dict[tuple, Dataset] | None = None) -> Dataset:
    """The data set of `run`, from `loaded` if it is there, where it is kept from now on."""
    key, loaded = _data_key(run), {} if loaded is None else loaded
    if key not in loaded:
        data = load_dataset(run.dataset, image_size=run.image_size or None, stream=run.stream or None)
        data = data.subset(*run.subset) if any(run.subset) else data
        loaded[key] = data.validation(run.held_out) if run.held_out else data
    return loaded[key]


def build(run: Run, num_classes: int) -> nn.Module:
    """The converted, untrained network of `run`, initialised from its seed."""
    checks.instance("run", run, Run, "a Run")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(run.config.seed, "init").initial_seed())
        model = convert(models.build(run.model, num_classes, **dict(run.model_args)), run.spec)
    if run.every_statistics:
        track(model)
    return model


def trained(run: Run, results_dir: str | Path, progress: bool = True) -> tuple[nn.Module, Dataset]:
    """The network of `run` and its data: trained, or read where `run_all` has left its checkpoint."""
    checkpoint = checkpoint_file(checks.instance("run", run, Run, "a Run"), results_dir)
    data = data_of(run)
    model = build(run, data.num_classes)
    with alone(checkpoint, patience=-1):
        train(model, data, run.config, checkpoint, progress)
    return model, data


Measure = Callable[[nn.Module, Dataset], pd.DataFrame]


def derived(run: Run, name: str, results_dir: str | Path, measure: Measure, each_epoch: bool = False) -> pd.DataFrame:
    """What `measure` finds in the network of `run`, which is trained for it unless its checkpoint is there.

    Args:
        run: the network.
        name: the table is kept as runs/<hash>-<name>.json, and read from there the next time.
        results_dir: as of `run_all`.
        measure: makes a tidy table of a network and its data.
        each_epoch: measure before training and after each epoch, told by a column epoch, not once at the end.

    Returns:
        The table, each row with what the run was asked for and its provenance. ValueError: a damaged file.
    """
    checks.instance("run", run, Run, "a Run")
    if not callable(measure):
        raise checks.invalid("measure", measure, "a function of a network and its data")
    path = rows_file(run, results_dir, f"-{name}")
    checkpoint = checkpoint_file(run, results_dir, f"-{name}" if each_epoch else "")
    if not path.exists():
        with alone(checkpoint, patience=-1):
            if not path.exists():  # another process may have been at work on it
                record = _measured(run, checkpoint, measure, each_epoch)
                remove_parts(path)
                write_text(path, json.dumps(record) + "\n")
    with checks.expecting("results_dir", str(path), "a whole table of a run, or none"):
        record = json.loads(path.read_text())
        return pd.DataFrame(record["table"]).assign(**record["asked"])


def _measured(run: Run, checkpoint: Path, measure: Measure, each_epoch: bool) -> dict[str, Any]:
    """The record of a `derived` table; the checkpoint keeps what is measured after each epoch."""
    data = data_of(run)
    model = build(run, data.num_classes)
    if each_epoch:
        tables = [measure(model, data)]
        history = train(model, data, run.config, checkpoint, observe=lambda m: measure(m, data).to_dict("list"))
        tables += map(pd.DataFrame, history.observed)
        table = pd.concat([t.assign(epoch=e) for e, t in enumerate(tables)], ignore_index=True)
    else:
        train(model, data, run.config, checkpoint)
        table = measure(model, data)
    asked = {"method": run.method, "dataset": run.dataset, "model": run.model, "trained_with": run.spec.correction}
    asked |= {"trained_bits": " ".join(map(str, run.spec.bits)), "epochs": run.config.epochs, "seed": run.config.seed}
    asked |= {"profile": run.profile, "run": run.hash}
    asked |= provenance(data, distributed.device_named(run.config.device), autocast=run.config.autocast)
    return {"asked": asked, "table": table.to_dict("list")}


def checkpoint_file(run: Run, results_dir: str | Path, name: str = "") -> Path:
    """Where the checkpoint of `run` lies, or of a training of it with a name of its own."""
    return Path(results_dir) / "checkpoints" / f"{run.hash}{name}.safetensors"


def rows_file(run: Run, results_dir: str | Path, name: str = "") -> Path:
    """Where the record of `run` lies, or a table made of its network."""
    return Path(results_dir) / "runs" / f"{run.hash}{name}.json"


def _stored(run: Run, results_dir: Path) -> dict[str, Any] | None:
    """The finished record, if there is one; ValueError: a damaged one, or one of another configuration.

    Fields that no longer exist are skipped: they had their defaults, or the hash would be another.
    """
    path = rows_file(run, results_dir)
    if not path.exists():
        return None
    with checks.expecting("results_dir", str(path), "a whole record of a run, or none"):
        record = json.loads(path.read_text())
        _frame(run, record)  # raises where a part is missing
        configs = json.loads(canonical_json(asdict(run))), record["config"]
        now, then = (pd.json_normalize(config).to_dict("records")[0] for config in configs)
    for key, value in then.items():
        if now.get(key, value) != value and not key.endswith(".device"):
            raise checks.invalid("results_dir", str(path), f"rows of this config, but {key} was {value!r}")
    return record


def _frame(run: Run, record: dict[str, Any]) -> pd.DataFrame:
    """A run's rows, with what was asked for before them and its cost and provenance after them."""
    pruned = run.config.coreset if run.pruning_rate else CoresetConfig(pruning_rate=0)
    asked = {"method": run.method, "dataset": run.dataset, "model": run.model, "scheme": run.config.scheme}
    asked |= {"norm": run.spec.norm, "correction": run.correction, "pruning_rate": run.pruning_rate}
    asked |= {"coreset": run.coreset, "candidates": pruned.candidates, "scoring_epochs": pruned.warmup}
    asked |= {"trained_bits": " ".join(map(str, run.spec.bits)), "n_train": record["n_train"]}
    asked |= {k: getattr(run.config, k) for k in ("epochs", "batch_size", "lr", "weight_decay", "seed")}
    cost = {k: sum(epoch[k] for epoch in record["history"]) for k in _SUMMED}
    rows = pd.DataFrame(record["rows"])
    rows["calibration_passes"] = record["calibration_passes"] * rows.adapted
    rows = rows.assign(**cost, profile=run.profile, run=run.hash, **record["provenance"])
    return pd.concat([pd.DataFrame([asked] * len(rows)), rows], axis=1)


def coreset_rows(runs: Iterable[Run], results_dir: str | Path) -> pd.DataFrame:
    """One row a draw and bit-width of finished `runs`: what was asked for, and what `tables.coreset_table` explains.

    The columns overlap and rank_correlation are means over the other bit-widths. ValueError: a run is not finished.
    """
    rows = []
    for run in _listed(runs):
        record = _stored(run, Path(results_dir))
        if record is None:
            raise checks.invalid("runs", run, "runs that run_all has finished")
        asked = {"pruning_rate": run.pruning_rate, "coreset": run.coreset, "epochs": run.config.epochs}
        for draw in record["coresets"]:
            asked |= {"candidates": run.config.coreset.candidates, "seed": run.config.seed, "run": run.hash}
            told = {k: draw[k] for k in ("epoch", "bits", "size", "union", "drift", "clipped")}
            told |= {k: pd.Series(draw[k], dtype=float).mean() for k in ("overlap", "rank_correlation")}
            shares = [count / draw["size"] for count in draw["classes"]]
            rows.append(asked | told | {"rarest_class": min(shares), "commonest_class": max(shares)})
    return pd.DataFrame(rows)
