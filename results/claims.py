"""What the paper claims and what this project adds, with what was measured here and a verdict that follows from it.

Every number in these texts is worked out from the rows of a CSV file below `results/`, and so is every verdict. After a
change of rows or of a text, `python results/claims.py` writes the tables of both READMEs and of the guide.
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from emqlib import checks
from emqlib.files import write_text

MARKS = ("<!-- claims: python results/claims.py -->", "<!-- end of claims -->")
AS_TRAINED = {"trained": True, "adapted": False}  # at the trained bit-widths, without batch-norm adaptation
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365}  # by number of seeds: the 97.5 % quantile of Student's t
PASSES = 5 * 50_000 * 200  # of one image at one bit-width: Any-Precision's published schedule of CIFAR-10

Verdict = Literal["consistent", "inconsistent", "inconclusive", "not tested at this scale", ""]
Source = Literal["abstract", "summary", "beyond the paper", "engineering"]


@dataclass(frozen=True)
class Claim:
    """One line of a table."""

    claim: str  # the words of the abstract, in quotation marks, or what a summary by others says, or our own claim
    source: Source
    setting: str  # what was trained here, and which part of the published schedule that is
    measured: str  # a difference of the same seeds, with its 95 % interval, and what else there is to know
    verdict: Verdict  # empty for what is no comparison over seeds
    why: str


def read(results: Path, name: str, **where: Any) -> pd.DataFrame:
    """The rows of `results`/name.csv whose columns have the values `where`."""
    return at(pd.read_csv(results / f"{name}.csv"), **where)


def at(rows: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows whose columns have the values `where`."""
    for column, value in where.items():
        rows = rows[checks.table("rows", rows, [column])[column] == value]
    return rows


def seeds(rows: pd.DataFrame, of: str = "top1", **where: Any) -> pd.Series:
    """The mean of a column for each seed; rows without a seed count as one. ValueError: no rows, or no such column."""
    part = checks.table("rows", at(rows, **where), [of])
    return part.groupby(part.seed if "seed" in part else 0 * part.index)[of].mean()


def said(values: pd.DataFrame | pd.Series, of: str = "top1", digits: int = 1, **where: Any) -> str:
    """The mean and, of several seeds, the standard deviation, with so many `digits`: "71.2 ± 0.3".

    values: one number for each seed, or rows, of which `seeds` takes the column `of`.
    """
    numbers = (seeds(values, of, **where) if isinstance(values, pd.DataFrame) else values).dropna()
    if numbers.empty:
        raise checks.invalid("values", "none", "numbers of the same seeds")
    mean = f"{round(numbers.mean(), digits) + 0.0:,.{digits}f}"  # + 0.0: a zero without a sign
    return mean + (f" ± {numbers.std():.{digits}f}" if len(numbers) > 1 else "")


def plain(values: pd.DataFrame | pd.Series, of: str = "top1", digits: int = 0, **where: Any) -> str:
    """The mean of `said` alone, for a number that all seeds share."""
    return said(values, of, digits, **where).partition(" ±")[0]


def millions(rows: pd.DataFrame) -> str:
    """The sample passes of one training, in millions."""
    return plain(rows.sample_passes / 1e6, digits=2)


def interval(values: pd.Series) -> tuple[float, float]:
    """The 95 % interval of the mean of one number for each seed, by Student's t; STUDENT has the numbers of seeds.

    ValueError: a number is missing, as in a difference whose sides do not have the same seeds.
    """
    if values.isna().any():
        raise checks.invalid("values", list(values), "numbers of the same seeds")
    half = STUDENT[len(values)] * values.std() / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def differs(values: pd.Series, digits: int = 1, sign: Literal["+", "-"] = "+") -> str:
    """A difference of the same seeds and its 95 % interval: "+3.2 [+2.0, +4.4]"; sign "-": with no plus, for ratios.

    An end of the interval that would be rounded to zero has as many digits as tell its sign.
    """
    mean, *ends = values.mean(), *interval(values)
    low, high = (f"{end:{sign}.{next((n for n in range(digits, 9) if round(end, n)), digits)}f}" for end in ends)
    return f"{round(mean, digits) + 0.0:{sign}.{digits}f} [{low}, {high}]"


def verdict(values: pd.Series | Iterable[pd.Series], least: float = 0.0, most: float = inf) -> Verdict:
    """What differences of the same seeds say of a claim that each is between `least` and `most`.

    It is consistent if the 95 % intervals lie within, inconsistent if one lies outside, else inconclusive.
    """
    ends = [interval(one) for one in ([values] if isinstance(values, pd.Series) else values)]
    if all(low >= least and high <= most for low, high in ends):
        return "consistent"
    return "inconsistent" if any(high < least or low > most for low, high in ends) else "inconclusive"


