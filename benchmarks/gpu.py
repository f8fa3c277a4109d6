"""What a GPU makes of it, in one run of at most nine minutes: `python benchmarks/gpu.py [FOLDER] [--dry]`.

It checks the Triton kernels against the formulas, and measures training steps of the paper's network in several ways,
and those of larger networks against plain ones. In the time that is left it trains `experiments.gpu_slices`, the most
important first, and another call goes on with that; their rows are in FOLDER/runs (or results/runs).
FOLDER/gpu.csv, .md, .png and .svg, by default in results/benchmarks, are written after each part, the most important
first. Without a GPU the rows say "not run", unless there are measured ones. With --dry everything runs small on a CPU,
for which the kernels need TRITON_INTERPRET=1.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from unittest import mock

import pandas as pd
import seaborn as sns
import torch
from common import RESULTS
from gpu_step import network
from matplotlib.axes import Axes
from steps import step, timed
from torch import Tensor

import emqlib as emq
from emqlib import correction, kernels, models, quantizers
from emqlib.paper import experiments, plots, runs, tables
from emqlib.paper.profiles import parameters
from emqlib.train import distributed, loop
from emqlib.train.checkpoint import OutOfTime
from emqlib.train.distributed import Place

LIMIT = 520.0  # seconds, after which nothing new is started
LAST = 30.0  # seconds before that, an epoch of training must have ended
# Ways to train: the value of `compile`, and whether kernels, optimizer and convolutions are as they are now.
WAYS = {
    "graphs, before": ("graphs", False),
    "graphs": ("graphs", True),
    "blocks": ("blocks", True),
    "eager": (False, True),
    "compiled": (True, True),
}
LARGER = ("torchvision.resnet18", "torchvision.resnet50", "vit_tiny")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    device: torch.device
    width_factor: int = 5  # of the paper's network
    batch: int = 128
    steps: int = 50
    larger: tuple[str, ...] = LARGER
    pixels: int = 224  # a side of the images of the larger networks
    profile: str = "paper"  # of the runs that are trained
    seeds: int = 3
    results: Path = RESULTS.parent  # where their rows go
    start: float = field(default_factory=perf_counter)

    @property
    def left(self) -> float:
        """The seconds in which something new may be started."""
        return self.start + LIMIT - perf_counter()

    @property
    def dry(self) -> bool:
        """Whether this is no measurement."""
        return self.device.type == "cpu"

    def wait(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()


def kernel_errors(size: Size, bits: int) -> dict[str, float]:
    """The largest relative error of the Triton kernels' weights and of their gradients, against float64 formulas."""
    from emqlib.triton_kernels import correct_dorefa_weights

    shapes = [(80, 80, 3, 3), (320, 160, 1, 1), (7, 33)] if not size.dry else [(7, 33)]
    torch.manual_seed(0)
    ours = [(0.1 * torch.randn(shape)).to(size.device).requires_grad_() for shape in shapes]
    theirs = [w.detach().double().requires_grad_() for w in ours]
    found, n = correct_dorefa_weights(ours, quantizers.levels(bits)), quantizers.levels(bits)
    pairs = [quantizers.dorefa_weight(w, n) for w in theirs]
    expected = [domain if bits == 32 else correction.correct_weight(w_q, domain) for w_q, domain in pairs]
    torch.autograd.backward(found, [torch.ones_like(w).cumsum(0) for w in found])
    torch.autograd.backward(expected, [torch.ones_like(w).cumsum(0) for w in expected])
    slopes = [_error(w.grad, v.grad) for w, v in zip(ours, theirs, strict=True)]
    return {"error of weights": max(map(_error, found, expected)), "error of gradients": max(slopes)}


def _error(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm().clamp_min(1e-12))


