"""Figures as functions of tidy rows; `python -m emqlib.paper.plots [FOLDER]` redraws all of them.

Rows are those of `runs.run_all` unless a function says otherwise, and bars show the standard deviation over seeds.
Without rows, or with a column missing, each function raises a ValueError.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import seaborn as sns
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from .. import checks
from ..convert import at_bits, quantized_layers, trained_bits
from ..files import home, write_atomic
from ..train.data import Dataset, normalize
from .tables import SETTING, adaptation_gaps, growth_table, in_words, seed_means, with_cost

_COSTS = {"sample_passes": (1e6, "sample passes (millions)"), "seconds": (60, "training time (minutes)")}
_BITS = "bit-width of weights and activations (*: trained)"
_CORRECTED = {"none": "#d55e00", "mean_var": "#0072b2"}  # colors of Okabe and Ito
_CORRECTIONS = {"none": "without weight bias correction", "mean_var": "with weight bias correction"}
_KINDS = {"none": "not corrected", "mean": "means corrected", "mean_var": "corrected"}
_KINDS |= {"output": "outputs too", "no gradient": "no gradient through it"}
_WIDE = 10.0  # inches, of a figure with its legend beside it
_MARKED = {"markers": True, "dashes": False, "palette": "colorblind"}
_SPREAD = {"errorbar": "sd", "err_style": "bars", "err_kws": {"capsize": 2, "lw": 1}}  # over seeds


def axes(ax: Axes | None, title: str, width: float = 7.2) -> Axes:
    """`ax`, or new ones of the style that all figures share, under `title`; width: inches, of the figure."""
    checks.instance("ax", ax, (type(None), Axes), "axes of matplotlib, or None for new ones")
    if ax is None:
        with sns.axes_style("whitegrid"):
            ax = plt.subplots(figsize=(width, 4.2), dpi=100, layout="constrained")[1]
    ax.set_title(title, fontsize=10)
    return ax


def _finish(ax: Axes, x: str, y: str, beside: bool = False) -> Axes:
    """`ax` with the names of its axes and a small legend: inside, or beside them where it has many lines."""
    ax.set(xlabel=x, ylabel=y)
    if ax.get_legend() is not None:
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {"loc": "best"}
        sns.move_legend(ax, **place, title=None, fontsize=7, handlelength=3.5)
    return ax


def _setting(rows: pd.DataFrame, title: str, *columns: str) -> str:
    """The title, and what the figure was made with; ValueError: no rows, or a column of a figure is missing."""
    checks.table("rows", rows, (*columns, "epochs", "seed", "dataset", "model", "profile"))
    first, seeds = rows.iloc[0], rows.groupby("epochs").seed.nunique()
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    return f"{title}\n{first.dataset}, {first.model}, profile {first.profile}, {count} seed(s)"


def _label(row: pd.Series) -> str:
    if not row.method.startswith("Ours"):
        return row.method
    pruned = [f"{row.pruning_rate:.0%} pruned", in_words(row.coreset)] if row.pruning_rate else []
    corrections = [_KINDS[kind] for kind in row.correction.split(", ")]
    return ", ".join([row.method, *pruned, *(corrections if corrections != ["corrected"] or not pruned else [])])


def _widths(rows: pd.DataFrame) -> dict[int, str]:
    """How each bit-width is shown: with a * where it was trained."""
    trained = set(rows.bits[rows.trained.astype(bool)])
    return {b: f"{b}*" if b in trained else f"{b}" for b in sorted(set(rows.bits))}


def accuracy_by_bits(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Top-1 accuracy (%) against bit-width, a line for each method and setting; adapted ones are dashed."""
    ax = axes(ax, _setting(rows, "Accuracy by bit-width", "bits", "top1", "trained", "adapted", *SETTING), _WIDE)
    norms = rows.adapted.map({False: "as trained", True: "adapted"})
    tidy = rows.assign(**{"method and setting": rows.apply(_label, axis=1), "batch norm": norms})
    look = {"hue": "method and setting", "palette": "colorblind", "style": "batch norm"}
    look |= {"markers": {"as trained": "o", "adapted": "s"}, "dashes": {"as trained": "", "adapted": (4, 1.5)}}
    sns.lineplot(tidy, x="bits", y="top1", **look, **_SPREAD, ax=ax)
    widths = _widths(rows)
    ax.set_xticks(list(widths), list(widths.values()))
    return _finish(ax, _BITS, "top-1 accuracy (%)", beside=True)