def part(rows: pd.DataFrame) -> str:
    """Epochs, images and seeds of runs, and their passes as a part of PASSES."""
    passes, seeds_there = rows.sample_passes.max(), rows.seed.nunique()
    resnet20 = "the paper's ResNet-20" if rows.profile.iloc[0] == "paper" else "pre-activation ResNet-20 of width 16"
    network = {"resnet8": "ResNet-8", "vit_tiny": "small ViT", "preact_resnet20": resnet20}
    what = f"{network[rows.model.iloc[0]]}, {rows.n_train.max():,.0f} images, {rows.epochs.max():.0f} epochs"
    share = float(f"{100 * passes / PASSES:.1g}")
    return f"{what}, {seeds_there} seeds; {share:g} % of the published passes"


def claims(results: Path) -> list[Claim]:
    """The claims of the abstract and of summaries, and then those beyond the paper, from the CSV files below `results`.

    ValueError: rows that a claim is about are missing.
    """
    papers = (_correction, _bit_widths, _transfer, _coresets, _scores, _cost, _transformers)
    groups = (*papers, _headline, _changes, _factors, _statistics, _beyond, _speed, _served)
    return [claim for group in groups for claim in group(checks.path("results", results))]


def _correction(results: Path) -> list[Claim]:
    rows = read(results, "small/06_corrected_again")
    ours = at(rows, correction="mean_var")
    first = read(results, "small/01_cifar10", method="Ours", pruning_rate=0)
    deep = read(results, "small/06_statistics", statistics="shared")
    gain, gain_first, gain_deep = map(_gain_of_correction, (rows, first, deep))
    at_one = _gain_of_correction(rows, bits=1, adapted=False)
    none, corrected = (read(results, "small/08_mismatch", bits=2, trained_with=c) for c in ("none", "mean_var"))
    shift, distance = (seeds(none, of) - seeds(corrected, of) for of in ("mean_shift", "wasserstein"))
    large = read(results, "benchmarks/paper_network", method="Ours", pruning_rate=0)
    calibrated, of_large = ([_gain(network, b) for b in (2, 4, 8)] for network in (ours, large))
    return [
        Claim(
            '"Weight bias correction enables shared batch normalization"',
            "abstract",
            part(rows),
            f"Without adaptation, correction adds {differs(gain)} points. Accuracy at 2 bits is without it "
            f"{said(rows, bits=2, correction='none', adapted=False)} %, with it {said(ours, bits=2, adapted=False)} %. "
            f"On a pre-activation ResNet-20, with three seeds, it adds {differs(gain_deep)} points. To ResNet-8 at 1 "
            f"bit, which is not trained and on which there is no verdict, it adds {differs(at_one)}.",
            verdict([gain, gain_deep]),
            "Uncorrected runs differ much from seed to seed: the five seeds of ResNet-8 gain "
            f"{plain(gain.nsmallest(1), digits=1)} to {plain(gain.nlargest(1), digits=1)} points. The three "
            f"seeds before them have {differs(gain_first)}. All eight together have "
            f"{differs(pd.concat([gain_first, gain]))}, but it was said beforehand that the five decide.",
        ),
        Claim(
            '"aligning activation distributions"',
            "abstract",
            part(first),
            f"At 2 bits, the mean is {differs(shift, 2)} standard deviations nearer to the shared one, and the "
            f"distribution {differs(distance, 3)} nearer to that of 8 bits.",
            verdict([shift, distance]),
            f"They come nearer but do not become one: {said(corrected, 'wasserstein', 3)} of "
            f"{said(none, 'wasserstein', 3)} is left. Rounded weights still move the output where their inputs have "
            "different means, and activations of 2 bits have another variance.",
        ),
        Claim(
            "Batch-norm adaptation, with which the method is combined, makes a network more accurate",
            "summary",
            part(ours),
            f"Adaptation adds {differs(calibrated[0])} points at 2 bits, {differs(calibrated[1])} at 4 bits and "
            f"{differs(calibrated[2])} at 8 bits. On the paper's network, after {plain(large, 'epochs')} epochs on an "
            f"H200, it adds {differs(of_large[0])}, {differs(of_large[1])} and {differs(of_large[2])} points at 2, 4 "
            "and 8 bits.",
            verdict(calibrated),
            "The paper's own numbers may include adaptation, which takes forward passes but no fine-tuning.",
        ),
    ]


def _gain_of_correction(rows: pd.DataFrame, **where: Any) -> pd.Series:
    """How many points weight bias correction gains in the rows with the values `where`, or else AS_TRAINED."""
    where = where or AS_TRAINED
    return seeds(rows, correction="mean_var", **where) - seeds(rows, correction="none", **where)


def _gain(rows: pd.DataFrame, bits: int) -> pd.Series:
    """How many points adaptation of the batch norm gains."""
    return seeds(rows, bits=bits, adapted=True) - seeds(rows, bits=bits, adapted=False)


