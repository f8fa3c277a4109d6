"""How wrong arguments are told: which values pass, and that the error names parameter, value and what is allowed."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emqlib import checks

anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers())
)


def test_choice() -> None:
    assert checks.choice("how", "top", ("top", "sample")) == "top"
    for wrong in ("Top", "", None, 1, ["top"], ("top",)):
        with pytest.raises(ValueError, match=r"^how=.*: expected one of sample, top$"):
            checks.choice("how", wrong, ("top", "sample"))


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_integers_of_every_kind_become_int(value: object) -> None:
    assert checks.integer("epochs", value, 1) == 3 and type(checks.integer("epochs", value, 1)) is int
    assert checks.bit_widths("bits", [value]) == (3,)


@pytest.mark.parametrize("value", [0, 6, -1, True, 3.0, "3", None, [3], torch.tensor([3, 4]), math.inf])
def test_wrong_integer(value: object) -> None:
    with pytest.raises(ValueError, match=r"^epochs=.*: expected an integer in \[1, 5\]$"):
        checks.integer("epochs", value, 1, 5)
    with pytest.raises(ValueError, match=r"^epochs=-7: expected an integer >= 1$"):
        checks.integer("epochs", -7, 1)


def test_real() -> None:
    for value in (0.5, 1, Fraction(1, 2), np.float32(0.5), torch.tensor(0.5)):
        assert checks.real("lr", value, "a number in [0, 1]", 0, 1) == float(value)
    for wrong in (-0.1, 1.1, math.nan, math.inf, -math.inf, True, "0.5", None, [0.5]):
        with pytest.raises(ValueError, match=r"^lr=.*: expected a number in \[0, 1\]$"):
            checks.real("lr", wrong, "a number in [0, 1]", 0, 1)


def test_pruning_rate() -> None:
    assert [checks.pruning_rate(v) for v in (0, 0.8, np.float64(0.999))] == [0, 0.8, 0.999]
    for wrong in (1, 1.0, -0.01, 80, math.nan, True, "0.8", None):
        with pytest.raises(ValueError, match=r"^pruning_rate=.*: expected a fraction in \[0, 1\), for example 0.8"):
            checks.pruning_rate(wrong)


def test_flag() -> None:
    assert checks.flag("amp", True) is True and checks.flag("amp", False) is False
    for wrong in (0, 1, "yes", None, np.True_):
        with pytest.raises(ValueError, match=r"^amp=.*: expected True or False$"):
            checks.flag("amp", wrong)


@given(anything)
def test_bit_width(value: object) -> None:
    if type(value) is int and value in (*range(1, 9), 32):
        assert checks.bit_width("bits", value) == value
    else:
        with pytest.raises(ValueError, match=r"(?s)^bits=.*: expected a bit-width: 1 to 8, or 32 for not quantized$"):
            checks.bit_width("bits", value)


@given(st.lists(st.sampled_from((*checks.BIT_WIDTHS, 0, 9, 16)), max_size=4))
def test_bit_widths(values: list[int]) -> None:
    if values and len(set(values)) == len(values) and set(values) <= set(checks.BIT_WIDTHS):
        for kind in (list, tuple, set, iter):
            assert checks.bit_widths("bits", kind(values)) == tuple(sorted(values))
    else:
        with pytest.raises(ValueError, match=r"^bits=\[.*\]: expected bit-widths out of 1 to 8 and 32, none twice"):
            checks.bit_widths("bits", values)


@pytest.mark.parametrize("value", ["248", b"\x02\x04", {2: 4}, 4, None, (2, "4"), (2, True), (2.0,), [[2]]])
def test_wrong_bit_widths(value: object) -> None:
    with pytest.raises(
        ValueError, match=r"^bits=.*: expected bit-widths out of 1 to 8 and 32.*for example \(2, 4, 8\)$"
    ):
        checks.bit_widths("bits", value)
