"""Redraw the figure of each benchmark from its rows: `python benchmarks/redraw.py [FOLDER]`, by default where they lie.

Without a benchmark's CSV there is nothing to draw; the same rows give the same bytes.
"""

import importlib
import sys
from pathlib import Path

import pandas as pd
from matplotlib import pyplot

from emqlib.paper import plots

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def redraw(folder: Path) -> list[str]:
    """Draw FOLDER/NAME.png for each benchmark NAME that has a CSV there; returns their names."""
    names = sorted(path.stem for path in HERE.glob("*.py") if (folder / f"{path.stem}.csv").exists())
    for name in names:
        ax = importlib.import_module(name).figure(pd.read_csv(folder / f"{name}.csv"))
        plots.save(ax, folder / name)
        pyplot.close(ax.figure)
    return names


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "results/benchmarks"
    print(f"redrawn in {where}: {', '.join(redraw(where))}")