def _bit_widths(results: Path) -> list[Claim]:
    rows = read(results, "small/10_untrained_bitwidths", method="Ours", trained_bits="2 4 8")
    plain_, adapted = at(rows, adapted=False), at(rows, adapted=True)
    three, six = (_beside(plain_, *bits) for bits in ((3, 2, 4), (6, 4, 8)))
    large = read(results, "benchmarks/paper_network", method="Ours", pruning_rate=0, adapted=False)
    calibrated = [_beside(adapted, *bits) for bits in ((3, 2, 4), (6, 4, 8))]
    return [
        Claim(
            '"eliminates the need for fine-tuning"',
            "abstract",
            part(rows),
            f"Untrained 3 and 6 bits are {differs(three)} and {differs(six)} points from the mean of their trained "
            "neighbours, with no fine-tuning and no adaptation; a point less counts as equal. The verdict leaves out 1 "
            f"bit, which is below all trained bit-widths and has {said(plain_, bits=1)} %.",
            verdict([three, six], -1.0),
            f"3 bits lie between: {differs(_above(plain_, 3, 2))} points from 2 bits, {differs(_above(plain_, 3, 4))} "
            f"from 4 bits. On the paper's network (an H200), where trained 2 bits have {said(large, bits=2)} %, "
            f"untrained 3 bits are {differs(_beside(large, 3, 2, 4))} points from the mean of their neighbours.",
        ),
        Claim(
            "Calibrated bit-widths match trained ones",
            "summary",
            part(rows),
            f"After adaptation, 3 and 6 bits are {differs(calibrated[0])} and {differs(calibrated[1])} points from the "
            "mean of their trained neighbours; a point less counts as equal.",
            verdict(calibrated, -1.0),
            f"Within a point between trained bit-widths. 1 bit, below them, reaches {said(adapted, bits=1)} %.",
        ),
    ]


def _beside(rows: pd.DataFrame, bits: int, lower: int, higher: int) -> pd.Series:
    """How many points an untrained bit-width is above the mean of two trained ones."""
    return (_above(rows, bits, lower) + _above(rows, bits, higher)) / 2


def _above(rows: pd.DataFrame, bits: int, other: int) -> pd.Series:
    """How many points a bit-width is above another one."""
    return seeds(rows, bits=bits) - seeds(rows, bits=other)


def _transfer(results: Path) -> list[Claim]:
    angles = read(results, "small/09_angles", layer="all layers", epoch=8)
    pairs = [seeds(angles, "angle", bits=a, other_bits=b) for a, b in ((4, 8), (2, 4), (2, 8))]
    # on other images; of a pair the smaller of its two
    other = {b: seeds(angles, "angle", bits=b, other_bits=b) for b in (2, 4, 8)}
    apart = [pd.concat([other[a], other[b]], axis=1).min(axis=1) for a, b in ((4, 8), (2, 4), (2, 8))]
    nearer = [far - pair for far, pair in zip(apart, pairs, strict=True)]
    reported = read(results, "paper/figure4", metric="angle")
    every = read(results, "small/09_knowledge_transfer")
    unadapted, every = at(every, adapted=False, bits=2), at(every, adapted=True)
    steps, more = at(every, epochs=8), at(every, epochs=16)
    gained, others_steps = [], []
    for b, rest in ((2, "4 8"), (4, "2 8"), (8, "2 4")):
        gained.append(seeds(steps, bits=b, trained_bits="2 4 8") - seeds(steps, bits=b, trained_bits=str(b)))
        others_steps.append(seeds(steps, bits=b, trained_bits=rest) - seeds(more, bits=b, trained_bits=str(b)))
    stale = seeds(unadapted, epochs=8, trained_bits="4 8") - seeds(unadapted, epochs=16, trained_bits="2")
    return [
        Claim(
            '"exploiting the implicit knowledge transfer phenomenon"',
            "abstract",
            part(steps),
            "The gradients of two bit-widths on the same images are nearer to one another than those of either "
            f"bit-width on different images: by {differs(nearer[0], 0)} degrees for 4 and 8 bits, "
            f"{differs(nearer[1], 0)} for 2 and 4 bits, {differs(nearer[2], 0)} for 2 and 8 bits.",
            verdict(nearer),
            "A step for one bit-width is also a step for the others.",
        ),
        Claim(
            f"Angles between the children's gradients are below about {plain(reported, 'value')} degrees (Figure 4)",
            "summary",
            part(steps),
            "{} degrees between 4 and 8 bits, {} between 2 and 4 bits and {} between 2 and 8 bits.".format(
                *(differs(pair, sign="-") for pair in pairs)
            ),
            verdict(pairs, 0.0, reported.value.item()),
            "4 and 8 bits are below it, 2 bits are not: for this network, and after so few epochs.",
        ),
        Claim(
            "A child model gains from the steps of the others",
            "summary",
            part(steps),
            "After adaptation, a child model with the others' steps is {}, {} and {} points more accurate at 2, 4 and "
            "8 bits than with its own steps alone. With the others' steps alone, it differs by {}, {} and {} points "
            "from a child with as many steps of its own; without adaptation, by {} points at 2 bits.".format(
                *map(differs, [*gained, *others_steps, stale])
            ),
            verdict(gained),
            "A step of another child does most of what its own would do. Whether it does less is inconclusive after "
            "adaptation. Children trained alone have neither weight bias nor output correction, and those with as many "
            "steps of their own were trained later, with a schedule that differs by half a step.",
        ),
    ]


