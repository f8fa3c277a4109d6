"""Experiments: runs by their hashes, stored rows by stopping and damaging."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from emqlib import (
    CoresetConfig,
    Dataset,
    OutOfTime,
    QuantSpec,
    TrainConfig,
    checkpoints,
    evaluate,
    experiments,
    files,
    load_dataset,
    studies,
    training,
)
from emqlib.analysis import BINS, SPAN
from emqlib.derived import derived, followed
from emqlib.experiments import UNCALIBRATED, bias_correction, quickstart, table1
from emqlib.profiles import PROFILES, Parameters, parameters
from emqlib.remedies import ACTIVATIONS, RULES
from emqlib.runs import Run, build, provenance, run_all, trained
from emqlib.transfer import gradient_angles


@pytest.fixture(autouse=True)
def no_profile_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMQ_PROFILE", raising=False)


# Runs

FIRST_SEED_OF_TABLE_1 = (
    "310b733c47db e7a75a11dd10 4475910614e9 096838ac6c01 1ec707025621 "
    "8158a74d4c1b 2b56b65dfa14 8f6781d77b00 88b899474a7d c76018ead9af"
)


def test_finished_runs_keep_their_names() -> None:
    """results/runs holds files of these names: with another hash they would all be trained again."""
    runs = table1(parameters(profile="small", bits=(2, 4, 8)))
    assert [run.hash for run in runs[:10]] == FIRST_SEED_OF_TABLE_1.split()
    assert len({run.hash for run in runs}) == len(runs)


CHANGED: dict[type, dict[str, Any]] = {
    Run: {
        "profile": "other",
        "dataset": "cifar100",
        "model": "resnet20",
        "spec": QuantSpec(bits=(1,)),
        "config": TrainConfig(epochs=1),
        "model_args": (("width", 8),),
        "subset": (100, 100),
        "eval_bits": (2, 4),
        "image_size": 64,
        "stream": True,
    },
    QuantSpec: {
        "bits": (2, 4),
        "weight": "lsq",
        "activation": "pact",
        "correction": "none",
        "norm": "switchable",
        "full_precision": ("first",),
        "zero_level": True,
        "correction_gradient": False,
        "activation_range": "unit",
        "output_correction": True,
    },
    TrainConfig: {
        "scheme": "bitwise",
        "epochs": 5,
        "batch_size": 64,
        "accumulate": 2,
        "optimizer": "adamw",
        "lr": 0.2,
        "momentum": 0.8,
        "nesterov": False,
        "weight_decay": 0.0,
        "schedule": "step",
        "milestones": (1,),
        "gamma": 0.2,
        "warmup_epochs": 1.0,
        "label_smoothing": 0.1,
        "clip_grad_norm": 1.0,
        "distillation": True,
        "autocast": "bfloat16",
        "channels_last": False,
        "compile": True,
        "seed": 1,
        "coreset": None,
    },
    CoresetConfig: {
        "score": "el2n",
        "pruning_rate": 0.5,
        "resample_every": 2,
        "scoring_epochs": 5,
        "scoring": "joint",
        "candidates": 0.5,
        "window": 4,
        "decay": 0.8,
        "rescore": True,
        "how": "ccs",
        "power": 2.0,
        "unscored": True,
        "cut": 0.1,
        "balanced": True,
        "across_bits": "identical",
        "unbiased": True,
        "max_weight": 3.0,
        "full_epochs": 1,
    },
}
BASE = Run(
    profile="small",
    dataset="cifar10",
    model="resnet8",
    spec=QuantSpec(bits=(2, 4, 8), weight="minmax"),
    config=TrainConfig(scheme="joint", coreset=CoresetConfig(score="tdds", how="sample")),
)


def changed(owner: type, name: str, value: object) -> Run:
    if owner is Run:
        return replace(BASE, **{name: value})
    if owner is QuantSpec:
        return replace(BASE, spec=replace(BASE.spec, **{name: value}))
    if owner is TrainConfig:
        return replace(BASE, config=replace(BASE.config, **{name: value}))
    coreset = replace(BASE.config.coreset, **{name: value})
    return replace(BASE, config=replace(BASE.config, coreset=coreset))


def test_the_hash_tells_every_field_apart() -> None:
    named = {(owner, field.name) for owner in CHANGED for field in fields(owner)}
    assert named - {(TrainConfig, "device")} == {(owner, name) for owner, values in CHANGED.items() for name in values}
    runs = [changed(owner, name, value) for owner, values in CHANGED.items() for name, value in values.items()]
    assert len({run.hash for run in [BASE, *runs]}) == len(runs) + 1
    assert all(len(run.hash) == 12 and int(run.hash, 16) >= 0 for run in runs)


def test_the_hash_does_not_depend_on_the_device_or_on_numbers_types() -> None:
    assert changed(TrainConfig, "device", "cpu").hash == BASE.hash
    assert changed(TrainConfig, "weight_decay", 1).hash == changed(TrainConfig, "weight_decay", 1.0).hash
    assert changed(QuantSpec, "bits", [8, 4, 2]).hash == BASE.hash


def test_an_option_of_a_later_version_renames_nothing() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(TrainConfig):
        novelty: float = 0.0

    later = Later(scheme="joint", coreset=BASE.config.coreset)
    assert replace(BASE, config=later).hash == BASE.hash
    assert replace(BASE, config=replace(later, novelty=1.0)).hash != BASE.hash


@pytest.mark.parametrize("value", [(), (9,), (2, 2), None, "2,4", [True]])
def test_wrong_eval_bits(value: object) -> None:
    with pytest.raises(ValueError, match=r"^eval_bits=.*expected bit-widths out of 1 to 8 and 32"):
        replace(BASE, eval_bits=value)


ALL = tuple(range(1, 9))


def test_table1() -> None:
    runs = table1(parameters(profile="small", bits="[2,4]", repeats=2, pruning_rates="[0.8, 0]"))
    expected = [
        ("Ours", "bitwise", "none", "shared", 0.0, (2, 4), ALL),
        ("Ours", "bitwise", "mean", "shared", 0.0, (2, 4), ALL),
        ("Ours", "bitwise", "mean_var", "shared", 0.0, (2, 4), ALL),
        ("Ours", "bitwise", "mean_var", "shared", 0.8, (2, 4), ALL),
        ("Any-Precision", "joint", "none", "switchable", 0.0, (2, 4), ALL),
        ("Dedicated", "dedicated", "none", "shared", 0.0, (2,), (2,)),
        ("Dedicated", "dedicated", "none", "shared", 0.0, (4,), (4,)),
        ("Ours", "bitwise", "mean_var", "shared", 0.8, (2, 4), ALL),  # without gradient, at the middle one of the rates
        ("Ours", "bitwise", "mean_var", "shared", 0.8, (2, 4), ALL),  # by importance
    ]
    settings = [(r.method, r.config.scheme, r.spec.correction, r.spec.norm, r.pruning_rate) for r in runs]
    found = [(*setting, r.spec.bits, r.eval_bits) for setting, r in zip(settings, runs, strict=True)]
    assert found == expected * 2
    assert [r.config.seed for r in runs] == [0] * 9 + [1] * 9
    assert [r.spec.correction_gradient for r in runs] == [*[True] * 7, False, True] * 2
    assert [r.coreset for r in runs if r.pruning_rate] == ["RS2", "RS2", "tdds"] * 2
    assert {r.config.distillation for r in runs if r.method == "Any-Precision"} == {True}
    assert {r.config.distillation for r in runs if r.method != "Any-Precision"} == {False}
    assert {(r.dataset, r.model, r.model_args) for r in runs} == {("cifar10", "resnet8", (("width", 16),))}


def test_the_rates_of_table1() -> None:
    runs = table1(parameters(profile="small", repeats=1))
    assert [run.pruning_rate for run in runs] == [0, 0, 0, 0.5, 0.8, 0.9, 0, 0, 0, 0, 0.8, 0.5, 0.8, 0.9]


def test_a_notebooks_coresets() -> None:
    """Scoring costs each bit-width three epochs of 4/3 of its coreset; nothing is pruned at a rate of 0."""
    assert experiments.bitwise_coreset(0.0) is None
    coreset = experiments.bitwise_coreset(0.8, how="sample")
    assert (coreset.score, coreset.how, coreset.pruning_rate, coreset.warmup) == ("tdds", "sample", 0.8, 3)
    assert coreset.candidates == pytest.approx(0.8 / 3) and experiments.bitwise_coreset(0.1).candidates == 1
    assert experiments.bitwise_coreset(0.8, candidates=1.0).candidates == 1


def test_curves_share_their_first_runs_with_table_1() -> None:
    """At other lengths only trained bit-widths are evaluated."""
    p = parameters(profile="small", pruning_rates=[0.8], lengths=[4, 6], repeats=2)
    runs = experiments.curves(p)
    asked = [(run.config.epochs, run.config.seed, run.method, run.pruning_rate, run.eval_bits) for run in runs]
    methods = [("Any-Precision", 0), ("Ours", 0), ("Ours", 0.8), ("Ours, own statistics", 0.8)]
    expected = [(epochs, seed, *method) for epochs, seed in ((4, 0), (4, 1), (6, 0), (6, 1)) for method in methods]
    assert asked == [(*setting, ALL if setting[0] == 4 else (2, 4, 8)) for setting in expected]
    paper = {run.hash for run in runs if run.config.epochs == 4 and run.spec.norm != "shared_affine"}
    assert paper <= {run.hash for run in table1(p)}


def test_what_is_tried_against_the_loss_at_equal_epochs() -> None:
    p = parameters(profile="small", lengths=[4, 6], repeats=2)
    runs = experiments.equal_epochs(p)
    assert len({run.hash for run in runs}) == len(runs)
    assert [(run.config.seed, run.dataset) for run in runs] == [(seed, "cifar10") for seed in (0, 1) for _ in range(11)]
    assert [run.config.epochs for run in runs] == [*[6] * 6, *[4] * 5] * 2
    asked = [(run.method, run.coreset, run.pruning_rate, run.config.batch_size) for run in runs]
    own, drawn = "Ours, own statistics", "tdds, sample of all"
    assert (
        asked
        == [
            ("Any-Precision", "full data", 0, 128),
            *(("Ours", "tdds", 0.8, size) for size in (128, 32)),
            *((own, name, 0.8, 64) for name in (drawn, "el2n, how=sample", "RS2")),
            ("Any-Precision", "full data", 0, 128),
            *((own, name, 0.8, 64) for name in (drawn, "el2n, how=sample")),
            ("Any-Precision", "full data", 0, 64),
            (own, "el2n, how=sample, power=0.0", 0.8, 64),
        ]
        * 2
    )
    assert {runs[i].hash for i in (0, 1, 3, 6, 7)} <= {run.hash for run in experiments.curves(p)}


def test_every_score_is_compared_at_the_middle_rate() -> None:
    p = parameters(profile="small", pruning_rates=[0.5, 0.8, 0.9], seed=3, repeats=1)
    runs = experiments.comparison(p)
    always = {"random", "RS2", "tdds", "el2n", "tdds, how=sample"}
    names = {rate: {run.coreset for run in runs if run.pruning_rate == rate} for rate in p.pruning_rates}
    assert names == {0.5: always, 0.8: always | {"entropy", "forgetting", "grand", "moderate"}, 0.9: always}
    assert {(run.subset, run.eval_bits) for run in runs} == {((10000, 5000), (2, 4, 8))}
    longer = [run for run in runs if run.config.epochs != 8]
    assert [(run.config.epochs, run.coreset, run.pruning_rate) for run in longer] == [(9, "RS2", r) for r in names]
    assert len({run.hash for run in runs}) == len(runs) and {run.config.seed for run in runs} == {3}


def test_the_ablation_changes_one_thing_at_a_time() -> None:
    """From the first run; those across bit-widths and by joint scoring, from the one with all candidates."""
    runs = experiments.scoring_ablation(parameters(profile="small", repeats=1))
    differences = [_differing(runs[0], run) for run in runs]
    assert len({run.hash for run in runs}) == len(runs) and differences[0] == set()
    alone = [names for names in differences if len(names) == 1]
    changed = ("how", "balanced", "full_epochs", "candidates", "batch_size", "lr", "weight_decay")
    assert sorted(name for names in alone for name in names) == sorted(changed)
    whole = next(run for run in runs if _differing(runs[0], run) == {"candidates"})
    ways = [run for run in runs if run.config.coreset.score == "tdds" and run.config.coreset.candidates == 1]
    assert [_differing(whole, run) for run in ways] == [
        {"how", "unbiased"},
        {"scoring"},
        {"across_bits"},
        set(),
        {"across_bits"},
    ]


def _differing(run: Run, other: Run) -> set[str]:
    parts = [(run.config, other.config), (run.config.coreset, other.config.coreset)]
    names = {f.name for a, b in parts for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}
    return names - {"coreset"}


def test_table2() -> None:
    runs = experiments.table2(parameters(profile="small", pruning_rates=[0.6], seed=1, repeats=1))
    methods = [("Any-Precision", 0), ("Ours", 0.6)]
    expected = [(name, *method) for name in ("cifar100", "tinyimagenet") for method in methods]
    assert [(run.dataset, run.method, run.pruning_rate) for run in runs] == expected


def test_growth_is_over_the_bit_widths_asked_for_first() -> None:
    runs = experiments.growth(parameters(profile="smoke", bits=(3, 5)))
    shared = [(run.spec.bits, run.method, run.coreset) for run in runs if run.method != "Dedicated"]
    kinds = [("Any-Precision", "full data"), ("Ours", "full data"), ("Ours", "tdds")]
    assert shared == [(bits, *kind) for bits in ((3, 5), (2, 3, 5)) for kind in kinds]
    assert [run.spec.bits for run in runs if run.method == "Dedicated"] == [(3,), (5,), (2,), (3,), (5,)]
    assert {run.eval_bits for run in runs if run.method != "Dedicated"} == {ALL}


def test_a_trained_bit_width_is_evaluated() -> None:
    runs = table1(parameters(profile="smoke", bits=[4, 32]))
    assert {run.eval_bits for run in runs if run.method != "Dedicated"} == {(*ALL, 32)}


def test_milestones_move_with_the_length() -> None:
    p = parameters(profile="paper")
    asked = {epochs: experiments.base(p, 0, "cifar10", epochs).config.milestones for epochs in (0, 50, 100, 400)}
    assert asked == {0: (100, 150, 180), 50: (25, 38, 45), 100: (50, 75, 90), 400: (200, 300, 360)}
    assert [run.config.milestones for run in experiments.curves(p)[::6]] == [
        (25, 38, 45),
        (50, 75, 90),
        (100, 150, 180),
    ]


def test_quickstart() -> None:
    runs = quickstart(parameters(profile="small", seed=3, repeats=2))
    assert [run.spec.correction for run in runs] == ["none", "mean_var"]
    assert {(run.dataset, run.method, run.config.seed) for run in runs} == {("digits", "Ours", 3)}


TABLES = ("curves", "equal_epochs", "comparison", "scoring_ablation", "table2", "growth")
TABLES += ("corrected_or_not", "bias_correction", "uncalibrated", "untrained", "transfer", "vit", "deployed")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("table", [quickstart, table1, *(getattr(experiments, name) for name in TABLES)])
def test_every_run_can_be_built(profile: str, table: Callable) -> None:
    runs = table(parameters(profile=profile))
    assert {run.profile for run in runs} == {profile}
    asked = {(run.model, run.model_args, run.spec): run for run in runs}  # one of each network
    for run in itertools.islice(asked.values(), 2 if profile == "paper" else 14):
        spec = build(run, num_classes=10).quant_spec
        assert replace(spec, activation_range="auto") == run.spec


def test_a_build_depends_on_its_seed_alone() -> None:
    run = quickstart(parameters(profile="smoke"))[0]
    before = torch.get_rng_state()
    first, again, other = (
        build(replace(run, config=replace(run.config, seed=seed)), 10).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


# Stored rows

TRAIN, TEST, EPOCHS = 40, 20, 2
TIMED = ["seconds"]  # columns that no two runs have in common


@pytest.fixture(scope="module", autouse=True)
def few_digits_on_one_thread() -> Iterator[None]:
    pytest.importorskip("sklearn")
    digits, threads = load_dataset("digits").subset(60, 30), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "emqlib.runs.load_dataset",
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


def assert_same(rows: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(rows.drop(columns=TIMED), expected.drop(columns=TIMED), check_exact=True)


def test_a_row_a_draw_and_bit_width(undisturbed: tuple[Path, pd.DataFrame]) -> None:
    """As the stored record tells it: overlap and correlation as means over the other bit-widths, classes as shares."""
    folder, runs = undisturbed[0], [run for run in tiny_runs() if run.pruning_rate]
    rows = experiments.coreset_rows(runs, folder)
    records = [json.loads((folder / f"runs/{run.hash}.json").read_text()) for run in runs]
    draws = [(run, draw) for run, record in zip(runs, records, strict=True) for draw in record["coresets"]]
    assert len(rows) == len(draws) > 0
    for row, (run, draw) in zip(rows.itertuples(), draws, strict=True):
        assert (row.run, row.epoch, row.bits, row.size) == (run.hash, draw["epoch"], draw["bits"], TRAIN // 2)
        assert row.overlap == pytest.approx(sum(draw["overlap"].values()) / len(draw["overlap"]))
        classes = (min(draw["classes"]) / row.size, max(draw["classes"]) / row.size)
        assert (row.rarest_class, row.commonest_class) == classes
    assert set(rows.coreset) == {run.coreset for run in runs}


def test_one_file_a_run(undisturbed: tuple[Path, pd.DataFrame]) -> None:
    folder, rows = undisturbed
    names = [run.hash for run in tiny_runs()]
    assert {path.name for path in (folder / "runs").iterdir()} == {f"{name}.json" for name in names}
    assert list(rows.run.drop_duplicates()) == names
    record = json.loads((folder / "runs" / f"{names[1]}.json").read_text())
    assert record["config"]["config"]["coreset"]["pruning_rate"] == 0.5
    assert [epoch["epoch"] for epoch in record["history"]] == [1, 2]
    assert record["calibration_passes"] == TRAIN


def test_a_file_holds_a_row_a_draw_and_bit_width(undisturbed: tuple[Path, pd.DataFrame]) -> None:
    for run in tiny_runs():
        draws = json.loads((undisturbed[0] / f"runs/{run.hash}.json").read_text())["coresets"]
        epochs = [] if not run.pruning_rate else [2] if run.config.coreset.score == "el2n" else [1, 2]
        assert sorted((d["epoch"], d["bits"]) for d in draws) == [(e, b) for e in epochs for b in run.spec.bits]
        assert all(d["size"] == sum(d["classes"]) == TRAIN // 2 for d in draws)
        assert all(0.5 <= d["union"] <= 1 and set(d["overlap"]) < {"2", "4"} for d in draws)


@pytest.mark.parametrize(
    ("coreset", "name"),
    [
        (None, "full data"),
        (CoresetConfig(pruning_rate=0.0), "full data"),
        (CoresetConfig(), "RS2"),
        (CoresetConfig(pruning_rate=0.5), "RS2"),
        (CoresetConfig(balanced=True), "RS2, balanced=True"),
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


def test_rows_tell_what_is_corrected(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs that differ in that alone: read from a record that is given another name."""
    monkeypatch.setattr("emqlib.runs.train", refuse_to_train)
    run = tiny_runs()[1]
    texts = {(True, False): "mean_var", (False, False): "mean_var, no gradient", (True, True): "mean_var, output"}
    for (gradient, output), text in texts.items():
        options = {"correction_gradient": gradient, "output_correction": output}
        other = replace(run, spec=replace(run.spec, **options))
        path = finished / f"runs/{other.hash}.json"
        if other != run:
            shutil.copy(finished / f"runs/{run.hash}.json", path)
            edit(path, lambda record, options=options: record["config"]["spec"].update(options))
        assert set(run_all([other], finished).correction) == {text}