def paper_step(size: Size, way: str, bits: int) -> dict[str, float]:
    """Passes a second of the paper's network in steps of `train`, and the seconds of the first one."""
    how, now = WAYS[way]
    count = size.batch * (size.steps + 10)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    data = emq.Dataset.from_tensors(images, torch.arange(count) % 10, flip=True, crop_padding=4)
    config = emq.TrainConfig(
        optimizer="adamw", lr=1e-3, batch_size=size.batch, autocast="bfloat16", compile=how, device=size.device.type
    )
    torch.compiler.reset()
    marks = [perf_counter()]  # of the call, the end of the first step, and the end of the tenth
    run = loop._Run(network(size.width_factor).train(), data, config, (1, 2, 4, 8, 32))
    watch = loop.LossWatch(Place(), run.model, run.device)
    with ExitStack() as held:
        if now:
            held.enter_context(distributed.fastest_convolutions(size.device))
            held.enter_context(distributed.blocks_compiled(run.model, how))
        else:
            held.enter_context(mock.patch.object(kernels, "runs_triton", lambda w: False))
            for group in run.optimizer.param_groups:
                group.update(fused=False, foreach=True)
        chunks = torch.randperm(count).split(size.batch)
        for i, batch in enumerate(run.loader.epoch(chunks, torch.Generator())):
            loop._step(run, (bits,), size.batch, batch, 1e-3, watch, f"step {i + 1}")
            if i in (0, 9):
                size.wait()
                marks.append(perf_counter())
        size.wait()
    watch.mean()
    rate = size.batch * size.steps / (perf_counter() - marks[2])
    return {"passes a second": rate, "first step, s": marks[1] - marks[0]}


