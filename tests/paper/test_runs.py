"""Runs: their hashes, and rows that are stored, read again, stopped, damaged and made by several processes."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from emqlib import CoresetConfig, Dataset, QuantSpec, TrainConfig, evaluate, files, load_dataset
from emqlib.paper import experiments
from emqlib.paper.experiments import table1
from emqlib.paper.profiles import parameters
from emqlib.paper.runs import Run, checkpoint_file, coreset_rows, derived, provenance, rows_file, run_all, trained
from emqlib.train.checkpoint import OutOfTime

ROOT = Path(__file__).resolve().parents[2]


# Runs


def test_every_committed_record_is_of_a_run_of_today() -> None:
    """Its name is the hash of its configuration, written with the fields and the defaults that there are now."""
    p, paths = parameters(profile="small"), sorted((ROOT / "results/runs").glob("*.json"))
    listed = {run.hash for table in experiments.RUNS if table is not experiments.imagenet for run in table(p)}
    records = {path.stem: json.loads(path.read_text()) for path in paths if "-" not in path.stem}
    small = {name for name, record in records.items() if record["config"]["profile"] == "small"}  # else of a benchmark
    under_way = {run.hash for table in experiments.UNDER_WAY for run in table(p)}
    assert listed <= small <= listed | under_way and {path.stem.partition("-")[0] for path in paths} == set(records)
    for name, record in records.items():
        assert _of_today(record["config"]).hash == name == record["run"]


def _of_today(stored: dict[str, Any]) -> Run:
    """The run of a stored configuration; fields that there are no more are left out."""

    def known(owner: type, values: dict[str, Any]) -> dict[str, Any]:
        names = {field.name for field in fields(owner)}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}

    training, coreset = stored["config"], stored["config"]["coreset"]
    coreset = coreset and CoresetConfig(**known(CoresetConfig, coreset))
    config = TrainConfig(**known(TrainConfig, training | {"coreset": coreset}))
    own = known(Run, stored) | {"spec": QuantSpec(**known(QuantSpec, stored["spec"])), "config": config}
    return Run(**own | {"model_args": tuple(map(tuple, stored["model_args"]))})


BASE = Run(
    profile="small",
    dataset="cifar10",
    model="resnet8",
    spec=QuantSpec(bits=(2, 4, 8), weight="minmax"),
    config=TrainConfig(scheme="joint", coreset=CoresetConfig(score="tdds", how="sample")),
)


def test_the_hash_tells_every_field_apart() -> None:
    runs = [BASE]
    for path in ((), ("spec",), ("config",), ("config", "coreset")):
        for name in {field.name for field in fields(reduce(getattr, path, BASE))} - {"device"}:
            runs.append(copy.deepcopy(BASE))
            object.__setattr__(reduce(getattr, path, runs[-1]), name, "another")
    assert len({run.hash for run in runs}) == len(runs) > 40
    assert all(len(run.hash) == 12 and int(run.hash, 16) >= 0 for run in runs)


def test_the_hash_does_not_depend_on_the_device_or_on_numbers_types() -> None:
    decayed = [replace(BASE.config, weight_decay=number, device="cpu") for number in (1, 1.0)]
    assert len({replace(BASE, config=config).hash for config in decayed}) == 1
    assert replace(BASE, config=replace(BASE.config, device="cpu")).hash == BASE.hash
    assert replace(BASE, spec=replace(BASE.spec, bits=[8, 4, 2])).hash == BASE.hash


def test_an_option_of_a_later_version_renames_nothing() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(TrainConfig):
        novelty: float = 0.0

    later = Later(scheme="joint", coreset=BASE.config.coreset)
    assert replace(BASE, config=later).hash == BASE.hash
    assert replace(BASE, config=replace(later, novelty=1.0)).hash != BASE.hash


ALL = tuple(range(1, 9))


# Stored rows

TRAIN, TEST, EPOCHS = 40, 20, 2
TIMED = ["seconds"]  # columns that no two runs have in common


@pytest.fixture(scope="module", autouse=True)
def few_digits_on_one_thread() -> Iterator[None]:
    digits, threads = load_dataset("digits").subset(60, 30), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "emqlib.paper.runs.load_dataset",
            lambda name, **how: load_dataset(name, **how) if name == "imagenet" or any(how.values()) else digits,
        )
        yield
    torch.set_num_threads(threads)


def tiny_runs() -> list[Run]:
    """One of each method, one with coresets by score, and one on all images that there are."""
    plan = table1(parameters(profile="smoke", bits=(2, 4), pruning_rates=[0.5]))
    runs = [plan[0], *plan[3:-1]]  # not the last, whose scoring phase takes longer
    config = {"epochs": EPOCHS, "batch_size": TRAIN, "lr": 0.01}
    runs = [replace(r, subset=(TRAIN, TEST), config=replace(r.config, **config)) for r in runs]
    runs = [r if r.method == "Dedicated" else replace(r, eval_bits=(2, 3)) for r in runs]
    scored = replace(runs[1].config, coreset=CoresetConfig(score="el2n", pruning_rate=0.5, unbiased=True, how="sample"))
    return [*runs, replace(runs[1], config=scored), replace(runs[0], subset=(0, 0))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_all(tiny_runs(), folder, progress=False)


@pytest.fixture
def finished(undisturbed: tuple[Path, pd.DataFrame], tmp_path: Path) -> Path:
    """A folder of one's own with all runs finished."""
    return Path(shutil.copytree(undisturbed[0], tmp_path / "finished"))


