"""Figures as functions of tidy rows; `python -m emqlib.paper.plots [FOLDER]` redraws all of them.

Rows are those of `runs.run_all` unless a function says otherwise, and bars show the standard deviation over seeds.
Without rows, or with a column missing, each function raises a ValueError.
"""

import math
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

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
from . import tables

_COSTS = {"sample_passes": (1e6, "sample passes", " (millions)"), "seconds": (60, "training time", " (minutes)")}
_ACCURACY = "mean top-1 accuracy (%)"  # over the trained bit-widths
_CORRECTED = {"none": "#d55e00", "mean_var": "#0072b2"}  # colors of Okabe and Ito
_CORRECTIONS = {"none": "without weight bias correction", "mean_var": "with weight bias correction"}
_BOTH = {"none": "without", "mean_var": "with weight bias correction"}  # in one sentence
WIDE = 9.0  # inches, of a figure with its legend beside it
_MARKED = {"markers": True, "dashes": False, "palette": "colorblind"}
_SPREAD = {"errorbar": "sd", "err_style": "bars", "err_kws": {"capsize": 2, "lw": 1}}  # over seeds
_ALL_DATA = "Any-Precision on all data"  # beside coresets
_DOT = {"color": "0.3", "alpha": 0.6, "lw": 0, "zorder": 2, "rasterized": True}
NAMED = {"ls": "--", "lw": 1, "color": "0.3"}  # a line that the legend names


def _panels(*grid: int, size: tuple[float, float] = (WIDE, 4.2), **form: Any) -> tuple[Figure, Any]:
    """A figure of the style that all share, with so many rows and columns of axes; size: in inches."""
    with sns.axes_style("whitegrid"):
        return plt.subplots(*grid, figsize=size, layout="constrained", **{"dpi": 90} | form)


def axes(ax: Axes | None, title: str, width: float = WIDE) -> Axes:
    """`ax`, or new ones of the style that all figures share, under `title`; width: inches, of the figure."""
    checks.instance("ax", ax, (type(None), Axes), "axes of matplotlib, or None for new ones")
    ax = _panels(size=(width, 4.2))[1] if ax is None else ax
    ax.set_title(title, fontsize=10, pad=8)
    return ax


def finish(ax: Axes, x: str, y: str) -> Axes:
    """`ax` with the names of its axes, and beside it the legend, if there is one, in lines that leave room."""
    ax.set(xlabel=x, ylabel=y)
    if ax.get_legend() is not None:
        sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title=None, fontsize=8, handlelength=3)
        for text in ax.get_legend().get_texts():
            text.set_text(textwrap.fill(text.get_text(), 32))
    return ax


def _setting(rows: pd.DataFrame, *columns: str, seeds: str = "bars: standard deviation") -> str:
    """What a figure was made with, below its title; seeds: how several are shown.

    ValueError: no rows, or a column of a figure is missing.
    """
    checks.table("rows", rows, (*columns, "epochs", "seed", "dataset", "model", "profile"))
    first, counts = rows.iloc[0], rows.groupby("epochs").seed.nunique()
    low, high = counts.min(), counts.max()
    count = "1 seed" if high == 1 else f"{high} seeds ({seeds})" if low == high else f"{low} to {high} seeds ({seeds})"
    return f"\n{tables.in_words(first.model)} on {tables.in_words(first.dataset)}, profile {first.profile}, {count}"


def _listed(texts: Iterable[str]) -> str:
    """The texts as one: with commas, and "and" before the last."""
    *others, last = texts
    return f"{', '.join(others)} and {last}" if others else last


def _side_by_side(ax: Axes, rows: pd.DataFrame, x: str, y: str, hue: str, **look: Any) -> None:
    """Means and standard deviations, a line for each `hue`, moved sideways so that bars do not hide each other."""
    look = {"hue_order": list(dict.fromkeys(rows[hue])), "palette": "colorblind"} | look
    look |= {"markers": list("osD^vP*Xhd<>" * 3)[: len(look["hue_order"])], "markersize": 5, "lw": 1}
    look["dodge"] = 0.5 if len(look["hue_order"]) > 1 else False
    sns.pointplot(rows, x=x, y=y, hue=hue, **look, errorbar="sd", capsize=0.05, err_kws={"lw": 1}, ax=ax)


