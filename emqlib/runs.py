"""A run is one frozen config, one hash and one file of rows, and is never run twice."""

import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from . import checks, models
from .checkpoints import Deadline, OutOfTime
from .config import TrainConfig
from .data import Dataset, load_dataset
from .data import check_name as check_data
from .evaluation import ADAPTATION_SAMPLES, batch_norms, evaluate
from .files import Busy, alone, can_hold_files, canonical_json, digest, remove_parts, write_text
from .layers import QuantSpec
from .multibit import convert
from .provenance import provenance
from .ranks import Ranks, accelerate, current, started
from .sampling import CoresetConfig, generator
from .training import train

COST = ("sample_passes", "scoring_passes", "steps", "seconds")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One network trained once and evaluated at every bit-width; its hash names its rows and its checkpoint.

    dataset, model: names of `load_dataset` and `models.build`; model_args: its keyword arguments. subset: (train, test)
    images, (0, 0) for all. eval_bits: bit-widths to evaluate, trained or not. image_size, stream: see `load_dataset`; 0
    and False for the data set's own.
    """

    profile: str
    dataset: str
    model: str
    spec: QuantSpec
    config: TrainConfig
    model_args: tuple[tuple[str, int], ...] = ()
    subset: tuple[int, int] = (0, 0)
    eval_bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    image_size: int = 0
    stream: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_bits", checks.bit_widths("eval_bits", self.eval_bits))
        checks.instance("profile", self.profile, str, "a name")
        check_data("dataset", self.dataset)
        models.check_name("model", self.model)
        checks.instance("spec", self.spec, QuantSpec, "a QuantSpec")
        checks.instance("config", self.config, TrainConfig, "a TrainConfig")
        args = checks.instance("model_args", self.model_args, tuple, "a tuple of pairs, a name and its value")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in args):
            raise checks.invalid("model_args", args, "a tuple of pairs, a name and its value")
        if not isinstance(self.subset, tuple) or len(self.subset) != 2:
            raise checks.invalid("subset", self.subset, "two numbers of images")
        for name, number in (("subset", self.subset[0]), ("subset", self.subset[1]), ("image_size", self.image_size)):
            checks.integer(name, number, 0)
        checks.flag("stream", self.stream)

    @property
    def method(self) -> str:
        """The name of the method in the paper's tables."""
        if self.config.scheme == "dedicated":
            return "Dedicated"
        if self.config.scheme == "joint" and self.spec.norm == "switchable":
            return "Any-Precision"
        norms = {"shared": "", "shared_affine": ", own statistics", "switchable": ", switchable norm"}
        return f"Ours{norms[self.spec.norm]}"

    @property
    def pruning_rate(self) -> float:
        """Fraction of the training set a child does not see in an epoch."""
        return 0.0 if self.config.coreset is None else self.config.coreset.pruning_rate

    @property
    def coreset(self) -> str:
        """What selects coresets, and which options differ from the defaults."""
        if not self.pruning_rate:
            return "full data"
        options = _asked(self.config.coreset)
        name = options.pop("score", "random")
        if name == "random" and options.pop("resample_every", 1) == 1:
            name = "RS2"  # a random coreset that is drawn anew each epoch
        if options.pop("unscored", False):
            name += f", {options.pop('how')} of all"
        named = [f"{k}={v}" for k, v in options.items() if k not in ("pruning_rate", "candidates", "scoring_epochs")]
        return ", ".join([name, *named])

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 of what differs from the defaults, the device left out.

        So an option that a later version adds does not rename the runs that never asked for it.
        """
        return digest(canonical_json(_asked(self)))[:12]


def _asked(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass that differ from their defaults, those of nested configs likewise."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "device"}
    differing = {f.name: values[f.name] for f in fields(config) if f.name in values and values[f.name] != f.default}
    return {name: _asked(value) if is_dataclass(value) else value for name, value in differing.items()}


def coreset_rows(runs: Iterable[Run], results_dir: str | Path) -> pd.DataFrame:
    """One row a draw and bit-width of finished `runs`: what was asked for, and what `results.coreset_table` explains.

    overlap and rank_correlation are means over the other bit-widths. ValueError: a run that is not finished.
    """
    rows = []
    for run in _listed(runs):
        record = _stored(run, Path(results_dir))
        if record is None:
            raise checks.invalid("runs", run, "runs that run_all has finished")
        for draw in record["coresets"]:
            classes = pd.Series(draw["classes"]) / draw["size"]
            means = {k: pd.Series(draw[k], dtype=float).mean() for k in ("overlap", "rank_correlation")}
            told = {k: draw[k] for k in ("epoch", "bits", "size", "union", "drift", "clipped")}
            spread = {"rarest_class": classes.min(), "commonest_class": classes.max()}
            asked = {"pruning_rate": run.pruning_rate, "coreset": run.coreset, "epochs": run.config.epochs}
            asked |= {"candidates": run.config.coreset.candidates, "seed": run.config.seed, "run": run.hash}
            rows.append(asked | told | means | spread)
    return pd.DataFrame(rows)


def run_all(
    runs: Iterable[Run],
    results_dir: str | Path,
    progress: bool = True,
    processes: int = 1,
    budget: float | Deadline | None = None,
) -> pd.DataFrame:
    """The tidy rows of all `runs`: read where a run is finished, run where it is not, resumed where it was cut short.

    One row a run, bit-width and adaptation, with its provenance. A killed call loses at most the epoch it was in.
    results_dir: holds runs/ and checkpoints/. Jobs that share it share the work: a run that another is at work on comes
    last, and is waited for. processes: how many to start, one a GPU, that train together, as `training.train` says;
    those that a launcher started all call this with 1. budget: seconds after which it stops, by OutOfTime, at the next
    step of training (one at least), for the next call to go on; a run whose last step is done is still evaluated.
    ValueError: no runs; a folder that cannot be written to; a damaged or foreign file where the rows of a run should
    be; rows of other images than there are now.
    """
    runs, deadline = _listed(runs), Deadline.of(budget)
    results_dir = checks.path("results_dir", results_dir, "a folder")
    checks.flag("progress", progress)
    if checks.integer("processes", processes, 1, 1024) > 1 and started() > 1:
        raise checks.invalid("processes", processes, "1 in each of the processes that a launcher started")
    records = [_stored(run, results_dir) for run in runs]  # a damaged file is found now, not after hours of training
    if None in records and not all(can_hold_files(results_dir.absolute() / name) for name in ("runs", "checkpoints")):
        raise checks.invalid(
            "results_dir", str(results_dir), "a folder that can be written to, runs/ and checkpoints/ too"
        )
    _refuse_other_data(runs, records)
    launched = processes > 1 and None in records
    if launched:
        _launch(runs, results_dir, progress, processes, deadline)
    try:
        records = _finish(runs, records, results_dir, progress, deadline, launched)
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


def _finish(
    runs: list[Run],
    records: list[dict[str, Any] | None],
    results_dir: Path,
    progress: bool,
    deadline: Deadline,
    worked: bool,
) -> list[dict[str, Any]]:
    """The records of all `runs`; worked: whether this call has made a step already, and may stop where time is up.

    A run that another job is at work on comes last, and is waited for.
    """
    loaded: dict[tuple, Dataset] = {}
    left, patience = [i for i, record in enumerate(records) if record is None], 0
    while left:
        for i in tuple(left):
            run, place = runs[i], current(runs[i].config.device)
            records[i] = place.share(_stored(run, results_dir))  # another job may have finished it meanwhile
            if records[i] is not None:
                left.remove(i)
                continue
            if worked and deadline.passed(place):
                raise OutOfTime("")
            with place.first():  # a download is not for all at once
                data = data_of(run, loaded)
            _refuse_other_data(runs, records, run, data)
            label = f"run {i + 1} of {len(runs)}: {run.method}, {run.spec.bits} bits, seed {run.config.seed}"
            with _claimed(run, results_dir, place, patience) as ours:
                if not ours:
                    _tell_of_waiting(label, progress and place.main and patience == 0)
                    continue
                records[i] = place.share(_stored(run, results_dir))
                if records[i] is None:
                    records[i] = _execute(run, data, results_dir, progress and label, place, deadline)
                    worked = True
            left.remove(i)
        patience, worked = 10, True  # from now on this call waits, which a budget does not allow for ever
    return records


def _refuse_other_data(
    runs: list[Run], records: list[dict[str, Any] | None], run: Run | None = None, data: Dataset | None = None
) -> None:
    """ValueError if the images of a data set are not the same in all records, and in `data`, to be used for `run`."""
    seen = {_data_key(run): (data.sha256, "the images there are now")} if run and data else {}
    for other, record in zip(runs, records, strict=True):
        if record is not None:
            found = record["provenance"]["data_sha256"]
            sha256, where = seen.setdefault(_data_key(other), (found, f"runs/{other.hash}.json"))
            if sha256 != found:
                expected = f"rows of the same images as {where}: those of runs/{other.hash}.json were others"
                raise checks.invalid("dataset", other.dataset, f"{expected}; delete the rows of one of them")


@contextmanager
def _claimed(run: Run, results_dir: Path, place: Ranks, patience: float) -> Iterator[bool]:
    """Whether this job, of one rank or several, is the only one at work on `run`, and stays so within the block."""
    with ExitStack() as stack:
        ours = True
        if place.main:
            try:
                stack.enter_context(alone(checkpoint_file(run, results_dir), patience))
                remove_parts(rows_file(run, results_dir))
            except Busy:
                ours = False
        yield place.share(ours)


def _tell_of_waiting(label: str, asked: bool) -> None:
    if asked:
        tqdm.write(f"{label}: another process is at work on it; the others first", file=sys.stderr)


def _launch(runs: list[Run], results_dir: Path, progress: bool, processes: int, deadline: Deadline) -> None:
    """Finish `runs` in so many processes of their own, forked from this one: it must not have touched a GPU yet."""
    launch = accelerate().notebook_launcher
    loaded: dict[tuple, Dataset] = {}
    for run in runs:
        data_of(run, loaded)  # an error about the data is better told here than by a process that dies of it
    with socket.create_server(("127.0.0.1", 0)) as free:  # Accelerate's own is the same for every notebook
        port = free.getsockname()[1]
    launch(_forked, (runs, results_dir, progress, deadline), num_processes=processes, use_port=str(port))


def _forked(runs: list[Run], results_dir: Path, progress: bool, deadline: Deadline) -> None:
    """`run_all` in a forked process, which would wait for ever for threads that only its parent has."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with suppress(OutOfTime):  # which the parent finds out for itself: an error would be shown with a traceback
        run_all(runs, results_dir, progress, budget=deadline)


