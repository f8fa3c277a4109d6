"""Argument checks: one place that words every error as `name=value: expected ...`, before any work starts."""

import inspect
import math
import operator
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pandas as pd
from torch import Tensor

BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 32)
_LARGEST = 2**63 - 1  # of what tensors, files and seeds hold


def invalid(name: str, value: object, expected: str) -> ValueError:
    """The error for a wrong argument, `name=value: expected ...`; the caller raises it."""
    return ValueError(f"{name}={_shown(value)}: expected {expected}")


@contextmanager
def expecting(name: str, value: object, expected: str) -> Iterator[None]:
    """Within the block, whatever goes wrong but a lack of memory is a ValueError that says what was expected.

    It is for what may raise anything: the contents of a file, or what somebody else has written.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        told = error if isinstance(error, ValueError) else repr(error)  # a KeyError says no more than the key
        raise invalid(name, value, f"{expected} ({told})") from error


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python writes, lists nested too deep, a __repr__ that fails
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 1000 else f"{text[:800]} ... {text[-100:]}"


def choice(name: str, value: Any, allowed: Collection[str | bool]) -> Any:
    """`value`, if it is one of the `allowed` names, or True or False; ValueError that lists them otherwise."""
    if not isinstance(value, (str, bool)) or value not in allowed:
        raise invalid(name, value, "one of " + ", ".join(sorted(map(str, allowed))))
    return value


class Own(str):
    """The name of a function of one's own, which files and tables hold, with the `function` itself."""

    function: Callable[..., Any]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Own":
        """Name a function by its module and its name there."""
        own = cls(f"{function.__module__}.{function.__qualname__}")
        own.function = function
        return own


def choice_or_own(name: str, value: Any, known: Collection[str], what: str, attempt: Callable[[Any], object]) -> str:
    """`value`, if it is one of the `known` names; a function at the top of a module becomes an `Own`.

    `what` says in words what the function takes and returns. `attempt` is called with the function and
    raises any exception if the function does not do that. ValueError: any other `value`.
    """
    if isinstance(value, Own) or (isinstance(value, str) and value in known):
        return value
    expected = f"one of {', '.join(sorted(known))}, or a function {what}"
    if not inspect.isfunction(value):
        raise invalid(name, value, expected)
    if "<" in value.__qualname__:  # two of them may have one name
        raise invalid(name, value, "a function that is defined in a module, not inside another function or by lambda")
    with expecting(name, value, expected):
        attempt(value)
    return Own.of(value)


def integer(name: str, value: Any, low: float, high: float | None = None) -> int:
    """`value` as an int in [low, high]; ValueError for anything else, True and 2.0 included."""
    span = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    try:
        number = operator.index(value)
    except Exception:  # whatever an object's own __index__ raises
        raise invalid(name, value, span) from None
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        raise invalid(name, value, span)
    if number > _LARGEST:
        raise invalid(name, value, f"{span}, of 64 bits")
    return number