def by_bits(ax: Axes, rows: pd.DataFrame, y: str, label: str, **look: Any) -> Axes:
    """`y`, named `label`, by bit-width, a line for each of the column `line`; 1 bit is apart, on a scale of its own.

    What is far lower at 1 bit than at the others would leave these no room.
    """
    look = {"hue_order": list(dict.fromkeys(rows.line))} | look  # the same colors in both panels
    trained = set(rows.bits[rows.trained.astype(bool)])
    rows = rows.assign(width=rows.bits.map(lambda b: f"{b}*" if b in trained else f"{b}"))
    rows = rows.sort_values("bits", kind="stable")
    one, others = rows[rows.bits == 1], rows[rows.bits > 1]
    apart = not one.empty and not others.empty
    _side_by_side(ax, others if apart else rows, "width", y, "line", **look)
    finish(ax, "bit-width of weights and activations (*: trained)", "" if apart else label)
    if apart:
        with sns.axes_style("whitegrid"):
            panel = ax.inset_axes((-0.3, 0, 0.16, 1))
        _side_by_side(panel, one, "width", y, "line", **look | {"legend": False})
        finish(panel, "(another scale)", label)
    return ax


def _lines(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with the name of the `line` that shows each, and its `setting`, which it shares with its adapted self.

    A network that cannot run at every bit-width without batch-norm adaptation is shown as it is served.
    """
    parts = []
    for setting, part in rows.assign(setting=rows.apply(tables.network_name, axis=1)).groupby("setting", sort=False):
        plain, adapted = part[~part.adapted], part[part.adapted]
        if set(adapted.bits) - set(plain.bits):
            parts.append(tables.served(part).assign(line=f"{setting}, adapted where not trained", adapted=False))
        else:
            parts += [plain.assign(line=setting), adapted.assign(line=f"{setting}, adapted")]
    return pd.concat(parts)


def _seen_by_bits(rows: pd.DataFrame) -> str:
    """What correction changes at the lowest trained bit-width, or without it how ours differs from Any-Precision."""
    trained = rows[rows.trained & ~rows.adapted]
    ours = trained[trained.method.eq("Ours") & trained.pruning_rate.eq(0) & trained.bits.eq(trained.bits.min())]
    if {"none", "mean_var"} <= set(ours.correction):
        top1 = ours.pivot_table(index="seed", columns="correction", values="top1")
        gained = (top1["mean_var"] - top1["none"]).agg(["mean", "std"])
        text = f"{gained['mean']:+.1f}" + (f" ± {gained['std']:.1f}" if len(top1) > 1 else "")
        return f"At {ours.bits.iloc[0]} bits, weight bias correction gives {text} points on average"
    means = trained.groupby(tables.SETTING, dropna=False).top1.mean().reset_index()
    baselines, ours = (means[means.method.str.startswith(name)] for name in ("Any-Precision", "Ours"))
    if len(baselines) != 1 or ours.empty:
        return "Accuracy by bit-width"
    gaps = ours.top1 - baselines.top1.iloc[0]
    by = " to ".join(dict.fromkeys(f"{gap:+.1f}" for gap in (gaps.min(), gaps.max())))
    return f"Ours differs from Any-Precision by {by} points, on average over the trained bit-widths"


def accuracy_by_bits(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Top-1 accuracy (%) against bit-width, a line for each method and setting; adapted ones are dashed.

    1 bit is in a panel of its own. A network that cannot run everywhere without adaptation is shown as it is served.
    """
    setting = _setting(rows, "bits", "top1", "trained", "adapted", "run", *tables.SETTING)
    ax, tidy = axes(ax, _seen_by_bits(rows) + setting), _lines(rows)
    kinds = tidy.drop_duplicates("line")
    settings = list(dict.fromkeys(tidy.setting))
    colors = dict(zip(settings, sns.color_palette("colorblind", len(settings)), strict=True))
    look = {"hue_order": list(kinds.line), "palette": [colors[name] for name in kinds.setting]}
    look["linestyles"] = ["--" if dashed else "-" for dashed in kinds.adapted]
    return by_bits(ax, tidy, "top1", "top-1 accuracy (%)", **look)


def accuracy_by_cost(rows: pd.DataFrame, cost: str = "sample_passes", ax: Axes | None = None, ours: str = "") -> Axes:
    """Mean top-1 accuracy (%) over the trained bit-widths against training cost, a line for each setting.

    A line joins the run lengths of a setting, in epochs beside the points. cost: "sample_passes" or "seconds". ours:
    what ours is called where it has one setting; empty: each setting is told.
    """
    factor, name, unit = _COSTS[checks.choice("cost", cost, _COSTS)]
    setting, points = _setting(rows), tables.with_cost(rows, cost)
    is_ours, rates = points.method.str.startswith("Ours"), points.pruning_rate
    names = points.apply(tables.network_name, axis=1).where(~is_ours | (ours == ""), ours)
    on_all = is_ours & rates.eq(0) & rates.gt(0).any()
    points = points.assign(label=names.where(~on_all, names + ", on all data"))
    points["cost"] = points.groupby(tables.SETTING, dropna=False)[cost].transform("mean") / factor
    means = points.groupby(tables.SETTING, dropna=False)[["cost", "top1"]].mean().reset_index()
    ax = axes(ax, _seen_by_cost(means, cost, ours or "the best of ours") + setting)
    sns.lineplot(points, x="cost", y="top1", hue="label", style="label", **_MARKED, **_SPREAD, ax=ax)
    label = f"{name}{unit}, logarithmic"
    if points.epochs.nunique() > 1:
        label += "; beside the points: epochs"
        for point in means.itertuples():
            beside = means.top1[means.cost.between(0.95 * point.cost, 1.05 * point.cost)]
            offset = 4 if len(beside) > 1 and point.top1 == beside.max() else -10  # below, unless others are there
            place = {"textcoords": "offset points", "xytext": (4, offset), "fontsize": 8}
            ax.annotate(f"{point.epochs}", (point.cost, point.top1), **place)
    ax.set_xscale("log")
    digits = "123456789" if points.cost.max() < 5 * points.cost.min() else "1235"  # the others would overlap
    for show in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        show(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in digits else "")
    return finish(ax, label, _ACCURACY)


def _seen_by_cost(means: pd.DataFrame, cost: str, best: str) -> str:
    """How far the best of ours, for no more than the longest run of Any-Precision costs, is ahead of it.

    Seconds vary with what else the machine does, so that 5 % more of them count as equal.
    """
    name, most = _COSTS[cost][1], 1.05 if cost == "seconds" else 1.0
    longest = means[means.method.str.startswith("Any-Precision")].sort_values("epochs").tail(1)
    ours = means[means.method.str.startswith("Ours") & (means.cost <= most * longest.cost.max())]
    if ours.empty:  # or there is no Any-Precision
        return f"Accuracy against {name}"
    gained = ours.top1.max() - longest.top1.item()
    than = f"{abs(gained):.1f} points {'ahead' if gained >= 0 else 'behind'}"
    run = f"{longest.epochs.item()} epochs of Any-Precision"
    limit = f"In about the {name} of {run}, or less" if most > 1 else f"In no more {name} than {run}"
    return f"{limit}, {best} is {than}"


def accuracy_by_lr(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean top-1 accuracy (%) over the trained bit-widths against learning rate, a line for each method and batch size.

    rows: of `experiments.tuning`.
    """
    setting = _setting(rows, "lr", "batch_size")
    means = tables.seed_means(rows, ["method", "batch_size", "lr"])
    best = means.groupby(["method", "batch_size", "lr"]).top1.mean().groupby("method").max().sort_values()
    ahead = f"Each at its best, {best.index[-1]} is {best.iloc[-1] - best.iloc[:-1].max():.1f} points ahead"
    seen = ahead if len(best) > 1 else "Accuracy by learning rate"
    ax = axes(ax, f"{seen} on held-out images{setting}")
    tidy = means.assign(line=means.method + means.batch_size.map(", batches of {}".format))
    sns.lineplot(tidy, x="lr", y="top1", hue="line", style="line", **_MARKED, **_SPREAD, ax=ax)
    ax.set_xscale("log")
    rates = sorted(set(tidy.lr))
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    return finish(ax, "highest learning rate, logarithmic", _ACCURACY)


def accuracy_by_coreset(rows: pd.DataFrame) -> Axes:
    """Mean top-1 accuracy (%) over the trained bit-widths for each coreset, a panel for each pruning rate.

    Small dots are seeds; the dashed line is Any-Precision, or random coresets. The order is that of the panel with the
    most coresets, the best at the top. Returns the left panel. rows: as `tables.named` names their coresets.
    """
    setting = _setting(rows, seeds="dots; diamonds and bars: mean and standard deviation")
    seeds = tables.seed_means(rows, ["method", "coreset", "pruning_rate", "sample_passes"])
    ours = seeds.method.str.startswith("Ours")
    differ = seeds.method[ours].nunique() > 1  # else what all of ours share is no part of a name
    names = seeds.coreset.map(tables.in_words) + (seeds.method.str.removeprefix("Ours") if differ else "")
    names = names.where(ours, seeds.method + " on all data")
    seeds = seeds.assign(coreset=names.map(partial(textwrap.fill, width=60)))
    panels = {rate: seeds[seeds.pruning_rate.isin([0, rate])] for rate in sorted(set(seeds.pruning_rate)) if rate > 0}
    means = {rate: part.groupby("coreset").top1.mean().sort_values(ascending=False) for rate, part in panels.items()}
    order = list(max(means.values(), key=len).index)
    order += [name for name in dict.fromkeys(seeds.coreset) if name not in order]
    baseline = next((name for name in (_ALL_DATA, *map(tables.in_words, ("RS2", "random"))) if name in order), None)
    lines = "\n".join(order).count("\n") + 1
    size = (4.6 + 2.6 * len(means), 1.6 + 0.24 * lines)
    figure, (drawn,) = _panels(1, len(means), size=size, sharey=True, squeeze=False)
    shared = {"x": "top1", "y": "coreset", "order": order, "color": sns.color_palette("colorblind")[0]}
    diamonds = {"linestyle": "none", "marker": "D", "markersize": 4, "capsize": 0.2, "err_kws": {"lw": 1}}
    for ax, (rate, part) in zip(drawn, panels.items(), strict=True):
        sns.stripplot(part, **shared, size=3, alpha=0.5, jitter=False, ax=ax)
        sns.pointplot(part, **shared, errorbar="sd", **diamonds, ax=ax)
        if baseline in means[rate]:
            ax.axvline(means[rate][baseline], **NAMED, label=f"{baseline}, mean")
        ax.set_title(f"{'ours ' if baseline == _ALL_DATA else ''}{rate:.0%} pruned", fontsize=9)
        finish(ax, _ACCURACY, "").tick_params(axis="y", labelsize=8)
    figure.suptitle(_seen_by_coreset(means, panels) + setting, fontsize=10)
    if baseline:
        figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside lower right", fontsize=8)
    return drawn[0]


def _seen_by_coreset(means: dict[float, pd.Series], panels: dict[float, pd.DataFrame]) -> str:
    """How many coresets are above Any-Precision at each pruning rate; else what scores gain, or how coresets differ."""
    at = f"At {_listed([f'{rate:.0%}' for rate in means])} pruning"
    if all(_ALL_DATA in found for found in means.values()):
        counts = [f"{(found > found[_ALL_DATA]).sum()} of {len(found) - 1}" for found in means.values()]
        return f"{at}, ahead of Any-Precision on all data: {_listed(counts)} kinds of coresets"
    found = means[max(means)]
    by_chance = found.index.str.contains(r"equal\s+chances")
    if by_chance.any():
        score = found.index.str.partition(",").get_level_values(0)
        gained = found[~by_chance].groupby(score[~by_chance]).mean() - found[by_chance].groupby(score[by_chance]).mean()
        texts = [f"{points:+.1f} points ({name})" for name, points in gained.items()]
        return f"{at}, drawing by importance gives {_listed(texts)}"
    spans = []
    for part in panels.values():
        equal = part.groupby([part.sample_passes.round(-2), "coreset"]).top1.mean().groupby("sample_passes")
        spans.append(f"{(equal.max() - equal.min()).max():.1f}")
    return f"{at} and equal passes, kinds of coresets differ by up to {_listed(spans)} points"


def growth(rows: pd.DataFrame, cost: str = "sample_passes", ax: Axes | None = None) -> Axes:
    """Training cost, "sample_passes" or "seconds", against the number of bit-widths, a line for each scheme."""
    factor, name, unit = _COSTS[checks.choice("cost", cost, _COSTS)]
    setting, table = _setting(rows), tables.growth_table(rows)
    tidy = table.assign(cost=table[cost] / factor)
    most = tidy[tidy["bit-widths"] == tidy["bit-widths"].max()].set_index("scheme").cost
    less = f"{'fewer' if cost == 'sample_passes' else 'less'} {name} than Any-Precision"
    least = f"{most['Any-Precision'] / most.min():.1f} times {less}: {most.idxmin()}"
    ax = axes(ax, f"At {tidy['bit-widths'].max()} bit-widths, {least}" + setting)
    count = tidy.scheme.nunique()
    wide = ([7.0, 4.0] + [1.5] * count)[:count]  # lines that lie on one another stay visible
    shown = {"hue": "scheme", "style": "scheme", "size": "scheme", "sizes": wide}
    sns.lineplot(tidy, x="bit-widths", y="cost", **shown, **_MARKED, ax=ax)
    ax.set(xticks=sorted(table["bit-widths"].unique()), ylim=(0, None))
    return finish(ax, "number of bit-widths", name + unit)


def _palette(rows: pd.DataFrame) -> dict[int, tuple[float, float, float]]:
    """The color of each bit-width, the same in every figure that tells bit-widths apart by color."""
    colors = sns.color_palette("colorblind", 9)
    return {b: colors[min(b, 9) - 1] for b in sorted(set(rows.bits))}


_SMOOTH = 5  # bins of a histogram over which a density is averaged, twice: at low bit-widths, numbers lie on a grid


def distributions(histograms: pd.DataFrame) -> Axes:
    """Distributions of pre-activations by bit-width, without and with correction side by side: means over layers.

    Pre-activations are standardized by the batch norm's running statistics. The dotted line is the standard normal
    distribution. histograms: of `measure.distributions`. Returns the left panel.
    """
    checks.table("histograms", histograms, ("layer", "seed", "trained_with", "bits", "z", "density"))
    setting, order = _setting(histograms, seeds="lines: means"), [False, *[True] * 4]
    rows = histograms.sort_values(["trained_with", "bits", "layer", "seed", "z"], ascending=order, kind="stable")
    seen = _seen_apart(rows)
    for _ in range(2):
        curves = rows.groupby(["trained_with", "bits", "layer", "seed"], sort=False).density
        smooth = curves.transform(lambda density: density.rolling(_SMOOTH, center=True, min_periods=1).mean())
        rows = rows.assign(density=smooth, line=rows.bits.map("{} bits".format))
    z = rows.z.drop_duplicates()
    palette = {f"{b} bits": color for b, color in reversed(_palette(rows).items())}  # the lowest on top of the others
    look = {"hue": "line", "hue_order": list(palette), "palette": palette, "errorbar": None, "style": "line"}
    look |= {"style_order": list(palette), "dashes": ["", *[(4, 2)] * (len(palette) - 2), ""][-len(palette) :]}
    figure, panels = _panels(1, 2, sharey=True)
    for ax, (kind, name) in zip(panels, _CORRECTIONS.items(), strict=True):
        sns.lineplot(rows[rows.trained_with == kind], x="z", y="density", **look, ax=ax, legend=kind == "mean_var")
        normal = (-(z**2) / 2).map(math.exp) / math.sqrt(2 * math.pi)
        ax.plot(z, normal, color="black", ls=":", lw=1, label="standard normal")
        ax.set(xlim=(-4, 4), xticks=range(-3, 4))
        ax.set_title(name, fontsize=9)
        if kind == "mean_var":
            ax.legend()
        label = "density, mean over layers and seeds" if kind == "none" else ""
        finish(ax, "standard deviations from the running mean", label)
    figure.suptitle(seen + setting, fontsize=10)
    return panels[0]


def _seen_apart(rows: pd.DataFrame) -> str:
    """What part of the areas under two densities is not under both, at the lowest and the highest bit-width."""
    ends = [rows.bits.min(), rows.bits.max()]
    index = ["trained_with", "layer", "seed", "z"]
    low, high = (rows[rows.bits == b].set_index(index).density for b in ends)
    apart, whole = ((low - high).abs().groupby(index[:3]).sum(), (low + high).groupby(index[:3]).sum())
    means = (100 * apart / whole).groupby("trained_with").mean()
    shares = _listed([f"{means[kind]:.1f} % {name}" for kind, name in _BOTH.items() if kind in means])
    return f"{ends[0]} and {ends[1]} bits overlap but for {shares}, on average over {rows.layer.nunique()} layers"


def idea(rows: pd.DataFrame) -> Axes:
    """The method in one picture: an output channel's weights, and what its layer computes with them, by bit-width.

    Above is a network trained without weight bias correction, below one trained with it. Dots are weights, the larger
    the more are equal; diamonds and bars are their mean and standard deviation, and the grey band is that of the
    full-precision weights. rows: of `measure.idea`. Returns the upper left panel.
    """
    checks.table("rows", rows, ("part", "trained_with", "bits", "value", "density"))
    lowest, highest = rows.bits.min(), rows.bits[rows.part != "weight"].max()
    title = "Weight bias correction gives rounded weights their mean and their spread back"
    title = f"{title}{_setting(rows)}, the output channel of each network that {lowest} bits move furthest"
    figure, panels = _panels(2, 2, size=(WIDE, 5.2), dpi=100, sharex="col", sharey="col")
    for (left, right), (trained_with, color) in zip(panels, _CORRECTED.items(), strict=True):
        network = rows[rows.trained_with == trained_with]
        _dots(left, network[network.part == "weight"], color)
        _curves(right, network[network.part != "weight"], color)
        name = _CORRECTIONS[trained_with].replace(" ", "\n", 1)
        left.set_ylabel(name, fontsize=10, color=color, weight="bold")
    panels[0, 0].set_title("one output channel's weights (area: how many)", fontsize=10)
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
        ax.scatter(equal.index, [line - 0.15] * len(equal), s=12 * equal, **_DOT)
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
    lowest = rows[rows.bits == rows.bits.min()].groupby("trained_with").mean_shift.mean()
    shifts = _listed([f"{lowest[kind]:.2f} {name}" for kind, name in _BOTH.items() if kind in lowest])
    of = "running means of the batch norms" if "wasserstein" in rows else f"means of tokens at {rows.bits.max()} bits"
    title = f"Distance at {rows.bits.min()} bits from the {of}: {shifts}"
    ax = axes(ax, title + _setting(rows, seeds="lines: means"))
    short = rows.layer.map(lambda name: ".".join(name.split(".")[-2:]))
    layer = short if short.nunique() == rows.layer.nunique() else rows.layer
    line = rows.bits.map("{} bits, ".format) + rows.trained_with.map(tables.CORRECTED)
    tidy = rows.assign(layer=layer, line=line).sort_values(["bits", "trained_with"], kind="stable")
    kinds, colors = tidy.drop_duplicates("line"), _palette(rows)
    look = {"palette": [colors[b] for b in kinds.bits], "markers": True, "errorbar": None, "sort": False}
    look["dashes"] = [(4, 1.5) if kind == "none" else "" for kind in kinds.trained_with]
    sns.lineplot(tidy, x="layer", y="mean_shift", hue="line", style="line", **look, ax=ax)
    ax.tick_params(axis="x", rotation=60, labelsize=8)
    return finish(ax, "", "distance of means (standard deviations)")


def gap_by_bits(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Top-1 accuracy above the same network after batch-norm adaptation, in points, by bit-width; 1 bit is apart.

    A line for each choice of statistics; the shaded band is half a point wide. rows: of `experiments.uncalibrated`.
    """
    setting, gaps = _setting(rows, "bits"), tables.adaptation_gaps(rows)
    gaps = gaps.assign(line=gaps.statistics)
    lowest = gaps[gaps.bits > 1].groupby(["line", "bits"]).gap.mean().groupby("line").min()
    best = lowest.idxmax().replace(", output", " with output")
    seen = f"From 2 bits up, {best} are at most {max(-lowest.max(), 0):.1f} points below the adapted network"
    ax = axes(ax, seen + setting)
    ax.axhspan(-0.5, 0, color="0.9", zorder=0, label="up to half a point below")
    return by_bits(ax, gaps, "gap", "top-1 above the adapted network (points)")


def accuracy_by_statistics(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean top-1 accuracy (%) by running statistics, a line for each coreset; rows: of `experiments.pruned_factors`."""
    setting, tidy = _setting(rows), tables.seed_means(tables.by_statistics(rows), ["coreset", "statistics"])
    means = tidy.groupby("statistics").top1.mean()
    own, shared = (means["adapted"] - means[f"{kind} statistics"] for kind in ("own", "shared"))
    seen = f"Own statistics are {own:.1f} points below the adapted network, shared ones {shared:.1f}"
    ax = axes(ax, seen + setting)
    tidy = tidy.assign(line=tidy.coreset.map(tables.in_words), statistics=tidy.statistics.str.replace(", ", ",\n"))
    _side_by_side(ax, tidy, "statistics", "top1", "line")
    ax.tick_params(axis="x", labelsize=8)
    return finish(ax, "", _ACCURACY)


def angles(rows: pd.DataFrame, by: str = "layer", ax: Axes | None = None) -> Axes:
    """Angles between the child models' gradients, a line for each pair of bit-widths on the same images.

    Dashed lines are one bit-width on other images; the dotted one is what is reported of the paper. rows: of
    `measure.alignment`; by: "layer", after the last epoch and from the input to the output, or "epoch", of all layers
    as one vector.
    """
    by_layer = checks.choice("by", by, ("layer", "epoch")) == "layer"
    columns = ("layer", "depth", "epoch", "bits", "other_bits", "other_images", "angle")
    setting = _setting(rows, *columns, seeds="lines: means")
    last = rows[(rows.epoch == rows.epoch.max()) & (rows.depth >= 0)].sort_values("depth", kind="stable")
    part = last if by_layer else rows[rows.depth < 0]
    both = part.bits.astype(str) + " and " + part.other_bits.astype(str) + " bits, same images"
    other = part.other_images.astype(bool)
    tidy = part.assign(line=both.where(~other, part.bits.astype(str) + " bits, other images"))
    means = tidy[tidy.epoch == tidy.epoch.max()].groupby([by, "line"], sort=False).angle.mean().reset_index()
    ranges = means.groupby(means.line.str.endswith("other images")).angle.agg(["min", "max"]).round().astype(int)
    same, others = (f"{low} to {high}°" for low, high in ranges.to_numpy())
    seen = f"After {tidy.epoch.max()} epochs, gradients are {same} apart on the same images and {others} on others"
    ax = axes(ax, seen + setting)
    dashes = {name: (3, 2) if name.endswith("other images") else "" for name in set(tidy.line)}
    look = {"hue": "line", "style": "line", "dashes": dashes, "markers": True, "palette": "tab10", "lw": 1}
    sns.lineplot(tidy, x=by, y="angle", **look, errorbar=None, sort=False, ax=ax)
    for value in tables.paper("figure4").query("metric == 'angle'").value:
        ax.axhline(value, ls=":", lw=1.5, color="black", label=f"{value:g} degrees: reported of the paper's Figure 4")
    ax.legend()
    ax.set_ylim(bottom=0)
    if by_layer:
        ax.tick_params(axis="x", rotation=60, labelsize=8)
    return finish(ax, "" if by_layer else "epochs trained", "angle (degrees)")


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
    inputs = normalize(images.to(next(model.parameters()).device), data)
    with torch.no_grad(), layer.input_quantizer.register_forward_hook(lambda *io: seen.append(io[2])):
        for b in (trained_bits(model)[-1], bits):
            with at_bits(model, b):
                classes = model.eval()(inputs).argmax(1).tolist()
    finest, maps = (x.float().cpu() for x in seen)
    between = (finest > finest.min()) & (finest < finest.max())
    channel = int(between.float().mean((0, 2, 3)).argmax())
    figure, panels = plt.subplots(2, count, squeeze=False, figsize=(WIDE, 2.6), layout="constrained")
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
    """Write the figure of `ax` as `path`.png and .svg, without date or version: the same rows give the same bytes."""
    figure, path = checks.instance("ax", ax, Axes, "axes of matplotlib").figure, checks.path("path", path)
    for kind, unknown in (("png", ["Software"]), ("svg", ["Date", "Creator"])):
        form = {"format": kind, "metadata": dict.fromkeys(unknown), "bbox_inches": "tight"}
        with plt.rc_context({"svg.hashsalt": "emqlib"}):  # which names of parts are drawn from
            write_atomic(path.with_suffix(f".{kind}"), partial(figure.savefig, **form))


_NO_MEANS = "correction in ('none', 'mean_var')"  # without those of the means alone, which the tables have
_FULL_DATA = f"pruning_rate == 0 and {_NO_MEANS} and not (method == 'Dedicated' and adapted)"
_TRAINED = "trained_bits.str.len() == trained_bits.str.len().{}()"  # at the most or the fewest bit-widths

# The figure's name: its CSV, the function of the rows in it, and which of the rows, as of `DataFrame.query`. A figure
# that is not here shows the accuracy by bit-width of the rows in the CSV of its own name.
FIGURES: dict[str, tuple[str, Callable[[pd.DataFrame], Axes], str]] = {
    "01_cifar10": ("01_cifar10", accuracy_by_bits, _FULL_DATA),
    "01_cifar10_curves": ("01_cifar10_curves", accuracy_by_cost, ""),
    "01_cifar10_curves_time": ("01_cifar10_curves", partial(accuracy_by_cost, cost="seconds"), ""),
    "02_cifar100": ("02_cifar100", accuracy_by_cost, ""),
    "02_tinyimagenet": ("02_tinyimagenet", accuracy_by_cost, ""),
    "04_layer_norms": ("04_layer_norms", mismatch, ""),
    "05_coreset_comparison": ("05_coreset_comparison", accuracy_by_coreset, ""),
    "05_importance": ("05_importance", accuracy_by_coreset, ""),
    "06_bias_correction": ("06_bias_correction", accuracy_by_bits, _NO_MEANS),
    "06_statistics": ("06_statistics", gap_by_bits, "correction == 'mean_var'"),
    "06_without_calibration": ("06_without_calibration", gap_by_bits, ""),
    "07_ablation_scoring_scheme": ("07_ablation_scoring_scheme", accuracy_by_coreset, ""),
    "07_factors": ("07_factors", accuracy_by_statistics, ""),
    "07_equal_epochs": ("07_equal_epochs", accuracy_by_coreset, "epochs == epochs.max()"),
    "08_activation_distributions": ("08_activation_distributions", distributions, ""),
    "08_mismatch": ("08_mismatch", mismatch, ""),
    "09_angles_by_layer": ("09_angles", angles, ""),
    "09_angles_by_epoch": ("09_angles", partial(angles, by="epoch"), ""),
    "10_untrained_bitwidths": ("10_untrained_bitwidths", accuracy_by_bits, _TRAINED.format("max")),
    "10_two_trained_bitwidths": ("10_untrained_bitwidths", accuracy_by_bits, _TRAINED.format("min")),
    "idea": ("idea", idea, ""),
    "11_training_cost": ("11_training_cost", growth, ""),
    "11_training_time": ("11_training_cost", partial(growth, cost="seconds"), ""),
    "14_headline": ("14_headline", partial(accuracy_by_cost, ours="the recipe"), ""),
    "14_headline_time": ("14_headline", partial(accuracy_by_cost, cost="seconds", ours="the recipe"), ""),
    "14_tuning": ("14_tuning", accuracy_by_lr, ""),
}


def source(figure: Path) -> Path:
    """The CSV that a figure is drawn from; figure: its path, with or without suffix."""
    return figure.with_name(f"{FIGURES.get(figure.stem, (figure.stem,))[0]}.csv")


def draw(path: Path) -> Axes:
    """Draw the figure that `path` names, without suffix, from its CSV in the same folder; write `path`.png and .svg.

    The same CSV gives the same bytes. ValueError: no whole CSV of it there.
    """
    path = checks.path("path", path)
    csv, (_, function, where) = source(path), FIGURES.get(path.name, ("", accuracy_by_bits, ""))
    if not csv.exists():
        raise checks.invalid("path", str(path), f"{csv.name} beside it, which the notebook writes")
    with checks.expecting("path", str(path), f"a whole {csv.name} beside it"):
        rows = checks.table("rows", pd.read_csv(csv, dtype={"trained_bits": str}))
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