def test_a_derived_table_is_kept_with_what_it_is_of(finished: Path) -> None:
    run = tiny_runs()[1]
    (finished / f"runs/{run.hash}.json").unlink()  # the network is in its checkpoint
    table = pd.DataFrame({"layer": ["a", "b"], "value": [0.1, 1e-30]})
    part = finished / f"runs/.{run.hash}-name.json.half.tmp"
    part.write_text("of a killed process")
    kept = derived(run, "name", finished, lambda *_: table)
    assert not part.exists()
    pd.testing.assert_frame_equal(kept, derived(run, "name", finished, refuse_to_train), check_exact=True)
    pd.testing.assert_frame_equal(kept[["layer", "value"]], table, check_exact=True)
    asked = {
        "method": "Ours",
        "dataset": "digits",
        "model": "resnet8",
        "trained_with": "mean_var",
        "trained_bits": "2 4",
    }
    asked |= {"epochs": EPOCHS, "seed": 0, "profile": "smoke", "run": run.hash}
    asked |= provenance(load_dataset("digits").subset(60, 30).subset(TRAIN, TEST), torch.device("cpu"))
    assert kept.drop(columns=["layer", "value"]).to_dict("records") == [asked] * 2
    assert (finished / f"runs/{run.hash}-name.json").read_text().endswith("}\n")


