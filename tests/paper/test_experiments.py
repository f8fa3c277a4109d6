"""The paper's tables as lists of runs, what is measured in their networks, and how they are run from a shell."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_runs import (
    ALL,
    TEST,
    TRAIN,
    few_digits_on_one_thread,
    no_profile_from_outside,
)

from emqlib import Coresets
from emqlib.paper import experiments, measure
from emqlib.paper.experiments import bias_correction, quickstart, table1
from emqlib.paper.measure import BINS, SPAN, gradient_angles
from emqlib.paper.profiles import PROFILES, Parameters, parameters
from emqlib.paper.runs import Run, build, run_all, trained

fixtures = few_digits_on_one_thread, no_profile_from_outside  # for this module too


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
    rates = [run.pruning_rate for run in table1(parameters(profile="small", repeats=1))]
    assert rates == [0, 0, 0, 0.5, 0.8, 0.9, 0, 0, 0, 0, 0.8, 0.5, 0.8, 0.9]


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
    changed = ("how", "candidates", "batch_size", "lr", "weight_decay")
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


def test_quickstart() -> None:
    runs = quickstart(parameters(profile="small", seed=3, repeats=2))
    assert [run.spec.correction for run in runs] == ["none", "mean_var"]
    assert {(run.dataset, run.method, run.config.seed) for run in runs} == {("digits", "Ours", 3)}


OF_PARAMETERS = [f for f in experiments.RUNS if f is not experiments.imagenet]  # whose networks are large


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("table", OF_PARAMETERS)
def test_every_run_can_be_built(profile: str, table: Callable) -> None:
    runs = table(parameters(profile=profile))
    assert {run.profile for run in runs} == {profile}
    for run in runs[:2] if profile == "paper" else runs[:14]:  # those of one seed
        spec = build(run, num_classes=10).emq.spec
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


def test_distributions_are_of_networks_without_and_with_correction(tmp_path: Path) -> None:
    p = parameters(profile="smoke", bits=(2, 4), results_dir=tmp_path)
    first = replace(p.profile.training, epochs=1)
    p = replace(p, profile=replace(p.profile, training=first, subset=(TRAIN, TEST)))
    weights, mismatch, histograms = measure.distributions(p)
    assert set(weights.trained_with) == {"none"} and set(weights.bits) == set(range(1, 9))
    for table in (mismatch, histograms):
        assert set(table.trained_with) == {"none", "mean_var"} and set(table.bits) == {2, 4}
        assert table.run.nunique() == 2 and {"commit", "data_sha256", "dataset", "seed"} <= set(table.columns)
    sums = histograms.groupby(["run", "layer", "bits"]).density.sum()
    assert ((sums * 2 * SPAN / BINS - 1).abs() < 1e-4).all() and len(sums) == len(mismatch)
    assert [run.hash for run in bias_correction(p)[::2][:2]] == list(mismatch.run.unique())  # Table 6's own networks
    shutil.rmtree(tmp_path / "checkpoints")
    for table, again in zip((weights, mismatch, histograms), measure.distributions(p), strict=True):
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
    assert [r.spec.bits for r in runs] == [(2, 4, 8), (4, 8), (2, 8), (2, 4), *[(2,), (4,), (8,)] * 2]
    assert [r.method for r in runs] == ["Ours, own statistics"] * 4 + ["Dedicated"] * 6
    assert [r.config.epochs for r in runs] == [8] * 7 + [16] * 3
    pair = experiments.transfer(parameters(profile="small", bits=(2, 8), repeats=1))
    assert [r.spec.bits for r in pair] == [(2, 8), (8,), (2,), (2,), (8,)]
    assert {r.eval_bits for r in runs[:4]} == {(2, 4, 8)}
    with pytest.raises(ValueError, match=r"^bits=\(4,\): expected two bit-widths at least$"):
        experiments.transfer(parameters(profile="small", bits=[4]))


def test_every_method_is_tuned_on_held_out_images() -> None:
    p = parameters(profile="small")
    runs = experiments.tuning(p)
    assert len({run.hash for run in runs}) == len(runs) == 18
    asked = {(r.method, r.config.distillation, r.config.lr, r.config.batch_size) for r in runs}
    methods = [("Any-Precision", True), ("Any-Precision, no distillation", False), ("Ours", False)]
    assert asked == {(*kind, lr, size) for kind in methods for lr in (0.05, 0.1, 0.2) for size in (128, 42)}
    settings = {(r.model, r.held_out, r.config.epochs, r.pruning_rate, r.config.seed, r.eval_bits) for r in runs}
    assert settings == {("preact_resnet20", 5000, 4, 0.0, 0, p.bits)}


def test_factors_and_scores_are_compared_on_held_out_images() -> None:
    kinds = experiments.statistics_kinds(parameters(profile="small", repeats=2))
    asked = [(r.config.seed, r.spec.correction, r.spec.norm, r.every_statistics) for r in kinds]
    assert asked == [(s, c, "shared_affine", True) for s in (0, 1) for c in ("none", "mean_var")]
    p = parameters(profile="small", repeats=1)
    runs = experiments.pruned_factors(p)
    drawn = [(r.config.coreset.resample_every, r.config.coreset.warmup, r.config.coreset.power) for r in runs]
    assert drawn == [(0, 0, 1.0), (1, 0, 1.0), (0, 1, 0.0), (1, 1, 0.0)]
    assert {(r.every_statistics, r.spec.norm, r.config.epochs) for r in runs} == {(True, "shared_affine", 30)}
    runs += experiments.importance(p)
    assert {(r.held_out, r.model, r.pruning_rate) for r in runs} == {(5000, "resnet8", 0.8)}
    assert {run.config.seed for run in experiments.importance(parameters(profile="small"))} == {0, 1, 2, 3, 4}


def test_scores_and_their_twins_take_the_same_passes() -> None:
    runs = experiments.importance(parameters(profile="small", repeats=1))
    assert [(r.config.coreset.score, r.config.coreset.power) for r in runs] == [
        ("el2n", 1.0),
        ("el2n", 0.0),
        ("tdds", 1.0),
        ("tdds", 0.0),
    ]
    passes = set()
    for run in runs:
        labels = torch.arange(1000) % 10
        coresets = Coresets(labels, (2, 4, 8), run.config.coreset, epochs=run.config.epochs)
        passes.add(sum(coresets.size(epoch) for epoch in range(run.config.epochs)))
    assert passes == {6000}


def test_what_is_compared_without_calibration() -> None:
    runs = experiments.uncalibrated(parameters(profile="small", repeats=2))
    kinds = [("shared", False), ("shared", True), ("shared_affine", False), ("shared_affine", True)]
    asked = [(r.config.seed, r.spec.norm, r.spec.output_correction) for r in runs]
    assert asked == [(seed, *kind) for seed in (0, 1) for kind in kinds]
    assert {(r.spec.correction, r.pruning_rate, r.eval_bits) for r in runs} == {("mean_var", 0.0, ALL)}


def test_alignment_follows_the_first_run_of_transfer(tmp_path: Path) -> None:
    p = small_parameters(tmp_path, bits=(2, 8))
    angles, probes = measure.alignment(p)
    assert set(angles.epoch) == {0, 1, 2} and set(angles.run) == set(probes.run) == {experiments.transfer(p)[0].hash}
    assert (angles.groupby("epoch").size() == angles.groupby("epoch").size()[0]).all()
    model, data = trained(experiments.transfer(p)[0], tmp_path, progress=False)
    expected = gradient_angles(model, data, (2, 8), TRAIN // 4)
    last = angles[angles.epoch == 2]
    assert last.angle.tolist() == expected.angle.tolist() and last.layer.tolist() == expected.layer.tolist()
    untrained = gradient_angles(build(experiments.transfer(p)[0], 10), data, (2, 8), TRAIN // 4)
    assert angles[angles.epoch == 0].angle.tolist() == untrained.angle.tolist()
    shutil.rmtree(tmp_path / "checkpoints")
    for table, again in zip((angles, probes), measure.alignment(p), strict=True):
        pd.testing.assert_frame_equal(table, again, check_exact=True)
    assert not (tmp_path / "checkpoints").exists()


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
    table = measure.token_shifts(p)
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


# From a shell


QUICK = ("-p", "bits", "[4]", "-p", "results_dir")  # of quickstart: two runs of four epochs of three steps


def test_a_shell_sees_the_exit_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "emqlib.paper.experiments", "quickstart", "--profile", "smoke"]
    command += [*QUICK, str(tmp_path)]
    out = in_a_shell(tmp_path, *command, "--budget", "1e-9", status=os.EX_TEMPFAIL)
    assert out.startswith("0 of 2 runs finished, of the next one epoch 1")
    assert out.endswith("; time is up, call again to go on\n")
    assert in_a_shell(tmp_path, *command) == f"2 runs, 32 rows below {tmp_path / 'runs'}; 1 process(es)\n"


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


ASKED = ("-p", "profile", "smoke", "-p", "bits", "[2,8]", "-p", "pruning_rates", "[0]", "-p", "results_dir")


def test_two_processes_from_a_shell_train_one_network(tmp_path: Path) -> None:
    """A notebook reads their rows afterwards, and trains nothing again."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "emqlib.paper.experiments", "imagenet", *ASKED, str(tmp_path / "made")]
    out = in_a_shell(tmp_path, *command, "--budget", "1e-9")
    assert out.startswith("0 of 2 runs finished, of the next one epoch 1") and out.endswith("call again to go on\n")
    out = in_a_shell(tmp_path, *command)
    assert out.strip() == f"2 runs, 26 rows below {tmp_path / 'made/runs'}; 2 process(es)"
    runs = experiments.imagenet(parameters("smoke", [2, 8], pruning_rates=[0], results_dir=tmp_path / "made"))
    rows = run_all(runs, tmp_path / "made", progress=False)
    assert set(rows.device) == {"2 x cpu, 1 threads"} and len(rows) == 26


def test_a_shell_is_told_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"^parameter='bitz': expected one of bits, dataset"):
        experiments.main(["imagenet", "-p", "bitz", "4"])
    with pytest.raises(ValueError, match=r"^seed='-1'"):
        experiments.main(["imagenet", "-p", "seed", "-1"])
    for budget in ("0", "nan"):
        with pytest.raises(ValueError, match=r"^budget=.*: expected a number of seconds > 0, or None$"):
            experiments.main(["quickstart", f"--budget={budget}"])
    for wrong, told in ((["mnist"], "choice: 'mnist'"), (["quickstart", "--budget", "1s"], "float value: '1s'")):
        with pytest.raises(SystemExit):
            experiments.main(wrong)
        assert f"invalid {told}" in capsys.readouterr().err
