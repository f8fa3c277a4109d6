"""Fixtures that several test files share."""

from typing import Any

import pytest
import torch
from hypothesis import settings

from emqlib import checkpoints, training

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator: every test draws the same numbers, whatever ran before it."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The tests' tensors are so small that a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is: a second later after each step, and else as late as before."""
    now, step = [0.0], training._step

    def timed(*args: Any) -> None:
        step(*args)
        now[0] += 1

    monkeypatch.setattr(training, "_step", timed)
    monkeypatch.setattr(checkpoints, "monotonic", lambda: now[0])
    return now
