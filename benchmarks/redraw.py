"""Rewrite the table and the figure of each benchmark from its rows: `python benchmarks/redraw.py [FOLDER]`.

The rows are read from FOLDER, by default where they lie. Without a benchmark's CSV there is nothing to draw; the same
rows give the same bytes.
"""

import importlib
import sys
from pathlib import Path

import pandas as pd
from matplotlib import pyplot

from emqlib.paper import plots, tables

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def redraw(folder: Path) -> list[str]:
    """Write FOLDER/NAME.md, .png and .svg for each benchmark NAME that has a CSV there; returns their names."""
    names = sorted(path.stem for path in HERE.glob("*.py") if (folder / f"{path.stem}.csv").exists())
    for name in names:
        benchmark, rows = importlib.import_module(name), pd.read_csv(folder / f"{name}.csv")
        tables.save(benchmark.summary(rows), folder / name)
        ax = benchmark.figure(rows)
        plots.save(ax, folder / name)
        pyplot.close(ax.figure)
    return names


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "results/benchmarks"
    print(f"redrawn in {where}: {', '.join(redraw(where))}")
