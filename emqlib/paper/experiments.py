"""Each table and figure of the paper as a list of runs, for `runs.run_all` to finish or to read.

`python -m emqlib.paper.experiments NAME` finishes the runs of one of them from a shell.
"""

import argparse
import inspect
import sys
import tempfile
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from PIL import Image

from .. import checks
from ..layers import QuantSpec
from ..train.checkpoint import Deadline, OutOfTime
from ..train.config import SCORES, CoresetConfig, TrainConfig, recipe
from ..train.data import Dataset
from ..train.distributed import current
from ..train.sources import load_dataset
from .profiles import Parameters, Setting, parameters
from .runs import Run, run_all

# Beyond the paper: what serves every bit-width, trained or not, without a calibration pass.
UNCALIBRATED = {"norm": "shared_affine", "output_correction": True}
PRUNED = 0.8  # the pruning rate of the experiments that have one alone

# The best of the runs of `tuning`, as a test compares with its rows: for each scheme the factor on the usual learning
# rate, and the number of parts that each batch is cut in; and whether Any-Precision is distilled.
TUNED = {"joint": (1.0, 3), "bitwise": (0.5, 3)}
DISTILLATION = False


def base(p: Parameters, seed: int, dataset: str = "cifar10", epochs: int = 0) -> Run:
    """What all runs of a profile share, on the full data of `dataset`, or of the profile's own data set.

    With another number of epochs than 0, which is the profile's own, only the trained bit-widths are evaluated, and
    milestones of the learning rate move in proportion. They stay an epoch apart, and none is after the last epoch.
    """
    own = p.profile.training
    length = epochs or own.epochs
    scaled = (round(milestone * length / own.epochs) for milestone in own.milestones)
    _, *milestones = accumulate(scaled, lambda before, this: max(before + 1, this), initial=0)
    return Run(
        profile=p.profile.name,
        dataset=p.profile.dataset or dataset,
        model=p.profile.model,
        model_args=p.profile.model_args,
        subset=p.profile.subset,
        spec=QuantSpec(bits=p.bits),
        config=replace(own, seed=seed, epochs=length, milestones=tuple(m for m in milestones if m < length)),
        eval_bits=p.bits if epochs else tuple({*Run.eval_bits, *p.bits}),
    )


def of_length(p: Parameters, seed: int, epochs: int) -> Run:
    """`base` for that many epochs; the run of Table 1 where they are the profile's own."""
    return base(p, seed, epochs=0 if epochs == p.profile.training.epochs else epochs)


def coreset_base(p: Parameters, seed: int, dataset: str = "cifar10") -> Run:
    """What runs that compare coresets share: more epochs than `base`, on a part of the data."""
    return replace(base(p, seed, dataset, p.profile.coreset_epochs), subset=p.profile.coreset_subset)


def in_setting(start: Run, setting: Setting) -> Run:
    """`start` with the network, the training and the images of `setting`; only the seed of its training is kept."""
    own = {name: getattr(setting, name) for name in ("model", "model_args", "subset", "image_size", "held_out")}
    return replace(start, **own, config=replace(setting.training, seed=start.config.seed))


def vit_base(p: Parameters, seed: int, dataset: str) -> Run:
    """What runs of a ViT share: min-max weights and learned activation ranges (LSQ).

    TinyImageNet's 64 x 64 pixels get as many patches as CIFAR's 32 x 32.
    """
    shared = in_setting(base(p, seed, dataset), p.profile.vit)
    args = dict(shared.model_args)
    if shared.dataset == "tinyimagenet":
        args |= {"image_size": 64, "patch_size": 2 * args["patch_size"]}
    spec = replace(shared.spec, weight="minmax", activation="lsq")
    return replace(shared, model_args=tuple(args.items()), spec=spec)


def with_training(run: Run, **fields: Any) -> Run:
    """`run` with other `fields` of its `TrainConfig`."""
    return replace(run, config=replace(run.config, **fields))


def dedicated(start: Run) -> list[Run]:
    """One network for each bit-width, on the full data, without correction."""
    alone = with_training(start, scheme="dedicated", coreset=None)
    specs = (replace(start.spec, bits=(b,), correction="none") for b in start.spec.bits)
    return [replace(alone, spec=spec, eval_bits=spec.bits) for spec in specs]


