"""Figures as functions of tidy rows; `python -m emqlib.paper.plots [FOLDER]` redraws all of them."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from .. import checks
from ..files import write_atomic
from .tables import SETTING, growth_table, remedy_gaps, seed_means, spread, with_cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

import sys
from collections.abc import Callable

from ..files import home

_OF_ANGLES = ("epoch", "depth", "bits", "other_bits", "other_images", "angle")
_MARKERS = "osD^vP*Xhd<>"
_OUTSIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend of many lines would cover some of them


def axes(ax: "Axes | None", title: str) -> "Axes":
    """`ax`, or new ones of the size and style that all figures share, under `title`."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    checks.instance("ax", ax, (type(None), plt.Axes), "axes of matplotlib, or None for new ones")
    if ax is None:
        with sns.axes_style("whitegrid"):
            ax = plt.subplots(figsize=(6.4, 4.0), dpi=100, layout="constrained")[1]
    ax.set_title(title, fontsize=10)
    return ax


def _setting(rows: pd.DataFrame, title: str) -> str:
    """The title, and what the figure was made with."""
    checks.table("rows", rows, ("epochs", "seed", "dataset", "model", "profile"))
    first, seeds = rows.iloc[0], rows.groupby("epochs").seed.nunique()
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    return f"{title}\n{first.dataset}, {first.model}, profile {first.profile}, {count} seed(s)"