def _coresets(results: Path) -> list[Claim]:
    curves = read(results, "small/01_cifar10_curves", epochs=8, **AS_TRAINED)
    joint, ours = seeds(curves, method="Any-Precision"), at(curves, method="Ours", coreset="tdds")
    half, most = (seeds(ours, pruning_rate=rate) - joint for rate in (0.5, 0.8))
    others = [read(results, f"small/02_{name}", **AS_TRAINED) for name in ("cifar100", "tinyimagenet")]
    hundred, tiny = (seeds(r, method="Ours", pruning_rate=0.8) - seeds(r, method="Any-Precision") for r in others)
    small = plain(pd.concat(others), "n_train")
    table = read(results, "paper/table1", metric="mean_top1")
    return [
        Claim(
            '"competitive or superior accuracy"',
            "abstract",
            f"{part(curves)}; CIFAR-100 and TinyImageNet: {small} images each",
            f"Ours at 80 % pruning is {differs(most)} points from Any-Precision on CIFAR-10 at equal epochs, "
            f"{differs(hundred)} on CIFAR-100 and {differs(tiny)} on TinyImageNet. At 50 % pruning, on which there is "
            f"no verdict, it is {differs(half)} points from it on CIFAR-10.",
            verdict([most, hundred, tiny]),
            "A coreset that is chosen once does not keep up in so short a training. Of several hundred epochs this "
            "says nothing.",
        ),
        Claim(
            f"{plain(table, 'value', 2)} % mean accuracy on CIFAR-10 at 80 % pruning (Table 1)",
            "summary",
            part(curves),
            f"{said(ours, pruning_rate=0.8)} % with a network and a schedule that are far smaller.",
            "not tested at this scale",
            "It needs the paper's network, its schedule and hours of a GPU.",
        ),
    ]


def _scores(results: Path) -> list[Claim]:
    rows, same = read(results, "small/05_importance", trained=True), ", across_bits=identical"
    twins = at(rows, adapted=False)

    def gained(runs: pd.DataFrame, name: str) -> pd.Series:
        return seeds(runs, coreset=name + same) - seeds(runs, coreset=f"{name}, power=0.0{same}")

    el2n, adapted = (gained(runs, "el2n, how=sample") for runs in (twins, at(rows, adapted=True)))
    tdds = gained(twins, "tdds, sample of all, window=5")
    short = read(results, "small/05_coreset_comparison", **AS_TRAINED)
    few = [
        seeds(short, coreset="tdds", pruning_rate=rate) - seeds(short, coreset="RS2, epochs=9", pruning_rate=rate)
        for rate in (0.5, 0.8, 0.9)
    ]
    options = read(results, "small/07_ablation_scoring_scheme", **AS_TRAINED)
    own, joint = (at(options, coreset=f"tdds, {kind}all candidates") for kind in ("", "scoring=joint, "))
    joint_scores = seeds(own) - seeds(joint)
    shared = "one coreset for all bit-widths, drawn anew in each epoch; held-out images"
    quoted = '"informative subset selected via gradient-based importance scores"'
    return [
        Claim(
            quoted,
            "abstract",
            f"EL2N, which is not the score that summaries name; {shared}; {part(at(twins, scoring_epochs=3))}",
            f"At 80 % pruning, drawing by EL2N is {differs(el2n)} points above its twin, which draws with equal "
            "chances after the same scoring phase. After adaptation, on which there is no verdict, it is "
            f"{differs(adapted)}.",
            verdict(el2n),
            "EL2N is the norm of the loss's gradient with respect to the logits. Twins take as many passes and steps.",
        ),
        Claim(
            quoted,
            "abstract",
            f"TDDS, named in summaries, of three tenths of the images; {shared}; {part(at(twins, scoring_epochs=10))}",
            f"At 80 % pruning, drawing by TDDS is {differs(tdds)} points above its twin.",
            verdict(tdds),
            "Images that are not ranked have equal chances, so this is a weaker test than that of EL2N. In a shorter "
            f"training (notebook 05, {plain(short, 'n_train')} images, test images), TDDS differs from random coresets "
            f"of as many passes by {differs(few[0])}, {differs(few[1])} and {differs(few[2])} points at 50, 80 and "
            "90 % pruning.",
        ),
        Claim(
            "Scores extracted bit-wise are better than joint ones (Table 7)",
            "summary",
            part(options),
            f"{differs(joint_scores)} points at 80 % pruning and equal passes. With joint scoring, a training takes "
            f"{plain(joint, 'steps')} optimizer steps in all, against {plain(own, 'steps')}.",
            verdict(joint_scores),
            "Not the scores alone: a step of the joint scoring phase is for all bit-widths at once.",
        ),
    ]


