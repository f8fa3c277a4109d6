"""Fixtures that several tests of training share."""

import pytest

import emqlib as emq
from emqlib import Dataset


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return emq.load_dataset("digits", image_size=8).subset(100, 50)
