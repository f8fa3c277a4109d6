"""A fault of each kind, in real processes, as `make faults` tries all of them many times over; and the judge itself."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import faults
import pandas as pd
import pytest
from disturbed import Judge, Try, call, job
from faults import FAULTS, STREAMED

ROOT = Path(__file__).resolve().parents[2]
# One for each thing that can go wrong with what is kept: in work, half written, written and not told, no room, several
# at work, not a number, damaged, interrupted.
SAMPLE = (
    "killed in a step of training",
    "killed writing a checkpoint",
    "killed after a record is written",
    "disk full",
    "several jobs on one folder",
    "NaN in a gradient",
    "checkpoint damaged",
    "Ctrl-C",
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge.of(tmp_path_factory.mktemp("faults") / "undisturbed")


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return faults.streamed(tmp_path_factory.mktemp("streamed"))


@pytest.mark.parametrize("name", SAMPLE)
def test_nothing_is_lost_and_the_next_call_goes_on(name: str, judge: Judge, tmp_path: Path) -> None:
    found = faults.tried(FAULTS[name][0], judge, tmp_path / "try", 0)
    assert found.survived and not found.lost, found.told


def test_nothing_is_lost_while_processes_decode(streaming: Judge, tmp_path: Path) -> None:
    found = faults.tried(STREAMED["killed while processes decode"][0], streaming, tmp_path / "try", 0)
    assert found.survived and not found.lost, found.told


# The judge sees what is lost: without this, a report of nothing lost would say nothing


@pytest.fixture(scope="module")
def ended(judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a job has ended."""
    folder = tmp_path_factory.mktemp("ended")
    assert judge.right(call(job, folder).value) and not judge.lost(folder)
    assert not judge.right(pd.concat([judge.rows, judge.rows[:1]])) and judge.right(judge.rows.assign(seconds=3))
    return folder


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        (None, ".json: gone"),
        *((lambda text, end=end: text[:end], ".json: other rows") for end in (0, 1, 500)),
        (lambda text: text.replace('"rows": [', '"rows": [{"top1": 1.25},'), ".json: other rows"),
        (lambda text: re.sub(r'"top1": [\d.]+', '"top1": 1.25', text, count=1), ".json: other rows"),
    ],
)
def test_the_judge_sees_a_record_that_is_not_whole(
    change: Callable[[str], str] | None, loss: str, judge: Judge, ended: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(ended, tmp_path / "done")
    path = next((folder / "results/runs").glob("*.json"))
    text = path.read_text()
    path.unlink()
    if change is not None:
        path.write_text(change(text))
    assert f"{path.stem}{loss}" in judge.lost(folder)


def test_the_judge_misses_an_epoch_and_sees_a_damaged_checkpoint(judge: Judge, ended: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ended, tmp_path / "done")
    first, second = sorted((folder / "results/checkpoints").glob("[!.]*"))
    with (folder / "log").open("a") as log:
        log.write(f"checkpoint {second.stem} 99\n")
    (loss,) = judge.lost(folder)
    assert loss.startswith(f"{second.name}: [")
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    lost = judge.lost(folder)
    assert len(lost) == 2 and any(first.name in loss for loss in lost) and any(second.name in loss for loss in lost)


def test_a_try_that_fails_is_no_survival(judge: Judge, tmp_path: Path) -> None:
    def fails(*_: object) -> Try:
        raise RuntimeError("the fault itself")

    found = faults.tried(fails, judge, tmp_path / "try", 0)
    assert not found.survived and "the fault itself" in found.told


# The report


def test_the_report_is_of_these_faults_and_nothing_is_lost() -> None:
    """A report of an earlier version may have had more of them."""
    rows = pd.read_csv(ROOT / "results/reliability/faults.csv")
    assert {*FAULTS, *STREAMED} <= set(rows.fault)
    assert (rows.survived == rows.tries).all() and (rows.lost == 0).all()
    killed = rows[rows.fault.str.startswith("killed")].tries.sum()
    assert killed >= 50 and rows.commit.str.fullmatch("[0-9a-f]{40}").all() and not rows.dirty.any()
    last = (ROOT / "results/reliability/faults.md").read_text().splitlines()[-1]
    assert re.findall(r"\d+", last) == [str(rows[name].sum()) for name in ("tries", "survived", "lost")]