def larger_step(size: Size, name: str, bits: int) -> dict[str, float]:
    """The speed of a converted network's step, where the plain network's is 1; eager, in bfloat16."""
    arguments = {"patch_size": size.pixels // 14} if name == "vit_tiny" else {"width": 8} if size.dry else {}
    plain = models.build(name, 100, **arguments)
    ours = emq.convert(plain, emq.QuantSpec(bits=(2, 4, 8)))
    emq.set_bits(ours, bits)
    x = torch.randn(64 if not size.dry else 2, 3, size.pixels, size.pixels, device=size.device)
    y = torch.arange(len(x), device=size.device)
    with distributed.fastest_convolutions(size.device):
        steps = [step(net, x, y, "training", "bfloat16", "eager") for net in (plain, ours)]
        for each in steps * 2:
            timed(each, 2)
        seconds = [min(timed(each, size.steps // 5 or 1) for _ in range(3)) for each in steps]
    return {"speed, plain = 1": seconds[0] / seconds[1]}


def top1(size: Size, run: runs.Run, bits: int) -> dict[str, float]:
    """The accuracy of a network at `bits`; the first call trains it, or goes on with it."""
    if size.left < LAST:
        raise OutOfTime("no time is left to train")
    rows = runs.run_all([run], size.results, progress=False, budget=size.left - LAST)
    there = rows[rows.bits == bits]
    return dict(zip(there.adapted.map({False: "top-1, %", True: "adapted top-1, %"}), there.top1, strict=True))


def cases(size: Size) -> list[tuple[str, str, int, Callable[[], dict[str, float]], tuple[str, ...]]]:
    """What is measured: part, name, bits, function and what that returns."""
    found = [
        ("kernels", "Triton", b, partial(kernel_errors, size, b), ("error of weights", "error of gradients"))
        for b in (*range(1, 9), 32)
    ]
    rate = ("passes a second", "first step, s")
    found += [("paper's network", way, 4, partial(paper_step, size, way, 4), rate) for way in WAYS]
    found += [("paper's network", "graphs", b, partial(paper_step, size, "graphs", b), rate) for b in (1, 8, 32)]
    for b in (2, 4, 8):
        found += [
            ("larger", name, b, partial(larger_step, size, name, b), ("speed, plain = 1",)) for name in size.larger
        ]
    p = parameters(profile=size.profile, repeats=size.seeds, results_dir=size.results)
    for run in experiments.gpu_slices(p):
        name = f"{run.method}, correction {run.correction}, {run.coreset}, {run.config.epochs} epochs, seed"
        for b in run.spec.bits:
            trained = partial(top1, size, run, b)
            found.append(("trained", f"{name} {run.config.seed}", b, trained, ("top-1, %", "adapted top-1, %")))
    return found


def measured(size: Size | None) -> Iterator[pd.DataFrame]:
    """Rows: part, name, bits, what, value and a note, all of them after each part; without a size none is run."""
    rows, last = [], ""
    for part, name, bits, function, kinds in cases(size or Size(torch.device("cuda"))):
        if rows and part != last:
            yield pd.DataFrame(rows)
        last, values = part, dict.fromkeys(kinds)
        note = "" if size and size.left > 0 else "not run"
        if not note:
            try:
                values = function()
            except Exception as error:  # the other rows are worth having
                note = f"failed: {type(error).__name__}: {str(error)[:200]}"
        here = {"part": part, "name": name, "bits": bits}
        rows += [here | {"what": what, "value": value, "note": note} for what, value in values.items()]
        if size:
            print(f"{LIMIT - size.left:5.0f} s", part, name, f"{bits} bits", values, note, flush=True)
    device = torch.cuda.get_device_name() if size and not size.dry else "none"
    yield pd.DataFrame(rows).assign(device=device, torch=torch.__version__)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, numbers to four digits; of a part that was not run, one row."""
    value = rows.value.map(lambda v: "" if pd.isna(v) else f"{v:.4g}")
    table = rows[["part", "name", "bits", "what"]].assign(value=value, note=rows.note.fillna(""))
    table = table.replace({"part": {"larger": "larger networks", "trained": "training runs"}}).astype({"bits": object})
    table.loc[table.note.eq("not run"), ["name", "bits", "what"]] = ""
    names = {"name": "way, network or run", "bits": "bit-width", "what": "measured, with its unit"}
    return table.drop_duplicates().rename(columns=names)


def figure(rows: pd.DataFrame) -> Axes:
    """Passes a second of the paper's network by way; dashed: the aim."""
    found = rows[rows.what.eq("passes a second") & rows.bits.eq(4)].assign(value=lambda t: t.value.astype(float))
    best = found.loc[found.value.idxmax()] if found.value.notna().any() else None
    fastest = "" if best is None else f"{best['name']} is the fastest, with {best.value:,.0f} passes a second"
    ax = plots.axes(None, f"The paper's network on a GPU: {fastest or 'not run yet'}")
    sns.barplot(found.fillna({"value": 0.0}), x="value", y="name", color=sns.color_palette("colorblind")[0], ax=ax)
    ax.axvline(35_000, **plots.NAMED, label="aim: 35,000")
    ax.legend()
    return plots.finish(ax, "passes a second at 4 bits", "")


def main(folder: Path, dry: bool) -> None:
    """Measure, and write after each part."""
    results = RESULTS.parent if folder == RESULTS else folder
    size = Size(torch.device("cuda"), results=results) if torch.cuda.is_available() else None
    if dry:
        small = {"width_factor": 1, "batch": 4, "steps": 2, "larger": ("resnet8",), "pixels": 32}
        trained = {"profile": "smoke", "seeds": 1, "results": results}
        size = Size(torch.device("cpu"), **small, **trained)
    if size is None and (folder / "gpu.csv").exists():
        print("no GPU here: the rows stay as they are")
        return
    with ExitStack() as quick:
        if dry:
            quick.enter_context(mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")))
            quick.enter_context(mock.patch.object(kernels, "runs_triton", lambda w: False))
        for rows in measured(size):
            tables.save(summary(rows), folder / "gpu", rows)
            plots.save(figure(rows), folder / "gpu")


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:] if not word.startswith("--")]
    dry = "--dry" in sys.argv
    main(given[0] if given else Path(tempfile.mkdtemp()) if dry else RESULTS, dry)