def test_a_trained_network_comes_from_its_checkpoint(
    finished: Path, undisturbed: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very network that gave the rows, without another step."""
    run, rows = tiny_runs()[1], undisturbed[1]
    monkeypatch.setattr(training, "_epoch", refuse_to_train)
    model, data = trained(run, finished, progress=False)
    expected = rows[(rows.run == run.hash) & ~rows.adapted]
    found = evaluate(model, data, bits=run.eval_bits)
    assert found.loss.tolist() == expected.loss.tolist() and len(data.train) == TRAIN


def test_distributions_are_of_networks_without_and_with_correction(tmp_path: Path) -> None:
    p = parameters(profile="smoke", bits=(2, 4), results_dir=tmp_path)
    first = replace(p.profile.training, epochs=1)
    p = replace(p, profile=replace(p.profile, training=first, subset=(TRAIN, TEST)))
    weights, mismatch, histograms = studies.distributions(p)
    assert set(weights.trained_with) == {"none"} and set(weights.bits) == set(range(1, 9))
    for table in (mismatch, histograms):
        assert set(table.trained_with) == {"none", "mean_var"} and set(table.bits) == {2, 4}
        assert table.run.nunique() == 2 and {"commit", "data_sha256", "dataset", "seed"} <= set(table.columns)
    sums = histograms.groupby(["run", "layer", "bits"]).density.sum()
    assert ((sums * 2 * SPAN / BINS - 1).abs() < 1e-4).all() and len(sums) == len(mismatch)
    assert [run.hash for run in bias_correction(p)[::2][:2]] == list(mismatch.run.unique())  # Table 6's own networks
    shutil.rmtree(tmp_path / "checkpoints")
    for table, again in zip((weights, mismatch, histograms), studies.distributions(p), strict=True):
        pd.testing.assert_frame_equal(table, again, check_exact=True)  # read, since nothing is left to measure
    assert not (tmp_path / "checkpoints").exists()


def small_parameters(folder: Path, **options: Any) -> Parameters:
    """The smoke profile on a few images for one epoch."""
    p = parameters(profile="smoke", results_dir=folder, **options)
    sizes = {"subset": (TRAIN, TEST), "coreset_subset": (TRAIN, TEST), "coreset_epochs": 2}
    return replace(p, profile=replace(p.profile, training=replace(p.profile.training, epochs=1), **sizes))


def test_bias_correction_crosses_corrections_and_norms() -> None:
    runs = bias_correction(parameters(profile="small", repeats=2))
    pairs = [("none", "shared"), ("mean", "shared"), ("mean_var", "shared"), ("none", "switchable")]
    pairs.append(("mean_var", "switchable"))
    assert [(r.config.seed, r.spec.correction, r.spec.norm) for r in runs] == [(s, *p) for s in (0, 1) for p in pairs]
    assert {(r.config.scheme, r.pruning_rate, r.eval_bits) for r in runs} == {("bitwise", 0.0, ALL)}
    assert runs[:3] == table1(parameters(profile="small", repeats=2))[:3]
    assert [r.method for r in runs[2:4]] == ["Ours", "Ours, switchable norm"]


def test_untrained_trains_all_and_then_the_ends() -> None:
    runs = experiments.untrained(parameters(profile="small", bits=(2, 4, 8), repeats=1))
    kinds = ["Any-Precision", "Ours", "Ours, own statistics"]
    assert [(r.spec.bits, r.method) for r in runs] == [(b, k) for b in ((2, 4, 8), (2, 8)) for k in kinds]
    assert [r.spec.output_correction for r in runs] == [False, False, True] * 2
    assert {r.eval_bits for r in runs} == {ALL}
    for bits, sets in ([2, 8], [(2, 8)]), ([4], [(4,)]):
        runs = experiments.untrained(parameters(profile="small", bits=bits, repeats=1))
        assert [r.spec.bits for r in runs] == sets * 3


def test_transfer_leaves_each_child_out_once() -> None:
    runs = experiments.transfer(parameters(profile="small", bits=(2, 4, 8), repeats=1))
    assert [r.spec.bits for r in runs] == [(2, 4, 8), (4, 8), (2, 8), (2, 4), (2,), (4,), (8,)]
    assert [r.method for r in runs] == ["Ours, own statistics"] * 4 + ["Dedicated"] * 3
    assert {r.eval_bits for r in runs[:4]} == {(2, 4, 8)}
    with pytest.raises(ValueError, match=r"^bits=\(4,\): expected two bit-widths at least$"):
        experiments.transfer(parameters(profile="small", bits=[4]))


def test_remedies_stand_beside_the_adapted_network_they_belong_to(tmp_path: Path) -> None:
    p = small_parameters(tmp_path, bits=(2, 4))
    rows = studies.remedies(p)
    trained_in = ["shared, as in the paper", "shared, output correction", "own, interpolated", "own, output correction"]
    assert set(rows.remedy) == {*trained_in, *RULES, ACTIVATIONS}
    assert all(bits.tolist() == list(ALL) for _, bits in rows.groupby("remedy").bits)
    start = experiments.base(p, 0, "cifar10")
    for remedy, options in zip(trained_in, ({}, {"output_correction": True}, OWN, UNCALIBRATED), strict=True):
        run = experiments.ours(start, **options)
        stored = run_all([run], tmp_path)
        part = rows[rows.remedy == remedy]
        assert part.top1.tolist() == stored[~stored.adapted].top1.tolist() and set(part.run) == {run.hash}
        assert part.adapted_top1.tolist() == stored[stored.adapted].top1.tolist()
        if options == OWN:
            others = rows[~rows.remedy.isin(trained_in)]
            assert set(others.run) == {run.hash} and set(others.trained_bits) == {"2 4"}
            assert others.adapted_top1.tolist() == part.adapted_top1.tolist() * others.remedy.nunique()
    assert not rows.drop(columns="commit").isna().any(axis=None)


OWN = {"norm": "shared_affine"}


def test_alignment_follows_the_first_run_of_transfer(tmp_path: Path) -> None:
    p = small_parameters(tmp_path, bits=(2, 8))
    angles, probes = studies.alignment(p)
    assert set(angles.epoch) == {0, 1, 2} and set(angles.run) == set(probes.run) == {experiments.transfer(p)[0].hash}
    assert (angles.groupby("epoch").size() == angles.groupby("epoch").size()[0]).all()
    model, data = trained(experiments.transfer(p)[0], tmp_path, progress=False)
    expected = gradient_angles(model, data, (2, 8), TRAIN // 4)
    last = angles[angles.epoch == 2]
    assert last.angle.tolist() == expected.angle.tolist() and last.layer.tolist() == expected.layer.tolist()
    untrained = gradient_angles(build(experiments.transfer(p)[0], 10), data, (2, 8), TRAIN // 4)
    assert angles[angles.epoch == 0].angle.tolist() == untrained.angle.tolist()
    shutil.rmtree(tmp_path / "checkpoints")
    for table, again in zip((angles, probes), studies.alignment(p), strict=True):
        pd.testing.assert_frame_equal(table, again, check_exact=True)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"table": {}}', '{"table": {"a": [1], "b": []}, "asked": {}}'])
def test_a_damaged_table_of_a_run_is_named(content: str, tmp_path: Path) -> None:
    run = tiny_runs()[0]
    path = tmp_path / "runs" / f"{run.hash}-name.json"
    path.parent.mkdir()
    path.write_text(content)
    for function in (derived, followed):
        with pytest.raises(ValueError, match=r"^results_dir='.*-name\.json': expected a whole table of a run, or none"):
            function(run, "name", tmp_path, refuse_to_train)
    assert path.read_text() == content


def test_a_run_followed_and_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_runs()[0]

    def measure(model: nn.Module, _: Dataset) -> pd.DataFrame:
        return pd.DataFrame({"norm": [float(model.fc.weight.detach().norm())]})

    undisturbed = followed(run, "norm", tmp_path / "undisturbed", measure)
    epoch, done = training._epoch, []

    def killed(*args: Any) -> Any:
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return epoch(*args)

    monkeypatch.setattr(training, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        followed(run, "norm", tmp_path, measure)
    pd.testing.assert_frame_equal(followed(run, "norm", tmp_path, measure), undisturbed, check_exact=True)
    assert len(done) == EPOCHS + 1 and undisturbed.epoch.tolist() == [0, 1, 2] and undisturbed.norm.nunique() == 3


def test_a_second_call_trains_nothing(
    finished: Path,
    undisturbed: tuple[Path, pd.DataFrame],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("emqlib.runs.train", refuse_to_train)
    rows = run_all(tiny_runs(), str(finished), progress=False)
    pd.testing.assert_frame_equal(rows, undisturbed[1], check_exact=True)
    assert capsys.readouterr() == ("", "")
    some = run_all(iter(tiny_runs()[2:3]), finished)
    assert set(some.method) == {"Any-Precision"}
    assert capsys.readouterr() == ("", "")  # no bar for what is only read


def test_progress_names_the_run_on_stderr(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_runs()[2]
    (finished / f"runs/{run.hash}.json").unlink()
    (finished / f"checkpoints/{run.hash}.safetensors").unlink()
    run_all([run], finished)
    out, err = capsys.readouterr()
    assert not out and "run 1 of 1: Any-Precision" in err  # tables are on the other stream


@pytest.mark.parametrize("checkpoint", ["kept", "deleted"])
def test_a_deleted_run_alone_is_run_again(
    finished: Path, undisturbed: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    run, trained = tiny_runs()[1], []
    (finished / f"runs/{run.hash}.json").unlink()
    if checkpoint == "deleted":
        (finished / f"checkpoints/{run.hash}.safetensors").unlink()
    epoch = training._epoch

    def counted(run: Any, *arguments: Any) -> dict[str, Any]:
        trained.append(run.config)
        return epoch(run, *arguments)

    monkeypatch.setattr(training, "_epoch", counted)
    assert_same(run_all(tiny_runs(), finished, progress=False), undisturbed[1])
    assert trained == ([run.config] * EPOCHS if checkpoint == "deleted" else [])
    assert (finished / f"runs/{run.hash}.json").exists()


def test_an_interrupted_run_goes_on(
    undisturbed: tuple[Path, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first epoch of the third run: two runs stay, the third has one epoch left."""
    runs, saved, epochs = tiny_runs()[:4], [], []
    save, epoch = training._save, training._epoch

    def save_and_stop(run: Any) -> None:
        save(run)
        saved.append(run.path.stem)
        if len(saved) == 2 * EPOCHS + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run_all(runs, tmp_path, progress=False)
    assert {path.stem for path in (tmp_path / "runs").iterdir()} == {run.hash for run in runs[:2]}
    monkeypatch.setattr(training, "_epoch", lambda run, bar: epochs.append(run.epoch) or epoch(run, bar))
    rows = run_all(runs, tmp_path, progress=False)
    assert epochs == [1, 0, 1]
    assert_same(rows, undisturbed[1][: len(rows)])


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_rows_of_another_config_are_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a default changes, which the hash does not show."""
    monkeypatch.setattr("emqlib.runs.train", refuse_to_train)
    path = finished / f"runs/{tiny_runs()[1].hash}.json"
    edit(path, lambda record: record["config"]["config"].update(momentum=0.5))
    with pytest.raises(ValueError, match=rf"^results_dir='{path}': .*config\.momentum was 0\.5"):
        run_all(tiny_runs(), finished, progress=False)


def test_rows_of_another_device_or_an_older_version_are_taken(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emqlib.runs.train", refuse_to_train)
    path = finished / f"runs/{tiny_runs()[0].hash}.json"
    edit(path, lambda record: record["config"]["config"].update(device="cuda:1"))
    edit(path, lambda record: record["config"]["config"].pop("compile"))  # there was no such option
    assert len(run_all(tiny_runs()[:1], finished, progress=False)) == 4


@pytest.mark.parametrize("key", ["config", "provenance", "history", "rows", "calibration_passes"])
def test_a_record_without_a_part_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr("emqlib.runs.train", refuse_to_train)
    path = finished / f"runs/{tiny_runs()[-1].hash}.json"
    edit(path, lambda record: record.pop(key))
    with pytest.raises(ValueError, match=rf"^results_dir='{path}': expected a whole record.*{key}"):
        run_all(tiny_runs(), finished, progress=False)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"config": 3}', b"{} {}"])
def test_a_damaged_record_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Also when an earlier run is still to be trained: nothing starts before all that is stored has been read."""
    monkeypatch.setattr("emqlib.runs.train", refuse_to_train)
    (finished / f"runs/{tiny_runs()[0].hash}.json").unlink()
    path = finished / f"runs/{tiny_runs()[-1].hash}.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^results_dir='{path}': expected a whole record"):
        run_all(tiny_runs(), finished, progress=False)


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^runs=\[\]: expected at least one Run$"):
        run_all([], tmp_path)


