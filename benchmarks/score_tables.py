"""What recording TDDS scores takes at the size of ImageNet: 1,281,167 samples, 1,000 classes, window 10.

`python benchmarks/score_tables.py` observes synthetic probabilities for some epochs (Linux) and writes a row each to
results/benchmarks/score_tables.csv. Claim: the table of probabilities, 2.6 GB in half precision, lies in a mapped file,
so that what a process must hold is under 100 MB, and an epoch takes seconds of a core where training takes hours.
"""

from time import perf_counter
from types import SimpleNamespace

import pandas as pd
import torch
from common import ranges, resident, write
from matplotlib.axes import Axes

from emqlib.paper import runs
from emqlib.train import distributed
from emqlib.train.config import CoresetConfig
from emqlib.train.coresets import recorder


def measure(
    n: int = 1_281_167, classes: int = 1000, window: int = 10, epochs: int = 3, batch: int = 256
) -> pd.DataFrame:
    """Rows: epoch, seconds, microseconds a sample, table and others (MB of buffers), held (MB that is no file)."""
    generator = torch.Generator().manual_seed(0)
    # some batches, over and over: to make a million samples' probabilities would cost more than to record them
    pool = torch.randn(64, batch, classes, generator=generator).mul_(3).softmax(2)
    labels, device, before = torch.zeros(batch, dtype=torch.long), torch.device("cpu"), resident("RssAnon")
    config = CoresetConfig(score="tdds", window=window)
    record, rows = recorder(config, n, classes, 0, device), []
    table, all_tables = (sum(x.nbytes for x in part) / 1e6 for part in ([record.previous], record.buffers()))
    for epoch in range(epochs):
        start = perf_counter()
        for number, indices in enumerate(torch.randperm(n, generator=generator).split(batch)):
            p = pool[(number + epoch) % len(pool)][: len(indices)]
            record.observe(epoch, indices, p, labels[: len(indices)], None)
        seconds = perf_counter() - start
        row = {"epoch": epoch + 1, "seconds": seconds, "us a sample": 1e6 * seconds / n, "table": table}
        rows.append(row | {"others": all_tables - table, "held": resident("RssAnon") - before})
    asked = {"samples": n, "classes": classes, "window": window, "batch": batch}
    return pd.DataFrame(rows).assign(
        **asked, **runs.provenance(SimpleNamespace(sha256="synthetic"), distributed.device_named("cpu"))
    )


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row an epoch: seconds, microseconds a sample, and MB."""
    columns = ["samples", "classes", "window", "epoch", "seconds", "us a sample", "table", "others", "held"]
    return rows[columns].round(1)


def figure(rows: pd.DataFrame) -> Axes:
    """Seconds of each epoch."""
    named = rows.assign(case="epoch " + rows.epoch.astype(str))
    return ranges(named, "case", "seconds", "Recording TDDS scores at ImageNet's size", "seconds an epoch")


if __name__ == "__main__":
    rows = measure()
    write("score_tables", rows, summary(rows), figure(rows))
