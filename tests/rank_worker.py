"""One rank of training runs, for test_ranks: `torchrun --nproc_per_node 2 tests/rank_worker.py FOLDER CASE ...`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import emqlib as emq
from emqlib import loading
from emqlib.data import normalize
from emqlib.ranks import current

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
    "features": ({}, {"coreset": emq.CoresetConfig(**SCORED | {"score": "grand", "rescore": True})}),
}


def network(**spec: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    return emq.convert(net, emq.QuantSpec(**{"bits": (2, 8)} | spec))


def run(case: str, checkpoint: Path | None = None, observe: Any = None) -> dict[str, Any]:
    """History, coresets and weights of one training run."""
    spec, fields = CASES[case]
    data = emq.load_dataset("digits").subset(120, 60)
    model = network(**spec).double()  # in float32 a rounding error could lift a weight over a quantization step
    single, loading.normalize = loading.normalize, lambda *x: normalize(*x).double()
    config = emq.TrainConfig(**{"epochs": 4, "batch_size": 30, "lr": 0.02, "device": "cpu"} | fields)
    try:
        history = emq.train(model, data, config, checkpoint, progress=False, observe=observe)
    finally:
        loading.normalize = single
    found = {name: p.flatten().tolist() for name, p in model.state_dict().items() if p.is_floating_point()}
    return {"loss": history.loss.tolist(), "coresets": history.attrs["coresets"], "state": found}


def main(folder: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    place = current("cpu")
    checkpoint = folder / "run.pt"

    def kill(_: nn.Module) -> None:
        if place.rank == 1 and checkpoint.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    for case in cases:
        if case == "killed":
            run("bitwise", checkpoint, kill)
        found = run("bitwise", checkpoint) if case == "resumed" else run(case)
        found |= {"rank": place.rank, "count": place.count}
        (folder / f"{case}-{place.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
