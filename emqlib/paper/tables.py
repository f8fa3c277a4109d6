"""Tables as functions of tidy rows: means ± standard deviations over seeds, and the paper's numbers beside them.

Rows are those of `runs.run_all` unless a function says otherwise. Without rows, or with a column missing, each function
raises a ValueError. An empty cell of a table was not run, and a * marks a trained bit-width.
"""

import html
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from .. import checks
from ..files import home, write_text

COST = ["sample_passes", "scoring_passes", "calibration", "steps", "seconds"]
SETTING = ["method", "correction", "pruning_rate", "coreset", "candidates", "epochs"]

# Kinds of coresets, networks and data sets as rows name them, part by part, in words.
_WORDS = {"random": "random, drawn once", "RS2": "random, each epoch (RS2)"}
_WORDS |= {"tdds": "TDDS", "el2n": "EL2N", "grand": "GraNd", "moderate": "Moderate"}
_WORDS |= {"how=sample": "drawn by rank", "sample of all": "drawn by rank from all data"}
_WORDS |= {"resample_every=0": "one draw", "resample_every": "drawn every {} epochs"}
_WORDS |= {"all candidates": "all data scored"}
_WORDS |= {"power=0.0": "but drawn at equal chances", "unbiased=True": "weighted losses"}
_WORDS |= {"scoring=joint": "joint scoring", "across_bits=identical": "the same for all bit-widths"}
_WORDS |= {"across_bits=disjoint": "without overlap", "batch_size": "batches of {}", "lr": "learning rate {}"}
_WORDS |= {"weight_decay": "weight decay {}", "epochs": "{} epochs", "window": "windows of {}"}
_WORDS |= {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tinyimagenet": "TinyImageNet", "imagenet": "ImageNet-1K"}
_WORDS |= {"resnet8": "ResNet-8", "resnet18": "ResNet-18", "resnet20": "ResNet-20", "mobilenet_v2": "MobileNetV2"}
_WORDS |= {"preact_resnet20": "pre-activation ResNet-20", "vit_tiny": "small ViT"}


def in_words(name: str) -> str:
    """A kind of coreset, a network or a data set, as rows name it, in words.

    Examples:
        >>> in_words("tdds, how=sample, batch_size=64")
        'TDDS, drawn by rank, batches of 64'
    """
    name = checks.instance("name", name, str, "the name of a kind of coreset, a network or a data set, as in rows")
    name = name.replace("resample_every=0, how=sample", "resample_every=0")  # one draw is by rank
    by_rank = ("how=sample", "sample of all") if "power=0.0" in name else ()  # equal chances are not by rank
    parts = [part for part in name.split(", ") if part not in by_rank]
    known = [(part, *part.split("=")) for part in parts]
    words = [_WORDS.get(part) or (_WORDS[key].format(*value) if key in _WORDS else part) for part, key, *value in known]
    return ", ".join(words)


CORRECTED = {"none": "not corrected", "mean": "means corrected", "mean_var": "corrected"}
CORRECTED |= {"output": "outputs corrected too", "no gradient": "no gradient through the correction"}


def network_name(row: pd.Series, told: bool = False) -> str:
    """The method of a row and how it differs from others of the method; told: the coreset is in words already."""
    if not row.method.startswith("Ours"):
        return row.method
    rate, coreset = row.get("pruning_rate", 0), row.get("coreset", "")
    kind = coreset if told else in_words(coreset)
    pruned = [f"{rate:.0%} pruned", *([kind] if kind else [])] if rate else []
    corrections = [CORRECTED[kind] for kind in row.correction.split(", ")]
    return ", ".join([row.method, *pruned, *(corrections if corrections != ["corrected"] or not pruned else [])])


def paper(table: str) -> pd.DataFrame:
    """What the paper is known to report: one row a number, maybe none.

    Columns: method, pruning_rate, metric, value, source; origin is "abstract", or "summary" if others published it.
    """
    checks.path("table", checks.instance("table", table, str, "the name of a table, for example table1"))
    path = home() / "results" / "paper" / f"{table}.csv"
    nothing = pd.DataFrame(columns=["method", "pruning_rate", "metric", "value", "origin"])
    return pd.read_csv(path) if path.exists() else nothing


def save(table: pd.DataFrame, path: Path, rows: pd.DataFrame | None = None) -> None:
    """Write `table` as `path`.md, and the tidy `rows` it was made of as `path`.csv, each file whole or not at all."""
    path, table = checks.path("path", path), checks.instance("table", table, pd.DataFrame, "a DataFrame")
    if checks.instance("rows", rows, (pd.DataFrame, type(None)), "a DataFrame, or None") is not None:
        write_text(path.with_suffix(".csv"), rows.to_csv(index=False))
    cells = table.astype(object).where(table.notna(), None)  # missing is empty, not "nan"
    write_text(path.with_suffix(".md"), cells.to_markdown(index=False) + "\n")


class _Shown(Styler):
    """A table that is text where there is no HTML."""

    def __repr__(self) -> str:
        return self.data.to_string(index=False)


def shown(table: pd.DataFrame, best: Sequence[str] | None = None, rows: int = 10, columns: int = 7) -> Styler:
    """The first rows and columns of `table`, as a notebook shows it; the caption says what is left out.

    What names a setting is one column, and headings are words. In a table that is too wide, the last untrained
    bit-widths are left out first.

    Args:
        table: of a function of this module, or any other.
        best: the columns of accuracies (text) whose highest value is bold; None: all of them. Spreads are grey.
        rows: how many at most.
        columns: how many at most, those of the index included.
    """
    table = (table.reset_index() if any(table.index.names) else table).rename(columns=str)
    setting = [name for name in (*SETTING[:-1], "adapted") if name in table]
    if {"method", "correction"} <= {*setting}:
        adapted = table.adapted.map({True: ", adapted", False: ""}) if "adapted" in table else ""
        names = table.apply(network_name, axis=1, told=True) + adapted
        table = table.drop(columns=setting)
        table.insert(0, "network", names)
    table = table.replace({"correction": CORRECTED, "trained_with": CORRECTED})
    table = table.rename(columns=lambda name: name.replace("mean_var", "corrected").replace("_", " "))
    untrained = [name for name in table if name.isdigit()]
    omitted = untrained[max(len(untrained) + columns - table.shape[1], 0) :]
    part = table.drop(columns=omitted).iloc[:rows, :columns]
    texts = [name for name in part if part[name].map(lambda cell: isinstance(cell, str)).all()]
    numbers = {name: pd.to_numeric(part[name].str.partition(" ± ")[0], errors="coerce") for name in texts}
    best = [name for name in texts if numbers[name].notna().any()] if best is None else best
    # names of cells in HTML, the same for the same table
    style = _Shown(part, uuid=f"{crc32(part.to_csv().encode()):08x}", cell_ids=False).hide(axis="index")
    for name in part:
        style.format(partial(_cell, highest=numbers[name].max() if name in best else None), subset=[name])
    left = [f"the first {len(part)} of {len(table)} rows"] if len(part) < len(table) else []
    missing = list(table.columns.difference(part.columns, sort=False))
    left += [f"without columns {', '.join(missing)}"] if missing else []
    return style.set_caption("; ".join(left)) if left else style


def _cell(value: object, highest: float | None) -> str:
    """A cell in HTML: in bold where it is `highest`, and what follows "±" in grey."""
    if isinstance(value, float):
        text = f"{value:,.3f}".rstrip("0").rstrip(".") if abs(value) >= 0.001 else f"{value:.2g}"
        return "" if math.isnan(value) else text
    number, sign, deviation = html.escape(str(value)).partition(" ± ")
    bold = highest is not None and pd.to_numeric(number, errors="coerce") == highest
    grey = f'<span style="color: gray">{sign}{deviation}</span>' if sign else ""
    return (f"<b>{number}</b>" if bold else number) + grey


def _texts(rows: pd.DataFrame, by: list[str], value: str = "top1") -> pd.Series:
    """`value` of each group of `by` as "71.2 ± 0.3", its mean and standard deviation, or as "71.2" of one seed."""
    groups = rows.groupby(by, sort=False)[value]
    means = groups.mean().map(lambda mean: f"{round(mean, 1) + 0.0:.1f}")  # + 0.0: a zero without a sign
    return means + groups.std().map(lambda std: "" if pd.isna(std) else f" ± {std:.1f}")


def _wide(rows: pd.DataFrame, index: list[str], columns: str, value: str = "top1") -> pd.DataFrame:
    """`_texts`, one column a value of `columns`, in order."""
    checks.table("rows", rows, [*index, columns, value])
    cells = _texts(rows, [*index, columns], value).reset_index()
    wide = cells.pivot_table(index=index, columns=columns, values=value, aggfunc="first", sort=False)
    return wide.sort_index(axis=1).fillna("").rename_axis(columns=None)


def _by_bits(rows: pd.DataFrame, index: list[str], value: str = "top1") -> pd.DataFrame:
    """`_wide` over bit-widths, the trained ones with a *."""
    trained = set(checks.table("rows", rows, ("bits", "trained")).bits[rows.trained])
    return _wide(rows, index, "bits", value).rename(columns=lambda b: f"{b}*" if b in trained else f"{b}").reset_index()


def seed_means(rows: pd.DataFrame, by: Sequence[str], adapted: bool = False) -> pd.DataFrame:
    """One row a group of `by` and seed: top1, the mean (%) over the trained bit-widths, adapted or not."""
    checks.table("rows", rows, [*by, "seed", "top1", "trained", "adapted"])
    part = rows[rows.trained & rows.adapted.eq(adapted)]
    return part.groupby([*by, "seed"], sort=False, dropna=False).top1.mean().reset_index()


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a method, setting and adaptation, one column a bit-width: top-1 (%), mean ± std over seeds."""
    return _told(_by_bits(rows, [*SETTING, "adapted"]))


def _told(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with its kinds of coresets in words."""
    return table.assign(coreset=table.coreset.map(in_words)) if "coreset" in table else table


def correction_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row without weight bias correction and one with it, a column a bit-width: top-1 (%), none of them adapted."""
    table = accuracy_table(rows[~checks.table("rows", rows, ("adapted", "trained")).adapted])
    names = ["without" if correction == "none" else "with" for correction in table.correction]
    accuracy = table.drop(columns=[*SETTING, "adapted"])
    accuracy.insert(0, "accuracy (%) by bit-width", [f"{name} weight bias correction" for name in names])
    return accuracy


def training_cost(rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """`columns` of each setting and seed, summed over its runs, of which Dedicated has one a bit-width.

    "calibration" is the number of images that adapt the bit-widths that cannot be served without it. Seconds of another
    processor or precision than the first run's are missing, as they compare with no others. ValueError: two runs of a
    setting and seed train the same bit-widths, so that they differ in what no column of SETTING tells.
    """
    needed = [*SETTING, "run", "seed", "trained_bits", *(name for name in columns if name != "calibration")]
    runs = checks.table("rows", rows, needed).drop_duplicates("run")
    if runs.duplicated([*SETTING, "seed", "trained_bits"]).any():
        raise checks.invalid("rows", "several runs of one setting and seed", f"one run for each {', '.join(SETTING)}")
    if "calibration" in columns:
        needing = served(checks.table("rows", rows, ["calibration_passes"]))
        passes = needing[needing.adapted].groupby("run").calibration_passes.sum()
        runs = runs.assign(calibration=runs.run.map(passes).fillna(0))
    if "seconds" in columns:
        machine = runs.reindex(columns=["device", "processor", "instructions", "autocast"]).astype(object).fillna("")
        runs = runs.assign(seconds=runs.seconds.where(machine.eq(machine.iloc[0]).all(axis=1)))
    return runs.groupby([*SETTING, "seed"], sort=False)[columns].agg(lambda part: part.sum(skipna=False))


def served(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each run and bit-width the row that a user gets: without adaptation, or with it where there is no other."""
    checks.table("rows", rows, ("adapted", "run", "bits"))
    return rows.sort_values("adapted", kind="stable").drop_duplicates(["run", "bits"]).sort_index()


def with_cost(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """`seed_means` of each setting, and a column of what its training cost; cost: a column of `rows`, or of COST."""
    means = seed_means(rows, SETTING).set_index([*SETTING, "seed"])
    return means.join(training_cost(rows[rows.trained & ~rows.adapted], [cost])).reset_index()


def cost_table(rows: pd.DataFrame, table: str) -> pd.DataFrame:
    """One row a method and setting: mean top-1 (%) over the trained bit-widths, and what training cost.

    The cost is sample passes (millions) and the part of them (%) in the scoring phase, forward passes of calibration
    (millions), optimizer steps, seconds, and how many times fewer passes and seconds than Any-Precision takes for as
    many epochs: means over seeds. The last two columns are what the paper reports in its `table`, such as "table1".
    """
    cost = training_cost(rows, COST).groupby(SETTING, sort=False).mean()
    columns = {
        "top1 (%)": _texts(seed_means(rows, SETTING), SETTING),
        "adapted top1 (%)": _texts(seed_means(rows, SETTING, adapted=True), SETTING),
        "passes (M)": (cost.sample_passes / 1e6).round(6),
        "scoring (%)": (100 * cost.scoring_passes / cost.sample_passes).round(1),
        "calibration (M)": (cost.calibration / 1e6).round(6),
        "steps": cost.steps.round(),
        "seconds": cost.seconds.round(),
        "fewer passes": _times_less(cost.sample_passes),
        "faster": _times_less(cost.seconds),
    }
    wide = pd.DataFrame(columns, index=cost.index).reset_index()
    return _told(wide.assign(**_paper_columns(wide, paper(table))))


def _times_less(cost: pd.Series) -> pd.Series:
    """How many times less than the first Any-Precision's of as many epochs; empty where there is none."""
    epochs = cost.index.get_level_values("epochs")
    baselines = cost[cost.index.get_level_values("method").str.startswith("Any-Precision")]
    first = baselines.groupby(level="epochs", sort=False).first()
    return (first.reindex(epochs).set_axis(cost.index) / cost).round(2)


def _paper_columns(wide: pd.DataFrame, reported: pd.DataFrame) -> dict[str, np.ndarray]:
    """A column for each metric and origin of the paper's numbers, such as "abstract: times faster"."""
    columns, labels = {}, {"mean_top1": "top1 (%)", "time_ratio": "times faster"}
    # the paper has numbers of its own method alone, with the correction and TDDS coresets, not of ablations
    own = (wide.method != "Ours") | ((wide.correction == "mean_var") & wide.coreset.isin(["full data", "tdds"]))
    keys = pd.MultiIndex.from_frame(wide[["method", "pruning_rate"]])
    for (origin, metric), part in reported[reported.metric.isin(labels)].groupby(["origin", "metric"]):
        values = part.set_index(["method", "pruning_rate"]).value.reindex(keys)
        columns[f"{origin}: {labels[metric]}"] = values.where(own.to_numpy()).to_numpy()
    return columns


def gap_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How much of the gap between the uncorrected network and its adapted self each correction closes, by bit-width.

    One row a bit-width: top-1 (%) of ours on the full data for each correction, without and with batch-norm adaptation,
    and the share of the gap (%) that each correction closes, empty where the gap is below one point, which is within
    the noise of seeds. All are means over seeds.
    """
    checks.table("rows", rows, ("method", "pruning_rate", "correction", "bits", "trained", "adapted", "top1"))
    part = rows[(rows.method == "Ours") & (rows.pruning_rate == 0)]
    if "none" not in set(part.correction):
        raise checks.invalid("rows", sorted(set(rows.method)), "runs of ours on the full data, without correction too")
    table = part.pivot_table(index=["bits", "trained"], columns=["adapted", "correction"], values="top1")
    table.columns = [correction + (", adapted" if adapted else "") for adapted, correction in table.columns]
    gap = table["none, adapted"] - table["none"]
    for name in table.columns.intersection(["mean", "mean_var"]):
        table[f"{name} closes (%)"] = (100 * (table[name] - table["none"]) / gap).where(gap >= 1)
    return table.round(1).reset_index()


def comparison_table(
    rows: pd.DataFrame, columns: str = "pruning_rate", index: Sequence[str] = ("coreset",)
) -> pd.DataFrame:
    """One row a kind of coreset, one column a pruning rate: mean top-1 (%) over the trained bit-widths, not adapted."""
    return _told(_wide(seed_means(rows, [*index, columns]), list(index), columns).reset_index())


def coreset_table(draws: pd.DataFrame) -> pd.DataFrame:
    """One row a kind of coreset: what its coresets have in common, means over draws, bit-widths and seeds.

    Columns: union, the fraction of the data that is in any coreset of a draw; overlap, the fraction of a coreset that
    another bit-width's has too; drift, the fraction that was not in the draw before; rank_correlation, Spearman's, of
    two bit-widths' scores; clipped, the fraction of samples whose weight in the loss was cut to the largest allowed
    one; and the shares of the rarest and the commonest class. draws: of `runs.coreset_rows`.
    """
    values = ["size", "union", "overlap", "drift", "rank_correlation", "clipped", "rarest_class", "commonest_class"]
    by = ["pruning_rate", "coreset", "candidates"]
    means = checks.table("draws", draws, [*by, *values]).groupby(by, sort=False)[values].mean()
    return _told(means.round(3).reset_index())


def named(rows: pd.DataFrame, *more: str) -> pd.DataFrame:
    """`rows` with coresets' names that tell apart all that differs, candidates and training included.

    more: other columns, whose value is part of the name where it is not the most frequent one.
    """
    asked = ("batch_size", "lr", "weight_decay", *more)
    checks.table("rows", rows, ("coreset", "candidates", "scoring_epochs", *asked))
    some = rows.candidates.lt(1) | rows.scoring_epochs.eq(0)
    name = rows.coreset.where(some, rows.coreset + ", all candidates")
    for option in asked:
        differs = rows[option] != rows[option].mode()[0]
        name = name.where(~differs, name + f", {option}=" + rows[option].map("{:g}".format))
    return rows.assign(coreset=name)


_STATISTICS = {"own": "own statistics", "shared": "shared statistics", "even": "shared statistics, even mean"}
_STATISTICS |= {"reversed": "shared statistics, order reversed", "slow": "shared statistics, momentum 0.01"}


def adaptation_gaps(rows: pd.DataFrame) -> pd.DataFrame:
    """How far each network is above its batch-norm-adapted self, in points: one row a seed and bit-width.

    Column statistics: shared by bit-widths, or their own for each trained one, or the kind of `statistics.KINDS` that
    the rows name; without or with output correction, and without weight bias correction.
    """
    checks.table("rows", rows, ("run", "seed", "bits", "trained", "norm", "correction", "adapted", "top1"))
    plain = rows[~rows.adapted]
    adapted = rows[rows.adapted].set_index(["run", "bits"]).top1.rename("adapted_top1")
    norms = plain.norm.map({"shared": "shared", "shared_affine": "own"})
    kinds = (plain.statistics if "statistics" in plain else norms).map(_STATISTICS)
    kinds += plain.correction.str.endswith(", output").map({True: ", output correction", False: ""})
    kinds += plain.correction.eq("none").map({True: ", no weight bias correction", False: ""})
    found = plain.assign(statistics=kinds).join(adapted, on=["run", "bits"])
    return found.assign(gap=found.top1 - found.adapted_top1)


def adaptation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a choice of statistics, one column a bit-width: `adaptation_gaps`, mean ± std over seeds."""
    return _by_bits(adaptation_gaps(rows), ["statistics"], "gap")


def by_statistics(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with their kind of `statistics.KINDS` in words, of which an adapted network is one more.

    Coresets that are scored and then drawn at equal chances are named as what they are: random, after all data.
    """
    names = checks.table("rows", rows, ("statistics", "adapted", "coreset")).coreset
    once = names.str.contains("resample_every=0").map({True: "random", False: "RS2"})
    names = names.where(~names.str.contains("power=0.0"), "all data first, " + once)
    kinds = rows.statistics.map(_STATISTICS).where(~rows.adapted, "adapted")
    return rows.assign(statistics=kinds, coreset=names, adapted=False)


def statistics_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a kind of coreset, one column a kind of `by_statistics`: mean top-1 (%) over the trained bit-widths."""
    return comparison_table(by_statistics(rows), "statistics")


def untrained_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a method and set of trained bit-widths: top-1 (%) at every bit-width as served, and the cost.

    Any-Precision is calibrated where it was not trained, ours nowhere. Passes of training are in millions, forward
    passes of calibration in thousands.
    """
    checks.table("rows", rows, ("sample_passes", "calibration_passes", "seconds"))
    index = ["trained_bits", "method", "correction"]
    wide = _wide(served(rows), index, "bits")
    runs = served(rows).groupby([*index, "run"], sort=False)
    names = {"passes": ("sample_passes", "first"), "calibration": ("calibration_passes", "sum")}
    cost = runs.agg(**names, s=("seconds", "first")).groupby(index, sort=False).mean()
    columns = {"passes (M)": cost.passes / 1e6, "calibration (k)": cost.calibration / 1e3, "seconds": cost.s.round()}
    return wide.assign(**columns).rename(columns=str).reset_index()


def transfer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a child model: top-1 (%) after all steps, after its own alone, after the others' alone.

    All are after batch-norm adaptation, so that weights are compared. "gained" is what the others' steps add to its
    own; "as many own steps" are as many as the others' alone. rows: of `experiments.transfer`.
    """
    checks.table("rows", rows, ("adapted", "trained", "trained_bits", "scheme", "bits", "seed", "epochs", "top1"))
    adapted = rows[rows.adapted]
    every, alone = max(adapted.trained_bits, key=len), adapted.scheme == "dedicated"
    kinds = adapted.trained_bits.map({every: "all steps"}).where(~alone, "own steps alone")
    kinds = kinds.where(~alone | adapted.epochs.eq(adapted.epochs.min()), "as many own steps")
    kinds = kinds.where(kinds.notna() | adapted.trained, "others' steps alone")
    seeds = adapted.assign(kind=kinds).pivot_table(index=["bits", "seed"], columns="kind", values="top1", sort=False)
    seeds["gained"] = seeds["all steps"] - seeds["own steps alone"]
    tidy = seeds.melt(ignore_index=False, var_name="kind", value_name="top1").dropna().reset_index()
    order = ["own steps alone", "others' steps alone", "as many own steps", "all steps", "gained"]
    wide = _wide(tidy, ["bits"], "kind").sort_index()
    return wide[[name for name in order if name in wide]].reset_index()


def growth_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Training cost by scheme and number of bit-widths; Dedicated is the sum of one network for each of them.

    rows: of `experiments.growth`.
    """
    checks.table("rows", rows, (*SETTING, "run", "trained_bits"))
    runs = rows.drop_duplicates("run")
    table = []
    for widths in runs.trained_bits[runs.method == "Any-Precision"]:
        singles = runs[(runs.method == "Dedicated") & runs.trained_bits.isin(widths.split())]
        shared = runs[(runs.method != "Dedicated") & (runs.trained_bits == widths)]
        for part in [singles, *(group for _, group in shared.groupby(SETTING, sort=False))]:
            first = part.iloc[0]
            pruned = f"{first.pruning_rate:.0%} pruned, " if first.pruning_rate else ""
            label = f"Ours, {pruned}{in_words(first.coreset)}" if first.method == "Ours" else first.method
            sums = training_cost(rows[rows.run.isin(part.run)], COST).sum(skipna=False).to_dict()
            table.append({"scheme": label, "bit-widths": len(widths.split()), "bits": widths} | sums)
    return pd.DataFrame(table)
