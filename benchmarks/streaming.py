"""How much memory the analyses of notebooks 08 and 09 take beyond the network's own, on a ResNet-50 at 224 x 224.

`python benchmarks/streaming.py` measures each in a process of its own (Linux) and writes a row each to
results/benchmarks/streaming.csv. Claim: at most 2,000 MB, since moments, counts and gradients are accumulated and
activations are not kept.
"""

from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from time import perf_counter

import pandas as pd
import torch
from common import ranges, resident, write
from matplotlib.axes import Axes
from torch import nn
from torchvision.transforms.v2.functional import resize

import emqlib as emq
from emqlib.paper import runs
from emqlib.paper.measure import gradient_angles, linear_probes, preactivations, weight_shift
from emqlib.train import distributed

BITS = (2, 4, 8)

# The analysis, and images in a batch: what has to keep a graph for its gradients takes small ones.
ANALYSES: dict[str, tuple[Callable[..., object], int]] = {
    "weight_shift": (lambda model, data, batch: weight_shift(model, BITS), 0),
    "preactivations": (lambda model, data, batch: preactivations(model, data, BITS, 64, batch), 16),
    "gradient_angles": (lambda model, data, batch: gradient_angles(model, data, BITS, 16, batch), 2),
    "linear_probes": (lambda model, data, batch: linear_probes(model, data, BITS, 64, batch), 16),
}


def enlarged(data: emq.Dataset, size: int) -> emq.Dataset:
    """The same images in `size` x `size` pixels."""
    train, test = (replace(s, images=resize(s.images, [size, size])) for s in (data.train, data.test))
    return replace(data, train=train, test=test)


def measure(data: emq.Dataset, model: str = "resnet50", size: int = 224) -> pd.DataFrame:
    """Rows: analysis, batch, seconds, network (MB: parameters and buffers), before and peak (MB resident), beyond.

    `before` is measured after the network and the images are there.
    """
    rows = []
    for name in ANALYSES:
        with get_context("spawn").Pool(1) as fresh:  # what another analysis freed would not count again
            rows.append(fresh.apply(_measured, (name, data, model, size, torch.get_num_threads())))
    return pd.DataFrame(rows).assign(model=model, size=size, **runs.provenance(data, distributed.device_named("cpu")))


def _measured(name: str, data: emq.Dataset, model: str, size: int, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    data = enlarged(data, size)
    network = emq.convert(emq.models.build(model, data.num_classes), emq.QuantSpec(bits=BITS))
    function, batch = ANALYSES[name]
    before, start = resident("VmRSS"), perf_counter()
    function(network, data, batch)
    peak = resident("VmHWM")
    row = {"analysis": name, "batch": batch, "seconds": round(perf_counter() - start, 1)}
    return row | {"network": round(_size(network)), "before": before, "peak": peak, "beyond": peak - before}


def _size(network: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())) / 1e6


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row an analysis: images in a batch, if it takes any, time, and memory beyond the network's own."""
    columns = {
        "analysis": rows.analysis.str.replace("_", " "),
        "images in a batch": rows.batch.astype(object).where(rows.batch > 0),
    }
    columns |= {"time (s)": rows.seconds, "network (MB)": rows.network}
    return pd.DataFrame(columns | {"memory beyond the network's (MB)": rows.beyond})


def figure(rows: pd.DataFrame) -> Axes:
    """Memory beyond the network's own, a line an analysis."""
    named = rows.assign(analysis=rows.analysis.str.replace("_", " "))
    title = f"Analyses of a ResNet-50 at 224 x 224 take at most {rows.beyond.max():,} MB beyond the network's own"
    return ranges(named, "analysis", "beyond", title, "additional memory (MB)", (2000, "claim: at most 2,000 MB"))


if __name__ == "__main__":
    rows = measure(emq.load_dataset("cifar10").subset(64, 32))
    write("streaming", rows, summary(rows), figure(rows))