def any_precision(start: Run) -> Run:
    """Any-Precision: joint training with recursive distillation, a batch norm for each bit-width."""
    joint = with_training(start, scheme="joint", distillation=True, coreset=None)
    return replace(joint, spec=replace(start.spec, norm="switchable", correction="none"))


def ours(start: Run, coreset: CoresetConfig | None = None, **spec: Any) -> Run:
    """Bit-wise training under one shared batch norm; spec: what differs in the `QuantSpec` of `start`."""
    bitwise = with_training(start, scheme="bitwise", distillation=False, coreset=coreset)
    return replace(bitwise, spec=replace(start.spec, **spec))


def bitwise_coreset(pruning_rate: float, **options: Any) -> CoresetConfig | None:
    """Coresets by importance as the notebooks use them, or None where nothing is pruned.

    Scoring is cheap enough for short runs: three epochs, the fewest that TDDS needs, on 4/3 of what is kept. This costs
    as much as one more epoch on the coreset. options: of `CoresetConfig`.
    """
    if not checks.pruning_rate(pruning_rate):
        return None
    usual = {"score": "tdds", "scoring_epochs": 3, "candidates": min(1.0, (1 - pruning_rate) * 4 / 3)}
    return CoresetConfig(**{"pruning_rate": pruning_rate} | usual | options)


def redrawn(start: Run, pruning_rate: float, parts: int = 2, **options: Any) -> Run:
    """Ours for few steps and images, beyond the paper: each trained bit-width has its own statistics.

    Each batch is cut in `parts`, and coresets are drawn each epoch from all data by importance.
    """
    drawn = bitwise_coreset(pruning_rate, **{"how": "sample", "unscored": True} | options)
    return ours(in_parts(start, parts), drawn, norm="shared_affine")


