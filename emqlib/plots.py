"""Figures as functions of tidy rows: no file is read, nothing is trained, and the style is set in one place."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from . import checks
from .files import write_atomic
from .results import SETTING, spread, training_cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _axes(ax: "Axes | None", title: str) -> "Axes":
    import matplotlib.pyplot as plt
    import seaborn as sns

    if ax is None:
        with sns.axes_style("whitegrid"):
            ax = plt.subplots(figsize=(6.4, 4.0), dpi=110, layout="constrained")[1]
    ax.set_title(title, fontsize=10)
    return ax


def _setting(rows: pd.DataFrame, title: str) -> str:
    """The title, and what the figure was made with."""
    if rows.empty:
        raise checks.invalid("rows", "none", "rows of run_all, at least one")
    first = rows.iloc[0]
    return f"{title}\n{first.dataset}, {first.model}, profile {first.profile}, {rows.seed.nunique()} seed(s)"


def accuracy_by_bits(rows: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Top-1 accuracy (%) against bit-width, a line for each method and setting; adapted ones are dashed.

    rows: of `experiments.run_all`; bars show the standard deviation over seeds, hollow markers untrained bit-widths.
    ValueError: no rows.
    """
    import seaborn as sns

    ax = _axes(ax, _setting(rows, "Accuracy by bit-width"))
    lines = spread(rows, [*SETTING, "adapted", "bits", "trained"])
    settings = list(dict.fromkeys(map(tuple, lines[SETTING].to_numpy())))
    colors, markers = sns.color_palette("colorblind", len(settings)), "osD^vP*Xhd<>"
    for (*setting, adapted), line in lines.groupby([*SETTING, "adapted"], sort=False):
        line, i = line.sort_values("bits"), settings.index(tuple(setting))
        look = {"color": colors[i], "marker": markers[i % len(markers)], "ls": "--" if adapted else "-", "ms": 5}
        label = _label(*setting) + (", adapted" if adapted else "")
        ax.errorbar(line.bits, line["mean"], line["std"].fillna(0), label=label, capsize=2, **look)
        untrained = line[~line.trained.astype(bool)]
        ax.plot(
            untrained.bits, untrained["mean"], ls="", marker=look["marker"], ms=5, mfc="white", mec=colors[i], zorder=5
        )
    ax.set_xlabel("bit-width of weights and activations (hollow: not trained)")
    ax.set_ylabel("top-1 accuracy (%)")
    ax.set_xticks(sorted(rows.bits.unique()))
    ax.legend(fontsize=7, handlelength=4)  # long enough to tell dashed from solid behind a marker
    return ax


def _label(method: str, correction: str, pruning_rate: float) -> str:
    if method != "Ours":
        return method
    return f"Ours, {correction}" + (f", {pruning_rate:.0%} pruned" if pruning_rate else "")


def accuracy_by_cost(rows: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Mean top-1 accuracy (%) over the trained bit-widths against sample passes, a marker for each setting.

    rows: of `experiments.run_all`, those without adaptation; bars show the standard deviation over seeds.
    ValueError: no rows.
    """
    import seaborn as sns

    ax = _axes(ax, _setting(rows, "Accuracy against training cost"))
    part = rows[rows.trained & ~rows.adapted]
    per_seed = part.groupby([*SETTING, "seed"], sort=False)
    passes = training_cost(part, ["sample_passes"]).sample_passes
    points = pd.DataFrame({"top1": per_seed.top1.mean(), "passes": passes}).groupby(SETTING, sort=False)
    colors, markers = sns.color_palette("colorblind", points.ngroups), "osD^vP*Xhd<>"
    for i, (setting, point) in enumerate(points):
        std = point.top1.std() if len(point) > 1 else 0
        look = {"color": colors[i], "marker": markers[i % len(markers)], "ls": "", "capsize": 2}
        ax.errorbar(point.passes.mean() / 1e6, point.top1.mean(), std, label=_label(*setting), **look)
    ticks = sorted(set(points.passes.mean() / 1e6))
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("sample passes (millions, logarithmic)")
    ax.set_ylabel("mean top-1 accuracy (%)")
    ax.legend(fontsize=7)
    return ax


def save(ax: "Axes", path: Path) -> None:
    """Write the figure of `ax` as `path`.png, without date or version: the same rows give the same bytes."""
    figure = ax.figure
    write_atomic(path.with_suffix(".png"), lambda f: figure.savefig(f, format="png", metadata={"Software": None}))