def accuracy_by_bits(rows: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Top-1 accuracy (%) against bit-width, a line for each method and setting; adapted ones are dashed.

    rows: of `experiments.run_all`; bars show the standard deviation over seeds, hollow markers untrained bit-widths.
    ValueError: no rows.
    """
    import seaborn as sns

    ax = axes(ax, _setting(rows, "Accuracy by bit-width"))
    lines = spread(rows, [*SETTING, "adapted", "bits", "trained"])
    settings = list(dict.fromkeys(map(tuple, lines[SETTING].to_numpy())))
    colors = sns.color_palette("colorblind", len(settings))
    for (*setting, adapted), line in lines.groupby([*SETTING, "adapted"], sort=False):
        line, i = line.sort_values("bits"), settings.index(tuple(setting))
        look = {"color": colors[i], "marker": _MARKERS[i % len(_MARKERS)], "ls": "--" if adapted else "-", "ms": 5}
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


def _label(method: str, correction: str, pruning_rate: float, coreset: str = "", *_: object) -> str:
    if not method.startswith("Ours"):
        return method
    return f"{method}, {correction}" + (f", {pruning_rate:.0%} pruned, {coreset}" if pruning_rate else "")


def accuracy_by_cost(rows: pd.DataFrame, cost: str = "sample_passes", ax: "Axes | None" = None) -> "Axes":
    """Mean top-1 accuracy (%) over the trained bit-widths against the cost of training, a line for each setting.

    A line joins the run lengths of a setting, in epochs beside the markers. rows: of `experiments.run_all`, those
    without adaptation; cost: "sample_passes" or "seconds"; bars show the standard deviation over seeds.
    ValueError: no rows, or another cost.
    """
    import seaborn as sns

    unit, label = _COSTS[checks.choice("cost", cost, _COSTS)]
    ax = axes(ax, _setting(rows, "Accuracy against training cost"))
    points = with_cost(rows, cost)
    groups = points.groupby(SETTING[:-1], sort=False, dropna=False)
    colors = sns.color_palette("colorblind", groups.ngroups)
    for i, (setting, group) in enumerate(groups):
        lengths = group.groupby("epochs").agg({"top1": ["mean", "std"], cost: "mean"})
        x, y, spreads = lengths[cost, "mean"] / unit, lengths["top1", "mean"], lengths["top1", "std"].fillna(0)
        look = {"color": colors[i % len(colors)], "marker": _MARKERS[i % len(_MARKERS)], "capsize": 2, "ms": 5, "lw": 1}
        ax.errorbar(x, y, spreads, label=_label(*setting), **look)
        for epochs in lengths.index if points.epochs.nunique() > 1 else ():
            place = {"textcoords": "offset points", "xytext": (4, -9), "fontsize": 6, "color": look["color"]}
            ax.annotate(f"{epochs}", (x[epochs], y[epochs]), **place)
    _logarithmic(ax)
    ax.tick_params(axis="x", which="both", length=0, labelsize=8, pad=4)
    ax.set_xlabel(f"{label}, logarithmic")
    ax.set_ylabel("mean top-1 accuracy (%)")
    ax.legend(fontsize=7)
    return ax


def _logarithmic(ax: "Axes") -> None:
    ax.set_xscale("log")
    for show in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        show(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "1235" else "")  # the others would overlap


_COSTS = {"sample_passes": (1e6, "sample passes (millions)"), "seconds": (60, "training time (minutes)")}


def accuracy_by_pruning(rows: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Mean top-1 accuracy (%) over the trained bit-widths against pruning rate, a line for each way to select coresets.

    rows: of `experiments.run_all`, those without adaptation; bars show the standard deviation over seeds.
    ValueError: no rows.
    """
    ax = axes(ax, _setting(rows, "Accuracy by pruning rate"))
    by = ["coreset", "pruning_rate"]
    lines = spread(seed_means(rows, by), by)
    _error_lines(ax, lines.assign(percent=100 * lines.pruning_rate), "coreset", "percent", 0.4)
    ax.set_xticks(100 * lines.pruning_rate.unique())
    ax.set_xlabel("pruning rate (%)")
    ax.set_ylabel("mean top-1 accuracy (%)")
    ax.legend(fontsize=7)
    return ax


def _error_lines(ax: "Axes", lines: pd.DataFrame, name: str, x: str, step: float) -> None:
    """Mean and standard deviation against column `x`, a line for each value of column `name`, `step` apart."""
    import seaborn as sns

    names = list(dict.fromkeys(lines[name]))
    colors = sns.color_palette("colorblind", len(names))
    for i, value in enumerate(names):
        line = lines[lines[name] == value].sort_values(x)
        shift = step * (i - len(names) / 2)  # beside one another, or bars hide each other
        look = {"color": colors[i], "marker": _MARKERS[i % len(_MARKERS)], "capsize": 2, "ms": 5, "lw": 1}
        ax.errorbar(line[x] + shift, line["mean"], line["std"].fillna(0), label=value, **look)


def accuracy_by_coreset(rows: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Mean top-1 accuracy (%) over the trained bit-widths for each coreset, the best at the top.

    rows: of `experiments.run_all`, as `results.named` names them, those without adaptation; bars show the standard
    deviation over seeds, small dots are seeds.
    ValueError: no rows.
    """
    import seaborn as sns

    ax = axes(ax, _setting(rows, "Accuracy by coreset"))
    seeds = seed_means(rows, ["method", "coreset"])
    pairs = zip(seeds.method, seeds.coreset, strict=True)
    names = [name + method.removeprefix("Ours") if method.startswith("Ours") else method for method, name in pairs]
    seeds = seeds.assign(coreset=names)
    order = spread(seeds, ["coreset"]).sort_values("mean", ascending=False).coreset
    color = sns.color_palette("colorblind")[0]
    shared = {"data": seeds, "x": "top1", "y": "coreset", "order": list(order), "color": color, "ax": ax}
    sns.stripplot(**shared, size=3, alpha=0.5, jitter=False)
    sns.pointplot(**shared, errorbar="sd", linestyle="none", marker="D", markersize=4, capsize=0.2, err_kws={"lw": 1})
    ax.figure.set_size_inches(6.4, 1.4 + 0.22 * len(order))
    ax.tick_params(axis="y", labelsize=7)
    ax.set_xlabel("mean top-1 accuracy (%)")
    ax.set_ylabel("")
    return ax


def growth(rows: pd.DataFrame, cost: str = "sample_passes", ax: "Axes | None" = None) -> "Axes":
    """Training cost against the number of bit-widths, a line for each scheme; rows: of `experiments.growth`.

    ValueError: no rows, or another cost than "sample_passes" and "seconds".
    """
    import seaborn as sns

    unit, label = _COSTS[checks.choice("cost", cost, _COSTS)]
    ax, table = axes(ax, _setting(rows, "Training cost by number of bit-widths")), growth_table(rows)
    names = list(dict.fromkeys(table.scheme))
    colors, markers = sns.color_palette("colorblind", len(names)), "osD^"
    for i, name in enumerate(names):
        line = table[table.scheme == name]
        ax.plot(line["bit-widths"], line[cost] / unit, color=colors[i], marker=markers[i % 4], label=name)
    ax.set_xticks(sorted(table["bit-widths"].unique()))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("number of bit-widths")
    ax.set_ylabel(label)
    ax.legend(fontsize=7)
    return ax


def bit_color(bits: int) -> tuple[float, float, float]:
    """The color of a bit-width, the same in every figure that tells bit-widths apart by color."""
    import seaborn as sns

    return sns.color_palette("colorblind", 9)[min(checks.bit_width("bits", bits), 9) - 1]


def distributions(histograms: pd.DataFrame) -> "Axes":
    """Distributions of one layer's pre-activations by bit-width, networks without and with correction side by side.

    Pre-activations are standardized by the batch norm's running statistics, which fit where the curves are one; the
    dotted line is the standard normal distribution. histograms: of `studies.distributions`, one layer of them.
    Returns the left panel. ValueError: no rows, or rows of several layers.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    checks.table("histograms", histograms, ("layer", "trained_with", "bits", "z", "density"))
    if histograms.layer.nunique() != 1:
        raise checks.invalid("histograms", sorted(set(histograms.layer)), "the rows of one layer")
    with sns.axes_style("whitegrid"):
        figure, panels = plt.subplots(1, 2, figsize=(8.0, 3.6), dpi=100, layout="constrained", sharex=True, sharey=True)
    figure.suptitle(_setting(histograms, f"Pre-activations of {histograms.layer.iloc[0]} by bit-width"), fontsize=10)
    for ax, (correction, title) in zip(panels, _TRAINED_WITH.items(), strict=True):
        for b, line in histograms[histograms.trained_with == correction].groupby("bits"):
            ax.plot(line.z, line.density, color=bit_color(b), label=f"{b} bits", lw=1.5)
        z = histograms.z.drop_duplicates()
        normal = (-(z**2) / 2).map(math.exp) / math.sqrt(2 * math.pi)
        ax.plot(z, normal, color="black", ls=":", lw=1, label="standard normal")
        ax.set_title(title, fontsize=9)
        ax.set_xlim(-4, 4)
        ax.set_xlabel("standard deviations from the running mean")
    panels[0].set_ylabel("density")
    panels[0].legend(fontsize=7)
    return panels[0]


_TRAINED_WITH = {"none": "without weight bias correction", "mean_var": "with weight bias correction"}


def mismatch(rows: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """How far the input of each norm lies from what it is at other bit-widths, in standard deviations.

    A line for each bit-width, means over seeds, dashed without correction; rows: the mismatch of
    `studies.distributions`, with the running mean of a batch norm, or `studies.layer_norms`, with the highest
    bit-width. ValueError: no rows.
    """
    checks.table("rows", rows, ("layer", "trained_with", "bits", "mean_shift"))
    title = "Tokens before each layer norm, against the highest bit-width"
    if "wasserstein" in rows:
        title = "Mismatch with the shared batch norm, by layer"
    ax = axes(ax, _setting(rows, title))
    layers = list(dict.fromkeys(rows.layer))
    for (correction, b), line in rows.groupby(["trained_with", "bits"], sort=False):
        look = {"color": bit_color(b), "ls": "--" if correction == "none" else "-", "marker": "o", "ms": 4, "lw": 1}
        label, shifts = f"{b} bits, {_TRAINED_WITH[correction].split()[0]} correction", line.groupby("layer").mean_shift
        ax.plot(range(len(layers)), shifts.mean().reindex(layers), label=label, **look)
    short = [".".join(name.split(".")[-2:]) for name in layers]
    ticks = short if len(set(short)) == len(layers) else layers
    ax.set_xticks(range(len(layers)), ticks, rotation=60, ha="right", fontsize=7)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("shift of the mean (standard deviations)")
    ax.legend(fontsize=7, handlelength=4, **_OUTSIDE)
    return ax


def gap_by_bits(rows: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Top-1 accuracy of each remedy against bit-width, in points above the same network after batch-norm adaptation.

    rows: of `studies.remedies`, bit-widths from 2 up; bars show the standard deviation over seeds, the shaded band
    is 1.5 points wide. ValueError: no rows.
    """
    checks.table("rows", rows, ("bits",))
    ax = axes(ax, _setting(rows, "Without a calibration pass, against batch-norm adaptation"))
    gaps = remedy_gaps(rows[rows.bits >= 2])
    ax.axhspan(-1.5, 0, color="0.9", zorder=0)
    _error_lines(ax, gaps, "remedy", "bits", 0.06)
    trained = sorted(set(gaps.bits[gaps.trained.astype(bool)]))
    ax.set_xlabel(f"bit-width of weights and activations (trained: {', '.join(map(str, trained))})")
    ax.set_ylabel("top-1 above adapted (points)")
    ax.legend(fontsize=7, **_OUTSIDE)
    return ax


def angles_by_layer(rows: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Angles between the children's gradients after the last epoch, by layer from the input to the output.

    A line for each pair of bit-widths on the same images; dashed: one bit-width on other images. rows: the angles of
    `studies.alignment`. ValueError: no rows.
    """
    checks.table("rows", rows, ("layer", *_OF_ANGLES))
    ax = axes(ax, _setting(rows, "Angles between gradients, by layer"))
    last = rows[(rows.epoch == rows.epoch.max()) & (rows.depth >= 0)]
    layers = list(dict.fromkeys(last.sort_values("depth").layer))
    _angle_lines(ax, last, "depth")
    ax.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
    return ax


def angles_by_epoch(rows: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Angles between the children's gradients, all layers as one vector, before training and after each epoch.

    Lines as in `angles_by_layer`. rows: the angles of `studies.alignment`. ValueError: no rows.
    """
    checks.table("rows", rows, _OF_ANGLES)
    ax = axes(ax, _setting(rows, "Angles between gradients of all layers, over training"))
    _angle_lines(ax, rows[rows.depth < 0], "epoch")
    ax.set_xlabel("epochs trained")
    return ax


def _angle_lines(ax: "Axes", rows: pd.DataFrame, x: str) -> None:
    import seaborn as sns

    pairs = [pair for pair, _ in rows[~rows.other_images.astype(bool)].groupby(["bits", "other_bits"])]
    colors = dict(zip(pairs, sns.color_palette("dark", len(pairs)), strict=True))
    means = rows.groupby(["bits", "other_bits", x]).angle.mean().reset_index()  # over seeds
    for (a, b), line in means.groupby(["bits", "other_bits"]):
        look = {"color": bit_color(a), "ls": "--"} if a == b else {"color": colors[a, b], "marker": "o", "ms": 4}
        label = f"{a} bits, other images" if a == b else f"{a} and {b} bits, same images"
        ax.plot(line[x], line.angle, lw=1, label=label, **look)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("angle (degrees)")
    ax.legend(fontsize=7, handlelength=4, **_OUTSIDE)


def ranges(rows: pd.DataFrame, label: str, value: str, title: str, unit: str, mark: float | None = None) -> "Axes":
    """Repeated measurements, a line for each `label` in the order of `rows`: a dot each, and a bar at their median.

    label, value: columns; unit: what `value` is measured in; mark: where a dashed line shows what is claimed.
    ValueError: no rows.
    """
    checks.table("rows", rows, (label, value))
    import seaborn as sns

    (dots, bar, *_), labels = sns.color_palette("colorblind"), list(dict.fromkeys(rows[label]))
    ax = axes(None, title)
    for place, name in enumerate(labels):
        values = rows[rows[label] == name][value]
        ax.plot(values, [place] * len(values), ls="", marker="o", ms=4, color=dots, alpha=0.5)
        ax.plot([values.median()], [place], ls="", marker="|", ms=16, mew=2, color=bar)
    if mark is not None:
        ax.axvline(mark, ls="--", lw=1, color="0.3")
    ax.set_yticks(range(len(labels)), labels, fontsize=7)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel(unit)
    return ax


def save(ax: "Axes", path: Path) -> None:
    """Write the figure of `ax` as `path`.png, without date or version: the same rows give the same bytes."""
    from matplotlib.axes import Axes

    figure, path = checks.instance("ax", ax, Axes, "axes of matplotlib").figure, checks.path("path", path)
    write_atomic(path.with_suffix(".png"), lambda f: figure.savefig(f, format="png", metadata={"Software": None}))


Draw = Callable[[pd.DataFrame], "Axes"]

# The figure's name: its CSV, and the function of the rows in it.
FIGURES: dict[str, tuple[str, Draw]] = {
    "00_quickstart": ("00_quickstart", accuracy_by_bits),
    "01_cifar10": ("01_cifar10", lambda rows: accuracy_by_bits(_ours_on_full_data(rows))),
    "01_cifar10_curves": ("01_cifar10_curves", accuracy_by_cost),
    "01_cifar10_curves_time": ("01_cifar10_curves", lambda rows: accuracy_by_cost(rows, "seconds")),
    "02_cifar100": ("02_cifar100", accuracy_by_cost),
    "02_tinyimagenet": ("02_tinyimagenet", accuracy_by_cost),
    "03_imagenet": ("03_imagenet", accuracy_by_bits),
    "04_vit_cifar10": ("04_vit_cifar10", accuracy_by_bits),
    "04_vit_tinyimagenet": ("04_vit_tinyimagenet", accuracy_by_bits),
    "04_layer_norms": ("04_layer_norms", mismatch),
    "05_coreset_comparison": ("05_coreset_comparison", accuracy_by_pruning),
    "06_bias_correction": ("06_bias_correction", lambda rows: accuracy_by_bits(_ends_of_correction(rows))),
    "06_remedies": ("06_remedies", gap_by_bits),
    "07_ablation_scoring_scheme": ("07_ablation_scoring_scheme", accuracy_by_coreset),
    "07_equal_epochs": ("07_equal_epochs", lambda rows: accuracy_by_coreset(_longest(rows))),
    "08_activation_distributions": ("08_activation_distributions", distributions),
    "08_mismatch": ("08_mismatch", mismatch),
    "09_angles_by_layer": ("09_angles", angles_by_layer),
    "09_angles_by_epoch": ("09_angles", angles_by_epoch),
    "10_untrained_bitwidths": ("10_untrained_bitwidths", lambda rows: accuracy_by_bits(_most_trained(rows))),
    "10_two_trained_bitwidths": ("10_untrained_bitwidths", lambda rows: accuracy_by_bits(_fewest_trained(rows))),
    "11_training_cost": ("11_training_cost", lambda rows: growth(rows, "sample_passes")),
    "11_training_time": ("11_training_cost", lambda rows: growth(rows, "seconds")),
}


def _ours_on_full_data(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.method.eq("Ours") & rows.pruning_rate.eq(0) & rows.bits.gt(1)]


def _ends_of_correction(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.correction.isin(("none", "mean_var"))]


def _longest(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.epochs.eq(rows.epochs.max())]


def _most_trained(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.trained_bits.eq(max(rows.trained_bits, key=len))]


def _fewest_trained(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.trained_bits.eq(min(rows.trained_bits, key=len))]


def draw(path: Path) -> "Axes":
    """Draw the figure that `path` names, without suffix, from its CSV in the same folder; write `path`.png.

    The same CSV gives the same bytes. ValueError: no such figure, or no whole CSV of it there.
    """
    path = checks.path("path", path)
    csv, function = FIGURES[checks.choice("path", path.name, FIGURES)]
    rows = path.with_name(f"{csv}.csv")
    if not rows.exists():
        raise checks.invalid("path", str(path), f"{rows.name} beside it, which the notebook writes")
    try:
        table = pd.read_csv(rows)
    except ValueError as error:
        raise checks.invalid("path", str(path), f"a whole {rows.name} beside it ({error})") from error
    ax = function(checks.table("rows", table))
    save(ax, path)
    return ax


def main(folder: Path) -> int:
    """Redraw all figures below `folder`; returns how many."""
    folder = checks.path("folder", folder)
    import matplotlib.pyplot as plt

    paths = [rows.with_name(name) for name, (csv, _) in FIGURES.items() for rows in sorted(folder.rglob(f"{csv}.csv"))]
    for path in paths:
        plt.close(draw(path).figure)
    return len(paths)


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else home() / "results"
    print(f"{main(where)} figures redrawn in {where}")
