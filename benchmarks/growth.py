"""Training for one to eight bit-widths against training one network in full precision: seconds and peak memory.

`python benchmarks/growth.py` trains a ResNet-20 of width 16, plain and on coresets, alternating, each number of
bit-widths in a process of its own (Linux), eager and compiled, and writes a row each to results/benchmarks/growth.csv.
Claim: eight bit-widths at 80 % pruning cost at most two trainings in full precision, each in its faster mode.
"""

import itertools
from dataclasses import replace
from multiprocessing import get_context
from time import perf_counter

import pandas as pd
import torch
import torch.nn.functional as F
from common import over_repeats, ranges, resident, write
from matplotlib.axes import Axes
from torch import nn

import emqlib as emq
from emqlib import models
from emqlib.paper import experiments, runs
from emqlib.train import distributed, loop
from emqlib.train.data import loader

ORDER = (2, 4, 8, 6, 3, 5, 7, 1)


def measure(
    data: emq.Dataset,
    counts: tuple[int, ...] = (1, 2, 4, 8),
    modes: tuple[str, ...] = ("eager", "compiled"),
    repeats: int = 5,
    epochs: int = 12,
    width: int = 16,
) -> pd.DataFrame:
    """Rows: scheme, bit_widths, mode, repeat, sample_passes, seconds, peak (MB resident, beyond data and libraries).

    What a process does for the first time, to allocate and to compile, is done before its clock starts.
    """
    rows, threads = [], torch.get_num_threads()
    cases = [("full precision", 1), *(("80% pruned", count) for count in counts)]
    for repeat, mode, (scheme, count) in itertools.product(range(repeats), modes, cases):
        config = emq.TrainConfig(epochs=epochs, lr=0.1, warmup_epochs=0.5, compile=mode == "compiled")
        with get_context("spawn").Pool(1) as fresh:
            row = fresh.apply(_measured, (scheme, ORDER[:count], data, config, width, threads))
        rows.append({"scheme": scheme, "bit_widths": count, "mode": mode, "repeat": repeat} | row)
    return pd.DataFrame(rows).assign(
        epochs=epochs, train=len(data.train), **runs.provenance(data, distributed.device_named("cpu"))
    )


def _measured(
    scheme: str, bits: tuple[int, ...], data: emq.Dataset, config: emq.TrainConfig, width: int, threads: int
) -> dict[str, float]:
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    if scheme == "full precision":
        net = models.resnet20(data.num_classes, width=width)
        _train_plain(net, data, replace(config, epochs=1))
        start = perf_counter()
        passes = _train_plain(net, data, config)
        seconds = perf_counter() - start
    else:
        history = train_ours(bits, data, config, width)
        passes, seconds = int(history.sample_passes.sum()), float(history.seconds.sum())
    return {"sample_passes": passes, "seconds": seconds, "peak": resident("VmHWM") - before}


def train_ours(bits: tuple[int, ...], data: emq.Dataset, config: emq.TrainConfig, width: int) -> pd.DataFrame:
    """The history of a training at 80 % pruning by TDDS, after a short one that allocates and compiles."""
    arguments = {"model": "resnet20", "model_args": (("width", width),)}
    spec = emq.QuantSpec(bits=tuple(sorted(bits)))
    base = runs.Run(profile="small", dataset="cifar10", spec=spec, config=config, **arguments)
    run = experiments.ours(base, experiments.bitwise_coreset(0.8))
    both_phases = replace(run.config, epochs=run.config.coreset.scoring_epochs + 1)
    emq.train(runs.build(run, data.num_classes), data, both_phases, progress=False)
    return emq.train(runs.build(run, data.num_classes), data, run.config, progress=False)


def _train_plain(net: nn.Module, data: emq.Dataset, config: emq.TrainConfig) -> int:
    """Train a network that is not converted as `emq.train` would; returns the sample passes."""
    device = torch.device("cpu")
    memory_format = distributed.memory_format(net, config.channels_last, device)
    net.to(memory_format=memory_format).train()
    forward = distributed.compiled(net, config.compile, steps=0)
    optimizer, batches = loop.optimizer(net, config), loader(data, "train", device)
    for epoch in range(config.epochs):
        chunks = torch.randperm(len(data.train)).tensor_split(-(-len(data.train) // config.batch_size))
        found = batches.epoch(chunks, torch.Generator().manual_seed(epoch))
        for i, (images, labels, _) in enumerate(found):
            for group in optimizer.param_groups:
                group["lr"] = loop.learning_rate(epoch + (i + 0.5) / len(chunks), config)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(forward(images.contiguous(memory_format=memory_format)), labels).backward()
            optimizer.step()
    return config.epochs * len(data.train)


def _relative(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each case's faster mode; times: seconds in trainings in full precision, repeat by repeat.

    Where full precision is faster in the other mode, by the median, its seconds count as so many fewer.
    """
    plain = rows[rows.scheme == "full precision"]
    medians = plain.groupby("mode").seconds.median()
    seconds = rows.merge(plain[["mode", "repeat", "seconds"]], on=["mode", "repeat"], suffixes=("", "_plain"))
    relative = seconds.assign(
        times=seconds.seconds / seconds.seconds_plain * seconds["mode"].map(medians) / medians.min(),
        passes=seconds.sample_passes / plain.sample_passes.iloc[0],
    )
    case = ["scheme", "bit_widths"]
    chosen = relative.groupby([*case, "mode"], sort=False).times.median()
    return chosen[chosen.groupby(case, sort=False).idxmin()].index.to_frame(index=False).merge(relative)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a scheme and number of bit-widths: passes and time in those of full precision, and peak memory.

    Time and memory are those of the faster mode, which is named.
    """
    relative = _relative(rows).rename(columns={"bit_widths": "bit-widths"})
    case = [relative[name] for name in ("scheme", "bit-widths", "mode")]
    groups = relative.groupby(case, sort=False)
    passes = groups.passes.first().round(2).rename("sample passes (full precision = 1)").to_frame()
    times = over_repeats(relative.times, case, "training time (full precision = 1)", 2)
    return passes.join(times).assign(**{"peak memory (MB)": groups.peak.median()}).reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """Training time of each repeat in the faster mode, a line a number of bit-widths."""
    relative = _relative(rows)
    relative = relative[relative.scheme != "full precision"]
    counts = relative.bit_widths.map(lambda count: f"{count} bit-width{'s' * (count > 1)}")
    relative = relative.assign(run=relative.scheme + ", " + counts)
    times = relative.groupby("run", sort=False).times.median()
    title = f"{times.index[-1]}: {times.iloc[-1]:.2f} times the training time of one network in full precision"
    return ranges(relative, "run", "times", title, "training time (full precision = 1)", (2, "claim: at most 2"))


if __name__ == "__main__":
    rows = measure(emq.load_dataset("cifar10").subset(640, 10))
    write("growth", rows, summary(rows), figure(rows))
