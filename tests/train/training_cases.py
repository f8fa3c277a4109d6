"""Small networks and runs that several tests of training share."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import emqlib as emq
from emqlib import Dataset, QuantSpec, TrainConfig
from emqlib import files as container
from emqlib.train import checkpoint as checkpoints
from emqlib.train import loop as training

BITS = (2, 4, 8)


def tiny(bits: tuple[int, ...] = BITS, init: int = 0, dropout: float = 0.0, **spec: Any) -> nn.Module:
    """First, quantized and last layer, batch norms, and dropout if wanted.

    No bias before a batch norm: its gradient is zero but for rounding, and AdamW would make steps of that.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init)
        first, second = (
            [nn.Conv2d(inputs, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()] for inputs in (3, 6)
        )
        head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(24, 10)]
        net = nn.Sequential(*first, nn.Dropout(dropout), *second, *head)
        return emq.convert(net, QuantSpec(bits=bits, **spec))


def quick(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 25, "lr": 0.05} | fields)


def train(model: nn.Module, data: Dataset, config: TrainConfig, checkpoint: Path | None = None) -> pd.DataFrame:
    return emq.train(model, data, config, checkpoint=checkpoint, progress=False)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def kept(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history and the state in a checkpoint."""
    about, tensors = container.read(path, checkpoints.VERSION, "a checkpoint")
    return json.loads(about["history"]), container.restored(about["state"], tensors)


def assert_same_history(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"), check_exact=True)


class Stop(Exception):
    """Raised in the middle of an epoch."""


@contextmanager
def stopped_at(
    monkeypatch: pytest.MonkeyPatch, where: str, before: Callable[..., None] | None = None
) -> Iterator[None]:
    """Let `train` run into a Stop at the end of a step, or into what `before(run)` does ahead of it."""
    step = training._step

    def disturbed(run: Any, *args: Any) -> None:
        if before is not None and args[-1] == where:
            before(run)
        step(run, *args)
        if before is None and args[-1] == where:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", disturbed)
        yield
