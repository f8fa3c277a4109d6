"""What the benchmarks share: where their results lie, how much memory a process holds, and how a result is written."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from emqlib.paper import plots, tables

RESULTS = Path(__file__).parents[1] / "results/benchmarks"


def write(name: str, rows: pd.DataFrame, table: pd.DataFrame, ax: Axes) -> None:
    """Write results/benchmarks/NAME.csv, .md and .png, and print the table."""
    tables.save(table, RESULTS / name, rows)
    plots.save(ax, RESULTS / name)
    print(table.to_string(index=False))


def resident(key: str) -> int:
    """Memory of this process in MB (Linux).

    Args:
        key: "VmRSS", what is resident now; "RssAnon", the part of it that no file backs; "VmHWM", the most so far.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status[key].split()[0]) * 1024 / 1e6)
