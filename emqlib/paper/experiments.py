"""A paper table becomes a list of runs, for `run_all` to run or to read."""

import argparse
import inspect
import shutil
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from .. import checks
from ..layers import QuantSpec
from ..train.checkpoint import Deadline, OutOfTime
from ..train.config import SCORES, CoresetConfig, TrainConfig
from ..train.data import Dataset, check_name, load_dataset
from ..train.distributed import current, started
from .profiles import Parameters, Setting, parameters
from .runs import Run, coreset_rows, run_all


def base(p: Parameters, seed: int, dataset: str, epochs: int = 0) -> Run:
    """What all runs of a profile share, on the full data.

    epochs: 0 for the profile's own number; with another, only the trained bit-widths are evaluated, and milestones of
    the learning rate move in proportion.
    """
    checks.instance("p", p, Parameters, "what profiles.parameters gives")
    check_name("dataset", checks.instance("dataset", dataset, str, "the name of a data set"))
    own = p.profile.training
    length = epochs or own.epochs
    milestones = tuple(max(1, round(m * length / own.epochs)) for m in own.milestones)
    config = replace(own, seed=seed, epochs=length, milestones=milestones)
    return Run(
        profile=p.profile.name,
        dataset=p.profile.dataset or dataset,
        model=p.profile.model,
        model_args=p.profile.model_args,
        subset=p.profile.subset,
        spec=QuantSpec(bits=p.bits),
        config=config,
        eval_bits=p.bits if epochs else tuple({*Run.eval_bits, *p.bits}),
    )


def in_setting(base: Run, setting: Setting) -> Run:
    """`base` with the network, the training and the images of `setting`; of its own training the seed is kept."""
    return replace(
        _run("base", base),
        model=checks.instance("setting", setting, Setting, "a Setting, such as a profile's vit").model,
        model_args=setting.model_args,
        subset=setting.subset,
        image_size=setting.image_size,
        config=replace(setting.training, seed=base.config.seed),
    )


def vit_base(p: Parameters, seed: int, dataset: str) -> Run:
    """What runs of a ViT share, with as many patches on TinyImageNet's 64 x 64 pixels as on CIFAR's 32 x 32."""
    shared = in_setting(base(p, seed, dataset), p.profile.vit)
    args = dict(shared.model_args)
    if shared.dataset == "tinyimagenet":
        args |= {"image_size": 64, "patch_size": 2 * args["patch_size"]}
    spec = replace(shared.spec, weight="minmax", activation="lsq")
    return replace(shared, model_args=tuple(args.items()), spec=spec)


def coreset_base(p: Parameters, seed: int, dataset: str) -> Run:
    """What runs that compare coresets share: more epochs, on as much of the data as they can then afford."""
    return replace(base(p, seed, dataset, p.profile.coreset_epochs), subset=p.profile.coreset_subset)


def _run(name: str, value: Any) -> Run:
    return checks.instance(name, value, Run, "a Run, as base makes one")


def dedicated(base: Run) -> list[Run]:
    """One network for each bit-width, on the full data, without correction."""
    config = replace(_run("base", base).config, scheme="dedicated", coreset=None)
    specs = (replace(base.spec, bits=(b,), correction="none") for b in base.spec.bits)
    return [replace(base, spec=spec, config=config, eval_bits=spec.bits) for spec in specs]


def any_precision(base: Run) -> Run:
    """Any-Precision: joint training with recursive distillation, a batch norm for each bit-width."""
    spec = replace(_run("base", base).spec, norm="switchable", correction="none")
    return replace(base, spec=spec, config=replace(base.config, scheme="joint", distillation=True, coreset=None))


def ours(base: Run, coreset: CoresetConfig | None = None, **spec: Any) -> Run:
    """Bit-wise training under one shared batch norm; `spec`: fields of the `QuantSpec` that differ from the base's."""
    config = replace(_run("base", base).config, scheme="bitwise", distillation=False, coreset=coreset)
    return replace(base, spec=replace(base.spec, **spec), config=config)


