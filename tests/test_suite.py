"""All results by one command: what notebooks need, side by side, stopped, failed, and what is deleted made anew."""

import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tqdm import tqdm

from emqlib import OutOfTime, experiments, runs, suite
from emqlib.checkpoints import Deadline
from emqlib.profiles import Parameters, parameters

pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parameters:
    """The smoke profile, on a few images for an epoch, by forked processes: those of a user take seconds to start."""
    monkeypatch.setattr(suite, "get_context", lambda _: multiprocessing.get_context("fork"))
    p = parameters(profile="smoke", bits=(2, 4), results_dir=tmp_path)
    short = replace(p.profile.training, epochs=1)
    return replace(p, profile=replace(p.profile, training=short, subset=(60, 30)))


def train_all(p: Parameters, asked: list[runs.Run], budget: float | None = None, jobs: int = 2) -> str:
    """What the line of progress says at the end."""
    with tqdm(total=10**9, file=io.StringIO()) as bar:
        suite._train_all(asked, p, jobs, Deadline(budget), bar)
        return bar.postfix


def test_every_notebook_finds_its_runs_and_every_table_its_notebook() -> None:
    assert list(suite.NOTEBOOKS) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert {f for tables in suite.NOTEBOOKS.values() for f in tables} == set(experiments.RUNS)
    for name, tables in suite.NOTEBOOKS.items():
        cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]
        source = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        called = set(re.findall(r"experiments\.(\w+)\(p\)", source)) - {"run_all"}
        studied = "studies." in source
        assert called <= {f.__name__ for f in tables} and (studied or len(called) == len(tables)), name


def test_runs_that_notebooks_share_are_listed_once() -> None:
    p = parameters(profile="small")
    both = suite.needed(["01_cifar10", "08_activation_distributions"], p)
    assert both == suite.needed(["01_cifar10"], p) and len(set(both)) == len(both)
    with pytest.raises(ValueError, match=r"^notebook='01': expected one of 00_quickstart, "):
        suite.needed(["01"], p)


def test_the_passes_that_progress_counts_are_those_of_the_rows(few: Parameters) -> None:
    asked = [*experiments.corrected_or_not(few), experiments.any_precision(experiments.base(few, 0, "digits"))]
    rows = runs.run_all(asked, few.results_dir, progress=False).drop_duplicates("run")
    assert rows.sample_passes.tolist() == [suite._passes(run) for run in asked] == [2 * 60] * 3
    longer = replace(asked[0], config=replace(asked[0].config, epochs=6), subset=(10000, 0))
    pruned = experiments.ours(longer, experiments.bitwise_coreset(0.8))
    assert suite._passes(pruned) == pytest.approx(2 * 10000 * (3 * 0.8 / 3 + 3 * 0.2))


def test_what_is_deleted_is_run_again_alone_and_gives_the_same_rows(few: Parameters) -> None:
    asked = experiments.corrected_or_not(few)
    assert train_all(few, asked) == "2 of 2 runs"
    files = [runs.rows_file(run, few.results_dir) for run in asked]
    before, kept = [json.loads(file.read_text()) for file in files], files[0].stat().st_mtime_ns
    files[1].unlink()
    runs.checkpoint_file(asked[1], few.results_dir).unlink()
    assert train_all(few, asked) == "2 of 2 runs"
    assert files[0].stat().st_mtime_ns == kept
    again = json.loads(files[1].read_text())
    timed = [{k: v for k, v in epoch.items() if k != "seconds"} for r in (before[1], again) for epoch in r["history"]]
    assert timed[: len(timed) // 2] == timed[len(timed) // 2 :] and len(timed) == 2
    assert {k: v for k, v in again.items() if k != "history"} == {k: v for k, v in before[1].items() if k != "history"}


def test_slices_of_any_length_lead_to_the_end(few: Parameters) -> None:
    asked, calls = [experiments.ours(experiments.base(replace(few, bits=(4,)), 0, "digits"))], 0
    while True:
        calls += 1
        assert calls < 10
        try:
            train_all(few, asked, budget=0.001, jobs=1)
            break
        except OutOfTime:
            assert len(list((few.results_dir / "checkpoints").glob("*.safetensors"))) >= 1
    assert calls == 2  # two steps, and what is evaluated is a step forward


def test_a_run_that_fails_ends_the_others_and_is_told(few: Parameters, capfd: pytest.CaptureFixture[str]) -> None:
    lost = replace(experiments.base(few, 0, "digits"), dataset="imagefolder:/nowhere/at/all")
    with pytest.raises(ChildProcessError, match="its error stands above"):
        train_all(few, [lost, *experiments.corrected_or_not(few)], jobs=1)
    assert "/nowhere/at/all" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--budget", "0"], r"^budget=0\.0: expected a number of seconds > 0"),
        (["--jobs", "0"], r"^jobs=0: expected"),
        (["13_more"], r"^notebook='13_more': expected one of"),
    ],
)
def test_wrong_arguments(arguments: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        suite.main([*arguments, "--profile", "smoke"])


def test_without_imagenet_its_notebook_is_said_not_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMQ_DATA", str(tmp_path))
    assert suite.main(["03_imagenet", "--profile", "small"]) == 0
    assert capsys.readouterr().out.startswith("03_imagenet: not run, there is no ImageNet here")


def test_a_call_makes_rows_tables_and_executed_notebooks(checkout: Path) -> None:
    """The README's command, for one notebook, with the programs that are there."""
    pytest.importorskip("nbconvert")
    shutil.rmtree(checkout / "build", ignore_errors=True)
    command = [sys.executable, "-m", "emqlib.suite", "00_quickstart", "--profile", "smoke"]
    if shutil.which("make") and Path(sys.prefix, "bin/python").exists():
        command = ["make", "results", "PROFILE=smoke", "ONLY=00_quickstart", "-o", "install", f"VENV={sys.prefix}"]
    stored = (checkout / "notebooks/00_quickstart.ipynb").read_bytes()
    asked = {"cwd": checkout, "env": os.environ | {"PYTHONPATH": str(checkout)}, "capture_output": True, "text": True}
    done = subprocess.run(command, **asked)
    assert done.returncode == 0, done.stderr
    made = checkout / "build/smoke"
    assert len(list((made / "runs").glob("*.json"))) == 2
    assert "1 notebooks" in done.stdout and "results, smoke: 100%" in done.stderr
    executed = made / "smoke/00_quickstart.ipynb"
    assert outputs(executed) and not any(out["output_type"] == "stream" for out in outputs(executed))
    assert len(pd.read_csv(made / "smoke/00_quickstart.csv")) == 2 * 2 * 8
    assert (checkout / "notebooks/00_quickstart.ipynb").read_bytes() == stored


def outputs(path: Path) -> list[dict[str, Any]]:
    return [out for cell in json.loads(path.read_text())["cells"] for out in cell.get("outputs", [])]