def _data_key(run: Run) -> tuple:
    return run.dataset, run.image_size, run.stream, run.subset


def data_of(run: Run, loaded: dict[tuple, Dataset]) -> Dataset:
    """The data set of `run`, as `loaded` has it already or has it from now on."""
    key = _data_key(run)
    if key not in loaded:
        data = load_dataset(run.dataset, image_size=run.image_size or None, stream=run.stream or None)
        loaded[key] = data.subset(*run.subset) if any(run.subset) else data
    return loaded[key]


def build(run: Run, num_classes: int) -> nn.Module:
    """The converted, untrained network of `run`, initialised from its seed."""
    checks.instance("run", run, Run, "a Run")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(run.config.seed, "init").initial_seed())
        return convert(models.build(run.model, num_classes, **dict(run.model_args)), run.spec)


def trained(run: Run, results_dir: str | Path, progress: bool = True) -> tuple[nn.Module, Dataset]:
    """The network of `run` and its data: trained, or read where a checkpoint is there, as `run_all` leaves one."""
    data = data_of(checks.instance("run", run, Run, "a Run"), {})
    with alone(checkpoint_file(run, results_dir), patience=-1):
        return _train(run, data, results_dir, progress)[0], data


def _train(
    run: Run, data: Dataset, results_dir: str | Path, progress: bool | str, deadline: Deadline | None = None
) -> tuple[nn.Module, pd.DataFrame]:
    model = build(run, data.num_classes)
    checkpoint = checkpoint_file(run, results_dir)
    return model, train(model, data, run.config, checkpoint=checkpoint, progress=progress, budget=deadline)