def _cost(results: Path) -> list[Claim]:
    curves = read(results, "small/01_cifar10_curves", epochs=8, **AS_TRAINED)
    joint, pruned = at(curves, method="Any-Precision"), at(curves, method="Ours", coreset="tdds", pruning_rate=0.8)
    fewer, faster = (seeds(joint, of) / seeds(pruned, of) for of in ("sample_passes", "seconds"))
    reported = {
        name: plain(read(results, f"paper/{name}", metric="time_ratio"), "value", 2)
        for name in ("table1", "table3", "tinyimagenet")
    }
    return [
        Claim(
            f'"reducing training time up to {reported["table1"]}x"',
            "abstract",
            f"{part(curves)}; 80 % pruning, scoring included",
            f"{differs(faster, sign='-')} times less time and {plain(fewer, digits=1)} times "
            "fewer passes than Any-Precision at the same bit-widths.",
            "not tested at this scale",
            "At the same bit-widths, 80 % pruning saves a factor of five at most. We do not know how the paper counts.",
        ),
        Claim(
            f"{reported['table3']} times less time on ImageNet-1K and {reported['tinyimagenet']} on TinyImageNet",
            "summary",
            "not run",
            "The second number is above the abstract's own limit.",
            "not tested at this scale",
            "Neither ImageNet's images nor GPU hours were available.",
        ),
    ]


def _transformers(results: Path) -> list[Claim]:
    every = [read(results, f"small/04_vit_{name}", trained=True) for name in ("cifar10", "tinyimagenet")]
    both = [at(rows, pruning_rate=0) for rows in every]
    ours = [seeds(rows, method="Ours", correction="mean_var") for rows in both]
    joint = [own - seeds(rows, method="Any-Precision") for own, rows in zip(ours, both, strict=True)]
    corrected = [own - seeds(rows, method="Ours", correction="none") for own, rows in zip(ours, both, strict=True)]
    pruned = [seeds(r, method="Ours", pruning_rate=0.8) - seeds(r, method="Any-Precision") for r in every]
    return [
        Claim(
            '"with both ResNet and ViT architectures"',
            "abstract",
            part(both[0]),
            f"At 80 % pruning and equal epochs, a ViT is {differs(pruned[0])} points from Any-Precision on CIFAR-10 "
            f"and {differs(pruned[1])} on TinyImageNet. On the full data, on which there is no verdict, bit-wise "
            f"training is {differs(joint[0])} and {differs(joint[1])} points from it, at equal passes. Weight bias "
            f"correction adds {differs(corrected[0])} and {differs(corrected[1])}.",
            verdict(pruned),
            "As for ResNets, a coreset chosen once does not keep up in so short a training. On the full data, ours "
            "takes three times as many optimizer steps. Layer norm keeps no statistics that need a correction.",
        ),
    ]


def _headline(results: Path) -> list[Claim]:
    rows = read(results, "small/14_headline", **AS_TRAINED)
    joint, recipe = rows[rows.method.str.startswith("Any-Precision")], rows[rows.pruning_rate > 0]
    lengths = [sorted(set(part.epochs)) for part in (joint, recipe)]  # of as many passes, if in this order
    pairs = [(at(joint, epochs=few), at(recipe, epochs=many)) for few, many in zip(*lengths, strict=True)]
    ahead = {millions(own): seeds(own) - seeds(few) for few, own in pairs}
    *first, last = (f"{differs(points)} points at {passes} million" for passes, points in ahead.items())
    by_passes = f"{', '.join(first)} and {last}"
    control = rows[rows.method.str.startswith("Ours") & rows.pruning_rate.eq(0)]
    (all_data,) = set(control.epochs)
    few, own = next(pair for pair in pairs if set(pair[0].epochs) == {all_data})
    others = [" and ".join(plain(rows, "epochs") for rows in pair[::-1]) for pair in pairs if pair[0] is not few]
    trained = f"Any-Precision {plain(few, 'epochs')} epochs; in other trainings {' epochs, '.join(others)} epochs"
    at_each = ", ".join(f"{differs(seeds(own, bits=b) - seeds(few, bits=b))} at {b} bits" for b in (2, 4, 8))
    time, steps = (seeds(own, of) / seeds(few, of) for of in ("seconds", "steps"))
    by_coresets = seeds(own) - seeds(control)
    equal = max(set(joint.epochs) & set(recipe.epochs))
    joint, recipe = at(joint, epochs=equal), at(recipe, epochs=equal)
    pruned, passes = seeds(recipe) - seeds(joint), seeds(joint, "sample_passes") / seeds(recipe, "sample_passes")
    chosen = "Learning rates, batches and distillation were chosen on held-out images"
    return [
        Claim(
            "At equal passes, the recommended recipe is ahead of tuned Any-Precision",
            "beyond the paper",
            f"{part(own)}; {trained}",
            f"{by_passes} passes. At {millions(own)} million: {at_each}; it takes {differs(time, 2, '-')} of the time "
            f"and {plain(steps)} times as many optimizer steps.",
            verdict(ahead.values()),
            f"{chosen} ([notebook 14](../notebooks/14_fair_comparison.ipynb)), for ours on all data; the kind of "
            "coreset was chosen on test images (notebook 07). The lead in far longer trainings is not known.",
        ),
        Claim(
            "At equal epochs, the recipe at 80 % pruning is as accurate as tuned Any-Precision on all data",
            "beyond the paper",
            part(recipe),
            f"{differs(pruned)} points, with {plain(passes, digits=1)} times fewer passes; half a point less counts as "
            "equal.",
            verdict(pruned, -0.5),
            f"{chosen}. The longer trainings of the two have no number of epochs in common.",
        ),
        Claim(
            "At equal passes, coresets add to the recipe's accuracy",
            "beyond the paper",
            f"{part(own)}; on all data {plain(control, 'epochs')} epochs",
            f"{differs(by_coresets)} points above the same recipe on all data, which takes as many passes and steps.",
            verdict(by_coresets),
            f"On all data, ours is {differs(seeds(control) - seeds(few))} points from tuned Any-Precision: this part "
            "of the lead is not due to coresets.",
        ),
    ]


