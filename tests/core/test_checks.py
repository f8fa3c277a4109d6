"""How wrong arguments are told: which values pass, and that the error names parameter, value and what is allowed."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emqlib import checks

# Each check with what it takes, what it refuses, and what it says is allowed
CHECKS: dict[str, tuple[Callable[[Any], Any], list[Any], list[Any], str]] = {
    "choice": (
        lambda v: checks.choice("x", v, ("top", "sample")),
        ["top", "sample"],
        ["Top", "", None, 1, ["top"], ("top",)],
        r"one of sample, top$",
    ),
    "integer": (
        lambda v: checks.integer("x", v, 1, 5),
        [1, 5, np.int64(3), torch.tensor(3)],
        [0, 6, -1, True, 3.0, "3", None, [3], torch.tensor([3, 4]), math.inf],
        r"an integer in \[1, 5\]$",
    ),
    "an integer of 64 bits": (
        lambda v: checks.integer("x", v, 0),
        [0, 2**63 - 1],
        [2**63],
        r"an integer >= 0, of 64 bits$",
    ),
    "real": (
        lambda v: checks.real("x", v, "a number in [0, 1]", 0, 1),
        [0.5, 1, Fraction(1, 2), np.float32(0.5), torch.tensor(0.5)],
        [-0.1, 1.1, math.nan, math.inf, -math.inf, True, "0.5", None, [0.5]],
        r"a number in \[0, 1\]$",
    ),
    "range": (
        lambda v: checks.Range(0, 1, low_open=True).number("x", v, float),
        [1, 1e-300],
        [0, -0.0, 1.1, True, None],
        r"a number in \(0, 1\]$",
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_what_passes_and_what_is_told_of_the_rest(name: str) -> None:
    check, right, wrong, expected = CHECKS[name]
    for value in right:
        assert check(value) == value and type(check(value)) in (str, int, float, bool)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"(?s)^x=.*: expected {expected}"):
            check(value)


@given(st.lists(st.sampled_from((*checks.BIT_WIDTHS, 0, 9, 16)), max_size=4))
def test_bit_widths(values: list[int]) -> None:
    if values and len(set(values)) == len(values) and set(values) <= set(checks.BIT_WIDTHS):
        for kind in (list, tuple, set, iter):
            assert checks.bit_widths("bits", kind(values)) == tuple(sorted(values))
    else:
        with pytest.raises(ValueError, match=r"^bits=\[.*\]: expected bit-widths out of 1 to 8 and 32, none twice"):
            checks.bit_widths("bits", values)


def test_what_cannot_be_shown_is_named_by_its_type() -> None:
    assert str(checks.invalid("x", 10**5000, "less")) == "x=<int>: expected less"
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert str(checks.invalid("x", deep, "less")) == "x=<list>: expected less"
    while deep:
        deep = deep.pop()  # all at once would take as deep a stack
    assert len(str(checks.invalid("x", "a" * 10**6, "less"))) < 1100


def test_path(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing", "nothing/below", "file/below"):
        assert checks.path("path", tmp_path / name) == checks.path("path", str(tmp_path / name)) == tmp_path / name