# Transformers and streamed images


def test_vit_compares_the_methods_on_both_data_sets() -> None:
    runs = experiments.vit(parameters(profile="small", repeats=2))
    assert len(runs) == 4 * 7 and {run.model for run in runs} == {"vit_tiny"}
    assert [run.dataset for run in runs] == ["cifar10"] * 14 + ["tinyimagenet"] * 14
    assert [run.config.seed for run in runs] == ([0] * 7 + [1] * 7) * 2
    one = [(run.method, run.spec.correction, run.pruning_rate, run.spec.bits) for run in runs[:7]]
    full, alone = (2, 4, 8), [("Dedicated", "none", 0.0, (b,)) for b in (2, 4, 8)]
    expected = [("Ours", "none", 0.0, full), ("Ours", "mean_var", 0.0, full), ("Ours", "mean_var", 0.8, full)]
    assert one == [*expected, ("Any-Precision", "none", 0.0, full), *alone]
    assert {(run.spec.weight, run.spec.activation) for run in runs} == {("minmax", "lsq")}
    sizes = {run.dataset: dict(run.model_args) for run in runs}
    assert sizes["tinyimagenet"] == sizes["cifar10"] | {"image_size": 64, "patch_size": 16}


def test_without_batch_norm_every_bit_width_is_served_and_none_adapted(tmp_path: Path) -> None:
    few = replace(PROFILES["smoke"], vit=replace(PROFILES["smoke"].vit, subset=(60, 30)))
    p = replace(parameters(profile="smoke", results_dir=str(tmp_path)), profile=few)
    runs = experiments.vit(p)
    rows = run_all([runs[1], runs[3]], tmp_path, progress=False)
    assert not rows.adapted.any() and set(rows.calibration_passes) == {0}
    assert [*rows[rows.method == "Any-Precision"].bits] == [*rows[rows.method == "Ours"].bits] == [*range(1, 9)]
    table = studies.layer_norms(p)
    assert set(table.trained_with) == {"none", "mean_var"} and set(table.bits) == {2, 4, 8}
    assert (tmp_path / f"runs/{runs[0].hash}-norms.json").exists()


