"""What training for every bit-width costs by scheme: whole runs, alternating in one process, scoring included.

`python benchmarks/schemes.py` writes a row a scheme and repeat to results/benchmarks/schemes.csv, and prints the
median, lowest and highest ratio of Any-Precision's seconds to each one's. Claim: at least 4 at 80 % pruning,
with batches as large as Any-Precision's.
"""

from dataclasses import replace

import pandas as pd
from common import over_repeats, ranges, write
from matplotlib.axes import Axes

import emqlib as emq
from emqlib.paper import experiments, profiles, runs
from emqlib.train import distributed


def measure(data: emq.Dataset, repeats: int = 5, epochs: int = 8, pruning_rate: float = 0.8) -> pd.DataFrame:
    """Rows: scheme, repeat, bits, sample passes and seconds of the profile `small` at 2, 4 and 8 bits on `data`."""
    start = experiments.base(profiles.parameters("small"), 0, "cifar10", epochs)
    coreset = experiments.bitwise_coreset(pruning_rate)
    schemes = {
        "Any-Precision": experiments.any_precision(start),
        f"ours, {pruning_rate:.0%} pruned": experiments.ours(start, coreset),
        f"ours, {pruning_rate:.0%} pruned, redrawn": experiments.redrawn(start, pruning_rate),
    }
    _train(replace(start, config=replace(start.config, epochs=1)), data)  # allocates what later runs find there
    rows = []
    for repeat in range(repeats):
        for name, run in schemes.items():
            history = _train(run, data)
            cost = {"sample_passes": history.sample_passes.sum(), "seconds": history.seconds.sum()}
            rows.append({"scheme": name, "repeat": repeat, "bits": "2 4 8", "epochs": epochs} | cost)
    origin = runs.provenance(data, distributed.device_named("auto"), autocast=start.config.autocast)
    return pd.DataFrame(rows).assign(**origin)


def _train(run: runs.Run, data: emq.Dataset) -> pd.DataFrame:
    return emq.train(runs.build(run, data.num_classes), data, run.config, progress=False)


def _times_as_fast(rows: pd.DataFrame) -> pd.Series:
    """How many times as fast as Any-Precision in the same repeat each row is."""
    return rows.repeat.map(rows[rows.scheme == "Any-Precision"].set_index("repeat").seconds) / rows.seconds


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a scheme: how many times fewer passes than Any-Precision it takes, and how many times as fast it is."""
    passes = rows.groupby("scheme", sort=False).sample_passes.first()
    table = (passes["Any-Precision"] / passes).round(2).rename("fewer sample passes (times)").to_frame()
    return table.join(over_repeats(_times_as_fast(rows), [rows.scheme], "times as fast", 2)).reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """How many times faster than Any-Precision each repeat was."""
    faster = rows.assign(times=_times_as_fast(rows))
    times = faster.groupby("scheme").times.median().drop("Any-Precision")
    title = f"With coresets, whole runs are {times.min():.1f} to {times.max():.1f} times as fast as Any-Precision"
    return ranges(
        faster, "scheme", "times", title, "times as fast as Any-Precision", (4, "claim, with equal batches: at least 4")
    )


if __name__ == "__main__":
    rows = measure(emq.load_dataset("cifar10").subset(1280, 10))
    write("schemes", rows, summary(rows), figure(rows))
