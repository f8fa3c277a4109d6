"""Faults, in real processes: a job is disturbed, what it had reported as saved is looked for, the next call goes on.

`python tests/project/faults.py` tries each many times and writes results/reliability/faults.csv and .md; the tests try
each a few times. The job and its judge: `disturbed`.
"""

import ctypes
import errno
import json
import os
import queue
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from disturbed import Arm, Judge, Try, call, end, job, judged, refusal, start
from tqdm import tqdm

from emqlib import CoresetConfig, QuantSpec, TrainConfig, files, load_dataset
from emqlib.files import software
from emqlib.paper import runs, tables
from emqlib.paper.experiments import write_class_folders
from emqlib.train import checkpoint, coresets, loop

ROOT = Path(__file__).resolve().parents[2]


# Killed


def _die() -> None:
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


def dies_in_a_step(count: int) -> None:
    """Be killed before the step of this number."""
    step, left = loop._step, [count]

    def counted(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            _die()
        step(*arguments)

    loop._step = counted


def dies_while_scoring(count: int) -> None:
    """Be killed in the scoring phase, before the batch of this number is taken in."""
    observe, left = coresets.Coresets.observe, [count]

    def counted(self: Any, *arguments: Any) -> None:
        left[0] -= bool(self.recorders)
        if left[0] < 0:
            _die()
        observe(self, *arguments)

    coresets.Coresets.observe = counted


def dies_writing(suffix: str, count: int, size: int) -> None:
    """Be killed after `size` bytes of the file of this number that ends so; of the whole file before its renaming."""
    write_atomic, left = files.write_atomic, [count]

    def counted(path: Path, write: Callable[[Any], object]) -> None:
        left[0] -= path.suffix == suffix
        if left[0] >= 0:
            return write_atomic(path, write)
        os.replace = lambda *_: _die()
        return write_atomic(path, lambda file: write(_Dying(file, size)))

    files.write_atomic = counted


def dies_after_writing(suffix: str, count: int) -> None:
    """Be killed when the file of this number that ends so has its name, before anybody is told."""
    replace, left = os.replace, [count]

    def counted(temporary: Any, path: Any) -> None:
        replace(temporary, path)
        left[0] -= str(path).endswith(suffix)
        if left[0] < 0:
            _die()

    os.replace = counted


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


# Disks and folders


def _unshared_disk(folder: Path, size: int) -> Callable[[], None]:
    """A disk of so many bytes at `folder`, for this process; returns what makes it large. OSError: not allowed."""
    libc, flags = ctypes.CDLL(None, use_errno=True), 0x10000000 | 0x00020000  # a user and a mount namespace of its own

    def mount(flag: int, options: str) -> None:
        if libc.mount(b"none", bytes(folder), b"tmpfs", flag, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")

    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")
    mount(0, f"size={size}")
    return lambda: mount(32, "size=1g")  # MS_REMOUNT


def _limited_files(size: int) -> Callable[[], None]:
    """Files of at most so many bytes, where no disk can be had."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _fills_up(folder: Path, size: int, limit: bool) -> tuple[str, list[str], pd.DataFrame]:
    place = folder / "results"
    place.mkdir()
    enlarge = _limited_files(size) if limit else _unshared_disk(place, 4096 * (1 + size // 4096))
    problem, before = "no error", set()
    try:
        job(folder)
    except OSError as error:
        named = str(place) in str(error)
        problem = "" if error.errno in (errno.ENOSPC, errno.EFBIG) and named else f"unclear: {error}"
        before = {str(path) for path in place.rglob("*.tmp")}
    enlarge()
    return problem, [f"{path}: half-written" for path in before], job(folder)


def disk_full(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """A disk that fills up at a random moment, an error that names the file, and then a larger disk."""
    size = rng.randrange(4096, 80_000)  # of 100 KB of checkpoints
    ended = call(_fills_up, folder, size, False)
    if isinstance(ended.error, OSError):
        shutil.rmtree(folder)
        folder.mkdir()
        ended = call(_fills_up, folder, size, True)
    if ended.error is not None:
        return Try(False, [], repr(ended.error))
    problem, lost, rows = ended.value
    return Try(not problem and judge.right(rows), lost, problem)


def _without_override() -> None:
    """Take from root the right to write where nobody may."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, none)


def read_only(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """A results folder, or one of its parts, that cannot be written to: refused before any work."""
    name = rng.choice(["", "runs", "checkpoints"])
    place = folder / "results" / name
    place.mkdir(parents=True)
    place.chmod(0o555)
    ended = call(job, folder, _without_override)
    problem = refusal(ended, ValueError, "results_dir=", "can be written to")
    problem += "" if not (folder / "log").read_text() else "something was saved"
    place.chmod(0o755)
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


# Numbers


def spoils(what: str, count: int) -> None:
    """Make the images, the loss or a gradient of the step of this number NaN."""
    step, left = loop._step, [count]

    def counted(run: Any, step_: Any, batch: Any, *more: Any) -> None:
        left[0] -= 1
        if left[0] == -1 and what == "images":
            batch = (batch[0] * torch.nan, *batch[1:])
        if left[0] == -1 and what == "loss":
            loss = loop._loss
            loop._loss = lambda *a: loss(*a) * torch.nan
        if left[0] == -1 and what == "gradient":
            next(run.model.parameters()).register_hook(lambda grad: grad * torch.nan)
        step(run, step_, batch, *more)

    loop._step = counted


def not_a_number(judge: Judge, folder: Path, rng: random.Random, what: str) -> Try:
    """Training stops at the first, by an error that names where; the checkpoint before stays good."""
    ended = call(job, folder, partial(spoils, what, rng.randrange(25)))
    return judged(judge, folder, refusal(ended, FloatingPointError, "epoch", "bits", "lr", "the last checkpoint stays"))


def _too_large(folder: Path, room: int) -> str:
    model = runs.convert(runs.models.build("resnet8", 10, width=64), QuantSpec(bits=(2, 4)))
    data, path = load_dataset("digits"), folder / "checkpoint"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    try:
        loop.train(model, data, TrainConfig(epochs=1, batch_size=1024), path, progress=False)
    except MemoryError as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        small = TrainConfig(epochs=1, batch_size=512, coreset=CoresetConfig(pruning_rate=0.5))
        loop.train(model, data.subset(60, 20), small, path, progress=False)
        return str(error)
    return "no error"


def out_of_memory(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """Too little memory for a step: an error with the batch size to try, and the same process goes on with less."""
    ended = call(_too_large, folder, rng.randrange(50, 400) << 20)
    expected = "try batch_size=512, or accumulate=2"
    problem = repr(ended.error or ended.code) if ended.value is None else "" if expected in ended.value else ended.value
    return Try(not problem, [], problem)


# Data and checkpoints


@contextmanager
def _image_folder(folder: Path) -> Iterator[list[Path]]:
    write_class_folders(load_dataset("digits", image_size=8).subset(60, 20), folder)  # all that a job takes
    yield sorted(folder.rglob("*.png"))


def damaged_image(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """An image file cut short or overwritten at random: named, and nothing is trained on it."""
    with _image_folder(folder / "data") as images:
        path, whole = (victim := rng.choice(images)), victim.read_bytes()
        cut = whole[: rng.randrange(len(whole) - 20)]  # the last bytes are the mark of a PNG's end, which tells nothing
        path.write_bytes(rng.choice([cut, rng.randbytes(len(whole)), b""]))
        which = {"dataset": f"imagefolder:{folder / 'data'}"}
        ended = call(job, folder, **which)
        problem = refusal(ended, ValueError, str(path), "not a readable image")
        problem += "something was saved" if (folder / "log").read_text() else ""
        path.write_bytes(whole)
        ended = call(job, folder, **which)
    return Try(not problem and ended.value is not None, [], problem or (repr(ended.error) if ended.error else ""))


def replaced_images(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """Images replaced when some runs are finished, and while one is: their rows are not mixed, nor gone on from."""
    with _image_folder(folder / "data") as images:
        which = {"dataset": f"imagefolder:{folder / 'data'}"}
        call(job, folder, partial(dies_in_a_step, rng.randrange(8, 35)), **which)
        begun = [path for path in (folder / "results").rglob("[!.]*") if path.is_file()]
        first, second = rng.sample(images, 2)
        first.write_bytes(second.read_bytes())
        ended = call(job, folder, **which)
        problem = refusal(ended, ValueError, "expected") if begun else ""
        shutil.rmtree(folder / "results", ignore_errors=True)
        ended = call(job, folder, **which)
    return Try(not problem and ended.value is not None, [], problem or (repr(ended.error) if ended.error else ""))


def mislabelled_images(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """A class without images, or with a name that only the test images have: named, and nothing is trained."""
    with _image_folder(folder / "data") as images:
        moved = rng.choice(sorted((folder / "data").glob("*/*")))
        moved.rename(moved.with_name("unheard of"))
        ended = call(job, folder, dataset=f"imagefolder:{folder / 'data'}")
        problem = refusal(ended, ValueError, str(folder / "data"), "class")
        problem += "something was saved" if (folder / "log").read_text() or not images else ""
        moved.with_name("unheard of").rename(moved)
        ended = call(job, folder, dataset=f"imagefolder:{folder / 'data'}")
    return Try(not problem and ended.value is not None, [], problem or (repr(ended.error) if ended.error else ""))


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


def another_checkpoint(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """The checkpoint of another config, or of another version, in the place of the run's own: refused, and left."""
    call(job, folder, partial(dies_in_a_step, rng.randrange(8, 20)))
    (path,) = (folder / "results" / "checkpoints").glob("[!.]*")
    whole, (about, tensors) = path.read_bytes(), files.read(path, checkpoint.VERSION, "a checkpoint")
    own = json.loads(about["identity"])
    name = rng.choice([name for name, value in own.items() if isinstance(value, (int, float, str))])
    other = {"identity": json.dumps(own | {name: "another"})}
    files.write(path, about | rng.choice([other, {"version": checkpoint.VERSION + 1}]), tensors)
    ended = call(job, folder)
    problem = refusal(ended, ValueError, "checkpoint=", "expected")
    path.write_bytes(whole)
    return judged(judge, folder, problem)


# Time and the keyboard


def jumping_clock(seed: int) -> None:
    """Let the clock on the wall jump by up to a year whenever it is asked."""
    rng, now = random.Random(seed), time.time
    time.time = lambda: now() + rng.uniform(-3e7, 3e7)


def _jumps_and_dies(seed: int, count: int) -> None:
    jumping_clock(seed)
    dies_in_a_step(count)


def clock_jumps(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """A job killed and started again, while the clock on the wall jumps to and fro."""
    begin = time.perf_counter()
    call(job, folder, partial(_jumps_and_dies, rng.randrange(1 << 30), rng.randrange(35)))
    ended = call(job, folder, partial(jumping_clock, rng.randrange(1 << 30)))
    if ended.value is None:
        return Try(False, [], repr(ended.error))
    seconds = float(ended.value.seconds.min())
    problem = "" if 0 < seconds < time.perf_counter() - begin else f"{seconds} s"
    return Try(judge.right(ended.value) and not problem, judge.lost(folder), problem)


def interrupted(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """A job that gets Ctrl-C at a random moment, while processes of its own decode images for it."""
    process, pipe = start(job, folder, **judge.which)
    process.join(rng.uniform(0, judge.seconds))
    if process.is_alive():
        os.kill(process.pid, signal.SIGINT)
    ended = end(process, pipe)
    problem = "" if isinstance(ended.error, KeyboardInterrupt) or judge.right(ended.value) else repr(ended)
    return judged(judge, folder, problem)


CELL = """
import disturbed, pathlib
pathlib.Path({folder!r}).mkdir(exist_ok=True)
rows = disturbed.job(pathlib.Path({folder!r}))
"""


def interrupted_notebook(judge: Judge, folder: Path, rng: random.Random) -> Try:
    """The stop button of a notebook, at random moments; the same cell, executed again, goes on."""
    from jupyter_client.manager import start_new_kernel

    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython")}
    manager, client = start_new_kernel(kernel_name="python3", env=env)
    try:
        # Once undisturbed: a package whose import is interrupted is half there until the kernel starts anew.
        errors: list[Any] = []
        for warm in ("a", "b"):
            begin = time.perf_counter()
            cell = CELL.format(folder=str(folder / warm))
            client.execute_interactive(cell, timeout=120, output_hook=lambda _: None)
        seconds = time.perf_counter() - begin
        for _ in range(3):
            client.execute(CELL.format(folder=str(folder)))
            time.sleep(rng.uniform(0, seconds))
            manager.interrupt_kernel()
            with suppress(queue.Empty):  # a kernel interrupted just before or after a cell may forget to answer
                reply = client.get_shell_msg(timeout=20)["content"]
                errors += [reply] if reply["status"] == "error" else []
        reply = client.execute_interactive(CELL.format(folder=str(folder)), timeout=120, output_hook=lambda _: None)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    wrong = ["\n".join(error["traceback"]) for error in errors if error["ename"] != "KeyboardInterrupt"]
    return judged(judge, folder, "; ".join(wrong) or ("" if reply["content"]["status"] == "ok" else str(reply)))


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
    "read-only folder": (read_only, 6),
    "several jobs on one folder": (two_jobs, 8),
    "a job killed beside another": (a_job_killed_beside_another, 8),
    "NaN in the images": (partial(not_a_number, what="images"), 5),
    "NaN in the loss": (partial(not_a_number, what="loss"), 5),
    "NaN in a gradient": (partial(not_a_number, what="gradient"), 5),
    "out of memory": (out_of_memory, 5),
    "image file cut short or overwritten": (damaged_image, 8),
    "images replaced": (replaced_images, 8),
    "images mislabelled": (mislabelled_images, 5),
    "checkpoint damaged": (damaged_checkpoint, 15),
    "checkpoint of another config or version": (another_checkpoint, 8),
    "clock that jumps": (clock_jumps, 5),
    "Ctrl-C": (interrupted, 10),
    "Ctrl-C in a notebook": (interrupted_notebook, 5),
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