def checkpoint_file(run: Run, results_dir: str | Path, name: str = "") -> Path:
    """Where the checkpoint of `run` lies, or that of a training of it with a name of its own."""
    return Path(results_dir) / "checkpoints" / f"{run.hash}{name}.safetensors"


def _execute(
    run: Run, data: Dataset, results_dir: Path, progress: bool | str, place: Ranks, deadline: Deadline
) -> dict[str, Any]:
    model, history = _train(run, data, results_dir, progress, deadline)
    rows = evaluate(model, data, bits=_served(run, model)).assign(adapted=False)
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


def _served(run: Run, model: nn.Module) -> tuple[int, ...]:
    """The bit-widths that need no adaptation first: a switchable norm, where there is one, knows the trained alone."""
    return run.spec.bits if run.spec.norm == "switchable" and batch_norms(model) else run.eval_bits


def rows_file(run: Run, results_dir: str | Path, name: str = "") -> Path:
    """Where the record of `run` lies, or a table made of its network."""
    return Path(results_dir) / "runs" / f"{run.hash}{name}.json"


def _stored(run: Run, results_dir: Path) -> dict[str, Any] | None:
    """The finished record, if there is one; ValueError if it is another config's, whose defaults were others then."""
    path = rows_file(run, results_dir)
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        _frame(run, record)  # raises where a part is missing
        now, then = _flat(json.loads(canonical_json(asdict(run)))), _flat(record["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise checks.invalid("results_dir", str(path), f"a whole record of a run, or none ({error!r})") from error
    changed = [k for k, v in then.items() if now.get(k) != v and not k.endswith(".device")]
    if changed:
        raise checks.invalid(
            "results_dir", str(path), f"rows of this config, but {changed[0]} was {then[changed[0]]!r}"
        )
    return record


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, {"config.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _frame(run: Run, record: dict[str, Any]) -> pd.DataFrame:
    """A run's rows, with what was asked for before them and its cost and provenance after them."""
    asked = {"method": run.method, "dataset": run.dataset, "model": run.model, "scheme": run.config.scheme}
    correction = run.spec.correction + ("" if run.spec.correction_gradient else ", no gradient")
    correction += ", output" if run.spec.output_correction else ""
    asked |= {"norm": run.spec.norm, "correction": correction, "pruning_rate": run.pruning_rate, "coreset": run.coreset}
    pruned = run.config.coreset if run.pruning_rate else CoresetConfig(pruning_rate=0)
    asked |= {"candidates": pruned.candidates, "scoring_epochs": pruned.warmup}
    asked |= {"trained_bits": " ".join(map(str, run.spec.bits)), "n_train": record["n_train"]}
    asked |= {k: getattr(run.config, k) for k in ("epochs", "batch_size", "lr", "weight_decay", "seed")}
    cost = {k: sum(epoch[k] for epoch in record["history"]) for k in COST}
    rows = pd.DataFrame(record["rows"])
    rows["calibration_passes"] = record["calibration_passes"] * rows.adapted
    rows = rows.assign(**cost, profile=run.profile, run=run.hash, **record["provenance"])
    return pd.concat([pd.DataFrame([asked] * len(rows)), rows], axis=1)