def real(name: str, value: Any, expected: str, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a finite float with low <= value <= high; `expected` is how the ValueError puts that."""
    try:
        number = float(value)
    except Exception:  # whatever an object's own __float__ raises
        raise invalid(name, value, expected) from None
    if isinstance(value, (bool, str)) or not math.isfinite(number) or not low <= number <= high:
        raise invalid(name, value, expected)
    return number


def pruning_rate(value: Any) -> float:
    """The fraction of the training set a child does NOT see, in [0, 1)."""
    below_1 = math.nextafter(1, 0)
    return real("pruning_rate", value, "a fraction in [0, 1), for example 0.8 to keep 20 %", 0, below_1)


def flag(name: str, value: Any) -> bool:
    """`value`, if it is True or False; ValueError for 0, 1, "yes" and everything else."""
    return instance(name, value, bool, "True or False")


def path(name: str, value: Any, expected: str = "the name of a file or folder") -> Path:
    """`value`, a str or Path, there or not; ValueError for anything else, and for what no file can be called."""
    if not isinstance(value, (str, Path)) or not str(value):
        raise invalid(name, value, expected)
    try:
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError):  # too long, a loop of links, a null byte
        raise invalid(name, value, expected) from None
    return Path(value)


def file_name(name: str, value: Any) -> Path:
    """The file that `value`, a str or Path, names; ValueError for anything else, and for a folder."""
    file = path(name, value, "the name of a file")
    if file.is_dir():
        raise invalid(name, value, "the name of a file")
    return file


def instance(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
    """`value`, if it is of that `kind`; ValueError otherwise."""
    if not isinstance(value, kind):
        raise invalid(name, value, expected)
    return value


def tensor(name: str, value: Any, expected: str, dims: int | None = None) -> Tensor:
    """`value`, if it is a real tensor, of `dims` dimensions where they are given (any shape else); else ValueError."""
    if not isinstance(value, Tensor) or value.is_complex() or dims not in (None, value.dim()):
        raise invalid(name, value, expected)
    return value


def table(name: str, value: Any, columns: Iterable[str] = ()) -> pd.DataFrame:
    """`value`, if it is a DataFrame that has a row at least, and these columns; ValueError otherwise."""
    expected = "a DataFrame of one row at least"
    if instance(name, value, pd.DataFrame, expected).empty:
        raise invalid(name, "none", expected)
    missing = next((column for column in columns if column not in value), None)
    if missing is not None:
        raise invalid(name, list(value.columns), f"the column {missing!r} too")
    return value


def bit_width(name: str, value: Any) -> int:
    """One bit-width: 1 to 8, or 32 for 'not quantized'."""
    try:
        bits = integer(name, value, 1)
    except ValueError:
        bits = 0
    if bits not in BIT_WIDTHS:
        raise invalid(name, value, "a bit-width: 1 to 8, or 32 for not quantized")
    return bits


def bit_widths(name: str, value: Any) -> tuple[int, ...]:
    """Several bit-widths, ascending; ValueError when empty, repeated, or not bit-widths."""
    expected = "bit-widths out of 1 to 8 and 32, none twice, for example (2, 4, 8)"
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise invalid(name, value, expected)
    try:
        items = list(islice(value, len(BIT_WIDTHS) + 1))  # no more are needed to see that some stand twice
        bits = tuple(sorted(bit_width(name, item) for item in items))
    except Exception:  # whatever iterating raises
        raise invalid(name, value, expected) from None
    if not bits or len(set(bits)) < len(bits):
        raise invalid(name, items, expected)
    return bits


@dataclass(frozen=True)
class Range:
    """Bounds of a number, as the annotation of a dataclass field: `lr: Annotated[float, Range(0, low_open=True)]`."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False  # whether `low` itself is refused
    high_open: bool = False  # whether `high` itself is refused

    def number(self, name: str, value: Any, kind: type) -> Any:
        """`value` as a plain int or float within the bounds; ValueError that states them otherwise."""
        expected = "an integer" if kind is int else "a number"
        if self.high < math.inf:
            left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
            expected += f" in {left}{self.low:g}, {self.high:g}{right}"
        elif self.low > -math.inf:
            expected += f" {'>' if self.low_open else '>='} {self.low:g}"
        low = math.nextafter(self.low, math.inf) if self.low_open else self.low
        high = math.nextafter(self.high, -math.inf) if self.high_open else self.high
        try:
            return integer(name, value, low, high) if kind is int else real(name, value, expected, low, high)
        except ValueError:
            raise invalid(name, value, expected) from None


def fields(config: Any) -> None:
    """Check every field of a frozen dataclass against its annotation, in its `__post_init__`.

    An annotation is a Literal of names, bool, str, a class, `int` or `float` (with a `Range`), or any type with a
    function `check(name, value)` that returns the value to keep; `X | None` allows None. Numbers become plain int and
    float, so that a config goes into JSON. ValueError: names the field, its value and what is allowed.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        object.__setattr__(config, name, _as_annotated(name, getattr(config, name), hint))


def _as_annotated(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        kind, check = get_args(hint)
        return check.number(name, value, kind) if isinstance(check, Range) else check(name, value)
    if get_origin(hint) is Literal:
        return choice(name, value, get_args(hint))
    if get_origin(hint) in (UnionType, Union):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return None if value is None else _as_annotated(name, value, kinds[0])
    if hint is bool:
        return flag(name, value)
    if hint in (int, float):
        return Range().number(name, value, hint)
    return instance(name, value, get_origin(hint) or hint, f"a {getattr(hint, '__name__', hint)}")
