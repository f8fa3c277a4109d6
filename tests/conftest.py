"""Fixtures that several test files share."""

import pytest
import torch
from hypothesis import settings

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
