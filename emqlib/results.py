"""Rows into tables: mean and spread over seeds, the paper's numbers in a column of their own, CSV and Markdown."""

from pathlib import Path

import pandas as pd

from . import checks
from .files import home, write_text

SETTING = ["method", "correction", "pruning_rate"]


def paper(table: str) -> pd.DataFrame:
    """What the paper reports, one row a number: method, pruning_rate, metric, value, source; empty where unknown."""
    path = home() / "results" / "paper" / f"{table}.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["method", "pruning_rate", "metric", "value"])


def spread(rows: pd.DataFrame, by: list[str], value: str = "top1") -> pd.DataFrame:
    """Mean, sample standard deviation (empty for one seed) and number of seeds of `value` for each group of `by`."""
    groups = rows.groupby(by, sort=False, dropna=False)[value]
    return groups.agg(mean="mean", std="std", seeds="count").reset_index()


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a method, setting and adaptation, one column a bit-width: top-1 (%), mean ± std over seeds.

    rows: of `experiments.run_all`. Trained bit-widths are marked with *; an empty cell was not run.
    """
    index = [*SETTING, "adapted"]
    cells = spread(rows, [*index, "bits"])
    cells["text"] = _texts(cells["mean"], cells["std"])
    wide = cells.pivot_table(index=index, columns="bits", values="text", aggfunc="first", sort=False).fillna("")
    trained = set(rows.bits[rows.trained])
    wide = wide[sorted(wide.columns)].rename(columns=lambda b: f"{b}*" if b in trained else f"{b}")
    return wide.rename_axis(columns=None).reset_index()


def _texts(means: pd.Series, stds: pd.Series) -> list[str]:
    """ "71.2 ± 0.3", or "71.2" where one seed has no spread."""
    pairs = zip(means, stds, strict=True)
    return [f"{mean:.1f}" if pd.isna(std) else f"{mean:.1f} ± {std:.1f}" for mean, std in pairs]


def training_cost(rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """`columns` of each setting and seed, summed over its runs, each counted once: Dedicated has one a bit-width."""
    return rows.drop_duplicates("run").groupby([*SETTING, "seed"], sort=False)[columns].sum()


def cost_table(rows: pd.DataFrame, table: str) -> pd.DataFrame:
    """One row a method and setting: mean top-1 (%) over the trained bit-widths, and what training cost.

    The mean is without and with batch-norm adaptation; the cost is sample passes (millions), optimizer steps, seconds,
    and how many times fewer passes than Any-Precision; all are means over seeds, and the paper's numbers have columns
    of their own. rows: of `experiments.run_all`; table: whose numbers of the paper, for example "table1".
    """
    trained = rows[rows.trained]
    per_seed = training_cost(rows, ["sample_passes", "steps", "seconds"])
    cost = per_seed.groupby(SETTING, sort=False).mean()
    baseline = cost.sample_passes[cost.index.get_level_values("method") == "Any-Precision"]
    columns = {
        "top1 (%)": _mean_over_bits(trained[~trained.adapted]),
        "adapted top1 (%)": _mean_over_bits(trained[trained.adapted]),
        "passes (M)": (cost.sample_passes / 1e6).round(6),
        "steps": cost.steps.round(),
        "seconds": cost.seconds.round(),
        "fewer passes": (baseline.iloc[0] / cost.sample_passes).round(2) if len(baseline) else None,
    }
    wide = pd.DataFrame(columns, index=cost.index).reset_index()
    return wide.assign(**_paper_columns(wide, paper(table)))


def _mean_over_bits(rows: pd.DataFrame) -> pd.Series:
    """mean ± standard deviation over seeds of each seed's mean over bit-widths."""
    seeds = rows.groupby([*SETTING, "seed"], sort=False).top1.mean().groupby(SETTING, sort=False)
    means = seeds.mean()
    return pd.Series(_texts(means, seeds.std()), index=means.index, dtype=object)


def _paper_columns(wide: pd.DataFrame, reported: pd.DataFrame) -> dict[str, list[float | None]]:
    columns = {}
    for metric, name in {"mean_top1": "paper: top1 (%)", "time_ratio": "paper: times faster"}.items():
        values = reported[reported.metric == metric].set_index(["method", "pruning_rate"]).value
        # the paper's own method is the corrected one: an ablation of it has no number there
        own = (wide.method != "Ours") | (wide.correction == "mean_var")
        keys = zip(wide.method, wide.pruning_rate, own, strict=True)
        columns[name] = [values.get((method, rate)) if reports else None for method, rate, reports in keys]
    return columns


def gap_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How much of the gap between the uncorrected network and its adapted self each correction closes, by bit-width.

    One row a bit-width: top-1 (%) of ours on the full data for each correction, without and with batch-norm adaptation,
    and the share of the gap that each correction closes with no adaptation (%), all means over seeds. The share is
    empty where the gap is below one point: that is within the noise of seeds. ValueError: `rows` lack such runs.
    """
    part = rows[(rows.method == "Ours") & (rows.pruning_rate == 0)]
    if "none" not in set(part.correction):
        raise checks.invalid("rows", sorted(set(rows.method)), "runs of ours on the full data, without correction too")
    table = part.pivot_table(index=["bits", "trained"], columns=["adapted", "correction"], values="top1")
    table.columns = [correction + (", adapted" if adapted else "") for adapted, correction in table.columns]
    gap = table["none, adapted"] - table["none"]
    for name in [correction for correction in ("mean", "mean_var") if correction in table]:
        table[f"{name} closes (%)"] = (100 * (table[name] - table["none"]) / gap).where(gap >= 1)
    return table.round(1).reset_index()


def save(table: pd.DataFrame, path: Path, rows: pd.DataFrame | None = None) -> None:
    """Write `table` as `path`.md, and the tidy `rows` it was made of as `path`.csv, each file whole or not at all."""
    if rows is not None:
        write_text(path.with_suffix(".csv"), rows.to_csv(index=False))
    cells = table.astype(object).where(table.notna(), None)  # missing is empty, not "nan"
    write_text(path.with_suffix(".md"), cells.to_markdown(index=False) + "\n")
