"""One process of training runs: `torchrun --nproc_per_node 2 tests/train/process_worker.py FOLDER CASE ...`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import emqlib as emq
from emqlib.norms import MultiBitBatchNorm
from emqlib.train import coresets as sampling
from emqlib.train import data as loading
from emqlib.train import distributed
from emqlib.train.checkpoint import OutOfTime
from emqlib.train.data import normalize
from emqlib.train.distributed import Place, current

SCORED = {"score": "el2n", "pruning_rate": 0.5, "scoring_epochs": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # fields of QuantSpec and TrainConfig
    "bitwise": ({}, {"coreset": emq.CoresetConfig(**SCORED)}),
    "joint": ({"norm": "switchable"}, {"scheme": "joint", "distillation": True, "clip_grad_norm": 1.0}),
    "learned": ({"weight": "lsq", "activation": "lsq", "norm": "shared_affine"}, {"batch_size": 31}),
    "tracked": (
        {"activation_range": "tracked", "output_correction": True, "norm": "shared_affine"},
        {"batch_size": 20},
    ),
    "features": ({}, {"coreset": emq.CoresetConfig(**SCORED | {"score": "grand"})}),
}


def network(dropout: float = 0.0, **spec: Any) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU()]
    second = [nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*first, *second, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(8, 10))
    return emq.convert(net, emq.QuantSpec(**{"bits": (2, 8)} | spec))


def run(
    case: str, checkpoint: Path | None = None, observe: Any = None, dropout: float = 0.0, budget: float | None = None
) -> dict[str, Any]:
    """History, coresets and weights of one training run."""
    spec, fields = CASES[case]
    data = emq.load_dataset("digits").subset(120, 60)
    model = network(dropout, **spec).double()  # in float32 rounding could lift a weight over a quantization step
    single, loading.normalize = loading.normalize, lambda *x: normalize(*x).double()
    config = emq.TrainConfig(**{"epochs": 4, "batch_size": 30, "lr": 0.02, "device": "cpu"} | fields)
    try:
        history = emq.train(model, data, config, checkpoint, progress=False, observe=observe, budget=budget)
    finally:
        loading.normalize = single
    found = {name: p.flatten().tolist() for name, p in model.state_dict().items() if p.is_floating_point()}
    return {"loss": history.loss.tolist(), "coresets": history.attrs["coresets"], "state": found}


def own_loop(whole: bool = True, damaged: bool = False) -> dict[str, Any]:
    """The coresets that a loop of one's own draws, after this process has observed its part of every batch.

    whole: whether it is; else the last batch of an epoch is not observed, and nothing is saved between epochs.
    damaged: whether the first sample of an epoch cannot be read, which only the first process notices.
    """
    labels, logits = torch.arange(50) % 3, torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    config = emq.CoresetConfig(score="grand", pruning_rate=0.5, how="sample")
    coresets, seen, exchange, counts = emq.Coresets(labels, (2, 8), config, epochs=3), [], mock.Mock(), []
    for epoch in range(3):
        before = exchange.call_count
        batches = coresets.batches(epoch, 9)
        with coresets.watching(nn.Linear(3, 3)), mock.patch.multiple(dist, **exchanges(exchange)):
            for number, (bits, i) in enumerate(batches if whole else batches[:-1]):
                seen.append([bits, *i.tolist()])
                read = i[1:] if damaged and number == 0 and current("cpu").main else i
                coresets.observe(bits, read, logits[bits // 8, read], labels[read], logits[0, read])
        counts.append(exchange.call_count - before)
        if not whole:
            continue
        state = coresets.state_dict()  # a process that goes on has no scores of its own but the main one's
        coresets = emq.Coresets(labels, (2, 8), config, epochs=3)
        coresets.load_state_dict(state)
    return {"seen": seen, "rows": coresets.rows, "exchanges": counts}


def norm_in_parts(place: Place) -> dict[str, Any]:
    """How often batch norm exchanges numbers each way, and its largest relative errors against that of the whole."""
    calls, found = [], {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        full = torch.float64 if dtype == torch.float64 else torch.float32
        x, grad = (torch.randn(9, 5, 4, 3, dtype=full).add(3).to(dtype) for _ in range(2))
        whole = nn.BatchNorm2d(5).to(full)
        norm = MultiBitBatchNorm(whole, emq.QuantSpec(bits=(2, 8)))
        xs = [x.clone().requires_grad_(), place.part(x).clone().requires_grad_()]
        y = whole(xs[0])
        y.backward(grad)
        exchange = mock.Mock()
        with distributed.synchronized(norm, place), mock.patch.multiple(dist, **exchanges(exchange)):
            ours = norm(xs[1])
            calls.append(exchange.call_count)
            ours.backward(place.part(grad))
            calls.append(exchange.call_count)
        pairs = [(ours, place.part(y)), (xs[1].grad, place.part(xs[0].grad))]
        pairs += zip(norm.statistics(), (whole.running_mean, whole.running_var), strict=True)
        for ours, theirs in zip((norm.weight, norm.bias), whole.parameters(), strict=True):
            pairs.append((distributed.gather(ours.grad[0]).sum(0), theirs.grad))
        found[str(dtype)] = [float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs]
    return {"calls": calls, "errors": found}


def exchanges(seen: mock.Mock) -> dict[str, Any]:
    """Every collective operation that `distributed` uses, each counted by `seen` before it does its work."""

    def counted(operation: Any) -> Any:
        return lambda *args, **kwargs: (seen(), operation(*args, **kwargs))[1]

    names = ("all_reduce", "all_gather", "all_gather_object", "gather_object", "broadcast_object_list")
    return {name: counted(getattr(dist, name)) for name in names}


def in_slices(index: int, checkpoint: Path) -> dict[str, Any]:
    """Whether a run in calls of one epoch, by the main process's budget alone, ends as one that is not disturbed."""
    whole, stops = run("bitwise", dropout=0.3), 0
    while True:
        try:
            found = run("bitwise", checkpoint, dropout=0.3, budget=1e-9 if index == 0 else 1e9)
            return {"same": found == whole, "stops": stops}
        except OutOfTime:
            stops += 1


def main(folder: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    place = current("cpu")
    checkpoint = folder / "run.pt"

    def kill(_: nn.Module) -> None:
        if place.index == 1 and checkpoint.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    for case in cases:
        if case == "killed":
            run("bitwise", checkpoint, kill)
        if case == "sliced":
            found = in_slices(place.index, folder / "sliced.pt")
        elif case == "own loop":
            found = own_loop()
        elif case == "often":
            with mock.patch.object(sampling, "WAITING", 9):  # two batches of six numbers a sample are more
                found = own_loop()
        elif case == "not whole":
            found = own_loop(whole=False)
        elif case == "damaged":
            found = own_loop(damaged=True)
        elif case == "norm":
            found = norm_in_parts(place)
        else:
            found = run("bitwise", checkpoint) if case == "resumed" else run(case)
        found |= {"index": place.index, "count": place.count}
        (folder / f"{case}-{place.index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
