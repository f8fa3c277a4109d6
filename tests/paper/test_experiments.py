"""The paper's tables as lists of runs, what is measured in their networks, and how they are run from a shell."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_runs import ALL, TEST, TRAIN, few_digits_on_one_thread

from emqlib import Coresets, recipe
from emqlib.paper import experiments, measure
from emqlib.paper.experiments import bias_correction, quickstart, table1
from emqlib.paper.measure import BINS, SPAN, gradient_angles
from emqlib.paper.profiles import PROFILES, Parameters, parameters
from emqlib.paper.runs import build, run_all, trained
from emqlib.paper.tables import seed_means

fixture = few_digits_on_one_thread  # for this module too


OF_PARAMETERS = [f for f in experiments.RUNS if f is not experiments.imagenet]  # whose networks are large
OWN = {"bits": (2, 8), "pruning_rates": [0.6], "lengths": [5, 7], "seed": 3, "repeats": 2}


@pytest.mark.parametrize("table", OF_PARAMETERS)
def test_parameters_are_followed(table: Callable) -> None:
    """Which runs a table has is told by those that are committed: test_every_committed_record_is_of_a_run_of_today."""
    name, runs = table.__name__, table(parameters(profile="small", **OWN))
    assert len({run.hash for run in runs}) == len(runs) or name == "growth"  # where widths share dedicated networks
    seeds = {"corrected_again": {5, 6}, "quickstart": {3}, "growth": {3}, "tuning": {3}}  # further ones, or only one
    assert {run.config.seed for run in runs} == seeds.get(name, {3, 4})
    # full precision, more and more bit-widths, and a fourth one
    more = {"deployed": {32}, "growth": {*ALL}, "headline_changes": {1}}.get(name, set())
    assert {b for run in runs for b in run.spec.bits} == {2, 8} | more
    assert all(set(run.spec.bits) <= set(run.eval_bits) for run in runs)
    at_80 = (
        "equal_epochs",
        "scoring_ablation",
        "growth",
        "headline",
        "headline_changes",
        "pruned_factors",
        "importance",
    )
    asked = {0.8} if name in at_80 else {0.6}
    assert {run.pruning_rate for run in runs} - {0} <= asked
    if name in ("curves", "equal_epochs"):
        assert {run.config.epochs for run in runs} == {5, 7}


PROBES = {"model": ("resnet8", "resnet20"), "lengths": ((20,), (30,)), "pruning_rates": ((0.3,), (0.4,))}
PROBES |= {"dataset": ("imagenet", "imagefolder:/nowhere"), "repeats": (1, 2)}


@pytest.mark.parametrize("parameter", PROBES)
def test_which_experiments_read_a_parameter(parameter: str) -> None:
    """Those whose runs another value changes."""
    p, every = parameters(profile="small"), experiments.RUNS + experiments.UNDER_WAY
    one, other = (replace(p, **{parameter: value}) for value in PROBES[parameter])
    assert [name for name in every if name(one) != name(other)] == experiments.READ_BY[parameter]


def test_names_of_methods_and_corrections() -> None:
    p = parameters(profile="small", repeats=1)
    runs = [*table1(p), *experiments.curves(p), *bias_correction(p), *experiments.uncalibrated(p)]
    kinds = {run.correction for run in runs}
    assert kinds == {"none", "mean", "mean_var", "mean_var, no gradient", "mean_var, output"}
    own = ["Ours, own statistics", "Ours, switchable norm"]
    assert list(dict.fromkeys(run.method for run in runs)) == ["Ours", "Any-Precision", "Dedicated", *own]
    assert [run.method for run in experiments.headline_changes(p)] == [f"{own[0]}, distillation", own[0]]
    assert table1(parameters(profile="small", bits=[4, 32]))[0].eval_bits == (*ALL, 32)
    with_1_bit = experiments.headline_changes(parameters(profile="small", repeats=1, bits=[1, 4]))
    assert [run.method for run in with_1_bit] == [f"{own[0]}, distillation"]


def test_all_data_are_one_run_of_a_comparison_of_coresets() -> None:
    both = experiments.comparison(parameters(profile="small", repeats=1, pruning_rates=[0.0, 0.8]))
    pruned = experiments.comparison(parameters(profile="small", repeats=1, pruning_rates=[0.8]))
    with pytest.raises(ValueError, match=r"^pruning_rates=\(0.0,\): expected one above 0 at least"):
        experiments.comparison(parameters(profile="small", pruning_rates=[0.0]))
    assert [run.coreset for run in both if run not in pruned] == ["full data"] and both[1:] == pruned


def test_a_notebooks_coresets() -> None:
    """Scoring costs each bit-width three epochs of 4/3 of its coreset; nothing is pruned at a rate of 0."""
    assert experiments.bitwise_coreset(0.0) is None
    coreset = experiments.bitwise_coreset(0.8, how="sample")
    assert (coreset.score, coreset.how, coreset.pruning_rate, coreset.warmup) == ("tdds", "sample", 0.8, 3)
    assert coreset.candidates == pytest.approx(0.8 / 3) and experiments.bitwise_coreset(0.1).candidates == 1
    assert experiments.bitwise_coreset(0.8, candidates=1.0).candidates == 1


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
    p = small_parameters(tmp_path, bits=(2, 4))
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


def test_the_picture_of_the_idea_is_of_the_quickstarts_networks(tmp_path: Path) -> None:
    p = small_parameters(tmp_path, bits=(2, 8))
    rows = measure.idea(p)
    assert list(rows.run.unique()) == [run.hash for run in quickstart(p)]
    assert list(rows.trained_with.unique()) == ["none", "mean_var"] and set(rows.part) == {"weight", "pre-activation"}
    assert (rows.groupby("run")[["layer", "channel"]].nunique() == 1).all(axis=None)


def small_parameters(folder: Path, **options: Any) -> Parameters:
    """The smoke profile on a few images for one epoch."""
    p = parameters(profile="smoke", results_dir=folder, **options)
    sizes = {"subset": (TRAIN, TEST), "coreset_subset": (TRAIN, TEST), "coreset_epochs": 2}
    return replace(p, profile=replace(p.profile, training=replace(p.profile.training, epochs=1), **sizes))


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


# Transformers and streamed images


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
    runs = experiments.imagenet(parameters(profile="paper", pruning_rates=[0.7], seed=3))
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
    with pytest.raises(ValueError, match=r"^dataset='cifar100': expected no value, since table1 does not .*; imagenet"):
        experiments.main(["table1", "-p", "dataset", "cifar100"])
    for budget in ("0", "nan"):
        with pytest.raises(ValueError, match=r"^budget=.*: expected a number of seconds > 0, or None$"):
            experiments.main(["quickstart", f"--budget={budget}"])
    for wrong, told in ((["mnist"], "choice: 'mnist'"), (["quickstart", "--budget", "1s"], "float value: '1s'")):
        with pytest.raises(SystemExit):
            experiments.main(wrong)
        assert f"invalid {told}" in capsys.readouterr().err


def test_tuned_settings_are_the_best_of_their_rows() -> None:
    p = parameters(profile="small")
    rows = seed_means(run_all(experiments.tuning(p), p.results_dir, progress=False), ["method", "lr", "batch_size"])
    usual = p.profile.fair.training
    for scheme, method in (("joint", "Any-Precision"), ("bitwise", "Ours")):
        best = rows[rows.method.str.startswith(method)].sort_values("top1").iloc[-1]
        factor, parts = experiments.TUNED[scheme]
        assert (best.lr, best.batch_size) == (factor * usual.lr, usual.batch_size // parts)
        assert scheme == "bitwise" or (best.method == "Any-Precision") == experiments.DISTILLATION
    ours, config = experiments.recommended(experiments.fair_base(p, 0), 4).config, recipe()[1]
    assert (ours.lr, ours.batch_size) == (config.lr, config.batch_size)
