"""What is measured in the network of a run, while it is trained or afterwards, and kept beside the run's rows."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from . import checks, devices
from .data import Dataset
from .files import alone, remove_parts, write_text
from .provenance import provenance
from .runs import Run, build, checkpoint_file, data_of, rows_file, trained
from .training import train


def derived(
    run: Run, name: str, results_dir: str | Path, measure: Callable[[nn.Module, Dataset], pd.DataFrame]
) -> pd.DataFrame:
    """What `measure` finds in the trained network of `run`: read where it is there, else trained and measured.

    A tidy table, each row with what the run was asked for and its provenance; kept as runs/<hash>-<name>.json.
    ValueError: a damaged file there.
    """
    path = rows_file(_checked(run, measure), results_dir, f"-{name}")
    with nullcontext() if path.exists() else alone(checkpoint_file(run, results_dir), patience=-1):
        if not path.exists():  # another job may have been at work on it
            model, data = trained(run, results_dir)
            _keep(path, run, data, measure(model, data))
    return _kept(path)


def followed(
    run: Run, name: str, results_dir: str | Path, measure: Callable[[nn.Module, Dataset], pd.DataFrame]
) -> pd.DataFrame:
    """What `measure` finds in the network of `run` before training, column epoch 0, and after each epoch of it.

    Read, kept and failing as `derived`. A killed call loses at most the epoch it was in.
    """
    _checked(run, measure)
    path, checkpoint = (file(run, results_dir, f"-{name}") for file in (rows_file, checkpoint_file))
    with nullcontext() if path.exists() else alone(checkpoint, patience=-1):
        if not path.exists():  # another job may have been at work on it
            _keep(path, run, *_follow(run, checkpoint, measure))
    return _kept(path)


def _checked(run: Any, measure: Any) -> Run:
    if not callable(measure):
        raise checks.invalid("measure", measure, "a function of a network and its data")
    return checks.instance("run", run, Run, "a Run")


def _follow(
    run: Run, checkpoint: Path, measure: Callable[[nn.Module, Dataset], pd.DataFrame]
) -> tuple[Dataset, pd.DataFrame]:
    data = data_of(run, {})
    model = build(run, data.num_classes)
    tables = [measure(model, data)]
    history = train(model, data, run.config, checkpoint, observe=lambda m: measure(m, data).to_dict("list"))
    tables += map(pd.DataFrame, history.observed)
    return data, pd.concat([t.assign(epoch=e) for e, t in enumerate(tables)], ignore_index=True)


def _keep(path: Path, run: Run, data: Dataset, table: pd.DataFrame) -> None:
    asked = {"method": run.method, "dataset": run.dataset, "model": run.model, "trained_with": run.spec.correction}
    asked |= {"trained_bits": " ".join(map(str, run.spec.bits)), "epochs": run.config.epochs, "seed": run.config.seed}
    asked |= {"profile": run.profile, "run": run.hash}
    asked |= provenance(data, devices.device(run.config.device), autocast=run.config.autocast)
    remove_parts(path)
    write_text(path, json.dumps({"asked": asked, "table": table.to_dict("list")}) + "\n")


def _kept(path: Path) -> pd.DataFrame:
    try:
        record = json.loads(path.read_text())
        return pd.DataFrame(record["table"]).assign(**record["asked"])
    except (ValueError, KeyError, TypeError) as error:
        raise checks.invalid("results_dir", str(path), f"a whole table of a run, or none ({error!r})") from error
