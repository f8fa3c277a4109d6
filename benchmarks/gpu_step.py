"""What a training step of the paper's network asks of a GPU, counted on a traced step, which needs none.

`python benchmarks/gpu_step.py` traces one step of pre-activation ResNet-20 of width 80 (128 images, 4 bits, bfloat16)
with tensors that have no numbers, and writes how many kernels it launches, by what they touch, with their bytes and
operations, and the time below which a H200 cannot go. `benchmarks/gpu.py` measures where there is a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pandas as pd
import seaborn as sns
import torch
from common import write
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import emqlib as emq
from emqlib import kernels, layers, models, triton_kernels
from emqlib.paper import plots
from emqlib.train import distributed, loop
from emqlib.train.distributed import Place

# What the change before brought is kept in the next one.
STAGES = {
    "before": (False, False, False, False),
    "optimizer fused": (True, False, False, False),
    "and weights in Triton": (True, True, False, False),
    "and activations": (True, True, True, False),
    "one graph for all bit-widths": (True, True, True, True),
}
KINDS = ["products", "batch norm", "activations", "weights", "optimizer"]
# What a H200 does: products in bfloat16 (60 % of the highest rate, as large convolutions reach), memory, and launches
# in a CUDA graph and one by one.
PRODUCTS, MEMORY, GRAPH, LAUNCH = 0.6 * 989e12, 4.8e12, 2e-6, 5e-6
PRODUCT = ("convolution", "mm", "addmm", "convolution_backward")
# These launch nothing, nor do views; the host has the number of an optimizer's step, which it reads.
FREE = (
    "empty",
    "detach",
    "as_strided",
    "lift_fresh",
    "device",
    "_record_function",
    "_local_scalar_dense",
    "promote_types",
)


class Counter(TorchDispatchMode):
    """Notes each operation that launches a kernel; `phase` is "optimizer" while the optimizer is at work."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.phase, self.rows = batch, "", []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; a fused optimizer, of which there are no fake ones, is only noted."""
        name, kwargs = func.__name__.partition(".")[0], kwargs or {}
        out = None if name.startswith("_fused_") else func(*args, **kwargs)
        if not func.is_view and not any(free in name for free in FREE):
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.note(name, [*tree_leaves(args), *tree_leaves(out)], flops)
        return out

    def note(self, name: str, tensors: list[Any], flops: int = 0) -> None:
        """Note a kernel that reads and writes `tensors`, among which may be other things."""
        found = [t for t in tensors if isinstance(t, Tensor)]
        kind = "batch norm" if "batch_norm" in name else "products" if name in PRODUCT else self.phase
        images = any(t.dim() and len(t) == self.batch for t in found)
        size = sum(t.numel() * t.element_size() for t in found)
        kind = kind or ("activations" if images else "weights")
        self.rows.append({"kind": kind, "name": name, "bytes": size, "flops": flops})

    def launch(self, kernel: Any, programs: int, *tensors: Tensor | float, **sizes: int) -> None:
        """Note a Triton kernel, in place of `triton_kernels.launch`."""
        self.note(kernel.__name__, list(tensors))