def bitwise_coreset(pruning_rate: float, **options: Any) -> CoresetConfig | None:
    """Coresets by importance, TDDS where not said otherwise, as the notebooks use them; None where nothing is pruned.

    Cheap enough for short runs: each bit-width scores 4/3 of what it keeps, in the three epochs that TDDS needs at
    least, and so spends on them the price of one epoch more of its coreset.
    """
    if not checks.pruning_rate(pruning_rate):
        return None
    usual = {"score": "tdds", "scoring_epochs": 3, "candidates": min(1.0, (1 - pruning_rate) * 4 / 3)}
    return CoresetConfig(**{"pruning_rate": pruning_rate} | usual | options)


def of_length(p: Parameters, seed: int, dataset: str, epochs: int) -> Run:
    """`base` for as many epochs, and the very one of Table 1 where they are the profile's own."""
    return base(p, seed, dataset, 0 if epochs == p.profile.training.epochs else epochs)


def redrawn(base: Run, pruning_rate: float, parts: int = 2, **options: Any) -> Run:
    """Ours where steps and images are few (beyond the paper): each batch of the base in `parts` ones, coresets
    drawn anew each epoch from all data by importance, and running statistics for each trained bit-width.
    """
    drawn = bitwise_coreset(pruning_rate, **{"how": "sample", "unscored": True} | options)
    return ours(in_parts(base, parts), drawn, norm="shared_affine")


