"""What loading and augmentation take of a training step on small data: batches alone, and whole steps, alternating.

`python benchmarks/loading.py` writes a row a network and repeat to results/benchmarks/loading.csv. Claim: below 5 %.
"""

from time import perf_counter

import pandas as pd
import torch
from common import over_repeats, ranges, write
from matplotlib.axes import Axes

import emqlib as emq
from emqlib import models
from emqlib.paper import runs, tables
from emqlib.train import distributed
from emqlib.train.data import loader

NETWORKS = {"resnet8": {"width": 16}, "resnet20": {"width": 16}, "preact_resnet20": {"width_factor": 1}}


def measure(data: emq.Dataset, networks: dict[str, dict[str, int]] = NETWORKS, repeats: int = 5) -> pd.DataFrame:
    """Rows: network, repeat; seconds of a batch of 128 augmented images and of a bfloat16 step with it; their ratio."""
    device, rows = distributed.device_named("auto"), []
    config = emq.TrainConfig(scheme="joint", epochs=1, autocast="bfloat16")
    for repeat in range(-1, repeats):  # the first one allocates
        for name, arguments in networks.items():
            model = emq.convert(models.build(name, data.num_classes, **arguments), emq.QuantSpec(bits=(8,)))
            history = emq.train(model, data.to(device), config, progress=False)
            step = float(history.seconds.sum() / history.steps.sum())
            batch = _seconds(data.to(device), int(history.steps.sum()), device)
            row = {"network": name, "repeat": repeat, "batch": batch, "step": step, "share": batch / step}
            rows += [row] if repeat >= 0 else []
    return pd.DataFrame(rows).assign(**runs.provenance(data, device, autocast=config.autocast))


def _seconds(data: emq.Dataset, batches: int, device: torch.device) -> float:
    chunks = torch.randperm(len(data.train)).tensor_split(batches)
    start = perf_counter()
    for images, _, _ in loader(data, "train", device).epoch(chunks, torch.Generator().manual_seed(0)):
        last = images
    float(last.sum())  # waits for a GPU
    return (perf_counter() - start) / batches


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a network: milliseconds of a batch and of a step, and the share of the one in the other (%)."""
    networks = rows.network.map(tables.in_words)
    names = {"batch": "loading a batch (ms)", "step": "training step (ms)"}
    table = (1000 * rows.groupby(networks, sort=False)[[*names]].median()).round(2).rename(columns=names)
    return table.join(over_repeats(100 * rows.share, [networks], "share of the step (%)", 2)).reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """The share of each repeat, a line a network."""
    percent = rows.assign(percent=100 * rows.share, network=rows.network.map(tables.in_words))
    most = percent.groupby("network").percent.median().max()
    title = f"Loading and augmentation take at most {most:.1f} % of a training step"
    return ranges(percent, "network", "percent", title, "share of a training step (%)", (5, "claim: at most 5 %"))


if __name__ == "__main__":
    rows = measure(emq.load_dataset("cifar10").subset(2560, 10))
    write("loading", rows, summary(rows), figure(rows))
