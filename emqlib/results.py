"""Rows into tables: mean and spread over seeds, the paper's numbers in a column of their own, CSV and Markdown."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from . import checks
from .files import home, write_text

COST = ["sample_passes", "scoring_passes", "calibration", "steps", "seconds"]
SETTING = ["method", "correction", "pruning_rate", "coreset", "candidates", "epochs"]


def paper(table: str) -> pd.DataFrame:
    """What the paper reports, one row a number: method, pruning_rate, metric, value, source; empty where unknown."""
    checks.path("table", checks.instance("table", table, str, "the name of a table, for example table1"))
    path = home() / "results" / "paper" / f"{table}.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["method", "pruning_rate", "metric", "value"])


def spread(rows: pd.DataFrame, by: list[str], value: str = "top1") -> pd.DataFrame:
    """Mean, sample standard deviation (empty for one seed) and number of seeds of `value` for each group of `by`."""
    checks.instance("by", by, list, "a list of columns")
    groups = checks.table("rows", rows, [*by, value]).groupby(by, sort=False, dropna=False)[value]
    return groups.agg(mean="mean", std="std", seeds="count").reset_index()


def seed_means(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """One row a group of `by` and seed: top1, the mean (%) over the trained bit-widths, without adaptation."""
    checks.table("rows", rows, [*by, "seed", "top1", "trained", "adapted"])
    part = rows[rows.trained & ~rows.adapted]
    return part.groupby([*by, "seed"], sort=False, dropna=False).top1.mean().reset_index()


def with_cost(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """`seed_means` of each setting, and a column of what its training cost; cost: a column of `rows`, or COST."""
    means = seed_means(rows, SETTING).set_index([*SETTING, "seed"])
    return means.join(training_cost(rows[rows.trained & ~rows.adapted], [cost])).reset_index()


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a method, setting and adaptation, one column a bit-width: top-1 (%), mean ± std over seeds.

    rows: of `experiments.run_all`. Trained bit-widths are marked with *; an empty cell was not run.
    """
    checks.table("rows", rows, ("trained",))
    index = [*SETTING, "adapted"]
    cells = spread(rows, [*index, "bits"])
    cells["text"] = _texts(cells["mean"], cells["std"])
    wide = cells.pivot_table(index=index, columns="bits", values="text", aggfunc="first", sort=False).fillna("")
    trained = set(rows.bits[rows.trained])
    wide = wide[sorted(wide.columns)].rename(columns=lambda b: f"{b}*" if b in trained else f"{b}")
    return wide.rename_axis(columns=None).reset_index()


def correction_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row without weight bias correction and one with it, a column a bit-width: top-1 (%), mean ± std over seeds.

    No bit-width is adapted; the trained ones are marked with *. rows: of `experiments.quickstart`, run by `run_all`.
    """
    table = accuracy_table(rows[~checks.table("rows", rows, ("adapted", "trained")).adapted])
    names = ["without" if correction == "none" else "with" for correction in table.correction]
    accuracy = table.drop(columns=[*SETTING, "adapted"])
    accuracy.insert(0, "accuracy (%) by bit-width", [f"{name} weight bias correction" for name in names])
    return accuracy


def _texts(means: pd.Series, stds: pd.Series) -> list[str]:
    """ "71.2 ± 0.3", or "71.2" where one seed has no spread."""
    pairs = zip(means, stds, strict=True)
    return [f"{mean:.1f}" if pd.isna(std) else f"{mean:.1f} ± {std:.1f}" for mean, std in pairs]


def training_cost(rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """`columns` of each setting and seed, summed over its runs, each counted once: Dedicated has one a bit-width.

    "calibration" are the images that went forward in batch-norm adaptation of the bit-widths of `rows` that cannot be
    served without, as those that a switchable norm was not trained for.
    """
    parts = ["adapted", "bits", "calibration_passes"] if "calibration" in columns else []
    needed = [*SETTING, "run", "seed", *parts, *(name for name in columns if name != "calibration")]
    runs = checks.table("rows", rows, needed).drop_duplicates("run")
    if "calibration" in columns:
        runs = runs.assign(calibration=runs.run.map(_calibration(rows)).fillna(0))
    return runs.groupby([*SETTING, "seed"], sort=False)[columns].sum()


def _calibration(rows: pd.DataFrame) -> pd.Series:
    adapted, served = (pd.MultiIndex.from_frame(rows[rows.adapted == a][["run", "bits"]]) for a in (True, False))
    return rows[rows.adapted][~adapted.isin(served)].groupby("run").calibration_passes.sum()


def cost_table(rows: pd.DataFrame, table: str) -> pd.DataFrame:
    """One row a method and setting: mean top-1 (%) over the trained bit-widths, and what training cost.

    The mean is without and with batch-norm adaptation; the cost is sample passes (millions) and the part of them (%) in
    the scoring phase, forward passes of calibration (millions), optimizer steps, seconds, and how many times fewer
    passes and seconds than Any-Precision at as many epochs; all are means over seeds, and the paper's numbers have
    columns of their own. rows: of `experiments.run_all`; table: whose numbers of the paper, for example "table1".
    """
    checks.table("rows", rows, ("trained", "adapted", "top1"))
    trained = rows[rows.trained]
    cost = training_cost(rows, COST).groupby(SETTING, sort=False).mean()
    columns = {
        "top1 (%)": _mean_over_bits(trained[~trained.adapted], SETTING),
        "adapted top1 (%)": _mean_over_bits(trained[trained.adapted], SETTING),
        "passes (M)": (cost.sample_passes / 1e6).round(6),
        "scoring (%)": (100 * cost.scoring_passes / cost.sample_passes).round(1),
        "calibration (M)": (cost.calibration / 1e6).round(6),
        "steps": cost.steps.round(),
        "seconds": cost.seconds.round(),
        "fewer passes": _times_less(cost.sample_passes),
        "faster": _times_less(cost.seconds),
    }
    wide = pd.DataFrame(columns, index=cost.index).reset_index()
    return wide.assign(**_paper_columns(wide, paper(table)))


def _times_less(cost: pd.Series) -> pd.Series:
    """How many times less than the first Any-Precision's of as many epochs; empty where there is none."""
    epochs = cost.index.get_level_values("epochs")
    baseline = (
        cost[cost.index.get_level_values("method") == "Any-Precision"].groupby(level="epochs", sort=False).first()
    )
    return (baseline.reindex(epochs).set_axis(cost.index) / cost).round(2)