def in_parts(run: Run, parts: int) -> Run:
    """`run` with each batch in as many smaller ones."""
    count = checks.integer("parts", parts, 1, _run("run", run).config.batch_size)
    return replace(run, config=replace(run.config, batch_size=run.config.batch_size // count))


def as_files(run: Run, results_dir: Path) -> str:
    """The name of the run's data set as class folders of files below `results_dir`, which are written if need be."""
    folder = results_dir / "images" / run.dataset
    write_class_folders(load_dataset(run.dataset).subset(*run.subset), folder)
    return f"imagefolder:{folder}"


def write_class_folders(data: Dataset, folder: Path) -> None:
    """Write a data set that lies in memory as class folders of PNG files, {train,val}/<class>/*, unless it is there.

    So `imagefolder:PATH` reads it, or streams it. Whoever looks finds all of it or nothing.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    half_done = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, split in (("train", data.train), ("val", data.test)):
            for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
                place = half_done / name / data.classes[label]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:06d}.png")
        half_done.chmod(0o755)  # mkdtemp makes it private
        half_done.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(half_done, ignore_errors=True)


__all__ = [
    "UNCALIBRATED",
    "any_precision",
    "base",
    "bias_correction",
    "bitwise_coreset",
    "comparison",
    "coreset_rows",
    "corrected_or_not",
    "curves",
    "dedicated",
    "deployed",
    "equal_epochs",
    "growth",
    "imagenet",
    "ours",
    "quickstart",
    "redrawn",
    "run_all",
    "scoring_ablation",
    "table1",
    "table2",
    "transfer",
    "uncalibrated",
    "untrained",
    "vit",
]


def quickstart(p: Parameters) -> list[Run]:
    """One network on the embedded digits, without and with weight bias correction."""
    shared = base(p, p.seeds[0], "digits")
    if p.profile.name != "smoke":  # digits need neither a large network nor a long schedule
        config = TrainConfig(epochs=4, batch_size=64, lr=0.1, seed=p.seeds[0])
        shared = replace(shared, dataset="digits", model="resnet8", model_args=(), config=config)
    return [ours(shared, correction="none"), ours(shared)]


def table1(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """Table 1: Dedicated, Any-Precision, and ours at several pruning rates; on the full data with each correction.

    Coresets are random ones, drawn anew each epoch (RS2), and bit-wise ones by TDDS. At the middle rate also without
    gradient through the correction's statistics, which measures that option's default.
    The paper's numbers: results/paper/table1.csv.
    """
    rates, runs = p.pruning_rates or (0.5, 0.8, 0.9), []
    for seed in p.seeds:
        shared = base(p, seed, dataset)
        random = [CoresetConfig(pruning_rate=rate) for rate in rates if rate]
        runs += [ours(shared, correction=c) for c in ("none", "mean", "mean_var")]
        runs += [*(ours(shared, coreset) for coreset in random), any_precision(shared), *dedicated(shared)]
        runs += [ours(shared, coreset, correction_gradient=False) for coreset in random[len(random) // 2 :][:1]]
        runs += [ours(shared, bitwise_coreset(rate)) for rate in rates if rate]
    return runs


def curves(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """Accuracy against the cost of training: Any-Precision and ours at each pruning rate, at each run length.

    The middle rate also by `redrawn`.
    """
    rates = [0.0, *(rate for rate in p.pruning_rates or (0.5, 0.8, 0.9) if rate)]
    runs = []
    for epochs, seed in product(p.lengths, p.seeds):
        shared = of_length(p, seed, dataset, epochs)
        runs += [any_precision(shared), *(ours(shared, bitwise_coreset(rate)) for rate in rates)]
        runs += [redrawn(shared, rate) for rate in rates[len(rates) // 2 :][:1]]
    return runs


def equal_epochs(p: Parameters, dataset: str = "cifar10", pruning_rate: float = 0.8) -> list[Run]:
    """What coresets lose to Any-Precision at as many epochs, and what takes the loss away.

    In the longest run: Any-Precision; the coreset of Table 1, also with batches a quarter as large; and, with half-size
    batches and statistics for each bit-width, `redrawn` by TDDS, by EL2N of one epoch on all data, and random ones
    (RS2). In the others: Any-Precision and both `redrawn`. In the shortest alone, the controls: Any-Precision with
    half-size batches, and one epoch on all data before coresets drawn at random (EL2N's weights to the power 0).
    """
    rate, el2n = pruning_rate, {"score": "el2n", "scoring_epochs": 1, "candidates": 1.0, "unscored": False}
    runs = []
    for seed in p.seeds:
        *shorter, start = (of_length(p, seed, dataset, epochs) for epochs in p.lengths)
        runs += [any_precision(start), *(ours(in_parts(start, parts), bitwise_coreset(rate)) for parts in (1, 4))]
        runs += [redrawn(start, rate), redrawn(start, rate, **el2n)]
        runs += [ours(in_parts(start, 2), CoresetConfig(pruning_rate=rate), norm="shared_affine")]
        for other in shorter:
            runs += [any_precision(other), redrawn(other, rate), redrawn(other, rate, **el2n)]
        for other in shorter[:1]:
            runs += [any_precision(in_parts(other, 2)), redrawn(other, rate, **el2n, power=0.0)]
    return runs


def comparison(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """Coresets by score: Random and RS2, TDDS and EL2N at every pruning rate, all the others at the middle one.

    All scores are recorded in the same scoring phase, and so at the same price; Random and RS2 have none, and train on
    their coresets from the first epoch. RS2 also for one epoch more, which is that price (see `bitwise_coreset`).
    """
    rates, runs = p.pruning_rates or (0.5, 0.8, 0.9), []
    for seed in p.seeds:
        shared = coreset_base(p, seed, dataset)
        for rate in rates:
            middle = rate == rates[len(rates) // 2]
            scores = [score for score in SCORES[1:] if middle or score in ("tdds", "el2n")]
            coresets = [CoresetConfig(pruning_rate=rate, resample_every=every) for every in (0, 1)]
            coresets += [bitwise_coreset(rate, score=score) for score in scores]
            coresets += [bitwise_coreset(rate, how="sample")]
            runs += [ours(shared, coreset) for coreset in coresets]
            longer = replace(shared, config=replace(shared.config, epochs=shared.config.epochs + 1))
            runs += [ours(longer, CoresetConfig(pruning_rate=rate))]
    return runs


def scoring_ablation(p: Parameters, dataset: str = "cifar10", pruning_rate: float = 0.8) -> list[Run]:
    """What of a TDDS coreset matters: how it is scored, drawn, drawn again and shared between bit-widths.

    The seven from joint scoring on have all candidates, so nothing else sets bit-widths apart: "joint" against
    "bitwise" scoring is Table 7, and coresets that are identical, independent or disjoint across bit-widths, by
    importance and at random, tell what scores of its own are worth to a bit-width from what wider coverage is. The
    last ones train on the first coreset with another batch size, learning rate or weight decay.
    """
    options = [
        {},
        {"how": "sample"},
        {"how": "sample", "resample_every": 0},
        {"how": "sample", "rescore": True},
        {"how": "sample", "unbiased": True, "candidates": 1.0},
        {"full_epochs": 1},
    ]
    ways = ("identical", "independent", "disjoint")
    options += [{"candidates": 1.0, "scoring": "joint"}]
    options += [{"candidates": 1.0, "across_bits": way} for way in ways]
    random = {"score": "random", "candidates": 1.0, "scoring_epochs": 0, "resample_every": 0}
    options += [random | {"across_bits": way} for way in ways]
    first, runs = p.profile.training, []
    trainings = [{"batch_size": first.batch_size // 2}, {"lr": 2 * first.lr}, {"weight_decay": first.weight_decay / 5}]
    for start in (coreset_base(p, seed, dataset) for seed in p.seeds):
        runs += [ours(start, bitwise_coreset(pruning_rate, **option)) for option in options]
        changed = (replace(start, config=replace(start.config, **training)) for training in trainings)
        runs += [ours(start, bitwise_coreset(pruning_rate)) for start in changed]
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
    """The comparison for ViT, on CIFAR-10 and on TinyImageNet.

    Dedicated, Any-Precision, and ours without and with correction, and at several pruning rates. Layer norm keeps no
    statistics: no bit-width needs a norm of its own, and nothing is adapted. Weights take one step size an output
    channel, activations learn theirs (LSQ), since those of a transformer are signed and long-tailed.
    """
    runs = []
    for shared in (vit_base(p, seed, dataset) for dataset in ("cifar10", "tinyimagenet") for seed in p.seeds):
        runs += [ours(shared, correction=correction) for correction in ("none", "mean_var")]
        runs += [ours(shared, bitwise_coreset(rate)) for rate in p.pruning_rates or (0.8,)]
        runs += [any_precision(shared), *dedicated(shared)]
    return runs


def imagenet(p: Parameters) -> list[Run]:
    """Table 3: ImageNet-1K, streamed, or any data set of class folders; one seed.

    Any-Precision, and ours on the full data and at several pruning rates. Smoke has the digits, written as files.
    ValueError: another data set.
    """
    if p.dataset not in ("", "imagenet") and not p.dataset.startswith("imagefolder:"):
        raise checks.invalid("dataset", p.dataset, "imagenet, or imagefolder:PATH for class folders")
    shared = base(p, p.seeds[0], "imagenet")
    dataset = p.dataset or (as_files(shared, p.results_dir) if p.profile.dataset else "imagenet")
    shared = replace(in_setting(shared, p.profile.imagenet), dataset=dataset, stream=dataset.startswith("imagefolder:"))
    if p.model:
        shared = replace(shared, model=p.model, model_args=())
    rates = p.pruning_rates or (0.6, 0.8)
    return [any_precision(shared), *(ours(shared, bitwise_coreset(rate)) for rate in dict.fromkeys((0.0, *rates)))]


def growth(p: Parameters, pruning_rate: float = 0.8) -> list[Run]:
    """Every scheme over more and more bit-widths, on a small part of CIFAR-10: what it costs, not what it gives.

    The bit-widths asked for come first, the others of 1 to 8 after them.
    """
    order, runs = tuple(dict.fromkeys((*p.bits, 2, 4, 8, 6, 3, 5, 7, 1))), []
    for count in p.profile.bit_counts:
        shared = base(replace(p, bits=tuple(sorted(order[:count]))), p.seeds[0], "cifar10", p.profile.coreset_epochs)
        shared = replace(shared, subset=p.profile.cost_subset, eval_bits=Run.eval_bits)
        runs += [*dedicated(shared), any_precision(shared), ours(shared), ours(shared, bitwise_coreset(pruning_rate))]
    return runs


def deployed(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """What `studies.deploy` serves, for each seed: Table 1's network, ours on the full data; one in full precision."""
    full = replace(p, bits=(32,))
    pairs = [(ours(base(p, seed, dataset)), *dedicated(base(full, seed, dataset))) for seed in p.seeds]
    return [run for pair in pairs for run in pair]


def corrected_or_not(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """Table 1's networks, ours on the full data, without and with correction: for `studies.distributions`."""
    pairs = product(p.seeds, ("none", "mean_var"))
    return [ours(base(p, seed, dataset), correction=correction) for seed, correction in pairs]


def bias_correction(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """Table 6: weight bias correction under a shared and a switchable batch norm, on the full data."""
    runs = []
    for shared in (base(p, seed, dataset) for seed in p.seeds):
        runs += [ours(shared, correction=correction) for correction in ("none", "mean", "mean_var")]
        runs += [ours(shared, correction=correction, norm="switchable") for correction in ("none", "mean_var")]
    return runs


# Beyond the paper: what serves every bit-width, trained or not, without a calibration pass (see `studies.remedies`).
UNCALIBRATED = {"norm": "shared_affine", "output_correction": True}


def uncalibrated(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """What `studies.remedies` starts from, on the full data: shared or own statistics, output correction or none."""
    kinds = product(("shared", "shared_affine"), (False, True))
    specs = [{"norm": norm, "output_correction": output} for norm, output in kinds]
    return [ours(base(p, seed, dataset), **spec) for seed in p.seeds for spec in specs]


def untrained(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """Every bit-width from few trained ones: all of `bits`, then the lowest and the highest alone.

    Any-Precision, which calibrates what it has not trained; ours; and ours with `UNCALIBRATED`; on the full data.
    """
    runs = []
    for bits, seed in product((p.bits, (p.bits[0], p.bits[-1])), p.seeds):
        shared = base(replace(p, bits=tuple(dict.fromkeys(bits))), seed, dataset)
        runs += [any_precision(shared), ours(shared), ours(shared, **UNCALIBRATED)]
    return list(dict.fromkeys(runs))  # of two bit-widths the lowest and the highest are all


def transfer(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """What a child gains from others' steps: all children; all but one, each left out once; each one alone.

    ValueError: a single bit-width, which has no others.
    """
    if len(p.bits) < 2:
        raise checks.invalid("bits", p.bits, "two bit-widths at least")
    runs = []
    for start in (coreset_base(p, seed, dataset) for seed in p.seeds):
        children = [tuple(b for b in p.bits if b != out) for out in (0, *p.bits)]
        runs += [ours(start, bits=bits, **UNCALIBRATED) for bits in children]
        runs += dedicated(start)
    return runs


RUNS = [quickstart, table1, table2, imagenet, vit, curves, comparison, equal_epochs, scoring_ablation, growth]
RUNS += [corrected_or_not, bias_correction, uncalibrated, untrained, transfer, deployed]


CALL_AGAIN = 75  # the exit status of a call whose budget is spent: EX_TEMPFAIL in sysexits.h


def main(arguments: list[str]) -> int:
    """Finish the runs of one experiment from a shell, in one process or in all that a launcher started.

    arguments: its name, and parameters as `papermill` takes them, for example ["imagenet", "-p", "bits", "[2,4,8]"].
    Prints a report and returns the exit status: CALL_AGAIN where the budget is spent and work is left, else 0; always 0
    in each of several processes, whose launcher would take it for a failure. SystemExit: a wrong name, or a budget that
    is no number. ValueError: a wrong parameter, or a budget that is not > 0.
    """
    names = {function.__name__: function for function in RUNS}
    asked = _parser(list(names)).parse_args(arguments)
    deadline, known = Deadline(asked.budget), inspect.signature(parameters).parameters
    for name, _ in asked.p:
        checks.choice("parameter", name, known)
    p = parameters(**{name: int(value) if value.isdecimal() and len(value) < 19 else value for name, value in asked.p})
    status = 0
    try:
        rows = run_all(names[asked.name](p), p.results_dir, processes=p.processes, budget=deadline)
        count = max(current().count, p.processes)
        report = f"{rows.run.nunique()} runs, {len(rows)} rows below {p.results_dir / 'runs'}; {count} process(es)"
    except OutOfTime as stop:
        report, status = str(stop), CALL_AGAIN
    if current().main:
        print(report)
    return status if started() == 1 else 0


def _parser(names: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m emqlib.paper.experiments")
    parser.add_argument("name", choices=names, help="the runs of one notebook")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("PARAMETER", "VALUE"))
    profile = {"type": lambda name: ("profile", name), "help": "the same as -p profile NAME"}
    parser.add_argument("--profile", dest="p", action="append", metavar="NAME", **profile)
    text = "stop at the next step of training, or after an evaluation, once so many seconds have passed; the same call "
    text += f"goes on from there. Exit status {CALL_AGAIN} where work is left (0 in processes that a launcher started)"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