def test_imagenet_takes_class_folders_and_other_networks() -> None:
    p = parameters(profile="paper", pruning_rates=[0.7], seed=3)
    runs = experiments.imagenet(p)
    assert [(run.method, run.pruning_rate) for run in runs] == [("Any-Precision", 0.0), ("Ours", 0.0), ("Ours", 0.7)]
    names = {(run.dataset, run.model, run.image_size, run.stream, run.config.seed) for run in runs}
    assert names == {("imagenet", "torchvision.resnet50", 224, False, 3)}
    asked = {"dataset": "imagefolder:/x", "model": "timm.deit_tiny_patch16_224"}
    run = experiments.imagenet(parameters(profile="small", **asked))[-1]
    assert (run.dataset, run.model, run.model_args, run.stream) == (*asked.values(), (), True)


def test_imagenet_is_missed_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMQ_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr("emqlib.runs.train", refuse_to_train)
    p = parameters(profile="small", results_dir=str(tmp_path / "results"))
    with pytest.raises(FileNotFoundError, match=r"(?s)no data for 'imagenet'.*nothing/imagenet.*image-net.org"):
        run_all(experiments.imagenet(p), p.results_dir)
    assert not (tmp_path / "results").exists()


# From a shell


QUICK = ("-p", "bits", "[4]", "-p", "results_dir")  # of quickstart: two runs of four epochs of three steps


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = str(tmp_path_factory.mktemp("quick"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emqlib.runs.load_dataset", load_dataset)
        assert experiments.main(["quickstart", "--profile", "smoke", *QUICK, folder]) == 0
    return run_all(quickstart(parameters("smoke", [4])), folder, progress=False)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("7", [(0, "epoch 3, step 1 of 3"), (1, "epoch 1, step 2 of 3"), (1, "epoch 3 of 4")]),
        ("12", [(1, "")]),  # the first run is evaluated, and the second one not begun
        ("23.5", []),
    ],
)
def test_a_budget_is_spent_call_by_call(
    budget: str,
    expected: list[tuple[int, str]],
    tmp_path: Path,
    quick_rows: pd.DataFrame,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("emqlib.runs.load_dataset", load_dataset)
    call = ["quickstart", "--profile", "smoke", *QUICK, str(tmp_path), "--budget", budget]
    for finished, begun in expected:
        assert experiments.main(call) == experiments.CALL_AGAIN == os.EX_TEMPFAIL
        done = f"{finished} of 2 runs finished" + (f", of the next one {begun}" if begun else "")
        assert capsys.readouterr().out == f"{done}; time is up, call again to go on\n"
        assert len(list((tmp_path / "runs").glob("*.json"))) == finished
    for _ in range(2):  # and then there is nothing left to do
        assert experiments.main(call) == 0
        assert capsys.readouterr().out == f"2 runs, {len(quick_rows)} rows below {tmp_path / 'runs'}; 1 process(es)\n"
    assert clock[0] == 24
    assert_same(run_all(quickstart(parameters("smoke", [4])), tmp_path, progress=False), quick_rows)


def test_what_is_trained_but_not_evaluated_is_a_step_forward(
    tmp_path: Path, quick_rows: pd.DataFrame, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short the budget: a call evaluates it, and leaves the next run to the next call."""
    monkeypatch.setattr("emqlib.runs.load_dataset", load_dataset)
    runs = quickstart(parameters("smoke", [4]))
    trained(runs[0], tmp_path, progress=False)
    clock[:] = [0]
    monkeypatch.setattr(checkpoints, "monotonic", itertools.count().__next__)  # time is always up
    with pytest.raises(OutOfTime, match=r"^1 of 2 runs finished; "):
        run_all(runs, tmp_path, progress=False, budget=1)
    assert clock == [0]
    with pytest.raises(OutOfTime, match=r"^1 of 2 runs finished, of the next one epoch 1, step 1 of 3; "):
        run_all(runs, tmp_path, progress=False, budget=1)


def test_a_shell_sees_the_exit_status(tmp_path: Path) -> None:
    call = ["quickstart", "--profile", "smoke", *QUICK, str(tmp_path), "--budget", "1e-9"]
    out = in_a_shell(tmp_path, sys.executable, "-m", "emqlib.experiments", *call, status=experiments.CALL_AGAIN)
    assert out == "0 of 2 runs finished, of the next one epoch 1, step 1 of 3; time is up, call again to go on\n"


@pytest.mark.parametrize("budget", [0, -1.0, "60", True, float("nan"), float("inf"), [60]])
def test_wrong_budgets(budget: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^budget=.*: expected a number of seconds > 0, or None$"):
        run_all(tiny_runs(), tmp_path, budget=budget)
    if isinstance(budget, (int, float)) and budget is not True:
        with pytest.raises(ValueError, match=r"^budget="):
            experiments.main(["quickstart", f"--budget={budget}"])
    for text in ("soon", "", "1s"):
        with pytest.raises(SystemExit):
            experiments.main(["quickstart", "--budget", text])
        assert "argument --budget: invalid float value" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_profile_is_a_parameter_and_the_last_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(runs: list[Run], *_: object, **__: object) -> pd.DataFrame:
        asked.append(runs[0].profile)
        return pd.DataFrame({"run": []})

    monkeypatch.setattr(experiments, "run_all", note)
    for options in (["--profile", "smoke"], ["-p", "profile", "paper", "--profile", "smoke"], ["-p", "seed", "3"]):
        experiments.main(["quickstart", *options])
    experiments.main(["quickstart", "--profile", "paper", "-p", "profile", "smoke"])
    assert asked == ["smoke", "smoke", parameters().profile.name, "smoke"]
    with pytest.raises(ValueError, match=r"^profile='tiny': expected one of auto, paper, small, smoke$"):
        experiments.main(["quickstart", "--profile", "tiny"])


def in_a_shell(folder: Path, *command: str, status: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EMQ_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stdout


ASKED = ("-p", "profile", "smoke", "-p", "bits", "[4]", "-p", "pruning_rates", "[0]", "-p", "results_dir")
NOTEBOOK = """
from emqlib import OutOfTime, experiments, profiles
if __name__ == "__main__":
    p = profiles.parameters("smoke", [4], pruning_rates=[0], results_dir={place!r}, processes=2)
    try:
        experiments.run_all(experiments.imagenet(p), p.results_dir, processes=p.processes, budget=1e-9)
    except OutOfTime as stop:
        print(stop)
    print(len(experiments.run_all(experiments.imagenet(p), p.results_dir, processes=p.processes)))
"""


def test_two_processes_from_a_shell_and_from_a_notebook_train_one_network(tmp_path: Path) -> None:
    """What two processes of a launcher have begun is gone on with by two that a notebook starts."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "emqlib.experiments", "imagenet", *ASKED, str(tmp_path / "made"), "--budget", "1e-9"]
    out = in_a_shell(tmp_path, *command)  # with status 0
    assert out.strip() == "0 of 2 runs finished, of the next one epoch 1, step 1 of 3; time is up, call again to go on"
    script = tmp_path / "notebook.py"
    script.write_text(NOTEBOOK.format(place=str(tmp_path / "made")))
    out = in_a_shell(tmp_path, sys.executable, str(script)).splitlines()
    assert out[-1] == "25" and "0 of 2 runs finished; time is up, call again to go on" in out
    p = parameters("smoke", [4], pruning_rates=[0], results_dir=str(tmp_path / "made"))
    rows = run_all(experiments.imagenet(p), p.results_dir, progress=False)
    assert set(rows.device) == {"2 x cpu, 1 threads"} and len(rows) == 25


def test_a_shell_is_told_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^parameter='bitz': expected one of bits, dataset"):
        experiments.main(["imagenet", "-p", "bitz", "4"])
    with pytest.raises(ValueError, match=r"^seed='-1'"):
        experiments.main(["imagenet", "-p", "seed", "-1"])
    with pytest.raises(SystemExit):
        experiments.main(["mnist"])
    assert "invalid choice: 'mnist'" in capsys.readouterr().err
    for value in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"^processes="):
            run_all(experiments.quickstart(parameters("smoke")), tmp_path, processes=value)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"^processes=2: expected 1 in each of"):
        patch.setenv("WORLD_SIZE", "2")
        run_all(experiments.quickstart(parameters("smoke")), tmp_path, processes=2)
    with pytest.raises(ValueError, match=r"^dataset='cifar10': expected imagenet, or imagefolder:PATH"):
        experiments.imagenet(parameters("smoke", dataset="cifar10"))