def _mean_over_bits(rows: pd.DataFrame, by: list[str]) -> pd.Series:
    """mean ± standard deviation over seeds of each seed's mean over bit-widths, for each group of `by`."""
    seeds = rows.groupby([*by, "seed"], sort=False).top1.mean().groupby(by, sort=False)
    means = seeds.mean()
    return pd.Series(_texts(means, seeds.std()), index=means.index, dtype=object)


def _paper_columns(wide: pd.DataFrame, reported: pd.DataFrame) -> dict[str, list[float | None]]:
    columns = {}
    for metric, name in {"mean_top1": "paper: top1 (%)", "time_ratio": "paper: times faster"}.items():
        values = reported[reported.metric == metric].set_index(["method", "pruning_rate"]).value
        # the paper's method has the correction and TDDS coresets: an ablation of it has no number there
        own = (wide.method != "Ours") | ((wide.correction == "mean_var") & wide.coreset.isin(["full data", "tdds"]))
        keys = zip(wide.method, wide.pruning_rate, own, strict=True)
        columns[name] = [values.get((method, rate)) if reports else None for method, rate, reports in keys]
    return columns


def gap_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How much of the gap between the uncorrected network and its adapted self each correction closes, by bit-width.

    One row a bit-width: top-1 (%) of ours on the full data for each correction, without and with batch-norm adaptation,
    and the share of the gap that each correction closes with no adaptation (%), all means over seeds. The share is
    empty where the gap is below one point: that is within the noise of seeds. ValueError: `rows` lack such runs.
    """
    checks.table("rows", rows, ("method", "pruning_rate", "correction", "bits", "trained", "adapted", "top1"))
    part = rows[(rows.method == "Ours") & (rows.pruning_rate == 0)]
    if "none" not in set(part.correction):
        raise checks.invalid("rows", sorted(set(rows.method)), "runs of ours on the full data, without correction too")
    table = part.pivot_table(index=["bits", "trained"], columns=["adapted", "correction"], values="top1")
    table.columns = [correction + (", adapted" if adapted else "") for adapted, correction in table.columns]
    gap = table["none, adapted"] - table["none"]
    for name in [correction for correction in ("mean", "mean_var") if correction in table]:
        table[f"{name} closes (%)"] = (100 * (table[name] - table["none"]) / gap).where(gap >= 1)
    return table.round(1).reset_index()


def comparison_table(
    rows: pd.DataFrame, columns: str = "pruning_rate", index: Sequence[str] = ("coreset",)
) -> pd.DataFrame:
    """One row a way to select coresets, one column a pruning rate: mean top-1 (%) over the trained bit-widths.

    Mean ± standard deviation over seeds, without batch-norm adaptation; an empty cell was not run. columns, index:
    what else to spread the numbers over.
    """
    cells = spread(seed_means(rows, [*index, columns]), [*index, columns])
    cells["text"] = _texts(cells["mean"], cells["std"])
    wide = cells.pivot_table(index=list(index), columns=columns, values="text", aggfunc="first", sort=False)
    return wide[sorted(wide.columns)].fillna("").rename_axis(columns=None).reset_index()


def coreset_table(draws: pd.DataFrame) -> pd.DataFrame:
    """One row a way to select coresets: what they had in common, means over draws, bit-widths and seeds.

    union: fraction of the data in any coreset of a draw; overlap: of a coreset that another bit-width's has too; drift:
    of it that the draw before had not; rank_correlation: Spearman's, of two bit-widths' scores; the share of the rarest
    and of the commonest class. draws: of `experiments.coreset_rows`.
    """
    values = ["size", "union", "overlap", "drift", "rank_correlation", "clipped", "rarest_class", "commonest_class"]
    by = ["pruning_rate", "coreset", "candidates"]
    means = checks.table("draws", draws, [*by, *values]).groupby(by, sort=False)[values].mean()
    return means.round(3).reset_index()


def curve_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a method and setting, one column a run length in epochs: mean top-1 (%) over the trained bit-widths.

    Mean ± standard deviation over seeds, without batch-norm adaptation. rows: of `experiments.curves`.
    """
    return comparison_table(rows, columns="epochs", index=SETTING[:-1])