def in_parts(run: Run, parts: int, factor: float = 1.0) -> Run:
    """`run` with each batch cut in so many smaller ones, at `factor` times the learning rate."""
    return with_training(run, batch_size=run.config.batch_size // parts, lr=factor * run.config.lr)


def write_class_folders(data: Dataset, folder: Path) -> None:
    """Write a data set as PNG files in {train,val}/<class>/, whole or not at all, unless `folder` exists."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        whole = Path(made) / folder.name
        for name, split in (("train", data.train), ("val", data.test)):
            for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
                place = whole / name / data.classes[label]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:06d}.png")
        try:
            whole.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise


def quickstart(p: Parameters) -> list[Run]:
    """One network on the embedded digits, without and with weight bias correction."""
    shared = base(p, p.seeds[0], "digits")
    if p.profile.name != "smoke":  # digits need neither a large network nor a long schedule
        config = TrainConfig(epochs=4, batch_size=64, lr=0.1, seed=p.seeds[0])
        shared = replace(shared, dataset="digits", model="resnet8", model_args=(), config=config)
    return [ours(shared, correction="none"), ours(shared)]


def table1(p: Parameters) -> list[Run]:
    """Table 1: Dedicated, Any-Precision, and ours with each correction and at several pruning rates.

    Coresets are random ones drawn each epoch (RS2), and bit-wise ones by TDDS. One run at the middle rate has no
    gradient through the correction's statistics.
    """
    rates, runs = p.pruning_rates or (0.5, 0.8, 0.9), []
    for seed in p.seeds:
        shared = base(p, seed)
        random = [CoresetConfig(pruning_rate=rate) for rate in rates if rate]
        runs += [ours(shared, correction=c) for c in ("none", "mean", "mean_var")]
        runs += [*(ours(shared, coreset) for coreset in random), any_precision(shared), *dedicated(shared)]
        runs += [ours(shared, coreset, correction_gradient=False) for coreset in random[len(random) // 2 :][:1]]
        runs += [ours(shared, bitwise_coreset(rate)) for rate in rates if rate]
    return runs


def curves(p: Parameters) -> list[Run]:
    """Accuracy by run length: Any-Precision, ours at each pruning rate, and `redrawn` at the middle rate."""
    rates = [0.0, *(rate for rate in p.pruning_rates or (0.5, 0.8, 0.9) if rate)]
    runs = []
    for epochs, seed in product(p.lengths, p.seeds):
        shared = of_length(p, seed, epochs)
        runs += [any_precision(shared), *(ours(shared, bitwise_coreset(rate)) for rate in rates)]
        runs += [redrawn(shared, rate) for rate in rates[len(rates) // 2 :][:1]]
    return runs


def equal_epochs(p: Parameters) -> list[Run]:
    """What coresets lose to Any-Precision at equal epochs, and what removes the loss.

    The longest run compares the coreset of Table 1, also with smaller batches, with `redrawn` by TDDS, by EL2N of one
    epoch on all data, and at random (RS2). The shortest has two controls: Any-Precision with half-size batches, and one
    epoch on all data followed by random coresets (EL2N's weights to the power 0).
    """
    el2n = {"score": "el2n", "scoring_epochs": 1, "candidates": 1.0, "unscored": False}
    runs = []
    for seed in p.seeds:
        *shorter, start = (of_length(p, seed, epochs) for epochs in p.lengths)
        runs += [any_precision(start), *(ours(in_parts(start, parts), bitwise_coreset(PRUNED)) for parts in (1, 4))]
        runs += [redrawn(start, PRUNED), redrawn(start, PRUNED, **el2n)]
        runs += [ours(in_parts(start, 2), CoresetConfig(pruning_rate=PRUNED), norm="shared_affine")]
        for other in shorter:
            runs += [any_precision(other), redrawn(other, PRUNED), redrawn(other, PRUNED, **el2n)]
        for other in shorter[:1]:
            runs += [any_precision(in_parts(other, 2)), redrawn(other, PRUNED, **el2n, power=0.0)]
    return runs


def comparison(p: Parameters) -> list[Run]:
    """Coresets by score: Random, RS2, TDDS and EL2N at every pruning rate, the other scores at the middle one.

    Every score costs the same. Random and RS2 have none; RS2 also gets one epoch more, which costs as much as scoring
    at pruning rates of 0.25 or more.
    A pruning rate of 0 asks for one run on all data. ValueError: no other rate.
    """
    asked, runs = p.pruning_rates or (0.5, 0.8, 0.9), []
    rates = [rate for rate in asked if rate > 0]
    if not rates:
        raise checks.invalid("pruning_rates", asked, "one above 0 at least, at which coresets are compared")
    for seed in p.seeds:
        shared = coreset_base(p, seed)
        runs += [ours(shared)] * (0 in asked)
        longer = with_training(shared, epochs=shared.config.epochs + 1)
        for rate in rates:
            scores = SCORES[1:] if rate == rates[len(rates) // 2] else ("el2n", "tdds")
            coresets = [CoresetConfig(pruning_rate=rate, resample_every=every) for every in (0, 1)]
            coresets += [bitwise_coreset(rate, score=score) for score in scores]
            coresets += [bitwise_coreset(rate, how="sample")]
            runs += [*(ours(shared, coreset) for coreset in coresets), ours(longer, CoresetConfig(pruning_rate=rate))]
    return runs


def scoring_ablation(p: Parameters) -> list[Run]:
    """What matters in a TDDS coreset: how it is scored, drawn, shared between bit-widths, and trained on.

    "Joint" scoring is for Table 7. Coresets that are identical, independent or disjoint across bit-widths, by
    importance and at random, tell the effect of own scores from that of wider coverage.
    """
    ways = [{"across_bits": way} for way in ("identical", "independent", "disjoint")]
    random = {"score": "random", "candidates": 1.0, "scoring_epochs": 0, "resample_every": 0}
    options = [{}, {"how": "sample"}, {"how": "sample", "resample_every": 0}]
    options += [{"how": "sample", "unbiased": True, "candidates": 1.0}, {"candidates": 1.0, "scoring": "joint"}]
    options += [{"candidates": 1.0} | way for way in ways] + [random | way for way in ways]
    first, runs = p.profile.training, []
    trainings = [{"batch_size": first.batch_size // 2}, {"lr": 2 * first.lr}, {"weight_decay": first.weight_decay / 5}]
    for start in (coreset_base(p, seed) for seed in p.seeds):
        runs += [ours(start, bitwise_coreset(PRUNED, **option)) for option in options]
        changed = (with_training(start, **training) for training in trainings)
        runs += [ours(start, bitwise_coreset(PRUNED)) for start in changed]
    return runs


def table2(p: Parameters) -> list[Run]:
    """The other small data sets, CIFAR-100 and TinyImageNet: Any-Precision, and ours at several pruning rates."""
    runs = []
    for dataset, seed in product(("cifar100", "tinyimagenet"), p.seeds):
        shared = coreset_base(p, seed, dataset)
        coresets = [bitwise_coreset(rate) for rate in p.pruning_rates or (0.6, 0.8)]
        runs += [any_precision(shared), *(ours(shared, coreset) for coreset in coresets)]
    return runs


def vit(p: Parameters) -> list[Run]:
    """The same for ViT on CIFAR-10 and TinyImageNet: ours without and with correction and pruned, and the others."""
    runs = []
    for shared in (vit_base(p, seed, dataset) for dataset in ("cifar10", "tinyimagenet") for seed in p.seeds):
        runs += [ours(shared, correction=correction) for correction in ("none", "mean_var")]
        runs += [ours(shared, bitwise_coreset(rate)) for rate in p.pruning_rates or (0.8,)]
        runs += [any_precision(shared), *dedicated(shared)]
    return runs


def imagenet(p: Parameters) -> list[Run]:
    """Table 3: Any-Precision, and ours on the full data and at several pruning rates, of one seed.

    On ImageNet-1K or any class folders, streamed; smoke writes digits as files. ValueError: another data set.
    """
    if p.dataset not in ("", "imagenet") and not p.dataset.startswith("imagefolder:"):
        raise checks.invalid("dataset", p.dataset, "imagenet, or imagefolder:PATH for class folders")
    shared = base(p, p.seeds[0], "imagenet")
    dataset = p.dataset or "imagenet"
    if p.profile.dataset and not p.dataset:
        folder = p.results_dir / "images" / shared.dataset
        write_class_folders(load_dataset(shared.dataset).subset(*shared.subset), folder)
        dataset = f"imagefolder:{folder}"
    shared = replace(in_setting(shared, p.profile.imagenet), dataset=dataset, stream=dataset.startswith("imagefolder:"))
    if p.model:
        shared = replace(shared, model=p.model, model_args=())
    rates = p.pruning_rates or (0.6, 0.8)
    return [any_precision(shared), *(ours(shared, bitwise_coreset(rate)) for rate in dict.fromkeys((0.0, *rates)))]


def growth(p: Parameters) -> list[Run]:
    """What each scheme costs for more and more bit-widths, on a small part of CIFAR-10.

    The bit-widths of `p` come first, then the others of 1 to 8.
    """
    order, runs = tuple(dict.fromkeys((*p.bits, 2, 4, 8, 6, 3, 5, 7, 1))), []
    for count in p.profile.bit_counts:
        shared = base(replace(p, bits=tuple(sorted(order[:count]))), p.seeds[0], epochs=p.profile.coreset_epochs)
        shared = replace(shared, subset=p.profile.cost_subset, eval_bits=Run.eval_bits)
        runs += [*dedicated(shared), any_precision(shared), ours(shared), ours(shared, bitwise_coreset(PRUNED))]
    return runs


def deployed(p: Parameters) -> list[Run]:
    """What is deployed, for each seed: Table 1's network, ours on the full data; then one in full precision."""
    return [run for s in p.seeds for run in (ours(base(p, s)), *dedicated(base(replace(p, bits=(32,)), s)))]


def corrected_or_not(p: Parameters) -> list[Run]:
    """Table 1's networks, ours on the full data, without and with correction: for `measure.distributions`."""
    return [ours(base(p, seed), correction=name) for seed, name in product(p.seeds, ("none", "mean_var"))]


def corrected_again(p: Parameters) -> list[Run]:
    """`corrected_or_not` with further seeds, five where the profile has several: three did not settle the verdict."""
    repeats = p.repeats or (5 if len(p.seeds) > 1 else 1)
    return corrected_or_not(replace(p, seed=p.seeds[-1] + 1, repeats=repeats))


def bias_correction(p: Parameters) -> list[Run]:
    """Table 6: weight bias correction under a shared and a switchable batch norm, on the full data."""
    kinds = [*product(["shared"], ("none", "mean", "mean_var")), *product(["switchable"], ("none", "mean_var"))]
    return [ours(base(p, seed), norm=norm, correction=name) for seed in p.seeds for norm, name in kinds]


def uncalibrated(p: Parameters) -> list[Run]:
    """What replaces calibration, on the full data: shared or own statistics, without and with output correction."""
    kinds = product(p.seeds, ("shared", "shared_affine"), (False, True))
    return [ours(base(p, seed), norm=norm, output_correction=output) for seed, norm, output in kinds]


def untrained(p: Parameters) -> list[Run]:
    """Every bit-width from few trained ones: all of `p`, then the lowest and the highest alone; on the full data.

    Any-Precision, which calibrates what it has not trained; ours; ours with `UNCALIBRATED`.
    """
    runs = []
    for bits, seed in product((p.bits, (p.bits[0], p.bits[-1])), p.seeds):
        shared = base(replace(p, bits=tuple(dict.fromkeys(bits))), seed)
        runs += [any_precision(shared), ours(shared), ours(shared, **UNCALIBRATED)]
    return list(dict.fromkeys(runs))  # of two bit-widths the lowest and the highest are all


def transfer(p: Parameters) -> list[Run]:
    """What a child model gains from the others' steps: trained all together, all but one, and each alone.

    Alone it is also trained for as many steps as the others have together. ValueError: a single bit-width.
    """
    if len(p.bits) < 2:
        raise checks.invalid("bits", p.bits, "two bit-widths at least")
    children = [tuple(b for b in p.bits if b != out) for out in (0, *p.bits)]
    runs = []
    for start in (coreset_base(p, seed) for seed in p.seeds):
        longer = with_training(start, epochs=(len(p.bits) - 1) * start.config.epochs)
        runs += [*(ours(start, bits=bits, **UNCALIBRATED) for bits in children), *dedicated(start), *dedicated(longer)]
    return list(dict.fromkeys(runs))  # of two bit-widths the others are one


def fair_base(p: Parameters, seed: int) -> Run:
    """What runs of a comparison share in which each method is tuned; only the trained bit-widths are evaluated."""
    return replace(in_setting(base(p, seed), p.profile.fair), eval_bits=p.bits)


def tuning(p: Parameters) -> list[Run]:
    """What each method trains best with, on validation images and the full data, of one seed.

    Any-Precision with and without distillation, and ours: learning rates 0.5, 1 and 2 times the usual one, each in
    whole batches and in batches of a third, in which ours takes as many steps as Any-Precision in whole ones.
    """
    start, runs = fair_base(p, p.seeds[0]), []
    for parts, factor in product((1, 3), (1.0, 2.0, 0.5)):
        shared = in_parts(start, parts, factor)
        joint = any_precision(shared)
        runs += [joint, with_training(joint, distillation=False), ours(shared)]
    return runs


def tuned_any_precision(start: Run, epochs: int) -> Run:
    """Any-Precision as `tuning` found it best, for so many epochs."""
    factor, parts = TUNED["joint"]
    return with_training(any_precision(in_parts(start, parts, factor)), epochs=epochs, distillation=DISTILLATION)


def recommended(start: Run, epochs: int) -> Run:
    """`config.recipe` for as many passes as `epochs` epochs on all data, with what `tuning` found best for ours."""
    spec, config = recipe(start.spec.bits)
    first = config.coreset.warmup
    length = first + round((epochs - first) / (1 - config.coreset.pruning_rate))
    factor, parts = TUNED["bitwise"]
    run = with_training(in_parts(start, parts, factor), epochs=length, coreset=config.coreset)
    return replace(run, spec=spec)


def headline(p: Parameters, longer: bool = False) -> list[Run]:
    """Any-Precision, tuned, against the recipe at as many passes, on test images.

    For one of the lengths the recipe trains on all data too, which tells what coresets bring. longer: for the lengths
    that take hours, without this control.
    """
    runs, lengths = [], p.profile.fair_longer if longer else p.profile.fair_lengths
    for epochs, seed in product(lengths, p.seeds):
        start = _tested(p, seed)
        runs += [tuned_any_precision(start, epochs), recommended(start, epochs)]
        if epochs == p.profile.fair_control and not longer:
            runs.append(with_training(runs[-1], epochs=epochs, coreset=None))
    return runs


def headline_longer(p: Parameters) -> list[Run]:
    """`headline` for the lengths that take hours."""
    return headline(p, longer=True)


def headline_changes(p: Parameters) -> list[Run]:
    """The recipe where `headline` has its control: with distillation, and with 1 bit too where it has none."""
    runs = []
    for seed in p.seeds:
        usual = recommended(_tested(p, seed), p.profile.fair_control)
        runs.append(with_training(usual, distillation=True))
        if 1 not in p.bits:
            bits = (1, *p.bits)
            runs.append(replace(usual, spec=replace(usual.spec, bits=bits), eval_bits=bits))
    return runs


def _tested(p: Parameters, seed: int) -> Run:
    """`fair_base` on test images; long runs are compiled."""
    run = replace(fair_base(p, seed), held_out=0)
    return with_training(run, compile=run.config.compile or "auto")


def gpu_slices(p: Parameters) -> list[Run]:
    """What a GPU is to train of the paper's network, the most important first; a budget stops it and it goes on later.

    First ours on the full data without and with correction, for a tenth of the schedule and three seeds. Then at 1, 2,
    4 and 8 bits, of one seed each: 80 % pruning by TDDS, of which a tenth of the epochs are for scoring, in windows of
    half of those (20 and 10 of 200 epochs, as far as the paper's setting is known); and at as many passes `recommended`
    and `tuned_any_precision`.
    """
    whole = p.profile.training.epochs
    seeds = range(p.seed, p.seed + (p.repeats or 3))
    short = [of_length(p, seed, max(whole // 10, 1)) for seed in seeds]
    runs = [ours(start, correction=name) for start in short for name in ("none", "mean_var")]
    four, scoring = replace(p, bits=(1, 2, 4, 8)), max(whole // 10, 3)
    tdds = CoresetConfig(score="tdds", scoring_epochs=scoring, window=max(scoring // 2, 3))
    runs.append(ours(base(four, p.seed), tdds))
    start, epochs = _tested(four, p.seed), scoring + round((whole - scoring) / 5)
    return [*runs, recommended(start, epochs), tuned_any_precision(start, epochs)]


def statistics_kinds(p: Parameters) -> list[Run]:
    """Which running statistics serve a shared norm, without and with correction: for `statistics.KINDS`."""
    starts = (replace(fair_base(p, seed), every_statistics=True) for seed in p.seeds)
    return [ours(start, norm="shared_affine", correction=name) for start in starts for name in ("none", "mean_var")]


def _long_base(p: Parameters, seed: int) -> Run:
    """`base` for the profile's `fair_epochs`, with held-out images in place of test images."""
    return replace(base(p, seed, epochs=p.profile.fair_epochs), held_out=p.profile.fair.held_out)


def pruned_factors(p: Parameters) -> list[Run]:
    """What matters in pruning: coresets drawn once or each epoch, with a first epoch on all data or without.

    All coresets are random, so that no score has a part in it. Each network is evaluated with `statistics.KINDS`.
    """
    on_all = {"score": "el2n", "scoring_epochs": 1, "how": "sample", "power": 0.0}  # a power of 0: equal chances
    kinds = [first | {"resample_every": every} for first, every in product(({}, on_all), (0, 1))]
    starts = [replace(_long_base(p, seed), every_statistics=True) for seed in p.seeds]
    coresets = [CoresetConfig(pruning_rate=PRUNED, **kind) for kind in kinds]
    return [ours(start, coreset, norm="shared_affine") for start, coreset in product(starts, coresets)]


def importance(p: Parameters) -> list[Run]:
    """Importance against equal chances at 80 % pruning: EL2N of 3 epochs, and TDDS of 10 with windows of 5.

    Each score has a twin that trains the same scoring phase and then draws with equal chances. EL2N scores all data and
    TDDS 3/10 of it, so that all runs take the same number of passes. Ranks are averaged over bit-widths, which all
    draw the same coreset. There are five seeds where the profile has several.
    """
    drawn = {"pruning_rate": 0.8, "how": "sample", "across_bits": "identical"}
    el2n = CoresetConfig(score="el2n", scoring_epochs=3, **drawn)
    tdds = CoresetConfig(score="tdds", scoring_epochs=10, window=5, candidates=0.3, unscored=True, **drawn)
    seeds = p.seeds if p.repeats or len(p.seeds) == 1 else range(p.seed, p.seed + 5)
    runs = []
    for seed, coreset, power in product(seeds, (el2n, tdds), (1.0, 0.0)):
        start = _long_base(p, seed)
        left = start.config.epochs - 15  # on coresets: 3 epochs on all data take as many passes as 15 on a fifth
        start = with_training(start, epochs=coreset.warmup + left)
        runs.append(ours(start, replace(coreset, power=power), norm="shared_affine"))
    return runs


RUNS = [quickstart, table1, table2, imagenet, vit, curves, comparison, equal_epochs, scoring_ablation, growth]
RUNS += [corrected_or_not, corrected_again, bias_correction, uncalibrated, untrained, transfer, deployed, tuning]
RUNS += [statistics_kinds, pruned_factors, importance, headline, headline_changes]
# made in several goes, and in no notebook yet
UNDER_WAY = [headline_longer, gpu_slices]
# The experiments that read a parameter, of those that most do not read.
READ_BY = {"dataset": [imagenet], "model": [imagenet], "lengths": [curves, equal_epochs]}
READ_BY |= {"pruning_rates": [table1, table2, imagenet, vit, curves, comparison]}
READ_BY["repeats"] = [
    e for e in RUNS + UNDER_WAY if e not in (quickstart, imagenet, growth, tuning)
]  # of several seeds
CALL_AGAIN = 75  # the exit status of a call whose budget is spent: EX_TEMPFAIL in sysexits.h


def main(arguments: list[str]) -> int:
    """Finish the runs of one experiment from a shell, in one process or in all that a launcher started.

    arguments: its name, and parameters as papermill takes them, for example ["imagenet", "-p", "bits", "[2,4,8]"].
    Returns CALL_AGAIN where the budget is spent and work is left, else 0; always 0 under a launcher, which would take
    another status for a failure. ValueError: a wrong parameter or budget.
    """
    names = {function.__name__: function for function in RUNS + UNDER_WAY}
    parser = argparse.ArgumentParser(prog="python -m emqlib.paper.experiments")
    parser.add_argument("name", choices=list(names), help="the runs of one notebook")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("PARAMETER", "VALUE"))
    profile = {"type": lambda name: ("profile", name), "help": "the same as -p profile NAME"}
    parser.add_argument("--profile", dest="p", action="append", metavar="NAME", **profile)
    text = f"stop at the end of an epoch after so many seconds, with exit status {CALL_AGAIN}; the same call goes on"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=text)
    asked = parser.parse_args(arguments)
    deadline, known = Deadline(asked.budget), inspect.signature(parameters).parameters
    experiment, status, place = names[asked.name], 0, current()
    for name, value in asked.p:
        checks.choice("parameter", name, known)
        if experiment not in READ_BY.get(name, [experiment]):
            others = ", ".join(other.__name__ for other in READ_BY[name])
            raise checks.invalid(name, value, f"no value, since {asked.name} does not read it; {others} would")
    p = parameters(**{name: int(value) if value.isdecimal() and len(value) < 19 else value for name, value in asked.p})
    try:
        rows = run_all(experiment(p), p.results_dir, budget=deadline)
        where = f"below {p.results_dir / 'runs'}; {place.count} process(es)"
        report = f"{rows.run.nunique()} runs, {len(rows)} rows {where}"
    except OutOfTime as stop:
        report, status = str(stop), CALL_AGAIN
    if place.main:
        print(report)
    return status if place.count == 1 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