def refuse_to_train(*_: object, **__: object) -> None:
    raise AssertionError("trained")


@pytest.fixture
def _read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emqlib.paper.runs.train", refuse_to_train)


def assert_same(rows: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(rows.drop(columns=TIMED), expected.drop(columns=TIMED), check_exact=True)


def test_one_file_a_run_with_its_coresets(undisturbed: tuple[Path, pd.DataFrame]) -> None:
    folder, rows = undisturbed
    names = [run.hash for run in tiny_runs()]
    assert {path.name for path in (folder / "runs").iterdir()} == {f"{name}.json" for name in names}
    assert list(rows.run.drop_duplicates()) == names
    for run in tiny_runs():
        record = json.loads(rows_file(run, folder).read_text())
        assert [epoch["epoch"] for epoch in record["history"]] == [1, 2]
        draws = record["coresets"]
        epochs = [] if not run.pruning_rate else [2] if run.config.coreset.score == "el2n" else [1, 2]
        assert sorted((d["epoch"], d["bits"]) for d in draws) == [(e, b) for e in epochs for b in run.spec.bits]
        assert all(d["size"] == sum(d["classes"]) == TRAIN // 2 for d in draws)
        assert all(0.5 <= d["union"] <= 1 and set(d["overlap"]) < {"2", "4"} for d in draws)


def test_a_row_a_draw_and_bit_width(undisturbed: tuple[Path, pd.DataFrame]) -> None:
    """As the stored record tells it: overlap and correlation as means over the other bit-widths, classes as shares."""
    folder, runs = undisturbed[0], [run for run in tiny_runs() if run.pruning_rate]
    rows = coreset_rows(runs, folder)
    draws = [(run, draw) for run in runs for draw in json.loads(rows_file(run, folder).read_text())["coresets"]]
    assert len(rows) == len(draws) > 0 and set(rows.coreset) == {run.coreset for run in runs}
    for row, (run, draw) in zip(rows.itertuples(), draws, strict=True):
        assert (row.run, row.epoch, row.bits, row.size) == (run.hash, draw["epoch"], draw["bits"], TRAIN // 2)
        assert row.overlap == pytest.approx(sum(draw["overlap"].values()) / len(draw["overlap"]))
        classes = (min(draw["classes"]) / row.size, max(draw["classes"]) / row.size)
        assert (row.rarest_class, row.commonest_class) == classes


@pytest.mark.parametrize(
    ("coreset", "name"),
    [
        (None, "full data"),
        (CoresetConfig(pruning_rate=0.0), "full data"),
        (CoresetConfig(), "RS2"),
        (CoresetConfig(pruning_rate=0.5), "RS2"),
        (CoresetConfig(resample_every=5), "RS2 every 5 epochs"),
        (CoresetConfig(across_bits="disjoint"), "RS2, across_bits=disjoint"),
        (CoresetConfig(resample_every=0), "random"),
        (CoresetConfig(score="tdds", pruning_rate=0.5, candidates=0.75), "tdds"),
        (CoresetConfig(score="el2n", how="sample", power=2), "el2n, how=sample, power=2.0"),
        (CoresetConfig(score="tdds", how="sample", unscored=True, power=2), "tdds, sample of all, power=2.0"),
    ],
)
def test_the_name_of_a_coreset(coreset: CoresetConfig | None, name: str) -> None:
    run = replace(BASE, config=TrainConfig(coreset=coreset))
    assert run.coreset == name


def test_rows(undisturbed: tuple[Path, pd.DataFrame]) -> None:
    """A row a bit-width and adaptation; a switchable norm serves the other bit-widths only once adapted."""
    _, rows = undisturbed
    for run, (name, part) in zip(tiny_runs(), rows.groupby("run", sort=False), strict=True):
        served = run.spec.bits if run.spec.norm == "switchable" else run.eval_bits
        expected = [(b, False) for b in served] + [(b, True) for b in run.eval_bits]
        assert name == run.hash
        assert list(zip(part.bits, part.adapted, strict=True)) == expected
        assert list(part.trained) == [b in run.spec.bits for b, _ in expected]
        names = ["method", "scheme", "norm", "correction", "pruning_rate", "seed", "epochs", "coreset", "batch_size"]
        asked = part[names].drop_duplicates()
        correction = run.spec.correction if run.spec.correction_gradient else "mean_var, no gradient"
        values = (run.method, run.config.scheme, run.spec.norm, correction, run.pruning_rate, 0, EPOCHS)
        assert [tuple(row) for row in asked.to_numpy()] == [(*values, run.coreset, TRAIN)]
        adapted = TRAIN if run.subset[0] else 60  # images a bit-width adapts to
        scoring = (run.config.coreset.candidates, run.config.coreset.warmup) if run.pruning_rate else (1.0, 0)
        names, bits = ["candidates", "scoring_epochs", "trained_bits", "n_train"], " ".join(map(str, run.spec.bits))
        assert [tuple(row) for row in part[names].drop_duplicates().to_numpy()] == [(*scoring, bits, adapted)]
        assert list(part.calibration_passes) == [adapted * adaptation for _, adaptation in expected]
        assert set(part.n) == {TEST if run.subset[1] else 30}
    assert rows.top1.between(0, 100).all() and not rows.drop(columns="commit").isna().any(axis=None)


def test_cost_in_closed_form(undisturbed: tuple[Path, pd.DataFrame]) -> None:
    costs = undisturbed[1].drop_duplicates("run")
    children = 2
    half = children * TRAIN // 2
    scored = (children * TRAIN + half) // 2  # the first of two epochs scores all images
    passes = [children * TRAIN, half, children * TRAIN, TRAIN, TRAIN, half, scored, children * 60]
    assert list(costs.sample_passes) == [EPOCHS * n for n in passes]
    assert list(costs.scoring_passes) == [0] * 6 + [children * TRAIN, 0]
    steps = [children, children, 1, 1, 1, children, children, children * 2]
    assert list(costs.steps) == [EPOCHS * n for n in steps]
    assert (costs.seconds > 0).all()


def test_provenance(undisturbed: tuple[Path, pd.DataFrame]) -> None:
    _, rows = undisturbed
    one = rows[["profile", "python", "torch", "device", "dataset", "model"]].drop_duplicates()
    versions = (".".join(map(str, sys.version_info[:3])), torch.__version__)
    expected = ("smoke", *versions, f"cpu, {torch.get_num_threads()} threads", "digits", "resnet8")
    assert [tuple(row) for row in one.to_numpy()] == [expected]
    digits = load_dataset("digits").subset(60, 30)
    sums = {digits.sha256, digits.subset(TRAIN, TEST).sha256}
    assert set(rows.data_sha256) == sums and len(sums) == 2


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit_and_dirty(root: Path) -> tuple[str, bool]:
        monkeypatch.setattr(files, "CHECKOUT", root)
        found = provenance(load_dataset("digits"), torch.device("cpu"))
        return found["commit"], found["dirty"]

    (tmp_path / "emqlib").mkdir()
    (tmp_path / "emqlib/a.py").touch()
    assert commit_and_dirty(tmp_path) == ("", False)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    assert commit_and_dirty(tmp_path) == ("", True)  # nothing committed yet
    git(tmp_path, "commit", "--message", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert len(commit) == 40 and commit_and_dirty(tmp_path) == (commit, False)
    (tmp_path / "notes.txt").touch()
    assert commit_and_dirty(tmp_path) == (commit, False)
    (tmp_path / "emqlib/a.py").write_text("1")
    assert commit_and_dirty(tmp_path) == (commit, True)
    # installed into an environment that lies inside somebody else's checkout
    assert commit_and_dirty(tmp_path / "emqlib") == ("", False)


def test_a_derived_table_is_kept_with_what_it_is_of(finished: Path) -> None:
    run = tiny_runs()[1]
    rows_file(run, finished).unlink()  # the network is in its checkpoint
    table = pd.DataFrame({"layer": ["a", "b"], "value": [0.1, 1e-30]})
    part = finished / f"runs/.{run.hash}-name.json.half.tmp"
    part.write_text("of a killed process")
    kept = derived(run, "name", finished, lambda *_: table)
    assert not part.exists()
    pd.testing.assert_frame_equal(kept, derived(run, "name", finished, refuse_to_train), check_exact=True)
    pd.testing.assert_frame_equal(kept[["layer", "value"]], table, check_exact=True)
    asked = {"method": "Ours", "dataset": "digits", "model": "resnet8", "trained_with": "mean_var"}
    asked |= {"trained_bits": "2 4"}
    asked |= {"epochs": EPOCHS, "seed": 0, "profile": "smoke", "run": run.hash}
    asked |= provenance(load_dataset("digits").subset(60, 30).subset(TRAIN, TEST), torch.device("cpu"))
    assert kept.drop(columns=["layer", "value"]).to_dict("records") == [asked] * 2
    assert (finished / f"runs/{run.hash}-name.json").read_text().endswith("}\n")


def test_a_trained_network_comes_from_its_checkpoint(finished: Path, undisturbed: tuple[Path, pd.DataFrame]) -> None:
    """The very network that gave the rows, without another step."""
    run, rows = tiny_runs()[1], undisturbed[1]
    before = checkpoint_file(run, finished).stat().st_mtime_ns
    model, data = trained(run, finished, progress=False)
    expected = rows[(rows.run == run.hash) & ~rows.adapted]
    found = evaluate(model, data, bits=run.eval_bits)
    assert found.loss.tolist() == expected.loss.tolist() and len(data.train) == TRAIN
    assert checkpoint_file(run, finished).stat().st_mtime_ns == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"table": {}}', '{"table": {"a": [1], "b": []}, "asked": {}}'])
def test_a_damaged_table_of_a_run_is_named(content: str, tmp_path: Path) -> None:
    run = tiny_runs()[0]
    path = tmp_path / "runs" / f"{run.hash}-name.json"
    path.parent.mkdir()
    path.write_text(content)
    for each_epoch in (False, True):
        with pytest.raises(ValueError, match=r"^results_dir='.*-name\.json': expected a whole table of a run, or none"):
            derived(run, "name", tmp_path, refuse_to_train, each_epoch)
    assert path.read_text() == content


def test_what_is_measured_after_each_epoch_goes_on_after_an_interruption(tmp_path: Path) -> None:
    run, seen = tiny_runs()[0], []

    def measure(model: nn.Module, _: Dataset) -> pd.DataFrame:
        seen.append(float(model.fc.weight.detach().norm()))
        if interrupted and len(seen) == 3:
            raise KeyboardInterrupt
        return pd.DataFrame({"norm": seen[-1:]})

    interrupted = False
    undisturbed = derived(run, "norm", tmp_path / "undisturbed", measure, each_epoch=True)
    assert undisturbed.epoch.tolist() == [0, 1, 2] and undisturbed.norm.tolist() == seen and len(set(seen)) == 3
    seen.clear()
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        derived(run, "norm", tmp_path, measure, each_epoch=True)
    again = derived(run, "norm", tmp_path, measure, each_epoch=True)
    pd.testing.assert_frame_equal(again, undisturbed, check_exact=True)
    assert len(seen) == 5  # the first epoch was not trained again


@pytest.mark.usefixtures("_read_alone")
def test_a_second_call_trains_nothing(
    finished: Path, undisturbed: tuple[Path, pd.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_all(tiny_runs(), str(finished), progress=False)
    pd.testing.assert_frame_equal(rows, undisturbed[1], check_exact=True)
    assert capsys.readouterr() == ("", "")
    some = run_all(iter(tiny_runs()[2:3]), finished)
    assert set(some.method) == {"Any-Precision"}
    assert capsys.readouterr() == ("", "")  # no bar for what is only read


@pytest.mark.parametrize("checkpoint", ["kept", "deleted"])
def test_a_deleted_run_alone_is_run_again(
    finished: Path, undisturbed: tuple[Path, pd.DataFrame], checkpoint: str
) -> None:
    run = tiny_runs()[1]
    rows, state = rows_file(run, finished), checkpoint_file(run, finished)
    others = {path: path.stat().st_mtime_ns for path in (finished / "runs").iterdir() if path != rows}
    rows.unlink()
    if checkpoint == "deleted":
        state.unlink()
    before = state.stat().st_mtime_ns if state.exists() else 0
    assert_same(run_all(tiny_runs(), finished, progress=False), undisturbed[1])
    assert rows.exists() and (state.stat().st_mtime_ns == before) == (checkpoint == "kept")
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())


def test_slices_of_any_length_lead_to_the_same_rows(undisturbed: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    """Each call makes some progress, however short its budget, and goes on where the one before has stopped."""
    runs, finished = tiny_runs()[:3], []
    with pytest.raises(OutOfTime, match=r"^0 of 3 runs finished, of the next one .*; time is up, call again to go on$"):
        run_all(runs, tmp_path, progress=False, budget=1e-9)
    for _ in range(40):
        try:
            rows = run_all(runs, tmp_path, progress=False, budget=1e-9)
            break
        except OutOfTime:
            finished.append(len(list((tmp_path / "runs").glob("*.json"))))
    assert finished == sorted(finished) and {1, 2} <= set(finished)
    assert_same(rows, undisturbed[1][: len(rows)])


def edit(run: Run, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = rows_file(run, folder)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.usefixtures("_read_alone")
def test_rows_of_another_config_or_of_other_images_are_refused(finished: Path) -> None:
    """As when a default changes, which the hash does not show, or a file of the data set."""
    first, second = tiny_runs()[:2]
    path = edit(first, finished, lambda record: record["provenance"].update(data_sha256="0" * 64))
    with pytest.raises(ValueError, match=rf"^dataset='digits': expected rows of the same images as runs/{path.name}"):
        run_all(tiny_runs(), finished, progress=False)
    rows_file(second, finished).unlink()
    with pytest.raises(
        ValueError, match=rf"^dataset='digits': .* as the images there are now, unlike runs/{path.name}"
    ):
        run_all([first, second], finished, progress=False)
    path = edit(first, finished, lambda record: record["config"]["config"].update(momentum=0.5))
    with pytest.raises(ValueError, match=rf"^results_dir='{path}': .*config\.momentum was 0\.5"):
        run_all(tiny_runs(), finished, progress=False)


@pytest.mark.usefixtures("_read_alone")
def test_rows_of_another_device_or_another_version_are_taken(finished: Path) -> None:
    first = tiny_runs()[0]
    edit(first, finished, lambda record: record["config"]["config"].update(device="cuda:1"))
    edit(first, finished, lambda record: record["config"]["config"].pop("compile"))  # there was no such option
    edit(first, finished, lambda record: record["config"]["config"].update(another=3))  # nor is there one any more
    assert len(run_all([first], finished, progress=False)) == 4


PARTS_OF_A_RECORD = ["config", "provenance", "history", "rows", "calibration_passes"]


@pytest.mark.usefixtures("_read_alone")
@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"config": 3}', *PARTS_OF_A_RECORD])
def test_a_damaged_record_is_refused(broken: bytes | str, finished: Path) -> None:
    """Also when an earlier run is still to be trained: nothing starts before all that is stored has been read."""
    rows_file(tiny_runs()[0], finished).unlink()
    last = tiny_runs()[-1]
    if isinstance(broken, str):
        edit(last, finished, lambda record: record.pop(broken))
        reason = f".*{broken}"
    else:
        rows_file(last, finished).write_bytes(broken)
        reason = ""
    with pytest.raises(
        ValueError, match=rf"^results_dir='{rows_file(last, finished)}': expected a whole record{reason}"
    ):
        run_all(tiny_runs(), finished, progress=False)