def equal_cost_table(rows: pd.DataFrame, cost: str = "seconds") -> pd.DataFrame:
    """One row a run of Any-Precision: its mean top-1 (%), and that of ours at each pruning rate for no more cost.

    Ours is the longest of the runs there are that costs no more; empty where all cost more. cost: "seconds" or
    "sample_passes"; rows: of `experiments.curves`.
    """
    checks.choice("cost", cost, ("seconds", "sample_passes"))
    points = with_cost(rows, cost).groupby(SETTING, sort=False)[["top1", cost]].mean().reset_index()
    ours, table = points[points.method.str.startswith("Ours")], []
    for baseline in points[points.method == "Any-Precision"].itertuples():
        spent = getattr(baseline, cost)
        row = {"epochs": baseline.epochs, cost: round(spent), "Any-Precision": round(baseline.top1, 1)}
        for (method, rate), runs in ours.groupby(["method", "pruning_rate"], sort=False):
            affordable = runs[runs[cost] <= spent].sort_values("epochs")
            row[f"{method}, {rate:.0%} pruned"] = "".join(
                f"{run.top1:.1f} ({run.epochs} epochs)" for run in affordable.tail(1).itertuples()
            )
        table.append(row)
    return pd.DataFrame(table)


def named(rows: pd.DataFrame, *more: str) -> pd.DataFrame:
    """`rows` with their coresets' names made to tell apart all that differs: candidates and training included.

    more: other columns whose values belong to the name where they are not the most frequent one.
    """
    asked = ("batch_size", "lr", "weight_decay", *more)
    checks.table("rows", rows, ("coreset", "candidates", "scoring_epochs", *asked))
    some = rows.candidates.lt(1) | rows.scoring_epochs.eq(0)
    name = rows.coreset.where(some, rows.coreset + ", all candidates")
    for option in asked:
        differs = rows[option] != rows[option].mode()[0]
        name = name.where(~differs, name + f", {option}=" + rows[option].map("{:g}".format))
    return rows.assign(coreset=name)