@contextmanager
def faked(model: nn.Module) -> Iterator[None]:
    """Within the block, parameters and buffers of `model` have no numbers, and neither has any new tensor."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = p if p is None else nn.Parameter(mode.from_tensor(p.detach()))
        module._buffers.update({k: b if b is None else mode.from_tensor(b) for k, b in module._buffers.items()})
    table = triton_kernels._table.__wrapped__  # no tensor without numbers is to be kept
    with mode, mock.patch.object(triton_kernels, "_table", table):
        yield


def traced(
    model: nn.Module, batch: int, bits: int, fused: bool, weights: bool, activations: bool, alike: bool, size: int = 32
) -> pd.DataFrame:
    """The kernels of a training step at `bits` of a converted network, on images (batch, 3, size, size).

    Args:
        fused: whether the optimizer is fused; else it goes over lists of tensors, as PyTorch does by default on a GPU.
        weights: whether `triton_kernels` quantizes weights.
        activations: whether they quantize activations.
        alike: whether the step reads the bit-width from tensors, as in a captured graph.
    """
    data = emq.Dataset.from_tensors(torch.zeros(batch, 3, size, size), torch.arange(batch) % 10)
    config = emq.TrainConfig(optimizer="adamw", autocast="bfloat16", batch_size=batch, device="cpu")
    counter, way = Counter(batch), {"fused": True} if fused else {"foreach": True}
    with mock.patch.object(distributed, "has_bfloat16", lambda: True), faked_run(model, data, config) as run:
        for group in run.optimizer.param_groups:
            group.update(way)
        watch = loop.LossWatch(Place(), model, run.device)
        watch.lag = 1000  # as on CUDA
        images, labels = torch.empty(batch, 3, size, size), torch.zeros(batch, dtype=torch.long)
        joint = mock.patch.object(layers.QuantConv2d, "is_joint", lambda layer: weights)
        each = mock.patch.object(kernels, "runs_triton", lambda x: activations)
        step = run.optimizer.step

        def optimize(*args: Any) -> None:
            counter.phase = "optimizer"
            step(*args)
            counter.phase = ""

        run.optimizer.step = optimize
        parts = [m for m in model.modules() if hasattr(m, "bits_in_tensors")] if alike else []
        reads = distributed.bits_in_tensors(parts)
        with joint, each, reads, mock.patch.object(triton_kernels, "launch", counter.launch), counter:
            for _ in range(2):  # the first step makes the optimizer's state
                counter.rows.clear()
                loop._step(run, (bits,), batch, (images, labels, labels), 0.1, watch, "")
    return pd.DataFrame(counter.rows)


@contextmanager
def faked_run(model: nn.Module, data: emq.Dataset, config: emq.TrainConfig) -> Iterator[loop._Run]:
    """What `train` works with, of a network without numbers."""
    run = loop._Run(model.train(), data, config, model.emq.spec.bits)
    with faked(model):
        run.optimizer = loop.optimizer(model, config)
        yield run


def network(width_factor: int = 5) -> nn.Module:
    """The paper's, at the paper's bit-widths."""
    spec = emq.QuantSpec(bits=(1, 2, 4, 8, 32), activation_range="unit")
    return emq.convert(models.preact_resnet20(10, width_factor=width_factor), spec)


def measure(width_factor: int = 5, batch: int = 128, bits: int = 4) -> pd.DataFrame:
    """Rows: stage, kind, and of a step the kernels of that kind, their bytes and operations."""
    rows = []
    for stage, ways in STAGES.items():
        found = traced(network(width_factor), batch, bits, *ways).groupby("kind")
        for kind, part in found:
            sums = {"kernels": len(part), "bytes": part.bytes.sum(), "flops": part.flops.sum()}
            rows.append({"stage": stage, "kind": kind} | sums | {"batch": batch, "bits": bits})
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a stage: kernels by kind, memory traffic and operations of a step, and the least time of each limit.

    At most so many passes a second: a step takes products and memory, or its launches in a graph if these take longer.
    """
    table = rows.pivot(index="stage", columns="kind", values="kernels").reindex(index=STAGES, columns=KINDS).fillna(0)
    sums = rows.groupby("stage")[["kernels", "bytes", "flops"]].sum().reindex(STAGES)
    table["all"] = sums.kernels
    table = table.add_suffix(" (kernels)")
    table["memory traffic (GB)"], table["operations (GFLOP)"] = sums.bytes / 1e9, sums.flops / 1e9
    products = rows[rows.kind.eq("products")].groupby("stage").bytes.sum()
    table["products (ms)"] = 1e3 * sums.flops / PRODUCTS
    table["memory (ms)"] = 1e3 * (sums.bytes - products) / MEMORY
    table["launches in a graph (ms)"], table["launches (ms)"] = 1e3 * sums.kernels * GRAPH, 1e3 * sums.kernels * LAUNCH
    least = (table["products (ms)"] + table["memory (ms)"]).clip(lower=table["launches in a graph (ms)"])
    table["passes a second, at most"] = (1e3 * rows.batch.iloc[0] / least).round(-2)
    return table.round(2).astype({name: int for name in table if "kernels" in name}).reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """Kernels of a step by what they touch, a bar a stage."""
    counts = rows.groupby("stage").kernels.sum()[list(STAGES)]
    title = f"A training step launches {counts.iloc[-1]:,} kernels, {counts.iloc[0]:,} before"
    ax = plots.axes(None, title)
    look = {"order": KINDS, "hue_order": list(STAGES), "palette": "colorblind"}
    sns.barplot(rows, x="kernels", y="kind", hue="stage", **look, ax=ax)
    return plots.finish(ax, "launches of kernels", "")


if __name__ == "__main__":
    rows = measure()
    write("gpu_step", rows, summary(rows), figure(rows))
