"""What the benchmarks share: where their results lie, a process's memory, and how a result is drawn and written."""

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from emqlib.paper import plots, tables

RESULTS = Path(__file__).parents[1] / "results/benchmarks"


def write(name: str, rows: pd.DataFrame, table: pd.DataFrame, ax: Axes) -> None:
    """Write results/benchmarks/NAME.csv, .md and .png, and print the table."""
    tables.save(table, RESULTS / name, rows)
    plots.save(ax, RESULTS / name)
    print(table.to_string(index=False))


def ranges(rows: pd.DataFrame, label: str, value: str, title: str, unit: str, mark: float | None = None) -> Axes:
    """Repeated measurements, a line for each `label` in the order of `rows`: a dot each, and a bar at their median.

    label, value: columns; unit: of `value`; mark: where a dashed line shows what is claimed.
    """
    ax, (dots, bar, *_) = plots.axes(None, title), sns.color_palette("colorblind")
    shared = {"x": value, "y": label, "order": list(dict.fromkeys(rows[label])), "ax": ax}
    sns.stripplot(rows, **shared, orient="h", size=4, alpha=0.5, jitter=False, color=dots)
    line = {"linestyle": "none", "marker": "|", "markersize": 16, "markeredgewidth": 2, "color": bar}
    sns.pointplot(rows, **shared, orient="h", estimator="median", errorbar=None, **line)
    if mark is not None:
        ax.axvline(mark, ls="--", lw=1, color="0.3")
    ax.tick_params(axis="y", labelsize=7)
    ax.set_xlim(left=0)
    ax.set(xlabel=unit, ylabel="")
    return ax


def resident(key: str) -> int:
    """Memory of this process in MB (Linux).

    Args:
        key: "VmRSS", what is resident now; "RssAnon", the part of it that no file backs; "VmHWM", the most so far.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status[key].split()[0]) * 1024 / 1e6)
