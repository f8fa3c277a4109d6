"""Faults, in real processes: a job is disturbed, what it had reported as saved is looked for, the next call goes on.

`python tests/project/faults.py` tries each many times and writes results/reliability/faults.csv and .md; the tests try
some of them once. The job and its judge: `disturbed`. Here are the faults that need a process of their own. Others are
tested where they are handled: numbers that are not finite and checkpoints of something else in train/test_resuming,
damaged and replaced images in train/test_data and paper/test_runs.
"""

import errno
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from disturbed import Arm, Judge, Try, call, end, job, judged, refusal, start
from tqdm import tqdm

from emqlib import QuantSpec, TrainConfig, convert, files, load_dataset, models
from emqlib.files import software
from emqlib.paper import tables
from emqlib.paper.experiments import write_class_folders
from emqlib.train import coresets, loop

ROOT = Path(__file__).resolve().parents[2]


def at_call(
    owner: Any, name: str, number: int, act: Callable[..., Any], counts: Callable[..., bool] = lambda *_: True
) -> None:
    """Let `act` take the place of one call of a function, which it gets first: the one of this number, from 0.

    counts: which calls are counted, by their arguments.
    """
    function, left = getattr(owner, name), [number]

    def counted(*arguments: Any) -> Any:
        if counts(*arguments):
            left[0] -= 1
            if left[0] == -1:
                return act(function, *arguments)
        return function(*arguments)

    setattr(owner, name, counted)


