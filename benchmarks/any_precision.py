"""Time to one accuracy: the published Any-Precision code against ours, factor by factor, in one process.

`EMQ_ANY_PRECISION=CHECKOUT python benchmarks/any_precision.py`, with a checkout of SHI-Labs/Any-Precision-DNNs, trains
a pre-activation ResNet-20 of width 16 at 2, 4 and 8 bits on 10,000 images of CIFAR-10 in each way, and writes a row an
epoch to results/benchmarks/any_precision.csv: training time so far, and top-1 accuracy, the mean over the bit-widths.
The target is the best that the published code reaches, by its own recipe, Adam at a rate that stays for the first 100
epochs. Each further line of the table changes one thing: the recipe (Adam, cosine to zero; the rate, 3e-3, was chosen
from 1e-3 and 3e-3 by ours with coresets), the implementation, bfloat16, bit-wise training, coresets. Claim: ours with
coresets takes at least 8 times less time. A second call goes on after the runs that are in the file.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from common import RESULTS, write
from matplotlib.axes import Axes
from torch import nn
from torch.utils.data import DataLoader, Dataset

import emqlib as emq
from emqlib.paper import experiments, plots, runs
from emqlib.train import distributed, loop

BITS = (2, 4, 8)
# How long each way trains, in epochs: a schedule that ends at zero has to be tried at several lengths.
LENGTHS = {
    "published code": (10,),
    "published code, our schedule": (5,),
    "ours, joint": (5, 7),
    "ours, joint, bfloat16": (5, 7),
    "ours, bit by bit": (2, 3),
    "ours, 80% pruned": (5, 6, 8),
}
# One epoch on all data, then a fifth drawn anew each epoch: what loses least (notebook 07).
SCORED = {"score": "el2n", "scoring_epochs": 1, "candidates": 1.0, "unscored": False}
ADAM_EPOCHS = 200  # of the published schedule, which a shorter run does not squeeze


def published() -> SimpleNamespace:
    """What of the checkout is used: networks, soft loss, optimizer, schedule and transforms. ValueError: none given."""
    root = os.environ.get("EMQ_ANY_PRECISION", "")
    if not (Path(root) / "models/resnet_quan.py").is_file():
        raise ValueError(f"EMQ_ANY_PRECISION={root!r}: expected a checkout of SHI-Labs/Any-Precision-DNNs")
    sys.path.insert(0, root)
    try:
        names = ("models.resnet_quan", "models.losses", "optimizer", "datasets.data")
        nets, losses, optimizer, data = map(importlib.import_module, names)
    finally:
        sys.path.remove(root)
    return SimpleNamespace(nets=nets, soft=losses.CrossEntropyLossSoft(), optimizer=optimizer, data=data)


def published_network(code: SimpleNamespace, bits: tuple[int, ...] = BITS, factor: int = 1) -> nn.Module:
    """Theirs for CIFAR-10, with 16, 32 and 64 times `factor` channels."""
    return code.nets.PreActResNet(code.nets.PreActBasicBlockQ, [3, 3, 3], list(bits), num_classes=10, expand=factor)


def set_published_bits(net: nn.Module, bits: int) -> None:
    """As train.py does in every step."""
    net.apply(lambda module: setattr(module, "wbit", bits))
    net.apply(lambda module: setattr(module, "abit", bits))


def published_gradients(
    code: SimpleNamespace,
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    bits: tuple[int, ...],
    forward: Any,
) -> None:
    """Gradients of a batch at every bit-width, highest first, each the teacher of the next."""
    teacher = None
    for b in sorted(bits, reverse=True):
        set_published_bits(net, b)
        logits = forward(images)
        (F.cross_entropy(logits, labels) if teacher is None else code.soft(logits, teacher)).backward()
        teacher = torch.softmax(logits.detach(), dim=1)


class _Pictures(Dataset):
    """A split as PIL images through the published transforms."""

    def __init__(self, split: Any, transform: Any) -> None:
        from torchvision.transforms.functional import to_pil_image

        self.images, self.labels, self.transform = [to_pil_image(x) for x in split.images], split.labels, transform

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.images)


def _train_published(data: emq.Dataset, epochs: int, ours: bool, batch: int = 128) -> Iterator[dict[str, float]]:
    """Rows of the published code; ours: by our optimizer and schedule instead of its own."""
    code = published()
    net, config = published_network(code), _base(epochs).config
    pictures, plain = (_Pictures(getattr(data, s), code.data.get_transform("cifar10", t)) for s, t in _SPLITS)
    loader = DataLoader(pictures, batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer = loop.optimizer(net, config) if ours else code.optimizer.get_optimizer_config(net, "adam", 1e-3, 0.0)
    milestones = [ADAM_EPOCHS // 2, ADAM_EPOCHS * 3 // 4, ADAM_EPOCHS * 9 // 10]
    schedule = code.optimizer.get_lr_scheduler("adam", optimizer, milestones)
    seconds = 0.0
    for epoch in range(epochs):
        start = perf_counter()
        net.train()
        for i, (images, labels) in enumerate(loader):
            if ours:
                for group in optimizer.param_groups:
                    group["lr"] = loop.learning_rate(epoch + (i + 0.5) / len(loader), config)
            optimizer.zero_grad()
            published_gradients(code, net, images, labels, BITS, net)
            optimizer.step()
        if not ours:
            schedule.step()
        seconds += perf_counter() - start
        yield {"epoch": epoch + 1, "seconds": seconds, "top1": _published_accuracy(net, plain)}


_SPLITS = (("train", "train"), ("test", "val"))


def _published_accuracy(net: nn.Module, pictures: Dataset) -> float:
    net.eval()
    right = 0
    with torch.no_grad():
        for images, labels in DataLoader(pictures, batch_size=500):
            for b in BITS:
                set_published_bits(net, b)
                right += int((net(images).argmax(1) == labels).sum())
    return 100 * right / (len(BITS) * len(pictures))


def _base(epochs: int, autocast: str = "none") -> runs.Run:
    recipe = {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.0, "warmup_epochs": 0.5}
    config = emq.TrainConfig(epochs=epochs, autocast=autocast, **recipe)
    arguments = {"model": "preact_resnet20", "model_args": (("width_factor", 1),)}
    return runs.Run(profile="small", dataset="cifar10", spec=emq.QuantSpec(bits=BITS), config=config, **arguments)


def _ours(way: str, epochs: int) -> runs.Run:
    if way == "ours, joint":
        return experiments.any_precision(_base(epochs))
    fast = _base(epochs, "bfloat16")
    ways = {"ours, joint, bfloat16": experiments.any_precision, "ours, bit by bit": experiments.ours}
    return experiments.redrawn(fast, 0.8, **SCORED) if way == "ours, 80% pruned" else ways[way](fast)


def _train_ours(data: emq.Dataset, run: runs.Run) -> Iterator[dict[str, float]]:
    net = runs.build(run, data.num_classes)
    found: list[float] = []
    history = emq.train(
        net,
        data,
        run.config,
        progress=False,
        observe=lambda net: found.append(emq.evaluate(net, data, BITS).top1.mean()),
    )
    for epoch, seconds, top1 in zip(history.epoch, history.seconds.cumsum(), found, strict=True):
        yield {"epoch": epoch, "seconds": seconds, "top1": top1}


def measure(data: emq.Dataset, way: str, epochs: int) -> pd.DataFrame:
    """Rows: way, epochs, epoch, seconds of training so far, top1 (%), the mean over the trained bit-widths."""
    torch.manual_seed(0)
    if way.startswith("published"):
        rows, autocast = _train_published(data, epochs, ours="our schedule" in way), "none"
    else:
        run = _ours(way, epochs)
        rows, autocast = _train_ours(data, run), run.config.autocast
    table = pd.DataFrame(rows).assign(way=way, epochs=epochs, train=len(data.train), test=len(data.test))
    return table.assign(**runs.provenance(data, distributed.device_named("auto"), autocast=autocast))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a way: its best top-1 (%), seconds to the target, of a run of how many epochs, and seconds an epoch.

    times faster: to the target, than the published code; step: than the line above; empty where it is not reached.
    """
    target = rows[rows.way == "published code"].top1.max()
    reached = rows[rows.top1 >= target].sort_values("seconds").drop_duplicates("way").set_index("way")
    best = rows.groupby("way", sort=False).top1.max()
    table = pd.DataFrame(
        {"best top1": best.round(1), "seconds to target": reached.seconds, "of epochs": reached.epochs}
    )
    table = table.loc[best.index]
    seconds = table["seconds to target"].copy()
    table["seconds to target"] = seconds.round()
    each = rows.seconds.groupby([rows.way, rows.epochs], sort=False).diff().fillna(rows.seconds)
    table["seconds an epoch"] = each.groupby(rows.way).median().round(1)
    table["times faster"] = (seconds["published code"] / seconds).round(1)
    table["step"] = (seconds.shift() / seconds).round(2)
    return table.assign(target=round(target, 1)).reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """Accuracy against training time, a line a way and length; the dashed line is the target."""
    table = summary(rows).set_index("way")
    reached, target = table["seconds to target"].dropna(), table.target.iloc[0]
    fastest = reached.idxmin()
    times = f"{reached[fastest]:.0f} s by {fastest}, {reached['published code']:.0f} s by the published code"
    ax = plots.axes(None, f"{target} % at 2, 4 and 8 bits takes {times}", plots.WIDE)
    look = {"units": "epochs", "estimator": None, "markers": list("osD^vP"), "dashes": False, "markersize": 7, "lw": 1}
    sns.lineplot(rows, x="seconds", y="top1", hue="way", style="way", palette="colorblind", **look, ax=ax)
    ax.axhline(target, **plots.NAMED, label="target: the best of the published code")
    ax.legend()
    ax.set_xscale("log")
    ax.minorticks_off()
    ticks = [t for t in (10, 20, 50, 100, 200, 500, 1000) if rows.seconds.min() / 2 < t < 2 * rows.seconds.max()]
    ax.set_xticks(ticks, ticks)
    return plots.finish(
        ax, "training time (s), logarithmic; a line for each number of epochs", "mean top-1 accuracy (%)"
    )


if __name__ == "__main__":
    published()
    data, csv = emq.load_dataset("cifar10").subset(10000, 2000), RESULTS / "any_precision.csv"
    rows = pd.read_csv(csv) if csv.exists() else pd.DataFrame(columns=["way", "epochs"])
    for way, lengths in LENGTHS.items():
        for epochs in lengths:
            if not (rows.way.eq(way) & rows.epochs.eq(epochs)).any():
                rows = pd.concat([rows, measure(data, way, epochs)], ignore_index=True)
                write("any_precision", rows, summary(rows), figure(rows))
