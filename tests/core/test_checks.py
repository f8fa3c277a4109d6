"""How wrong arguments are told: which values pass, and that the error names parameter, value and what is allowed."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
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


def test_what_cannot_be_shown_is_named_by_its_type() -> None:
    assert str(checks.invalid("x", 10**5000, "less")) == "x=<int>: expected less"
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert str(checks.invalid("x", deep, "less")) == "x=<list>: expected less"
    while deep:
        deep = deep.pop()  # all at once would take as deep a stack
    assert len(str(checks.invalid("x", "a" * 10**6, "less"))) < 1100


def test_an_integer_fits_64_bits() -> None:
    assert checks.integer("seed", 2**63 - 1, 0) == 2**63 - 1
    with pytest.raises(ValueError, match=r"^seed=9223372036854775808: expected an integer >= 0, of 64 bits$"):
        checks.integer("seed", 2**63, 0)


def test_path(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing", "nothing/below", "file/below"):
        assert checks.path("path", tmp_path / name) == checks.path("path", str(tmp_path / name)) == tmp_path / name
    for wrong in ("", None, b"a", 3, "a\0b", "a" * 300, tmp_path / ("a" * 300), "\ud800"):
        with pytest.raises(ValueError, match=r"(?s)^path=.*: expected the name of a file or folder$"):
            checks.path("path", wrong)
    with pytest.raises(ValueError, match=r"^path=.*: expected the name of a file$"):
        checks.file_name("path", tmp_path / "folder")


def test_table() -> None:
    rows = pd.DataFrame({"a": [1], "b": [2]})
    assert checks.table("rows", rows) is rows and checks.table("rows", rows, ["b", "a"]) is rows
    with pytest.raises(ValueError, match=r"^rows=\['a', 'b'\]: expected the column 'c' too$"):
        checks.table("rows", rows, ["a", "c"])
    with pytest.raises(ValueError, match=r"^rows='none': expected a DataFrame of one row at least$"):
        checks.table("rows", rows[:0], ["a"])
    with pytest.raises(ValueError, match=r"^rows=\{'a': \[1\]\}: expected a DataFrame"):
        checks.table("rows", {"a": [1]})


def test_tensor() -> None:
    x = torch.ones(2, 2)
    assert checks.tensor("x", x, "a table") is x and checks.tensor("x", x, "a table", dims=2) is x
    for wrong in (None, [1.0], np.ones((2, 2)), x[0], x * 1j):
        with pytest.raises(ValueError, match=r"(?s)^x=.*: expected a table$"):
            checks.tensor("x", wrong, "a table", dims=2)