def _changes(results: Path) -> list[Claim]:
    rows = read(results, "small/14_changes", **AS_TRAINED)
    kinds = ("the recipe", "with distillation", "with 1 bit too")
    recipe, distilled, wider = (at(rows[rows.bits > 1], method=kind) for kind in kinds)
    gained, kept = seeds(distilled) - seeds(recipe), seeds(wider) - seeds(recipe)
    more = seeds(wider, "sample_passes") / seeds(recipe, "sample_passes")
    return [
        Claim(
            "Distillation adds to the recipe's accuracy: 2 and 4 bits learn what the network answers at 8 bits",
            "beyond the paper",
            part(distilled),
            f"{differs(gained)} points.",
            verdict(gained),
            "In bit-wise training the steps of 2 and 4 bits then see no label, and those are two of three.",
        ),
        Claim(
            "With 1 bit as a fourth trained bit-width, 2, 4 and 8 bits stay as accurate",
            "beyond the paper",
            part(wider),
            f"{differs(kept)} points, with {plain(more, digits=2)} times as many passes; half a point less counts as "
            f"equal. At 1 bit the network has {said(rows, bits=1)} %.",
            verdict(kept, -0.5),
            "Three seeds differ by more than the half point that was asked about.",
        ),
    ]


def _factors(results: Path) -> list[Claim]:
    rows = read(results, "small/07_factors", trained=True)
    kind = rows.coreset.str
    once, on_all = rows.coreset.eq("random") | kind.contains("resample_every=0"), kind.contains("el2n")
    plain_, own = at(rows, adapted=False), rows.statistics.eq("own")
    redrawn = seeds(rows[own & ~once]) - seeds(rows[own & once])
    first = seeds(rows[own & on_all]) - seeds(rows[own & ~on_all])
    more = seeds(rows[on_all], "sample_passes") / seeds(rows[~on_all], "sample_passes")
    kinds = {kind: seeds(plain_, statistics=kind) for kind in ("own", "shared", "even")}
    setting = f"{part(rows)}; random coresets at 80 % pruning, held-out images"
    return [
        Claim(
            "Own statistics are better than shared ones at 80 % pruning",
            "beyond the paper",
            setting,
            f"{differs(kinds['own'] - kinds['shared'])} points.",
            verdict(kinds["own"] - kinds["shared"]),
            f"Adapted networks are {differs(seeds(rows, adapted=True) - kinds['own'])} points above own statistics. "
            f"The even mean over bit-widths adds only {differs(kinds['even'] - kinds['shared'])} to shared ones.",
        ),
        Claim(
            "At 80 % pruning, a new draw in each epoch and a first epoch on all data each add accuracy",
            "beyond the paper",
            setting,
            f"A draw in each epoch adds {differs(redrawn)} points, and a first epoch on all data, with "
            f"{plain(more, digits=2)} times as many passes, {differs(first)}.",
            verdict([redrawn, first]),
            "Both add about a point on average, and three seeds do not settle it.",
        ),
    ]


def _statistics(results: Path) -> list[Claim]:
    rows = read(results, "small/06_statistics", correction="mean_var")
    plain_, adapted = at(rows, adapted=False), at(rows, adapted=True)
    usual, even, own = (seeds(plain_, statistics=kind) - seeds(adapted) for kind in ("shared", "even", "own"))
    order, reverse = at(plain_, statistics="shared"), at(plain_, statistics="reversed")
    first, last = (seeds(reverse, bits=b) - seeds(order, bits=b) for b in (2, 8))
    return [
        Claim(
            "Under a shared batch norm, the bit-width of the last step gains and that of the first one loses",
            "beyond the paper",
            part(rows),
            f"If 8 bits step last and 2 bits first, instead of the other way round, accuracy is {differs(first)} "
            f"points at 2 bits and {differs(last)} at 8 bits.",
            verdict([-first, last]),
            f"But the order is not why shared statistics lose. They are {differs(usual)} points from the adapted "
            f"network, and their even mean over bit-widths is {differs(even)}. Only statistics of each bit-width's own "
            f"close the gap: {differs(own)}.",
        ),
    ]