def option_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a coreset of `named` rows: mean top-1 (%) without and with adaptation, sample passes (thousands)."""
    checks.table("rows", rows, ("coreset", "trained", "adapted", "seed", "top1", "run", "sample_passes"))
    trained = rows[rows.trained]
    cost = rows.drop_duplicates("run").groupby("coreset", sort=False).sample_passes.mean()
    means = [trained[trained.adapted == adapted] for adapted in (False, True)]
    top1, adapted = (_mean_over_bits(part, ["coreset"]) for part in means)
    columns = {"top1 (%)": top1, "adapted top1 (%)": adapted, "passes (k)": (cost / 1e3).round(1)}
    return pd.DataFrame(columns, index=cost.index).reset_index()


def remedy_gaps(rows: pd.DataFrame) -> pd.DataFrame:
    """For each remedy and bit-width, how far its top-1 is above that of the same network adapted: points over seeds.

    Columns: remedy, bits, trained, mean, std, seeds. rows: of `studies.remedies`.
    """
    checks.table("rows", rows, ("remedy", "bits", "trained", "top1", "adapted_top1"))
    return spread(rows.assign(gap=rows.top1 - rows.adapted_top1), ["remedy", "bits", "trained"], "gap")


def remedy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a remedy, one column a bit-width: points above the adapted network, mean ± std over seeds.

    "worst": the lowest mean of bit-widths from 2 up, by which the rows are sorted, the best first; the last row is the
    adapted network's own top-1 (%), of the run that the most remedies start from. Trained bit-widths are marked with *.
    rows: of `studies.remedies`.
    """
    checks.table("rows", rows, ("run", "seed"))
    gaps = remedy_gaps(rows)
    worst = gaps[gaps.bits >= 2].groupby("remedy")["mean"].min().sort_values(ascending=False)
    gaps["text"] = _texts(gaps["mean"], gaps["std"])
    wide = gaps.pivot_table(index="remedy", columns="bits", values="text", aggfunc="first").loc[worst.index]
    adapted = spread(rows[rows.run.isin(rows.groupby("seed").run.agg(lambda r: r.mode()[0]))], ["bits"], "adapted_top1")
    wide.loc["adapted (top-1, %)"] = pd.Series(_texts(adapted["mean"], adapted["std"]), index=adapted.bits)
    trained = set(rows.bits[rows.trained])
    table = wide.rename(columns=lambda b: f"{b}*" if b in trained else f"{b}").rename_axis(columns=None)
    return table.assign(worst=worst.round(1)).reset_index()


