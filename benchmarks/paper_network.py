"""The paper's CIFAR-10 network on one GPU, trained for about as many sample passes by each method.

`python benchmarks/paper_network.py` trains pre-activation ResNet-20 of width 80, with the optimizer of the profile
`paper` and its schedule shortened, and writes its rows to results/benchmarks/paper_network.csv; runs that are stored
are read. Ours at 80 % pruning can make five times as many epochs. Few epochs: a full schedule takes hours.
"""

from dataclasses import replace

import pandas as pd
import torch
from common import RESULTS, write
from matplotlib.axes import Axes

from emqlib.paper import experiments, plots, runs, tables
from emqlib.paper.profiles import Parameters, parameters

EPOCHS = {"any_precision": 5, "full": 4, "coreset": 26, "redrawn": 26}


def asked() -> list[runs.Run]:
    """The runs of three seeds."""
    p = parameters(profile="paper", repeats=3)
    return [run for seed in p.seeds for run in _of_seed(p, seed)]


def _of_seed(p: Parameters, seed: int) -> list[runs.Run]:
    """Any-Precision; ours on the full data, on the paper's coresets at 80 %, and as `experiments.redrawn`, one part."""
    start = {name: experiments.of_length(p, seed, count) for name, count in EPOCHS.items()}
    coreset = experiments.bitwise_coreset(0.8)
    found = [experiments.any_precision(start["any_precision"]), experiments.ours(start["full"])]
    found += [experiments.ours(start["coreset"], coreset), experiments.redrawn(start["redrawn"], 0.8, 1)]
    return [replace(run, eval_bits=runs.Run.eval_bits) for run in found]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a method: top-1 (%) over the trained bit-widths, passes (millions) and steps; the paper's numbers.

    Without seconds, which the rows have: runs shared the GPU but for ours on the full data, seed 0.
    """
    table = tables.cost_table(rows, "table1")
    names = {"epochs": "epochs", "top1 (%)": "top-1 (%)", "adapted top1 (%)": "adapted top-1 (%)"}
    names |= {"passes (M)": "sample passes (millions)", "scoring (%)": "scoring (% of passes)"}
    names |= {"steps": "optimizer steps", "summary: top1 (%)": "summary of the paper: top-1 (%)"}
    names |= {"abstract: times faster": "abstract of the paper: times faster"}
    table["passes (M)"] = table["passes (M)"].round(2)
    shown = table[[*names]].rename(columns=names)
    shown.insert(0, "method", table.apply(tables.network_name, axis=1, told=True))
    return shown


def figure(rows: pd.DataFrame) -> Axes:
    """Top-1 by bit-width, as served: Any-Precision calibrated where it was not trained, ours nowhere."""
    return plots.accuracy_by_bits(rows[~rows.adapted | rows.method.eq("Any-Precision")])


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # few shapes of batches: the fastest convolutions are looked for once
    rows = runs.run_all(asked(), RESULTS.parent)
    write("paper_network", rows, summary(rows), figure(rows))