def accuracy_by_cost(rows: pd.DataFrame, cost: str = "sample_passes", ax: Axes | None = None) -> Axes:
    """Mean top-1 accuracy (%) over the trained bit-widths against training cost, a line for each setting.

    A line joins the run lengths of a setting, in epochs beside the points. cost: "sample_passes" or "seconds".
    """
    unit, label = _COSTS[checks.choice("cost", cost, _COSTS)]
    ax = axes(ax, _setting(rows, "Accuracy against training cost"))
    points = with_cost(rows, cost)
    points = points.assign(label=points.apply(_label, axis=1))
    points["cost"] = points.groupby(SETTING, dropna=False)[cost].transform("mean") / unit
    sns.lineplot(points, x="cost", y="top1", hue="label", style="label", **_MARKED, **_SPREAD, ax=ax)
    label += ", logarithmic"
    if points.epochs.nunique() > 1:
        label += "; beside the points: epochs"
        place = {"textcoords": "offset points", "xytext": (4, -9), "fontsize": 6}
        for point in points.groupby(SETTING, dropna=False)[["cost", "top1"]].mean().reset_index().itertuples():
            ax.annotate(f"{point.epochs}", (point.cost, point.top1), **place)
    ax.set_xscale("log")
    for show in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        show(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "1235" else "")  # the others would overlap
    return _finish(ax, label, "mean top-1 accuracy (%)")