def _beyond(results: Path) -> list[Claim]:
    rows = read(results, "small/06_without_calibration", norm="shared_affine", correction="mean_var, output")
    gaps = {b: -_gain(rows, b) for b in (1, 2, 3, 4, 8)}
    at_each = ", ".join(f"{differs(gap)} at {b} bits" for b, gap in gaps.items() if b > 1)
    equal = read(results, "small/07_equal_epochs", epochs=8, **AS_TRAINED)
    joint = seeds(equal, method="Any-Precision")
    names = ("el2n, how=sample, all candidates", "tdds, sample of all", "RS2")
    el2n, tdds, random = (seeds(equal, coreset=name) - joint for name in names)
    half = read(results, "small/07_equal_epochs", epochs=4, **AS_TRAINED)
    shorter = seeds(half, coreset=names[0]) - seeds(half, method="Any-Precision", batch_size=128)
    large = read(results, "benchmarks/paper_network", **AS_TRAINED)
    few, once = at(large, method="Any-Precision"), at(large, method="Ours", coreset="tdds")
    ahead, anew = (seeds(ours) - seeds(few) for ours in (once, at(large, method="Ours, own statistics")))
    return [
        Claim(
            "Own statistics and output correction take the place of adaptation",
            "beyond the paper",
            part(rows),
            f"Points above the adapted network: {at_each}, and {differs(gaps[1])} at 1 bit.",
            verdict([gap for b, gap in gaps.items() if b in (2, 4, 8)], -0.5),
            'The verdict is on trained bit-widths, within half a point. `QuantSpec(norm="shared_affine", '
            "output_correction=True)`.",
        ),
        Claim(
            "80 % pruning, by EL2N and drawn anew, is ahead of Any-Precision at equal epochs, not tuned",
            "beyond the paper",
            part(equal),
            f"Against Any-Precision: {differs(el2n)} points by EL2N of one epoch on all data, {differs(tdds)} by TDDS, "
            f"{differs(random)} at random.",
            verdict(el2n),
            "The verdict is on EL2N, in small batches and with own statistics. Any-Precision gains from small batches "
            f"too, and EL2N's lead shrinks with length: {differs(shorter)} points after half as many epochs.",
        ),
        Claim(
            "At about equal passes, 80 % pruning is ahead of Any-Precision, not tuned, on the paper's network",
            "beyond the paper",
            f"{part(large)}; an H200",
            f"{differs(ahead)} points with a coreset chosen once, {differs(anew)} drawn anew with own statistics. "
            f"Any-Precision takes {plain(few, 'epochs')} epochs and {millions(few)} million passes, ours "
            f"{millions(once)} million.",
            verdict([ahead, anew]),
            "Any-Precision was not tuned for so few epochs, and its milestones fall together.",
        ),
    ]


