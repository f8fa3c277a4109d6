"""Rows into tables: mean and spread over seeds, the paper's numbers in a column of their own, CSV and Markdown."""

from pathlib import Path

import pandas as pd

from .experiments import ROOT
from .files import write_text

SETTING = ["method", "correction", "pruning_rate"]


def paper(table: str) -> pd.DataFrame:
    """What the paper reports, one row a number: method, pruning_rate, metric, value, source; empty where unknown."""
    path = ROOT / "results" / "paper" / f"{table}.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["method", "pruning_rate", "metric", "value"])


def spread(rows: pd.DataFrame, by: list[str], value: str = "top1") -> pd.DataFrame:
    """Mean, sample standard deviation (empty for one seed) and number of seeds of `value` for each group of `by`."""
    groups = rows.groupby(by, sort=False, dropna=False)[value]
    return groups.agg(mean="mean", std="std", seeds="count").reset_index()


def accuracy_table(rows: pd.DataFrame, adapted: bool = False) -> pd.DataFrame:
    """One row a method and setting, one column a bit-width: top-1 accuracy (%), mean ± standard deviation over seeds.

    rows: of `experiments.run_all`. Trained bit-widths are marked with *; an empty cell was not run.
    """
    part = rows[rows.adapted == adapted]
    cells = spread(part, [*SETTING, "bits"])
    cells["text"] = [
        f"{mean:.1f}" if pd.isna(std) else f"{mean:.1f} ± {std:.1f}" for mean, std in zip(cells["mean"], cells["std"])
    ]
    wide = cells.pivot_table(index=SETTING, columns="bits", values="text", aggfunc="first", sort=False).fillna("")
    wide = wide[sorted(wide.columns)]
    trained = set(part.bits[part.trained])
    wide.columns = [f"{b}*" if b in trained else f"{b}" for b in wide.columns]
    return wide.reset_index()


def cost_table(rows: pd.DataFrame, table: str) -> pd.DataFrame:
    """One row a method and setting: mean top-1 (%) over the trained bit-widths, without and with batch-norm adaptation,
    the paper's mean, sample passes (millions), seconds, and how many times fewer passes than Any-Precision.

    rows: of `experiments.run_all`; table: whose numbers of the paper to put beside them, for example "table1".
    """
    trained = rows[rows.trained]
    plain, adapted = (_mean_over_bits(trained[trained.adapted == a]) for a in (False, True))
    runs = rows.drop_duplicates("run")
    cost = (
        runs.groupby([*SETTING, "seed"], sort=False)[["sample_passes", "seconds"]]
        .sum()
        .groupby(SETTING, sort=False)
        .mean()
    )
    baseline = cost.sample_passes[cost.index.get_level_values("method") == "Any-Precision"]
    columns = {
        "top1 (%)": plain,
        "adapted top1 (%)": adapted,
        "passes (M)": (cost.sample_passes / 1e6).round(3),
        "seconds": cost.seconds.round(),
        "fewer passes": (baseline.iloc[0] / cost.sample_passes).round(2) if len(baseline) else None,
    }
    wide = pd.DataFrame(columns, index=cost.index).reset_index()
    return wide.assign(**_paper_columns(wide, paper(table)))


def _mean_over_bits(rows: pd.DataFrame) -> pd.Series:
    """mean ± standard deviation over seeds of each seed's mean over bit-widths."""
    seeds = rows.groupby([*SETTING, "seed"], sort=False).top1.mean().groupby(SETTING, sort=False)
    means, stds = seeds.mean(), seeds.std()
    return pd.Series(
        [f"{m:.1f}" if pd.isna(s) else f"{m:.1f} ± {s:.1f}" for m, s in zip(means, stds)],
        index=means.index,
        dtype=object,
    )


def _paper_columns(wide: pd.DataFrame, reported: pd.DataFrame) -> dict[str, list]:
    columns = {}
    for metric, name in {"mean_top1": "paper top1 (%)", "time_ratio": "paper times faster"}.items():
        values = reported[reported.metric == metric].set_index(["method", "pruning_rate"]).value
        best = wide.correction != "none"  # the paper's own method is the corrected one
        keys = zip(wide.method, wide.pruning_rate, best | (wide.method != "Ours"), strict=True)
        columns[name] = [values.get((method, rate)) if counts else None for method, rate, counts in keys]
    return columns


def gap_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How much of the gap between the uncorrected network and its adapted self each correction closes, by bit-width.

    One row a bit-width: top-1 (%) of ours on the full data without correction, without and with batch-norm adaptation,
    with each correction and no adaptation, and the share of the gap each closes (%), means over seeds.
    """
    part = rows[(rows.method == "Ours") & (rows.pruning_rate == 0)]
    means = part.groupby(["bits", "correction", "adapted"]).top1.mean()
    table = pd.DataFrame(
        {
            "none": means.xs(("none", False), level=("correction", "adapted")),
            "mean": means.xs(("mean", False), level=("correction", "adapted")),
            "mean_var": means.xs(("mean_var", False), level=("correction", "adapted")),
            "none, adapted": means.xs(("none", True), level=("correction", "adapted")),
            "mean_var, adapted": means.xs(("mean_var", True), level=("correction", "adapted")),
        }
    )
    gap = table["none, adapted"] - table["none"]
    for name in ("mean", "mean_var"):
        # a gap within the noise of seeds has no share to close
        table[f"{name} closes (%)"] = (100 * (table[name] - table["none"]) / gap).where(gap > 1)
    trained = part.groupby("bits").trained.first()
    return table.round(1).assign(trained=trained).reset_index()


def save(table: pd.DataFrame, path: Path) -> None:
    """Write `table` as `path`.csv and `path`.md, each whole or not at all."""
    write_text(path.with_suffix(".csv"), table.to_csv(index=False))
    write_text(path.with_suffix(".md"), table.to_markdown(index=False) + "\n")