def accuracy_by_pruning(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean top-1 accuracy (%) over the trained bit-widths against pruning rate, a line for each kind of coreset."""
    ax = axes(ax, _setting(rows, "Accuracy by pruning rate"))
    seeds = seed_means(rows, ["coreset", "pruning_rate"])
    seeds["coreset"] = seeds.coreset.map(in_words)
    _side_by_side(ax, seeds.assign(rate=(100 * seeds.pruning_rate).round().astype(int)), "rate", "top1", "coreset")
    return _finish(ax, "pruning rate (%)", "mean top-1 accuracy (%)")


def accuracy_by_lr(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean top-1 accuracy (%) over the trained bit-widths against learning rate, a line for each method and batch size.

    rows: of `experiments.tuning`.
    """
    ax = axes(ax, _setting(rows, "What each method trains best with, on validation images", "lr", "batch_size"))
    means = seed_means(rows, ["method", "batch_size", "lr"])
    tidy = means.assign(batches=means.batch_size.map("batches of {}".format))
    look = {"hue": "method", "style": "batches", "markers": True, "palette": "colorblind"}
    sns.lineplot(tidy, x="lr", y="top1", **look, ax=ax)
    ax.set_xscale("log")
    rates = sorted(set(tidy.lr))
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    return _finish(ax, "highest learning rate, logarithmic", "mean top-1 accuracy (%)")


def _side_by_side(ax: Axes, rows: pd.DataFrame, x: str, y: str, hue: str) -> None:
    """Means and standard deviations, a line for each `hue`, moved sideways so that bars do not hide each other."""
    look = {"markers": list("osD^vP*Xhd<>")[: rows[hue].nunique()], "markersize": 5, "lw": 1, "palette": "colorblind"}
    spread = {"errorbar": "sd", "capsize": 0.05, "err_kws": {"lw": 1}, "dodge": 0.5}
    sns.pointplot(rows, x=x, y=y, hue=hue, **look, **spread, ax=ax)


def accuracy_by_coreset(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean top-1 accuracy (%) over the trained bit-widths for each coreset, the best at the top; small dots are seeds.

    rows: as `tables.named` names their coresets.
    """
    ax = axes(ax, _setting(rows, "Accuracy by coreset"))
    seeds = seed_means(rows, ["method", "coreset"])
    ours = seeds.method.str.startswith("Ours")
    names = seeds.coreset.map(in_words) + seeds.method.str.removeprefix("Ours")
    seeds = seeds.assign(coreset=names.where(ours, seeds.method))
    order = list(seeds.groupby("coreset").top1.mean().sort_values(ascending=False).index)
    shared = {"x": "top1", "y": "coreset", "order": order, "color": sns.color_palette("colorblind")[0], "ax": ax}
    sns.stripplot(seeds, **shared, size=3, alpha=0.5, jitter=False)
    diamonds = {"linestyle": "none", "marker": "D", "markersize": 4, "capsize": 0.2, "err_kws": {"lw": 1}}
    sns.pointplot(seeds, **shared, errorbar="sd", **diamonds)
    ax.figure.set_size_inches(7.2, 1.4 + 0.22 * len(order))
    ax.tick_params(axis="y", labelsize=7)
    return _finish(ax, "mean top-1 accuracy (%)", "")


def growth(rows: pd.DataFrame, cost: str = "sample_passes", ax: Axes | None = None) -> Axes:
    """Training cost, "sample_passes" or "seconds", against the number of bit-widths, a line for each scheme."""
    unit, label = _COSTS[checks.choice("cost", cost, _COSTS)]
    ax, table = axes(ax, _setting(rows, "Training cost by number of bit-widths")), growth_table(rows)
    tidy = table.assign(cost=table[cost] / unit)
    sns.lineplot(tidy, x="bit-widths", y="cost", hue="scheme", style="scheme", **_MARKED, ax=ax)
    ax.set(xticks=sorted(table["bit-widths"].unique()), ylim=(0, None))
    return _finish(ax, "number of bit-widths", label)


def _palette(rows: pd.DataFrame, name: str = "{}") -> dict[str, tuple[float, float, float]]:
    """The color of each bit-width, the same in every figure that tells bit-widths apart by color."""
    colors = sns.color_palette("colorblind", 9)
    return {name.format(b): colors[min(b, 9) - 1] for b in sorted(set(rows.bits))}


def distributions(histograms: pd.DataFrame) -> Axes:
    """Distributions of one layer's pre-activations by bit-width, without and with correction side by side.

    Pre-activations are standardized by the batch norm's running statistics. The dotted line is the standard normal
    distribution. histograms: of `measure.distributions`. Returns the left panel. ValueError: several layers.
    """
    checks.table("histograms", histograms, ("layer", "trained_with", "bits", "z", "density"))
    if histograms.layer.nunique() != 1:
        raise checks.invalid("histograms", sorted(set(histograms.layer)), "the rows of one layer")
    title = _setting(histograms, f"Pre-activations of {histograms.layer.iloc[0]} by bit-width")
    columns = {"trained_with": histograms.trained_with.map(_CORRECTIONS), "bit-width": histograms.bits.astype(str)}
    rows, palette = histograms.assign(**columns), _palette(histograms)
    look = {"hue": "bit-width", "hue_order": list(palette), "palette": palette, "errorbar": None}
    shape = {"height": 3.6, "aspect": 1.1, "facet_kws": {"legend_out": False}}  # the legend takes no room inside
    with sns.axes_style("whitegrid"):
        grid = sns.relplot(rows, x="z", y="density", col="trained_with", kind="line", **look, **shape)
    z = rows.z.drop_duplicates()
    for ax in grid.axes.flat:
        ax.plot(z, (-(z**2) / 2).map(math.exp) / math.sqrt(2 * math.pi), color="black", ls=":", lw=1)
        ax.set(xlim=(-4, 4), xticks=range(-3, 4))
    grid.set_titles("{col_name}", size=9).set_axis_labels("standard deviations from the running mean", "density")
    sns.move_legend(grid, "center left", bbox_to_anchor=(1, 0.5), title="bit-width\n(dotted:\nstandard\nnormal)")
    grid.figure.set_dpi(100)
    grid.figure.suptitle(title, fontsize=10, y=1.06)
    return grid.axes.flat[0]


def idea(rows: pd.DataFrame) -> Axes:
    """The method in one picture: an output channel's weights, and what its layer computes with them, by bit-width.

    Above is a network trained without weight bias correction, below one trained with it. Dots are weights, the larger
    the more are equal; diamonds and bars are their mean and standard deviation, and the grey band is that of the
    full-precision weights. rows: of `measure.idea`. Returns the upper left panel.
    """
    checks.table("rows", rows, ("part", "trained_with", "bits", "value", "density"))
    lowest, highest = rows.bits.min(), rows.bits[rows.part != "weight"].max()
    title = "Weight bias correction gives rounded weights their mean and their spread back"
    title = f"{_setting(rows, title)}, the output channel of each network that {lowest} bits move furthest"
    with sns.axes_style("whitegrid"):
        size = {"figsize": (9, 5.2), "dpi": 100, "layout": "constrained"}
        figure, panels = plt.subplots(2, 2, sharex="col", sharey="col", **size)
    for (left, right), (trained_with, color) in zip(panels, _CORRECTED.items(), strict=True):
        network = rows[rows.trained_with == trained_with]
        _dots(left, network[network.part == "weight"], color)
        _curves(right, network[network.part != "weight"], color)
        name = _CORRECTIONS[trained_with].replace(" ", "\n", 1)
        left.set_ylabel(name, fontsize=10, color=color, weight="bold")
    panels[0, 0].set_title("weights of one output channel", fontsize=10)
    panels[0, 1].set_title("what they compute, before the shared batch norm", fontsize=10)
    panels[1, 0].set_xlabel("weight, in the quantizer's range")
    panels[1, 1].set_xlabel(f"pre-activation, in standard deviations from the mean at {highest} bits")
    figure.suptitle(title, fontsize=10)
    return panels[0, 0]


def _dots(ax: Axes, weights: pd.DataFrame, color: str) -> None:
    """The weights at each bit-width, full precision on top, above their mean and standard deviation."""
    values = dict(sorted(weights.groupby("bits").value, reverse=True))
    mean, std = values[32].mean(), values[32].std()
    ax.axvspan(mean - std, mean + std, color="0.9", zorder=0)
    ax.axvline(mean, color="0.6", lw=1, zorder=0)
    for line, these in enumerate(values.values()):
        equal = these.value_counts()
        ax.scatter(equal.index, [line - 0.15] * len(equal), s=12 * equal, color="0.3", alpha=0.6, lw=0, zorder=2)
        ax.errorbar(these.mean(), line + 0.25, xerr=these.std(), color=color, marker="D", capsize=4, lw=2, zorder=3)
    ax.set_yticks(range(len(values)), ["full precision" if b == 32 else f"{b} bits" for b in values])
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def _curves(ax: Axes, histograms: pd.DataFrame, color: str, merged: int = 6) -> None:
    """The densities at the highest bit-width, filled, and at the lowest; bins are `merged`, as sums have few values."""
    bits = histograms.bits.min(), histograms.bits.max()
    low, high = (histograms[histograms.bits == b].reset_index(drop=True) for b in bits)
    low, high = (h.groupby(h.index // merged)[["value", "density"]].mean() for h in (low, high))
    ax.fill_between(high.value, high.density, color="0.8", label=f"{bits[1]} bits")
    ax.plot(low.value, low.density, color=color, lw=2, label=f"{bits[0]} bits")
    ax.set(xlim=(-4, 4), ylim=(0, None), yticks=[], ylabel="density")
    ax.legend(loc="upper left", fontsize=9)


def mismatch(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How far the input of each norm is shifted, in standard deviations: a line for each bit-width, means over seeds.

    Dashed lines are without correction. rows: of `measure.distributions`, against the running mean of a batch norm, or
    of `measure.token_shifts`, against the highest bit-width.
    """
    checks.table("rows", rows, ("layer", "trained_with", "bits", "mean_shift"))
    tokens = "Tokens before each layer norm, against the highest bit-width"
    title = "Mismatch with the shared batch norm, by layer" if "wasserstein" in rows else tokens
    ax = axes(ax, _setting(rows, title), _WIDE)
    short = rows.layer.map(lambda name: ".".join(name.split(".")[-2:]))
    layer = short if short.nunique() == rows.layer.nunique() else rows.layer
    networks = {"network": rows.trained_with.map(_CORRECTIONS), "bit-width": rows.bits.map("{} bits".format)}
    palette = _palette(rows, "{} bits")
    look = {"hue": "bit-width", "hue_order": list(palette), "palette": palette, "style": "network", "markers": True}
    look |= {"style_order": list(_CORRECTIONS.values())[::-1], "errorbar": None, "sort": False}
    sns.lineplot(rows.assign(layer=layer, **networks), x="layer", y="mean_shift", **look, ax=ax)
    ax.tick_params(axis="x", rotation=60, labelsize=7)
    ax.set_ylim(bottom=0)
    return _finish(ax, "", "shift of the mean (standard deviations)", beside=True)


def gap_by_bits(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Top-1 accuracy above the same network after batch-norm adaptation, in points, by bit-width from 2 up.

    A line for each choice of statistics; the shaded band is 1.5 points wide. rows: of `experiments.uncalibrated`.
    """
    ax = axes(ax, _setting(rows, "Without a calibration pass, against batch-norm adaptation", "bits"))
    gaps = adaptation_gaps(rows[rows.bits >= 2])
    ax.axhspan(-1.5, 0, color="0.9", zorder=0)
    gaps = gaps.assign(width=gaps.bits.map(_widths(gaps))).sort_values("bits", kind="stable")
    _side_by_side(ax, gaps, "width", "gap", "statistics")
    return _finish(ax, _BITS, "top-1 above adapted (points)")


def angles(rows: pd.DataFrame, by: str = "layer", ax: Axes | None = None) -> Axes:
    """Angles between the child models' gradients, a line for each pair of bit-widths on the same images.

    Dashed lines are one bit-width on other images. rows: of `measure.alignment`; by: "layer", after the last epoch and
    from the input to the output, or "epoch", of all layers as one vector.
    """
    by_layer = checks.choice("by", by, ("layer", "epoch")) == "layer"
    title = "Angles between gradients" + (", by layer" if by_layer else " of all layers, over training")
    columns = ("layer", "depth", "epoch", "bits", "other_bits", "other_images", "angle")
    ax = axes(ax, _setting(rows, title, *columns), _WIDE)
    last = rows[(rows.epoch == rows.epoch.max()) & (rows.depth >= 0)].sort_values("depth", kind="stable")
    part = last if by_layer else rows[rows.depth < 0]
    images = part.other_images.astype(bool).map({False: "same images", True: "other images"})
    both = part.bits.astype(str) + " and " + part.other_bits.astype(str) + " bits"
    pair = both.where(part.bits != part.other_bits, part.bits.astype(str) + " bits")
    look = {"hue": "gradients at", "style": "of", "style_order": ["same images", "other images"], "markers": ["o", "s"]}
    tidy = part.assign(**{"gradients at": pair, "of": images})
    sns.lineplot(tidy, x=by, y="angle", **look, palette="dark", errorbar=None, sort=False, lw=1, ax=ax)
    ax.set_ylim(bottom=0)
    if by_layer:
        ax.tick_params(axis="x", rotation=60, labelsize=7)
    return _finish(ax, "" if by_layer else "epochs trained", "angle (degrees)", beside=True)


def answers(model: nn.Module, data: Dataset, bits: int, count: int = 10) -> Figure:
    """The first test images, what `model` takes them for at `bits`, and the activations that it computes with.

    Answers that are wrong are red. Below each image is the input of the first quantized layer, in the channel that has
    the most values between its lowest and its highest level at the highest trained bit-width.

    Args:
        model: a converted network.
        data: its data set, of images.
        bits: a bit-width that it serves.
        count: how many images.
    """
    images = checks.instance("data", data, Dataset, "a Dataset").test.take(torch.arange(count)).images
    layer, seen = next(iter(quantized_layers(model).values())), []
    hook = layer.input_quantizer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    inputs = normalize(images.to(next(model.parameters()).device), data)
    try:
        for b in (trained_bits(model)[-1], bits):
            with torch.no_grad(), at_bits(model, b):
                classes = model.eval()(inputs).argmax(1).tolist()
    finally:
        hook.remove()
    finest, maps = (x.float().cpu() for x in seen)
    between = (finest > finest.min()) & (finest < finest.max())
    channel = int(between.float().mean((0, 2, 3)).argmax())
    figure, panels = plt.subplots(2, count, squeeze=False, figsize=(_WIDE, 2.6), layout="constrained")
    for i, (above, below) in enumerate(panels.T):
        above.imshow(images[i].permute(1, 2, 0).cpu().numpy())
        right = classes[i] == int(data.test.labels[i])
        above.set_title(data.classes[classes[i]], fontsize=9, color="black" if right else "red")
        below.imshow(maps[i, channel].numpy(), cmap="viridis")
    for panel in panels.flat:
        panel.set_axis_off()
    plt.close(figure)  # a cell shows what it gives
    levels = maps[:, channel].unique().numel()
    figure.suptitle(f"At {bits} bit{'s' * (bits > 1)}: answers, and activations with {levels} levels", fontsize=10)
    return figure


def save(ax: Axes, path: Path) -> None:
    """Write the figure of `ax` as `path`.png, without date or version: the same rows give the same bytes."""
    figure, path = checks.instance("ax", ax, Axes, "axes of matplotlib").figure, checks.path("path", path)
    form = {"format": "png", "metadata": {"Software": None}, "bbox_inches": "tight"}
    write_atomic(path.with_suffix(".png"), lambda f: figure.savefig(f, **form))


Draw = Callable[[pd.DataFrame], Axes]
_TRAINED = "trained_bits.str.len() == trained_bits.str.len().{}()"  # at the most or the fewest bit-widths

# The figure's name: its CSV, the function of the rows in it, and which of the rows, as of `DataFrame.query`. A figure
# that is not here shows the accuracy by bit-width of the rows in the CSV of its own name.
FIGURES: dict[str, tuple[str, Draw, str]] = {
    "01_cifar10": ("01_cifar10", accuracy_by_bits, "method == 'Ours' and pruning_rate == 0 and bits > 1"),
    "01_cifar10_curves": ("01_cifar10_curves", accuracy_by_cost, ""),
    "01_cifar10_curves_time": ("01_cifar10_curves", lambda rows: accuracy_by_cost(rows, "seconds"), ""),
    "02_cifar100": ("02_cifar100", accuracy_by_cost, ""),
    "02_tinyimagenet": ("02_tinyimagenet", accuracy_by_cost, ""),
    "04_layer_norms": ("04_layer_norms", mismatch, ""),
    "05_coreset_comparison": ("05_coreset_comparison", accuracy_by_pruning, ""),
    "06_bias_correction": ("06_bias_correction", accuracy_by_bits, "correction in ('none', 'mean_var')"),
    "06_without_calibration": ("06_without_calibration", gap_by_bits, ""),
    "07_ablation_scoring_scheme": ("07_ablation_scoring_scheme", accuracy_by_coreset, ""),
    "07_equal_epochs": ("07_equal_epochs", accuracy_by_coreset, "epochs == epochs.max()"),
    "08_activation_distributions": ("08_activation_distributions", distributions, ""),
    "08_mismatch": ("08_mismatch", mismatch, ""),
    "09_angles_by_layer": ("09_angles", angles, ""),
    "09_angles_by_epoch": ("09_angles", lambda rows: angles(rows, "epoch"), ""),
    "10_untrained_bitwidths": ("10_untrained_bitwidths", accuracy_by_bits, _TRAINED.format("max")),
    "10_two_trained_bitwidths": ("10_untrained_bitwidths", accuracy_by_bits, _TRAINED.format("min")),
    "idea": ("idea", idea, ""),
    "11_training_cost": ("11_training_cost", growth, ""),
    "11_training_time": ("11_training_cost", lambda rows: growth(rows, "seconds"), ""),
}


def source(figure: Path) -> Path:
    """The CSV that a figure is drawn from; figure: its path, with or without suffix."""
    return figure.with_name(f"{FIGURES.get(figure.stem, (figure.stem,))[0]}.csv")


def draw(path: Path) -> Axes:
    """Draw the figure that `path` names, without suffix, from its CSV in the same folder; write `path`.png.

    The same CSV gives the same bytes. ValueError: no whole CSV of it there.
    """
    path = checks.path("path", path)
    csv, (_, function, where) = source(path), FIGURES.get(path.name, ("", accuracy_by_bits, ""))
    if not csv.exists():
        raise checks.invalid("path", str(path), f"{csv.name} beside it, which the notebook writes")
    with checks.expecting("path", str(path), f"a whole {csv.name} beside it"):
        rows = checks.table("rows", pd.read_csv(csv))
    ax = function(rows.query(where) if where else rows)
    save(ax, path)
    return ax


def main(folder: Path) -> int:
    """Redraw all figures of notebooks that there are below `folder`; returns how many."""
    folder = checks.path("folder", folder)
    found = sorted([*folder.rglob("[0-9][0-9]_*.png"), *folder.rglob("idea.png")])
    paths = [path.with_suffix("") for path in found if source(path).exists()]
    for path in paths:
        plt.close(draw(path).figure)
    return len(paths)


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else home() / "results"
    print(f"{main(where)} figures redrawn in {where}")
