"""Figures, read back from their axes: what is drawn is what the rows say."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("seaborn")
matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402
from matplotlib.container import ErrorbarContainer  # noqa: E402
from test_results import grown  # noqa: E402

from emqlib import plots  # noqa: E402


@pytest.fixture(autouse=True)
def no_figure_stays() -> Iterator[None]:
    yield
    pyplot.close("all")


def example() -> pd.DataFrame:
    """Ours, two seeds, evaluated at 2, 4 and 5 (not trained) bits, pruned too; one seed of Dedicated; shuffled."""
    names = ["method", "correction", "pruning_rate", "adapted", "seed", "bits", "top1", "run", "sample_passes"]
    ours = [
        (
            "Ours",
            "mean_var",
            rate,
            adapted,
            seed,
            bits,
            10 * bits + 2 * seed + 30 * adapted - 10 * (rate > 0),
            run,
            passes,
        )
        for rate, passes in ((0.0, 4_000_000), (0.8, 800_000))
        for seed in (0, 1)
        for adapted in (False, True)
        for bits in (5, 4, 2)
        for run in (f"ours {rate} {seed}",)
    ]
    dedicated = [
        ("Dedicated", "none", 0.0, False, 0, 2, 55.0, "dedicated 2", 2_000_000),
        ("Dedicated", "none", 0.0, False, 0, 4, 65.0, "dedicated 4", 2_000_000),
    ]
    rows = pd.DataFrame(ours + dedicated, columns=names).assign(trained=lambda t: t.bits.isin([2, 4]))
    rows["coreset"] = rows.pruning_rate.map({0.0: "full data", 0.8: "tdds"})
    return rows.assign(candidates=1.0, epochs=4, dataset="cifar10", model="resnet8", profile="small")


def drawn(ax: Axes) -> dict[str, ErrorbarContainer]:
    return {container.get_label(): container for container in ax.containers}


def points(container: ErrorbarContainer) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*container.lines[0].get_data(), strict=True)]


def half_bars(container: ErrorbarContainer) -> list[float]:
    """Half the height of each error bar."""
    segments = container.lines[2][0].get_segments()
    return [float(high - low) / 2 for (_, low), (_, high) in segments]


def hollow(ax: Axes) -> list[tuple[tuple[float, float], ...]]:
    """The points of each line of white markers, those without points left out."""
    lines = [line for line in ax.get_lines() if line.get_markerfacecolor() == "white"]
    return [tuple((float(x), float(y)) for x, y in line.get_xydata()) for line in lines if len(line.get_xydata())]


LABELS = [
    "Ours, mean_var",
    "Ours, mean_var, adapted",
    "Ours, mean_var, 80% pruned, tdds",
    "Ours, mean_var, 80% pruned, tdds, adapted",
    "Dedicated",
]


def test_accuracy_by_bits_draws_the_rows() -> None:
    """Means over the seeds 0 and 1, which are 2 apart: a sample standard deviation of sqrt(2)."""
    lines = drawn(plots.accuracy_by_bits(example()))
    assert list(lines) == LABELS
    for label, level in zip(LABELS[:4], (1, 31, -9, 21), strict=True):
        assert points(lines[label]) == [(bits, 10 * bits + level) for bits in (2, 4, 5)]
        assert half_bars(lines[label]) == pytest.approx([2**0.5] * 3)
    assert points(lines["Dedicated"]) == [(2, 55), (4, 65)]
    assert half_bars(lines["Dedicated"]) == [0, 0]  # one seed has no spread


def test_accuracy_by_bits_marks_untrained_bit_widths() -> None:
    ax = plots.accuracy_by_bits(example())
    assert hollow(ax) == [((5, 51),), ((5, 81),), ((5, 41),), ((5, 71),)]
    trained = example()
    assert not hollow(plots.accuracy_by_bits(trained[trained.trained]))


def test_accuracy_by_bits_tells_its_lines_apart() -> None:
    """A color and a marker for each setting; dashes for adaptation."""
    lines = {label: container.lines[0] for label, container in drawn(plots.accuracy_by_bits(example())).items()}
    looks = {label: (to_rgba(line.get_color()), line.get_marker()) for label, line in lines.items()}
    assert looks[LABELS[0]] == looks[LABELS[1]] and looks[LABELS[2]] == looks[LABELS[3]]
    settings = [looks[label] for label in LABELS[::2]]
    assert len({color for color, _ in settings}) == len({marker for _, marker in settings}) == 3
    assert [lines[label].get_linestyle() for label in LABELS] == ["-", "--", "-", "--", "-"]


def test_accuracy_by_bits_names_what_it_shows() -> None:
    ax = plots.accuracy_by_bits(example())
    assert ax.get_title() == "Accuracy by bit-width\ncifar10, resnet8, profile small, 2 seed(s)"
    assert ax.get_xlabel().startswith("bit-width") and ax.get_ylabel() == "top-1 accuracy (%)"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == LABELS
    assert list(ax.get_xticks()) == [2, 4, 5]


def test_corrections_have_lines_of_their_own() -> None:
    rows = example()[lambda t: t.method.eq("Ours") & t.pruning_rate.eq(0)]
    corrections = ("none", "mean", "mean_var, no gradient")
    ax = plots.accuracy_by_bits(pd.concat([rows.assign(correction=name) for name in corrections]))
    expected = [f"Ours, {name}{suffix}" for name in corrections for suffix in ("", ", adapted")]
    assert list(drawn(ax)) == expected


def test_accuracy_by_cost_draws_the_rows() -> None:
    """Without adaptation and over the trained 2 and 4 bits; the passes of Dedicated are those of its two networks."""
    ax = plots.accuracy_by_cost(example())
    marks = drawn(ax)
    assert {label: points(mark) for label, mark in marks.items()} == {
        "Ours, mean_var": [(4.0, 31.0)],
        "Ours, mean_var, 80% pruned, tdds": [(0.8, 21.0)],
        "Dedicated": [(4.0, 60.0)],
    }
    spreads = [pytest.approx([bar]) for bar in (2**0.5, 2**0.5, 0)]
    assert [half_bars(mark) for mark in marks.values()] == spreads
    assert len({to_rgba(mark.lines[0].get_color()) for mark in marks.values()}) == 3


def test_a_line_joins_run_lengths() -> None:
    """Against seconds, in minutes, with the number of epochs beside each marker."""
    rows = example().assign(seconds=120.0)
    longer = rows.assign(epochs=8, seconds=240.0, top1=rows.top1 + 5, run=rows.run + " longer")
    ax = plots.accuracy_by_cost(pd.concat([longer, rows]), "seconds")
    assert points(drawn(ax)["Ours, mean_var"]) == [(2.0, 31.0), (4.0, 36.0)]
    assert ax.get_xlabel() == "training time (minutes), logarithmic"
    assert [text.get_text() for text in ax.texts] == ["4", "8"] * 3
    alone = plots.accuracy_by_cost(pd.concat([longer[longer.seed == 0], rows]))
    assert alone.get_title().endswith("profile small, 1 to 2 seed(s)")


def test_accuracy_by_cost_against_what_is_no_cost() -> None:
    with pytest.raises(ValueError, match=r"^cost='epochs': expected one of"):
        plots.accuracy_by_cost(example(), "epochs")


def pruned() -> pd.DataFrame:
    """TDDS and RS2 at 50 and 80 %: two seeds, the second 2 points above the first."""
    part = example()[lambda t: t.method.eq("Ours") & t.pruning_rate.gt(0)]
    rates = pd.concat([part, part.assign(pruning_rate=0.5, top1=part.top1 + 10)])
    return pd.concat([rates, rates.assign(coreset="RS2", top1=rates.top1 - 5)])


def test_accuracy_by_pruning_draws_the_rows() -> None:
    """Lines by selection, a little beside one another: the mean over 2 and 4 bits, 21 % at 80 % pruning."""
    ax = plots.accuracy_by_pruning(pruned())
    marks = drawn(ax)
    assert {name: [y for _, y in points(mark)] for name, mark in marks.items()} == {"tdds": [31, 21], "RS2": [26, 16]}
    for mark in marks.values():
        assert [x for x, _ in points(mark)] == pytest.approx([50, 80], abs=1)
        assert half_bars(mark) == pytest.approx([2**0.5] * 2)
    assert ax.get_xlabel() == "pruning rate (%)" and ax.get_ylabel() == "mean top-1 accuracy (%)"


def test_accuracy_by_coreset_draws_the_rows() -> None:
    """The best at the top: a diamond at each mean, a dot at each seed."""
    ax = plots.accuracy_by_coreset(pruned()[lambda t: t.pruning_rate.eq(0.8)])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["tdds", "RS2"]
    means = [(float(x), float(y)) for line in ax.get_lines() if line.get_marker() == "D" for x, y in line.get_xydata()]
    assert means == [(21, 0), (16, 1)]
    dots = sorted((float(x), round(float(y), 3)) for dots in ax.collections for x, y in dots.get_offsets())
    assert dots == [(15, 1), (17, 1), (20, 0), (22, 0)]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("Any-Precision", ["Any-Precision"]),
        ("Ours, own statistics", ["tdds, own statistics", "RS2, own statistics"]),
    ],
)
def test_accuracy_by_coreset_tells_methods_apart(method: str, names: list[str]) -> None:
    rows = pruned()[lambda t: t.pruning_rate.eq(0.8)].assign(method=method)
    ax = plots.accuracy_by_coreset(rows[rows.coreset.eq("tdds")] if len(names) == 1 else rows)
    assert [label.get_text() for label in ax.get_yticklabels()] == names


def test_growth_draws_the_costs() -> None:
    rows = grown().assign(dataset="cifar10", model="resnet8", profile="small")
    ax = plots.growth(rows.assign(seconds=rows.seconds * 60), "seconds")
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert lines == {
        "Dedicated": [[2, 18], [3, 27]],
        "Any-Precision": [[2, 20], [3, 30]],
        "Ours, full data": [[2, 20], [3, 30]],
        "Ours, tdds": [[2, 6], [3, 9]],
    }
    assert ax.get_title() == "Training cost by number of bit-widths\ncifar10, resnet8, profile small, 1 seed(s)"
    assert ax.get_xlabel() == "number of bit-widths" and ax.get_ylabel() == "training time (minutes)"


def test_accuracy_by_cost_names_what_it_shows() -> None:
    ax = plots.accuracy_by_cost(example())
    assert ax.get_title() == "Accuracy against training cost\ncifar10, resnet8, profile small, 2 seed(s)"
    assert ax.get_xlabel() == "sample passes (millions), logarithmic" and ax.get_xscale() == "log"
    assert ax.get_ylabel() == "mean top-1 accuracy (%)"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [*LABELS[::2]]


@pytest.mark.parametrize("plot", [plots.accuracy_by_bits, plots.accuracy_by_cost])
def test_axes_of_the_reader_are_used(plot: Callable[..., Axes]) -> None:
    figure, axes = pyplot.subplots(1, 2)
    rows = example()
    before = rows.copy()
    assert plot(rows, ax=axes[1]) is axes[1]
    assert axes[1].containers and not axes[0].containers
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
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == [f"{b} bits, {c} correction" for c in ("without", "with") for b in (2, 8)]
    assert lines["2 bits, without correction"].get_xydata().ravel() == pytest.approx([0, 0.2, 1, 1.2])
    assert lines["8 bits, with correction"].get_xydata().ravel() == pytest.approx([0, 0.16, 1, 1.16])
    assert {line.get_linestyle() for name, line in lines.items() if "without" in name} == {"--"}
    for b in (2, 8):  # one color a bit-width
        assert {line.get_color() for name, line in lines.items() if name.startswith(str(b))} == {plots.bit_color(b)}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["bn1", "bn2"]


def test_distributions_draw_the_histograms() -> None:
    """Without correction on the left, with it on the right, and the standard normal distribution in both."""
    rows = mismatched()[lambda t: t.layer.eq("bn2")]
    histograms = pd.concat([rows.assign(z=z, density=rows.mean_shift + z) for z in (-1.0, 0.0, 1.0)])
    left, right = plots.distributions(histograms).figure.axes
    assert ["without" in left.get_title(), "without" in right.get_title()] == [True, False]
    for ax, scale in ((left, 10), (right, 50)):
        lines = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
        assert list(lines) == ["2 bits", "8 bits", "standard normal"]
        for b in (2, 8):
            assert lines[f"{b} bits"].tolist() == [[z, b / scale + 1 + z] for z in (-1, 0, 1)]
        assert lines["standard normal"][1, 1] == pytest.approx(0.39894, abs=1e-5)
    with pytest.raises(ValueError, match=r"^histograms=\['bn1', 'bn2'\]: expected the rows of one layer$"):
        plots.distributions(mismatched().assign(z=0.0, density=1.0))


def test_gaps_draw_each_remedy_from_two_bits_up() -> None:
    rows = [
        {"remedy": remedy, "bits": b, "seed": seed, "top1": top1 + seed * b, "adapted_top1": 70.0, "trained": b != 3}
        for remedy, top1 in (("shared", 60.0), ("own", 69.0))
        for b in (1, 2, 3)
        for seed in (0, 1)
    ]
    asked = {"dataset": "cifar10", "model": "resnet8", "profile": "small", "epochs": 4}
    ax = plots.gap_by_bits(pd.DataFrame(rows).assign(**asked))
    assert [container.get_label() for container in ax.containers] == ["shared", "own"]
    for container, gap in zip(ax.containers, (-10, -1), strict=True):
        x, y = container.lines[0].get_data()
        assert [round(value) for value in x] == [2, 3] and list(y) == [gap + 1, gap + 1.5]
        (bars,) = container.lines[2]
        assert [np.ptp(bar[:, 1]) for bar in bars.get_segments()] == pytest.approx([2 * 2**0.5, 3 * 2**0.5])
    assert "(trained: 2)" in ax.get_xlabel() and "2 seed(s)" in ax.get_title()


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
    ax = plots.angles_by_layer(angles())
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["2 bits, other images", "2 and 4 bits, same images", "4 bits, other images"]
    assert lines["2 and 4 bits, same images"].get_xydata().tolist() == [[0, 142], [1, 143]]
    assert lines["4 bits, other images"].get_xydata().tolist() == [[0, 144], [1, 145]]
    assert [lines[name].get_linestyle() for name in lines] == ["--", "-", "--"]
    assert lines["4 bits, other images"].get_color() == plots.bit_color(4)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv1", "fc"]


def test_angles_by_epoch_are_those_of_all_layers_and_means_over_seeds() -> None:
    rows = angles()
    rows = pd.concat([rows.assign(seed=k, angle=rows.angle + k - 1) for k in range(3)])
    lines = {line.get_label(): line.get_xydata().tolist() for line in plots.angles_by_epoch(rows).get_lines()}
    assert lines["2 and 4 bits, same images"] == [[0, 41], [1, 141]]
    assert lines["2 bits, other images"] == [[0, 21], [1, 121]]


def test_each_bit_width_has_a_color_of_its_own() -> None:
    assert len({plots.bit_color(b) for b in (*range(1, 9), 32)}) == 9


EVERY = [plots.accuracy_by_bits, plots.accuracy_by_cost, plots.accuracy_by_pruning, plots.accuracy_by_coreset]


@pytest.mark.parametrize("plot", EVERY)
def test_no_rows(plot: Callable[..., Axes]) -> None:
    with pytest.raises(ValueError, match=r"^rows='none': expected a DataFrame of one row at least$"):
        plot(example()[:0])
    assert not pyplot.get_fignums()


@pytest.mark.parametrize("plot", EVERY)
def test_equal_rows_give_equal_bytes(plot: Callable[..., Axes], tmp_path: Path) -> None:
    """Also after a reading of the CSV beside the figure."""
    example().to_csv(tmp_path / "rows.csv", index=False)
    for name, rows in {"a": example(), "b": example(), "c": pd.read_csv(tmp_path / "rows.csv")}.items():
        plots.save(plot(rows), tmp_path / name)
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0].startswith(b"\x89PNG") and pictures[0] == pictures[1] == pictures[2]
    assert len(pictures[0]) < 100_000 and b"matplotlib" not in pictures[0].lower()
    changed = example().assign(top1=example().top1 + 1)
    plots.save(plot(changed), tmp_path / "d")
    assert (tmp_path / "d.png").read_bytes() != pictures[0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png"}  # no temporary file


def test_the_library_needs_none_of_the_notebooks_packages() -> None:
    blocked = ["matplotlib", "seaborn", "papermill", "IPython", "jupyterlab", "sklearn", "tabulate"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import emqlib.plots, emqlib.results
from emqlib.paper.experiments import table1
from emqlib.paper.profiles import parameters
print(len(table1(parameters(profile="smoke", bits="[2,4]"))))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr, result.stdout.strip().isdigit()) == (0, "", True)
