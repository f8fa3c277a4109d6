"""What a step at a bit-width costs: the converted network against the plain one, taking turns in one process.

`python benchmarks/steps.py` writes a row a pair of measurements to results/benchmarks/steps.csv and prints, for each
network, precision and bit-width, how fast training and inference are where the plain network's speed is 1: eager
against eager, and each at its faster setting. Claims, for training: at least 0.8 in eager, at least 0.9 at best.
"""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter

import pandas as pd
import torch
import torch.nn.functional as F
from common import over_repeats, ranges, write
from matplotlib.axes import Axes
from torch import nn

import emqlib as emq
from emqlib import models
from emqlib.convert import step_weights
from emqlib.paper import runs, tables
from emqlib.train import distributed, loop

NETWORKS = {"resnet20": {"width": 16}, "preact_resnet20": {"width_factor": 1}}
CASE = ["phase", "network", "precision"]


def measure(
    data: emq.Dataset,
    networks: dict[str, dict[str, int]] = NETWORKS,
    precisions: tuple[str, ...] = ("none", "bfloat16"),
    modes: tuple[str, ...] = ("eager", "compiled"),
    bits: tuple[int, ...] = tuple(range(1, 9)),
    repeats: int = 5,
    batch: int = 128,
) -> pd.DataFrame:
    """Rows: phase, network, precision, mode, bits, repeat; seconds of a step of the plain and of our network."""
    device, rows = distributed.device_named("auto"), []
    x = data.train.images[:batch].float().div(255).to(device)
    y = data.train.labels[:batch].to(device)
    for (name, arguments), precision in itertools.product(networks.items(), precisions):
        torch.compiler.reset()
        plain = models.build(name, data.num_classes, **arguments)
        ours = emq.convert(plain, emq.QuantSpec(bits=bits))
        for phase in ("training", "inference"):
            pairs = {mode: [step(net, x, y, phase, precision, mode) for net in (plain, ours)] for mode in modes}
            for repeat, b, mode in itertools.product(range(-1, repeats), bits, modes):
                emq.set_bits(ours, b)
                row = {"phase": phase, "network": name, "precision": precision, "mode": mode, "bits": b}
                seconds = dict(zip(("plain", "ours"), map(timed, pairs[mode]), strict=True))
                rows += [row | {"repeat": repeat} | seconds] if repeat >= 0 else []  # the first ones compile
    table = pd.DataFrame(rows).assign(batch=batch, **runs.provenance(data, device))
    return table.assign(autocast=[distributed.autocast_used(precision, device) for precision in table.precision])


def step(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, phase: str, precision: str, mode: str, channels_last: bool = True
) -> Callable:
    """One training or inference step of `net` on images x (B, 3, H, W) and labels y (B,)."""
    memory_format = distributed.memory_format(net, channels_last, x.device)
    net, x = net.to(x.device, memory_format=memory_format).train(phase == "training"), x.to(memory_format=memory_format)
    forward = distributed.compiled(net, mode == "compiled", steps=0)
    optimizer = loop.optimizer(net, emq.TrainConfig(lr=0.01))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with step_weights(net) if phase == "training" and mode == "eager" else nullcontext():  # as `train` does
            with distributed.autocast(precision, x.device), torch.set_grad_enabled(phase == "training"):
                loss = F.cross_entropy(forward(x).float(), y)
            if phase == "training":
                loss.backward()
        if phase == "training":
            optimizer.step()
        float(loss.detach())  # waits for a GPU

    return step


def timed(step: Callable, steps: int = 3) -> float:
    """Seconds of one of `steps` steps, the mean."""
    start = perf_counter()
    for _ in range(steps):
        step()
    return (perf_counter() - start) / steps


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of our faster setting, by network, precision and bit-width; speed: ours, where the plain network's is 1.

    Each repeat is against the plain network's in the setting that is faster for it, since a machine's own speed drifts.
    """
    plain = rows.groupby([*CASE, "mode"]).plain.median()
    theirs = plain[plain.groupby(CASE).idxmin()].index.to_frame(index=False).merge(rows)
    ours = rows.groupby([*CASE, "bits", "mode"], sort=False).ours.median()
    chosen = ours[ours.groupby([*CASE, "bits"], sort=False).idxmin()].index.to_frame(index=False).merge(rows)
    fastest = theirs[[*CASE, "bits", "repeat", "plain"]].rename(columns={"plain": "fastest"})
    return chosen.merge(fastest).assign(speed=lambda t: t.fastest / t.ours)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a phase, network, precision and bit-width: our speed in units of the plain network's.

    First of the pairs in eager, then the median of each at its faster setting, ours being named.
    """
    eager, best = rows[rows["mode"] == "eager"], _best(rows).groupby([*CASE, "bits"], sort=False)
    table = over_repeats(eager.plain / eager.ours, [eager[k] for k in (*CASE, "bits")], "speed in eager (plain = 1)", 3)
    table["speed at best (plain = 1)"] = best.speed.median().round(3)
    table["our faster setting"] = best["mode"].first()
    table["images a second at best"] = (rows.batch.iloc[0] / best.ours.median()).round()
    table = table.reset_index().rename(columns={"bits": "bit-width"})
    return table.assign(
        network=table.network.map(tables.in_words), precision=table.precision.replace("none", "float32")
    )


def figure(rows: pd.DataFrame) -> Axes:
    """Our speed in units of the plain network's, each at its faster setting: a dot a repeat and bit-width."""
    found = _best(rows)
    precision = found.precision.replace("none", "float32")
    found["case"] = found.phase + ", " + found.network.map(tables.in_words) + ", " + precision
    speeds = found.groupby("case").speed.median()
    title = f"At 1 to 8 bits, a step has {speeds.min():.2f} to {speeds.max():.2f} of the plain network's speed"
    return ranges(found, "case", "speed", title, "speed (plain network = 1)", (0.9, "claim, in training: at least 0.9"))


if __name__ == "__main__":
    rows = measure(emq.load_dataset("cifar10").subset(1280, 10))
    write("steps", rows, summary(rows), figure(rows))