# Killed


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Dying:
    """A file whose writer is killed after so many bytes."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: Any) -> int:
        """Write what is left to write, and die where that is less than asked for."""
        data = memoryview(data).cast("B")
        self.file.write(data[: self.left])
        if len(data) > self.left:
            self.file.flush()
            _die()
        self.left -= len(data)
        return len(data)


def dies_in_a_step(number: int) -> None:
    """Be killed before the step of this number."""
    at_call(loop, "_step", number, _die)


def dies_while_scoring(number: int) -> None:
    """Be killed in the scoring phase, before the batch of this number is taken in."""
    at_call(coresets.Coresets, "observe", number, _die, lambda made, *_: bool(made.recorders))


def dies_writing(suffix: str, number: int, size: int) -> None:
    """Be killed after `size` bytes of the file of this number that ends so; of the whole file before its renaming."""

    def act(write_atomic: Callable[..., None], path: Path, write: Callable[[Any], object]) -> None:
        os.replace = _die
        write_atomic(path, lambda file: write(_Dying(file, size)))

    at_call(files, "write_atomic", number, act, lambda path, _: path.suffix == suffix)


def dies_after_writing(suffix: str, number: int) -> None:
    """Be killed when the file of this number that ends so has its name, before anybody is told."""

    def act(replace: Callable[..., None], temporary: Any, path: Any) -> None:
        replace(temporary, path)
        _die()

    at_call(os, "replace", number, act, lambda _, path: str(path).endswith(suffix))


def killed(judge: Judge, folder: Path, rng: random.Random, arm: Callable[[random.Random], Arm]) -> Try:
    """A job killed by itself where `arm` says."""
    ended = call(job, folder, arm(rng), **judge.which)
    return judged(judge, folder, "" if ended.code == -signal.SIGKILL else f"was not killed: {ended}")


def killed_at_any_moment(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """A job killed from outside, at a random moment of its life."""
    process, pipe = start(job, folder, **judge.which)
    process.join(rng.uniform(0, judge.seconds))
    process.kill()
    end(process, pipe)
    return judged(judge, folder)


def killed_again_and_again(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """Jobs killed one after the other on the same folder, each after a little work."""
    for _ in range(4):
        call(job, folder, partial(dies_in_a_step, rng.randrange(2, 12)), **judge.which)
        if lost := judge.lost(folder):
            return Try(False, lost, "; ".join(lost))
    return judged(judge, folder)


def interrupted(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """A job that gets Ctrl-C at a random moment, also while processes of its own decode images for it."""
    process, pipe = start(job, folder, **judge.which)
    process.join(rng.uniform(0, judge.seconds))
    if process.is_alive():
        os.kill(process.pid, signal.SIGINT)
    ended = end(process, pipe)
    problem = "" if isinstance(ended.error, KeyboardInterrupt) or judge.right(ended.value) else repr(ended)
    return judged(judge, folder, problem)


# Several jobs


def two_jobs(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """Jobs on one folder, started at random moments: all end with the same rows, and nothing is trained twice."""
    started = []
    for _ in range(3):
        started.append(start(job, folder))
        time.sleep(rng.uniform(0, judge.seconds / 2))
    problems = [repr(e.error) for e in (end(*both) for both in started) if not judge.right(e.value)]
    noted = (folder / "log").read_text().splitlines()
    problems += [] if len(noted) == len(set(noted)) else [f"saved twice: {noted}"]
    return judged(judge, folder, "; ".join(problems))


def a_job_killed_beside_another(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """One of two jobs is killed; the other, which may be waiting for it, does its work too."""
    victim, heir = start(job, folder), start(job, folder)
    victim[0].join(rng.uniform(0.2, 1) * judge.seconds)
    victim[0].kill()
    end(*victim)
    ended = end(*heir)
    return judged(judge, folder, "" if judge.right(ended.value) else repr(ended.error))


# Disk, memory, numbers, files


def _limited(kind: int, size: int) -> Callable[[], None]:
    """Limit what this process may have of something; returns what gives it back."""
    resource.setrlimit(kind, (size, resource.RLIM_INFINITY))
    return lambda: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _fills_up(folder: Path, size: int) -> tuple[str, list[str], pd.DataFrame]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    enlarge = _limited(resource.RLIMIT_FSIZE, size)
    problem = "no error"
    try:
        job(folder)
    except OSError as error:
        named = str(folder / "results") in str(error)
        problem = "" if error.errno == errno.EFBIG and named else f"unclear: {error}"
    left = [f"{path}: half-written" for path in folder.rglob("*.tmp")]
    enlarge()
    return problem, left, job(folder)


def disk_full(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """Files that cannot grow beyond a random size, an error that names the file, and then room for them."""
    ended = call(_fills_up, folder, rng.randrange(4096, 20_000))
    if ended.error is not None:
        return Try(False, [], repr(ended.error))
    problem, lost, rows = ended.value
    return Try(not problem and judge.right(rows), lost, problem)


def _too_large(room: int) -> str:
    model = convert(models.build("resnet8", 10, width=64), QuantSpec(bits=(2, 4)))
    data = load_dataset("digits")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    enlarge = _limited(resource.RLIMIT_AS, used + room)
    try:
        loop.train(model, data, TrainConfig(epochs=1, batch_size=1024), progress=False)
    except MemoryError as error:
        enlarge()
        loop.train(model, data.subset(60, 20), TrainConfig(epochs=1, batch_size=512), progress=False)
        return str(error)
    return "no error"


def out_of_memory(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """Too little memory for a step: an error with the batch size to try, and the same process goes on with less."""
    ended = call(_too_large, rng.randrange(50, 400) << 20)
    told = repr(ended.error or ended.code) if ended.value is None else ended.value
    survived = "try batch_size=512, or accumulate=2" in told
    return Try(survived, [], "" if survived else told)


def spoils_a_gradient(number: int) -> None:
    """Make a gradient of the step of this number NaN."""

    def act(step: Callable[..., None], run: Any, *arguments: Any) -> None:
        next(run.model.parameters()).register_hook(lambda grad: grad * torch.nan)
        step(run, *arguments)

    at_call(loop, "_step", number, act)


def not_a_number(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """Training stops at the first, by an error that names where; the checkpoint before stays good."""
    ended = call(job, folder, partial(spoils_a_gradient, rng.randrange(25)))
    return judged(judge, folder, refusal(ended, FloatingPointError, "epoch", "bits", "lr", "the last checkpoint stays"))


def damaged_checkpoint(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """A checkpoint cut short, with one bit changed, or of something else: refused by name, and left as it is."""
    call(job, folder, partial(dies_in_a_step, rng.randrange(8, 20)))
    (path,) = (folder / "results" / "checkpoints").glob("[!.]*")
    whole = path.read_bytes()
    at = rng.randrange(len(whole))
    flipped = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
    path.write_bytes(broken := rng.choice([whole[:at], flipped, rng.randbytes(len(whole))]))
    ended = call(job, folder)
    problem = refusal(ended, ValueError, "checkpoint=", str(path), "whole checkpoint")
    problem += "" if path.read_bytes() == broken else "it was overwritten"
    path.write_bytes(whole)
    return judged(judge, folder, problem)


# The table


def _killed_in(suffix: str, files: int, size: int) -> Callable[[random.Random], Arm]:
    return lambda rng: partial(dies_writing, suffix, rng.randrange(files), rng.randrange(size))


KILLS: dict[str, Callable[[random.Random], Arm]] = {
    "killed in a step of training": lambda rng: partial(dies_in_a_step, rng.randrange(35)),
    "killed while scoring": lambda rng: partial(dies_while_scoring, rng.randrange(10)),
    "killed writing a checkpoint": _killed_in(".safetensors", 9, 60_000),
    "killed writing a record": _killed_in(".json", 2, 2_000),
    "killed writing a table": lambda rng: partial(dies_writing, rng.choice([".csv", ".md"]), 0, rng.randrange(3_000)),
    "killed after a checkpoint is written": lambda rng: partial(dies_after_writing, ".safetensors", rng.randrange(9)),
    "killed after a record is written": lambda rng: partial(dies_after_writing, ".json", rng.randrange(2)),
}

Fault = Callable[[Judge, Path, random.Random], Try]
# name: the fault, and how often the long form tries it
FAULTS: dict[str, tuple[Fault, int]] = {
    **{name: (partial(killed, arm=arm), 10) for name, arm in KILLS.items()},
    "killed at any moment": (killed_at_any_moment, 30),
    "killed again and again": (killed_again_and_again, 5),
    "disk full": (disk_full, 10),
    "several jobs on one folder": (two_jobs, 8),
    "a job killed beside another": (a_job_killed_beside_another, 8),
    "NaN in a gradient": (not_a_number, 5),
    "out of memory": (out_of_memory, 5),
    "checkpoint damaged": (damaged_checkpoint, 15),
    "Ctrl-C": (interrupted, 10),
}
STREAMED: dict[str, tuple[Fault, int]] = {
    "killed while processes decode": (killed_at_any_moment, 10),
    "Ctrl-C while processes decode": (interrupted, 10),
}


def tried(fault: Fault, judge: Judge, folder: Path, seed: int) -> Try:
    """One try in a folder of its own; what the try itself fails with is no survival."""
    folder.mkdir(parents=True)
    try:
        return fault(judge, folder, random.Random(seed))
    except Exception:
        return Try(False, [], traceback.format_exc(limit=-3))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def streamed(folder: Path) -> Judge:
    """The judge of jobs whose images are decoded by processes of their own."""
    write_class_folders(load_dataset("digits", image_size=8).subset(100, 30), folder / "images")
    return Judge.of(folder / "undisturbed", dataset=f"imagefolder:{folder / 'images'}", stream=True)


def main(scale: float = 1.0) -> int:
    """Try all faults, `scale` times as often as the table says, and write the report; returns how many went wrong."""
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        judges = {False: Judge.of(folder / "undisturbed"), True: streamed(folder / "streamed")}
        plan = [(name, *fault, False) for name, fault in FAULTS.items()]
        plan += [(name, *fault, True) for name, fault in STREAMED.items()]
        for name, fault, often, stream in tqdm(plan, unit="fault"):
            seeds = range(max(1, round(often * scale)))
            found = [tried(fault, judges[stream], folder / "try", 1000 * len(rows) + seed) for seed in seeds]
            for t in found:
                if t.told:
                    tqdm.write(f"{name}: {t.told}", file=sys.stderr)
            survived, lost = sum(t.survived for t in found), sum(len(t.lost) for t in found)
            wrong += len(found) - survived + lost
            rows.append({"fault": name, "tries": len(found), "survived": survived, "lost": lost})
    table = pd.DataFrame(rows)
    total = {"fault": "all"} | table[["tries", "survived", "lost"]].sum().to_dict()
    tables.save(
        pd.concat([table, pd.DataFrame([total])]), ROOT / "results/reliability/faults", table.assign(**software())
    )
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)))