def _race(results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published code's rows, and ours of the shortest training that is as accurate on held-out images."""
    rows = read(results, "benchmarks/any_precision")
    raced = rows[rows.seed > 0]  # seed 0 is for tuning
    theirs, ours = at(raced, way="published code"), at(raced, way="ours, 80% pruned")
    ours = ours[ours.groupby("epochs").seed.transform("nunique") == theirs.seed.nunique()]
    means, target = ours.groupby("epochs").held_out.mean().round(6), round(theirs.held_out.mean(), 6)
    return theirs, at(ours, epochs=means[means >= target].index.min())


def _speed(results: Path) -> list[Claim]:
    theirs, ours = _race(results)
    ratio, points = seeds(theirs, "seconds") / seeds(ours, "seconds"), seeds(ours) - seeds(theirs)
    steps = read(results, "benchmarks/steps", phase="training", network="resnet20")
    medians = steps.groupby(["precision", "bits", "mode"])[["plain", "ours"]].median()
    fastest = medians.groupby(["precision", "bits"]).min().groupby("precision").mean()
    speed = fastest.plain / fastest.ours
    single, half = (said(speed[[name]], digits=2) for name in ("none", "bfloat16"))
    eager = at(steps, mode="eager", precision="none")
    eager = said(seeds(eager, "plain") / seeds(eager, "ours"), digits=2)
    growth = read(results, "benchmarks/growth")
    pruned, full = at(growth, scheme="80% pruned", bit_widths=8, mode="compiled"), at(growth, scheme="full precision")
    medians, beside = full.groupby("mode").seconds.median(), at(full, mode="compiled").set_index("repeat").seconds
    trainings = pruned.set_index("repeat").seconds / beside * medians["compiled"] / medians.min()
    least, at_middle, most = (said(trainings.quantile([q]), digits=2) for q in (0.0, 0.5, 1.0))
    return [
        Claim(
            "Time to an accuracy, against the published code of Any-Precision",
            "engineering",
            f"pre-activation ResNet-20, {plain(theirs, 'train')} images of CIFAR-10, one core, three seeds",
            f"{differs(ratio, sign='-')} times less time with ours at 80 % pruning: {said(ours, 'seconds', 0)} s "
            f"against {said(theirs, 'seconds', 0)} s. On held-out images ours has {said(ours, 'held_out')} %, the "
            f"published code {said(theirs, 'held_out')} %. On test images ours is {differs(points)} points from it.",
            "",
            "The target is the published code's mean on held-out images. Each side has the best of its settings on "
            "them; for both, the highest learning rate that was tried. The published code is compiled, which is not "
            "counted; ours is not. A third of the time was predicted ([table](benchmarks/any_precision.md)).",
        ),
        Claim(
            "A quantized training step costs little",
            "engineering",
            "ResNet-20, two cores, mean over 1 to 8 bits",
            f"{single} of the plain network's speed in float32 and {half} in bfloat16, each side in its faster mode; "
            f"{eager} in float32 if neither is compiled.",
            "",
            "The compiler fuses the added work ([table](benchmarks/steps.md)). brevitas and torchao are slower "
            "([table](benchmarks/implementations.md)).",
        ),
        Claim(
            "Eight bit-widths at 80 % pruning cost about two trainings in full precision",
            "engineering",
            f"ResNet-20, {plain(pruned, 'epochs')} epochs of {plain(pruned, 'train')} images",
            f"{at_middle} trainings, the median of repeats from {least} to {most}. Each side is in its faster mode.",
            "",
            "For runs long enough to compile, which is not counted ([growth](benchmarks/growth.md)).",
        ),
    ]


def _served(results: Path) -> list[Claim]:
    files = read(results, "benchmarks/serving", runtime="onnxruntime", network="resnet8")
    part = files[files.bits.between(4, 8)]
    least = plain(part.agreement.nsmallest(1), digits=1)
    most = plain((part.top1 - part.trained_top1).abs().nlargest(1), digits=1)
    two, eight, full = (at(files, bits=b).groupby("seed").min(numeric_only=True) for b in (2, 8, 32))
    smaller, faster = (plain(full[of] / other[of], digits=1) for of, other in (("file", two), ("latency", eight)))
    return [
        Claim(
            "One checkpoint is served at every bit-width",
            "engineering",
            "ResNet-8, ONNX files in onnxruntime, one core",
            f"From 4 to 8 bits they agree with the network on {least} % of the images or more, and their accuracy is "
            f"{most} points or less from it. At 2 bits a file is {smaller} times smaller than in float32, "
            f"at 8 bits {faster} times as fast.",
            "",
            "Integer kernels take 8 bits, so fewer make a file smaller, not faster.",
        ),
    ]


def ingredients(results: Path) -> pd.DataFrame:
    """What combinations of the recipe's parts bring at equal epochs, beside Any-Precision on all data."""
    rows = read(results, "small/07_equal_epochs", epochs=8, **AS_TRAINED)
    kinds = {
        "Any-Precision on all data": {"method": "Any-Precision"},
        "Batches of 128, a coreset chosen once by TDDS, shared statistics": {"coreset": "tdds, batch_size=128"},
        "The same in batches of 32": {"coreset": "tdds, batch_size=32"},
        "Batches of 64, drawn anew at random, own statistics": {"coreset": "RS2"},
        "The same, drawn by TDDS from all data": {"coreset": "tdds, sample of all"},
        "The same, by EL2N after an epoch on all data, as the recipe": {"coreset": "el2n, how=sample, all candidates"},
    }
    table = [
        [name, said(rows, **kind), plain(at(rows, **kind).sample_passes.div(1e6), digits=2)]
        for name, kind in kinds.items()
    ]
    return pd.DataFrame(table, columns=["training", "accuracy (%)", "passes (millions)"])


def texts(root: Path) -> dict[Path, str]:
    """What `results/README.md`, with all claims, `README.md`, with the paper's, and `GUIDE.md` are to hold."""
    table = pd.DataFrame(map(asdict, claims(root / "results")))
    papers = table[table.source.isin(["abstract", "summary"])]
    beyond = table[table.source == "beyond the paper"].drop(columns="source")
    engineering = table[table.source == "engineering"].drop(columns=["source", "verdict"])
    gallery = [("The paper's claims", papers), ("Beyond the paper", beyond), ("Engineering", engineering)]
    first = [("", beyond.iloc[:2].drop(columns="why")), ("", papers.drop(columns="why"))]
    written = {root / "results/README.md": gallery, root / "README.md": first}
    written[root / "GUIDE.md"] = [("", ingredients(root / "results"))]
    return {path: _written(path.read_text(), tables) for path, tables in written.items()}


def _written(text: str, tables: list[tuple[str, pd.DataFrame]]) -> str:
    """`text` with `tables`, some with a title, between the two MARKS, which it must have once each, in this order."""
    before, _, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end or any(mark in before + after for mark in MARKS):
        raise checks.invalid("text", text[:60], f"the marks {MARKS}, each once")
    lines = [before + MARKS[0]]
    for title, table in tables:
        rows = [list(table), ["---"] * table.shape[1], *table.to_numpy()]
        lines += ["", *([f"### {title}", ""] if title else []), *(f"| {' | '.join(row)} |" for row in rows)]
    note = "Accuracies for which no bit-width is named are means over the trained bit-widths."
    return "\n".join([*lines, "", note, "", MARKS[1] + after])


def main(root: Path) -> None:
    """Write both files again, for the project at `root`."""
    for path, text in texts(checks.path("root", root)).items():
        write_text(path, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])
