"""Figures, read back from their axes: what is drawn is what the rows say. Those that are committed: test_figures."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D

import emqlib as emq
from emqlib.paper import plots
from emqlib.train.data import normalize

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_figure_stays() -> Iterator[None]:
    yield
    pyplot.close("all")


def example() -> pd.DataFrame:
    """Ours, two seeds, evaluated at 2, 4 and 5 (not trained) bits, pruned too; one seed of Dedicated."""
    names = ["method", "correction", "pruning_rate", "adapted", "seed", "bits", "top1", "run", "sample_passes"]
    rows: list[tuple] = []
    for (rate, passes), seed, adapted in product(((0.0, 4_000_000), (0.8, 800_000)), (0, 1), (False, True)):
        level = 2 * seed + 30 * adapted - 10 * (rate > 0)
        setting = ("Ours", "mean_var", rate, adapted, seed)
        rows += [(*setting, bits, 10 * bits + level, f"ours {rate} {seed}", passes) for bits in (5, 4, 2)]
    for bits, top1 in ((2, 55.0), (4, 65.0)):
        rows += [("Dedicated", "none", 0.0, False, 0, bits, top1, f"dedicated {bits}", 2_000_000)]
    table = pd.DataFrame(rows, columns=names).assign(trained=lambda t: t.bits.isin([2, 4]))
    table["coreset"] = table.pruning_rate.map({0.0: "full data", 0.8: "tdds"})
    table["trained_bits"] = table.bits.astype(str).where(table.method.eq("Dedicated"), "2 4")
    return table.assign(candidates=1.0, epochs=4, dataset="cifar10", model="resnet8", profile="small")


def lines(ax: Axes) -> list[Line2D]:
    """The lines that join points, without error bars and what a legend shows."""
    return [line for line in ax.get_lines() if line.get_linestyle() != "None" and len(line.get_xydata())]


def marked(ax: Axes) -> list[Line2D]:
    """Those with a marker at each point, where error bars are lines too."""
    return [line for line in lines(ax) if line.get_marker() not in ("None", "", None)]


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def heights(line: Line2D) -> list[float]:
    return [float(y) for y in line.get_ydata() if not np.isnan(y)]


def half_bars(ax: Axes) -> list[float]:
    """Half the height of each error bar that has one."""
    segments = [segment for container in ax.containers for segment in container.lines[2][0].get_segments()]
    found = [float(np.ptp(segment[:, 1])) for segment in segments if len(segment)]
    found += [float(np.ptp(heights(line) or [0])) for line in lines(ax) if not ax.containers and line not in marked(ax)]
    return [height / 2 for height in found if height > 0]


def legend(ax: Axes) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in ax.get_legend().get_texts()]


LABELS = ["Ours, corrected", "Ours, 80% pruned, TDDS", "Dedicated"]
MADE_WITH = "\nResNet-8 on CIFAR-10, profile small, 2 seeds (bars: standard deviation)"


def test_accuracy_by_bits_draws_the_rows() -> None:
    """Means over the seeds 0 and 1, which are 2 apart: a sample standard deviation of sqrt(2); one seed has none."""
    rows = example()
    ax = plots.accuracy_by_bits(rows[~(rows.adapted & rows.method.eq("Dedicated"))])
    solid, dashed = ([x for x in marked(ax) if (x.get_linestyle() == "-") == plain] for plain in (True, False))
    expected = [[10 * b + level for b in (2, 4, 5)] for level in (1, -9)]
    assert [heights(line) for line in solid] == [*expected, [55, 65]]
    assert [heights(line) for line in dashed] == [[10 * b + level for b in (2, 4, 5)] for level in (31, 21)]
    assert half_bars(ax) == pytest.approx([2**0.5] * 12)
    # A color for each setting, dashes for adaptation, a * for a trained bit-width, and the legend outside
    assert ax.get_title() == f"Accuracy by bit-width{MADE_WITH}" and not ax.child_axes
    assert ax.get_xlabel().startswith("bit-width") and ax.get_ylabel() == "top-1 accuracy (%)"
    adapted = [f"{label}, adapted" for label in LABELS[:2]]
    assert legend(ax) == [LABELS[0], adapted[0], LABELS[1], adapted[1], LABELS[2]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2*", "4*", "5"]
    assert len({to_rgba(line.get_color()) for line in marked(ax)}) == 3
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


def test_one_bit_has_a_panel_of_its_own() -> None:
    rows = example()[lambda t: t.method.eq("Ours")]
    ax = plots.accuracy_by_bits(pd.concat([rows.assign(bits=1, top1=3.0, trained=False), rows]))
    (panel,) = ax.child_axes
    assert [heights(line) for line in marked(panel)] == [[3.0]] * 4
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1"] and panel.get_legend() is None
    assert min(y for line in marked(ax) for y in heights(line)) > 10 and panel.get_ylabel() == "top-1 accuracy (%)"
    colors = [[to_rgba(line.get_color()) for line in marked(part)] for part in (ax, panel)]
    assert colors[0] == colors[1]


def test_any_number_of_settings_is_drawn() -> None:
    pruned = example()[lambda t: t.pruning_rate.gt(0)]
    rows = pd.concat([pruned.assign(coreset=f"kind {i}", run=pruned.run + f" {i}") for i in range(13)])
    assert len(marked(plots.accuracy_by_bits(rows))) == 26


def test_learning_rates_are_compared() -> None:
    rows = pd.concat([example().assign(lr=lr, batch_size=64, top1=lambda t, lr=lr: t.top1 - lr) for lr in (1, 2)])
    ax = plots.accuracy_by_lr(rows[rows.pruning_rate.eq(0)])
    assert legend(ax) == ["Ours, batches of 64", "Dedicated, batches of 64"]
    assert [points(line) for line in lines(ax)] == [[(1, 30), (2, 29)], [(1, 59), (2, 58)]]
    assert ax.get_title().startswith("Each at its best, Dedicated is 29.0 points ahead on held-out images\n")
    alone = plots.accuracy_by_lr(rows[rows.pruning_rate.eq(0) & rows.method.eq("Ours")])
    assert alone.get_title().startswith("Accuracy by learning rate on held-out images\n")


def test_what_cannot_run_everywhere_without_adaptation_is_drawn_as_served() -> None:
    rows = example()[lambda t: t.method.eq("Ours") & t.pruning_rate.eq(0)].assign(method="Any-Precision")
    ax = plots.accuracy_by_bits(rows[rows.adapted | rows.trained])
    assert [heights(line) for line in marked(ax)] == [[21, 41, 81]]
    assert legend(ax) == ["Any-Precision, adapted where not trained"]


def test_titles_say_what_the_rows_say() -> None:
    rows = example()
    ours = rows[rows.method.eq("Ours") & rows.pruning_rate.eq(0)]
    worse = ours.assign(correction="none", top1=ours.top1 - 3 - 2 * ours.seed, run=ours.run + " none")
    told = "At 2 bits, weight bias correction gives +4.0 ± 1.4 points on average"
    assert plots.accuracy_by_bits(pd.concat([ours, worse])).get_title().startswith(told)
    baseline = ours.assign(method="Any-Precision", top1=ours.top1 - 5, run=ours.run + " joint")
    both = pd.concat([rows[rows.method.eq("Ours")], baseline])
    told = "Ours differs from Any-Precision by -5.0 to +5.0 points, on average over the trained bit-widths"
    assert plots.accuracy_by_bits(both).get_title().startswith(told)
    told = "In no more sample passes than 4 epochs of Any-Precision, {} is 5.0 points ahead"
    assert plots.accuracy_by_cost(both).get_title().startswith(told.format("the best of ours"))
    slower = both.assign(seconds=100.0 + 4 * both.method.eq("Ours"))  # seconds vary: 4 % more of them are as many
    told_of_time = "In about the training time of 4 epochs of Any-Precision, or less, the best of ours is 5.0 points"
    assert plots.accuracy_by_cost(slower, "seconds").get_title().startswith(told_of_time)
    named = plots.accuracy_by_cost(both, ours="the recipe")
    assert named.get_title().startswith(told.format("the recipe"))
    assert {"the recipe", "the recipe, on all data"} <= {*legend(named)}


def test_accuracy_by_cost_draws_the_rows() -> None:
    """Without adaptation and over the trained 2 and 4 bits; the passes of Dedicated are those of its two networks."""
    ax = plots.accuracy_by_cost(example())
    assert [points(line) for line in lines(ax)] == [[(4.0, 31.0)], [(0.8, 21.0)], [(4.0, 60.0)]]
    assert half_bars(ax) == pytest.approx([2**0.5] * 2) and legend(ax) == [f"{LABELS[0]}, on all data", *LABELS[1:]]
    assert ax.get_title() == f"Accuracy against sample passes{MADE_WITH}"
    assert ax.get_xlabel() == "sample passes (millions), logarithmic" and ax.get_xscale() == "log"
    assert ax.get_ylabel() == "mean top-1 accuracy (%)" and not ax.texts


def test_a_line_joins_run_lengths() -> None:
    """Against seconds, in minutes, with the number of epochs beside each point."""
    rows = example().assign(seconds=120.0)
    longer = rows.assign(epochs=8, seconds=240.0, top1=rows.top1 + 5, run=rows.run + " longer")
    ax = plots.accuracy_by_cost(pd.concat([longer, rows]), "seconds")
    assert points(lines(ax)[0]) == [(2.0, 31.0), (4.0, 36.0)]
    assert ax.get_xlabel() == "training time (minutes), logarithmic; beside the points: epochs"
    assert sorted(text.get_text() for text in ax.texts) == ["4"] * 3 + ["8"] * 3
    alone = plots.accuracy_by_cost(pd.concat([longer[longer.seed == 0], rows]))
    assert "profile small, 1 to 2 seeds" in alone.get_title()


def pruned() -> pd.DataFrame:
    """TDDS and RS2 at 50 and 80 %: two seeds, the second 2 points above the first."""
    part = example()[lambda t: t.method.eq("Ours") & t.pruning_rate.gt(0)]
    rates = pd.concat([part, part.assign(pruning_rate=0.5, top1=part.top1 + 10)])
    return pd.concat([rates, rates.assign(coreset="RS2", top1=rates.top1 - 5)])


def test_accuracy_by_coreset_draws_the_rows() -> None:
    """A panel for each rate, the best at the top: a diamond at each mean, a dot at each seed, a dashed line at RS2."""
    ax = plots.accuracy_by_coreset(pruned())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["TDDS", "random, each epoch (RS2)"]
    assert [panel.get_title() for panel in ax.figure.axes] == ["50% pruned", "80% pruned"]
    for panel, best in zip(ax.figure.axes, (31, 21), strict=True):
        drawn = [line for line in panel.get_lines() if line.get_marker() == "D"]
        means = [(float(x), float(y)) for line in drawn for x, y in line.get_xydata()]
        assert means == [(best, 0), (best - 5, 1)]
        dots = sorted((float(x), round(float(y), 3)) for dots in panel.collections for x, y in dots.get_offsets())
        assert dots == [(best - 6, 1), (best - 4, 1), (best - 1, 0), (best + 1, 0)]
        (dashed,) = (line for line in panel.get_lines() if line.get_linestyle() == "--")
        assert set(dashed.get_xdata()) == {best - 5} and dashed.get_label() == "random, each epoch (RS2), mean"
    told = "At 50% and 80% pruning and equal passes, kinds of coresets differ by up to 5.0 and 5.0 points\n"
    assert ax.figure.get_suptitle().startswith(told)


def test_coresets_are_compared_with_any_precision_where_it_is_there() -> None:
    rows = pruned()[lambda t: t.pruning_rate.eq(0.8)].assign(method="Ours, own statistics")
    rows.loc[rows.coreset.eq("RS2"), ["method", "pruning_rate"]] = ["Any-Precision", 0.0]
    ax = plots.accuracy_by_coreset(rows)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["TDDS", "Any-Precision on all data"]
    told = "At 80% pruning, ahead of Any-Precision on all data: 1 of 1 kinds of coresets\n"
    assert ax.figure.get_suptitle().startswith(told)
    names = plots.accuracy_by_coreset(pd.concat([rows, pruned()[lambda t: t.pruning_rate.eq(0.8)]])).get_yticklabels()
    assert {"TDDS, own statistics", "TDDS"} < {label.get_text() for label in names}  # where ours are of two kinds


def test_a_title_says_what_importance_gives_over_equal_chances() -> None:
    twins = {"tdds": "tdds, how=sample", "RS2": "tdds, how=sample, power=0.0"}
    ax = plots.accuracy_by_coreset(pruned()[lambda t: t.pruning_rate.eq(0.8)].replace({"coreset": twins}))
    assert ax.figure.get_suptitle().startswith("At 80% pruning, drawing by importance gives +5.0 points (TDDS)\n")


def test_accuracy_by_statistics_draws_the_rows() -> None:
    own = pruned()[lambda t: t.pruning_rate.eq(0.8) & ~t.adapted].assign(statistics="own")
    shared = own.assign(statistics="shared", top1=own.top1 - 5)
    adapted = own.assign(statistics=None, adapted=True, top1=own.top1 + 2)
    ax = plots.accuracy_by_statistics(pd.concat([own, shared, adapted]))
    assert [heights(line) for line in marked(ax)] == [[21, 16, 23], [16, 11, 18]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["own statistics", "shared statistics", "adapted"]
    assert legend(ax) == ["TDDS", "random, each epoch (RS2)"]
    assert ax.get_title().startswith("Own statistics are 2.0 points below the adapted network, shared ones 7.0\n")


@pytest.mark.parametrize("plot", [plots.accuracy_by_bits, plots.accuracy_by_cost])
def test_axes_of_the_reader_are_used(plot: Callable[..., Axes]) -> None:
    figure, axes = pyplot.subplots(1, 2)
    rows = example()
    before = rows.copy()
    assert plot(rows, ax=axes[1]) is axes[1]
    assert axes[1].get_lines() and not axes[0].get_lines()
    assert pyplot.get_fignums() == [figure.number]
    pd.testing.assert_frame_equal(rows, before)


def mismatched() -> pd.DataFrame:
    """Two layers at 2 and 8 bits, networks without and with correction: shift = bits / 10, a fifth of it corrected."""
    rows = [
        {"trained_with": c, "layer": layer, "bits": b, "mean_shift": b / (10 if c == "none" else 50) + i}
        for c in ("none", "mean_var")
        for b in (2, 8)
        for i, layer in enumerate(("bn1", "bn2"))
    ]
    return pd.DataFrame(rows).assign(dataset="cifar10", model="resnet8", profile="small", seed=0, epochs=8)


def test_mismatch_draws_the_means_over_seeds() -> None:
    rows = mismatched()
    ax = plots.mismatch(pd.concat([rows.assign(seed=k, mean_shift=rows.mean_shift + k - 1) for k in range(3)]))
    found = {(line.get_linestyle(), line.get_color()): line.get_ydata().tolist() for line in lines(ax)}
    assert sorted(found.values()) == [pytest.approx(x) for x in ([0.04, 1.04], [0.16, 1.16], [0.2, 1.2], [0.8, 1.8])]
    assert {tuple(np.round(y, 6)) for (style, _), y in found.items() if style == "--"} == {(0.2, 1.2), (0.8, 1.8)}
    assert {color for _, color in found} == set(plots._palette(rows).values()) and len(set(found)) == 4
    kinds = [f"{b} bits, {kind}" for b in (2, 8) for kind in ("corrected", "not corrected")]
    assert legend(ax) == kinds and ax.get_title().startswith(
        "Distance at 2 bits from the means of tokens at 8 bits: 0.70"
    )
    assert [label.get_text() for label in ax.get_xticklabels()] == ["bn1", "bn2"]


def test_distributions_draw_the_histograms() -> None:
    """Without correction on the left, with it on the right, and the standard normal distribution in both."""
    rows = mismatched()[lambda t: t.layer.eq("bn2")]
    grid = np.arange(-20.0, 21.0) / 10
    histograms = pd.concat([rows.assign(z=z, density=rows.mean_shift) for z in grid])
    left, right = plots.distributions(histograms).figure.axes
    assert ["without" in left.get_title(), "without" in right.get_title()] == [True, False]
    for ax, scale in ((left, 10), (right, 50)):
        *of_bits, normal = lines(ax)
        for b, line in zip((8, 2), of_bits, strict=True):  # 2 bits on top
            assert line.get_ydata() == pytest.approx(b / scale + 1)  # averages of what is even
        assert normal.get_xydata()[20, 1] == pytest.approx(0.39894, abs=1e-5)
    assert legend(right) == ["8 bits", "2 bits", "standard normal"] and left.get_legend() is None


def test_distributions_are_smooth() -> None:
    """What lies on a grid, as at low bit-widths, is averaged; the area under it stays. The title is of the rows."""
    rows = mismatched()[lambda t: t.layer.eq("bn2")]
    grid = np.arange(-20.0, 21.0) / 10
    histograms = pd.concat([rows.assign(z=z, density=5 * float(round(10 * z) % 5 == 0)) for z in grid])
    line = lines(plots.distributions(histograms))[0]
    assert line.get_ydata()[5:-5] == pytest.approx(1)
    apart = pd.concat([rows.assign(z=z, density=(round(10 * z) + rows.bits // 8) % 2) for z in grid])
    assert "but for 100.0 % without" in plots.distributions(apart).figure.get_suptitle()


def test_distributions_are_means_over_layers() -> None:
    """Densities of 0.2 and 0.8 in one layer, 1.2 and 1.8 in the other: 60 and 20 % are not under both curves."""
    histograms = pd.concat([mismatched().assign(z=z, density=mismatched().mean_shift) for z in (-1.0, 0.0, 1.0)])
    ax = plots.distributions(histograms)
    assert [line.get_ydata()[0] for line in lines(ax)[:2]] == pytest.approx([1.3, 0.7])
    told = (
        "2 and 8 bits overlap but for 40.0 % without and 32.7 % with weight bias correction, on average over 2 layers"
    )
    assert ax.figure.get_suptitle().splitlines()[0] == told


def test_the_idea_draws_weights_beside_what_they_compute() -> None:
    """A network in each row: each weight a dot, as large as there are equal ones, and curves of merged bins."""
    rows = pd.read_csv(ROOT / "results/idea.csv")
    panels = plots.idea(rows).figure.axes
    for (left, right), trained_with in zip((panels[:2], panels[2:]), ("none", "mean_var"), strict=True):
        of_network = rows[rows.trained_with == trained_with]
        weights = of_network[of_network.part == "weight"].groupby("bits").value
        dots = {round(d.get_offsets()[0][1] + 0.15): d for d in left.collections if len(d.get_offsets()) > 1}
        assert [text.get_text() for text in left.get_yticklabels()] == ["full precision", "8 bits", "4 bits", "2 bits"]
        for line, b in enumerate((32, 8, 4, 2)):
            equal = weights.get_group(b).value_counts()
            assert dict(zip(dots[line].get_offsets()[:, 0], dots[line].get_sizes() / 12, strict=True)) == dict(equal)
        means = [float(container.lines[0].get_xdata()[0]) for container in left.containers]
        assert means == [weights.get_group(b).mean() for b in (32, 8, 4, 2)]
        assert (max(means) - min(means) < 1e-5) == (trained_with == "mean_var")  # corrected, all of them are one
        (curve,) = lines(right)
        assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(1, abs=0.01)
        assert [text.get_text() for text in right.get_legend().get_texts()] == ["8 bits", "2 bits"]


def angles() -> pd.DataFrame:
    """Two layers and all of them, before and after an epoch: bits + 10 other_bits + 100 epoch + depth."""
    pairs = [(2, 4, False), (2, 2, True), (4, 4, True)]
    rows = [
        {"layer": layer, "depth": depth, "bits": a, "other_bits": b, "other_images": other, "epoch": epoch}
        for layer, depth in (("conv1", 0), ("fc", 1), ("all layers", -1))
        for a, b, other in pairs
        for epoch in (0, 1)
    ]
    table = pd.DataFrame(rows).assign(dataset="cifar10", model="resnet8", profile="small", epochs=1, seed=0)
    return table.assign(angle=lambda t: t.bits + 10 * t.other_bits + 100 * t.epoch + t.depth)


def test_angles_by_layer_are_those_of_the_last_epoch() -> None:
    ax = plots.angles(angles())
    found = {line.get_linestyle(): [] for line in lines(ax)}
    for line in lines(ax):
        found[line.get_linestyle()].append(points(line))
    assert found.pop(":") == [[(0, 28), (1, 28)]]  # what is reported of the paper
    assert found == {"-": [[(0, 142), (1, 143)]], "--": [[(0, 122), (1, 123)], [(0, 144), (1, 145)]]}
    told = ["2 and 4 bits, same images", "2 bits, other images", "4 bits, other images"]
    assert legend(ax) == [*told, "28 degrees: reported of the paper's Figure 4"]
    seen = "After 1 epochs, gradients are 142 to 143° apart on the same images and 122 to 145° on others\n"
    assert ax.get_title().startswith(seen)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv1", "fc"]


def test_answers_show_what_the_network_says_and_computes_with() -> None:
    torch.manual_seed(0)
    model = emq.convert(emq.models.build("resnet8", 10, width=4), emq.QuantSpec(bits=(2, 8)))
    data = emq.load_dataset("digits").subset(40, 20)
    figure = plots.answers(model, data, bits=2, count=4)
    above, below = figure.axes[:4], figure.axes[4:]
    values = {value for ax in below for value in ax.images[0].get_array().ravel().tolist()}
    assert figure.get_suptitle() == f"At 2 bits: answers, and activations with {len(values)} levels"
    assert all(3 * value == pytest.approx(round(3 * value)) for value in values) and max(values) <= 1
    with emq.at_bits(model, 2), torch.no_grad():
        classes = model(normalize(data.test.images[:4], data)).argmax(1).tolist()
    labels = data.test.labels[:4].tolist()
    shown = [(ax.get_title(), ax.title.get_color()) for ax in above]
    assert shown == [(str(c), "black" if c == y else "red") for c, y in zip(classes, labels, strict=True)]
    assert plots.answers(model, data, bits=1, count=1).get_suptitle().startswith("At 1 bit:")


def test_a_figure_is_written_as_png_and_svg_with_the_same_bytes_again(tmp_path: Path) -> None:
    ax = plots.accuracy_by_cost(example())
    for name in ("a", "b"):
        plots.save(ax, tmp_path / name)
    for kind in ("png", "svg"):
        first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("a", "b"))
        assert first == second and (kind == "png" or (b"<dc:date>" not in first and b"Matplotlib" not in first))


def test_a_single_trained_bit_width_is_drawn_from_its_file(tmp_path: Path) -> None:
    name = "10_untrained_bitwidths"
    rows = pd.read_csv(ROOT / f"results/small/{name}.csv").query("trained_bits == '2 8'")
    rows.assign(trained_bits=3, trained=False).to_csv(tmp_path / f"{name}.csv", index=False)
    assert plots.draw(tmp_path / name).get_legend_handles_labels()[1]
