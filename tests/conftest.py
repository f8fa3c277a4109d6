"""Fixtures that several test files share."""

import pytest
import torch


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator: every test draws the same numbers, whatever ran before it."""
    return torch.Generator().manual_seed(0)
