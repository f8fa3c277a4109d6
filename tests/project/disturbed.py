"""A job in a process of its own, for faults to disturb, and a judge of what is left of it.

A job trains two tiny networks on the embedded digits, one by importance scores, by `run_all`, and notes down each
checkpoint and record once it has been written. The judge knows the rows that an undisturbed job ends with. Survived:
the next call went on and ended with these rows, to the last digit. Lost: what was noted down and is not there, is not
whole, or is there twice.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from emqlib import CoresetConfig, QuantSpec, TrainConfig, files
from emqlib.paper import runs, tables
from emqlib.paper.runs import Run, run_all
from emqlib.train import checkpoint

DIFFERING = ["seconds", "commit", "dirty"]  # what rows of two undisturbed jobs may differ in

Arm = Callable[[], None]  # prepares the fault in the job's own process


def jobs_runs(dataset: str = "digits", stream: bool = False) -> list[Run]:
    """What a job trains: half a second of work, with a scoring phase, draws of coresets and two optimizers."""
    shared = {"profile": "smoke", "dataset": dataset, "subset": (60, 20), "eval_bits": (2, 3), "stream": stream}
    shared |= {"model": "resnet8", "model_args": (("width", 4),), "image_size": 8, "spec": QuantSpec(bits=(2, 4))}
    coreset = CoresetConfig(score="tdds", pruning_rate=0.5, how="sample")
    first = TrainConfig(epochs=6, batch_size=20, lr=0.05, coreset=coreset)
    return [Run(config=first, **shared), Run(config=TrainConfig(scheme="joint", epochs=3, batch_size=20), **shared)]


# The job, in a process of its own


def job(folder: Path, arm: Arm | None = None, **which: Any) -> pd.DataFrame:
    """Finish the runs, write their table, and note down in folder/log what has been saved."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    log = os.open(folder / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    save, write = checkpoint.save, runs.write_text

    def saved(path: Path, own: Any, history: list[Any], state: Any) -> None:
        save(path, own, history, state)
        os.write(log, f"checkpoint {path.stem} {len(history)}\n".encode())

    def written(path: Path, text: str) -> None:
        write(path, text)
        os.write(log, f"record {path.stem} 0\n".encode())

    checkpoint.save, runs.write_text = saved, written
    if arm is not None:
        arm()
    rows = run_all(jobs_runs(**which), folder / "results", progress=False)
    tables.save(tables.accuracy_table(rows), folder / "results" / "table", rows)
    return rows


@dataclass
class Ended:
    """How a process ended: what it returned, or its error, or neither, if it was killed."""

    value: Any = None
    error: BaseException | None = None
    code: int | None = None


def _told(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    torch.set_num_threads(1)  # rows of another number of threads are others in their last digits
    set_start_method("fork", force=True)  # for processes that decode: what a user's own process would start
    try:
        pipe.send(("begun", None))
        pipe.send(("value", function(*arguments, **named)))
    except BaseException as error:
        pipe.send(("error", type(error)(*map(str, error.args))))


def start(function: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, Any]:
    """A process that has imported the library already and begins to work now, and where its answer comes from."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["emqlib.paper.experiments", "emqlib.paper.tables"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_told, args=(theirs, function, arguments, named))
    process.start()
    theirs.close()
    ours.recv()  # a busy machine may take seconds to start it: times are counted from here
    return process, ours


def end(process: Any, pipe: Any) -> Ended:
    """Wait for it."""
    answer = ("killed", None)
    with suppress(EOFError):
        answer = pipe.recv()
    process.join()
    pipe.close()
    return Ended(**({} if answer[0] == "killed" else {answer[0]: answer[1]}), code=process.exitcode)


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Ended:
    """Run `function` in a process of its own."""
    return end(*start(function, *arguments, **named))


# The judge


def comparable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without what two undisturbed jobs differ in."""
    return rows.drop(columns=[name for name in DIFFERING if name in rows]).reset_index(drop=True)


@dataclass
class Judge:
    """What the undisturbed job ended with, and what is lost of what a disturbed one had noted down."""

    rows: pd.DataFrame
    seconds: float  # that a job takes
    which: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, **which: Any) -> "Judge":
        """That of an undisturbed job in `folder`."""
        folder.mkdir(parents=True)
        process, begin = start(job, folder, **which), time.perf_counter()
        ended = end(*process)
        assert ended.error is None and ended.value is not None, ended
        return cls(comparable(ended.value), time.perf_counter() - begin, which)

    def right(self, rows: pd.DataFrame | None) -> bool:
        """Whether these are the undisturbed job's rows, each once."""
        return rows is not None and comparable(rows).equals(self.rows)

    def lost(self, folder: Path) -> list[str]:
        """What was noted down as saved and is not there, or not whole; and any file that is not."""
        log = folder / "log"
        noted = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        epochs = {run: max(int(n) for kind, r, n in noted if r == run and kind == "checkpoint") for _, run, _ in noted}
        records = {run for kind, run, _ in noted if kind == "record"}
        return [*self._lost_checkpoints(folder / "results", epochs), *self._lost_rows(folder / "results", records)]

    def _lost_checkpoints(self, folder: Path, epochs: dict[str, int]) -> Iterator[str]:
        for run in {*epochs, *(path.stem for path in (folder / "checkpoints").glob("[!.]*"))}:
            path = folder / "checkpoints" / f"{run}.safetensors"
            try:
                about, _ = files.read(path, checkpoint.VERSION, "a checkpoint")
                if len(json.loads(about["history"])) < epochs.get(run, 0):
                    yield f"{path.name}: {about['history']}"
            except ValueError as error:
                yield str(error)

    def _lost_rows(self, folder: Path, records: set[str]) -> Iterator[str]:
        found = {}
        for path in (folder / "runs").glob("[!.]*"):
            with suppress(ValueError):
                found[path.stem] = json.loads(path.read_text())
            rows = pd.DataFrame(found.get(path.stem, {}).get("rows", []))
            own = self.rows[self.rows.run == path.stem][rows.columns].reset_index(drop=True)
            if rows.empty or not rows.equals(own):
                yield f"{path.name}: other rows"
        yield from (f"{run}.json: gone" for run in records - set(found))
        if (folder / "table.csv").exists():
            table = pd.read_csv(folder / "table.csv", dtype={"run": str})
            own = comparable(table)
            if len(own) != len(self.rows) or not own.top1.equals(self.rows.top1):
                yield "table.csv: other rows"


@dataclass
class Try:
    """What came of one disturbance."""

    survived: bool
    lost: list[str]
    told: str = ""  # what went wrong, for whoever looks into it


def judged(judge: Judge, folder: Path, problem: str = "") -> Try:
    """Look for what was noted down, let the next call go on, and look again."""
    lost = judge.lost(folder)
    ended = call(job, folder, **judge.which)
    told = problem or (
        repr(ended.error) if ended.error else "" if judge.right(ended.value) else "other rows at the end"
    )
    lost += [] if told else judge.lost(folder)
    return Try(not told, lost, "; ".join([told, *lost]).strip("; "))


def refusal(ended: Ended, kind: type[BaseException], *words: str) -> str:
    """What is wrong with an error that should be of this kind and say these words: nothing, if it does."""
    if isinstance(ended.error, kind) and all(word in str(ended.error) for word in words):
        return ""
    return f"expected {kind.__name__} with {words}, got {ended.error!r} ({ended.code})"
