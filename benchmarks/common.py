"""What the benchmarks share: where their results lie, a process's memory, and how a result is drawn and written."""

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from emqlib.paper import plots, tables

RESULTS = Path(__file__).parents[1] / "results/benchmarks"


def write(name: str, rows: pd.DataFrame, table: pd.DataFrame, ax: Axes) -> None:
    """Write results/benchmarks/NAME.csv, .md, .png and .svg, and print the table."""
    tables.save(table, RESULTS / name, rows)
    plots.save(ax, RESULTS / name)
    print(table.to_string(index=False))


def over_repeats(values: pd.Series, by: list[pd.Series], name: str, digits: int) -> pd.DataFrame:
    """The median, lowest and highest of `values` in each group, or the one value where nothing was repeated.

    by: what the groups have in common; name: of the columns, with the unit; digits: after the decimal point.
    """
    groups = values.groupby(by, sort=False)
    if groups.size().max() == 1:
        return groups.first().round(digits).rename(name).to_frame()
    table = groups.agg(["median", "min", "max"]).round(digits)
    return table.set_axis([f"{name}, {part}" for part in ("median", "lowest", "highest")], axis=1)


def ranges(
    rows: pd.DataFrame, label: str, value: str, title: str, unit: str, mark: tuple[float, str] | None = None
) -> Axes:
    """Measurements, a line for each `label` in the order of `rows`: a dot each, and a bar at a median of several.

    label, value: columns; unit: of `value`; mark: where a dashed line is, and what it shows.
    """
    ax, (dots, bar, *_) = plots.axes(None, title), sns.color_palette("colorblind")
    shared = {"x": value, "y": label, "order": list(dict.fromkeys(rows[label])), "ax": ax}
    sns.stripplot(rows, **shared, orient="h", size=4, alpha=0.5, jitter=False, color=dots)
    ax.collections[0].set_label("one measurement")
    if rows[label].duplicated().any():
        line = {"linestyle": "none", "marker": "|", "markersize": 16, "markeredgewidth": 2, "color": bar}
        sns.pointplot(rows, **shared, orient="h", estimator="median", errorbar=None, **line)
        ax.lines[0].set_label("median")
    if mark is not None:
        ax.axvline(mark[0], **plots.NAMED, label=mark[1])
    ax.legend()
    ax.tick_params(axis="y", labelsize=8)
    ax.set_xlim(left=0)
    return plots.finish(ax, unit, "")


def resident(key: str) -> int:
    """Memory of this process in MB (Linux).

    Args:
        key: "VmRSS", what is resident now; "RssAnon", the part of it that no file backs; "VmHWM", the most so far.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status[key].split()[0]) * 1024 / 1e6)