def served(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each run and bit-width the row that a user gets: without adaptation, or with it where there is no other."""
    checks.table("rows", rows, ("adapted", "run", "bits"))
    return rows.sort_values("adapted", kind="stable").drop_duplicates(["run", "bits"]).sort_index()


def untrained_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a method and set of trained bit-widths: top-1 (%) at every bit-width as served, and what that costs.

    Any-Precision is calibrated where it was not trained, ours nowhere. passes: of training, in millions; calibration:
    forward passes, in thousands; means ± std over seeds. rows: of `experiments.untrained`.
    """
    checks.table("rows", rows, ("sample_passes", "calibration_passes", "seconds"))
    index = ["trained_bits", "method", "correction"]
    cells = spread(served(rows), [*index, "bits"])
    cells["text"] = _texts(cells["mean"], cells["std"])
    wide = cells.pivot_table(index=index, columns="bits", values="text", aggfunc="first", sort=False).sort_index(axis=1)
    runs = served(rows).groupby([*index, "run"], sort=False)
    cost = runs.agg(
        passes=("sample_passes", "first"), calibration=("calibration_passes", "sum"), s=("seconds", "first")
    )
    cost = cost.groupby(index, sort=False).mean()
    columns = {"passes (M)": cost.passes / 1e6, "calibration (k)": cost.calibration / 1e3, "seconds": cost.s.round()}
    return wide.assign(**columns).rename_axis(columns=None).rename(columns=str).reset_index()


def transfer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a child: top-1 (%) after all steps, after its own alone, after the others' alone, mean ± std over seeds.

    All are after batch-norm adaptation, so that what is compared are weights; "gained" is what the others' steps add to
    its own. rows: of `experiments.transfer`.
    """
    checks.table("rows", rows, ("adapted", "trained", "trained_bits", "scheme", "bits", "seed", "top1"))
    adapted = rows[rows.adapted]
    every = max(adapted.trained_bits, key=len)
    kinds = adapted.trained_bits.map({every: "all steps"}).where(adapted.scheme != "dedicated", "own steps alone")
    kinds = kinds.where(kinds.notna() | adapted.trained, "others' steps alone")
    seeds = adapted.assign(kind=kinds).pivot_table(index=["bits", "seed"], columns="kind", values="top1", sort=False)
    seeds["gained"] = seeds["all steps"] - seeds["own steps alone"]
    parts = {kind: seeds[kind].groupby("bits", sort=True).agg(["mean", "std"]) for kind in seeds}
    table = pd.DataFrame({kind: _texts(part["mean"], part["std"]) for kind, part in parts.items()})
    order = ["own steps alone", "others' steps alone", "all steps", "gained"]
    return table.assign(bits=next(iter(parts.values())).index)[["bits", *order]]


def growth_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Training cost by scheme and number of bit-widths: sample passes, by formula too, calibration, steps, seconds.

    calibration: images that go forward to serve the bit-widths that were evaluated and not trained. Dedicated is the
    sum of one network for each of the bit-widths. rows: of `experiments.growth`. The formulas, for B bit-widths, N
    images and E epochs: B N E; ours with coresets B N (c S + (1 - r) (E - S)), where S scoring epochs see the fraction
    c, and r is the pruning rate.
    """
    checks.table("rows", rows, (*SETTING, "run", "trained_bits", "scoring_epochs", "n_train"))
    runs = rows.drop_duplicates("run")
    table = []
    for widths in runs.trained_bits[runs.method == "Any-Precision"]:
        singles = runs[(runs.method == "Dedicated") & runs.trained_bits.isin(widths.split())]
        shared = runs[(runs.method != "Dedicated") & (runs.trained_bits == widths)]
        for part in [singles, *(group for _, group in shared.groupby(SETTING, sort=False))]:
            first, count = part.iloc[0], len(widths.split())
            scored = first.candidates * first.scoring_epochs if first.pruning_rate else 0
            kept = (1 - first.pruning_rate) * (first.epochs - first.scoring_epochs)
            formula = round(count * first.n_train * (scored + kept))
            label = f"Ours, {first.coreset}" if first.method == "Ours" else first.method
            sums = training_cost(rows[rows.run.isin(part.run)], COST).sum().to_dict()
            table.append({"scheme": label, "bit-widths": count, "bits": widths, "by formula": formula} | sums)
    return pd.DataFrame(table)


def deployment_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a runtime and bit-width, medians over repeats and seeds; rows: of `deployment.served`.

    top1 and agreement in %; sizes in KB (1,000 bytes), memory in MiB, load and latency in milliseconds.
    """
    units = {"file": 1e3, "packed": 1e3, "arithmetic": 1e3, "load": 1e-3, "latency": 1e-3}
    columns = ["top1", "agreement", "difference", *units, "images_a_second", "peak", "peak_batch"]
    by = ["runtime", "weights", "bits"]
    table = checks.table("rows", rows, [*by, *columns]).groupby(by, sort=False)[columns].median()
    digits = {"difference": 5, "latency": 3, "images_a_second": 0, "peak": 0, "peak_batch": 0}
    scaled = table.assign(**{name: table[name] / unit for name, unit in units.items()})
    return scaled.round(
        {name: digits.get(name, 2 if name in ("top1", "agreement") else 1) for name in columns}
    ).reset_index()


def switching_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a way to another bit-width: milliseconds of all bit-widths and repeats of `deployment.switching`."""
    checks.table("rows", rows, ("way", "milliseconds"))
    return rows.groupby("way", sort=False).milliseconds.agg(["median", "min", "max"]).round(2).reset_index()


def ratio_definitions(bits: range = range(2, 6), epochs: int = 200) -> pd.DataFrame:
    """Which definition of cost would give the paper's times: an inference, by our own counts, from numbers alone.

    The ratio is passes of a baseline over k bit-widths to ours over B <= k, both for `epochs`, with S epochs of scoring
    on the full data: k E / (B (S + (1 - r) (E - S))). Rows: for each reported ratio the three nearest of all k up to 9
    (8 and full precision) and S in 0, 5, 10, 20. Where the pruning rate is not known to us, 60 and 80 % are tried.
    """
    for count in checks.instance("bits", bits, (range, tuple, list), "numbers of bit-widths, for example range(2, 6)"):
        checks.integer("bits", count, 1, 9)
    checks.integer("epochs", epochs, 20)
    reported = [(7.88, "CIFAR-10", (0.8,)), (5.75, "ImageNet-1K", (0.6, 0.8)), (8.41, "TinyImageNet", (0.6,))]
    table = []
    for ratio, data, rates in reported:
        options = [(r, b, k, s) for r in rates for b in bits for k in range(b, 10) for s in (0, 5, 10, 20)]
        counted = [(k * epochs / (b * (s + (1 - r) * (epochs - s))), r, b, k, s) for r, b, k, s in options]
        for value, r, b, k, s in sorted(counted, key=lambda row: abs(row[0] - ratio))[:3]:
            row = {"data": data, "paper": ratio, "by passes": round(value, 2), "pruning rate": r}
            table.append(row | {"our bit-widths": b, "baseline's": k, "scoring epochs": s})
    return pd.DataFrame(table)


def save(table: pd.DataFrame, path: Path, rows: pd.DataFrame | None = None) -> None:
    """Write `table` as `path`.md, and the tidy `rows` it was made of as `path`.csv, each file whole or not at all."""
    path, table = checks.path("path", path), checks.instance("table", table, pd.DataFrame, "a DataFrame")
    if rows is not None:
        checks.instance("rows", rows, pd.DataFrame, "a DataFrame, or None")
        write_text(path.with_suffix(".csv"), rows.to_csv(index=False))
    cells = table.astype(object).where(table.notna(), None)  # missing is empty, not "nan"
    write_text(path.with_suffix(".md"), cells.to_markdown(index=False) + "\n")
