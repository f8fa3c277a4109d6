"""Wrong input: told at once, by name, value and what is allowed, before a file is written or a step is taken."""

import inspect
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from bad_input import CASES, OF_ROWS, Case, function, table
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import emqlib as emq
from emqlib.paper.profiles import parameters

pyplot.switch_backend("agg")


@pytest.fixture
def work() -> Iterator[list[str]]:
    """The optimizer steps that are taken, and the layers that are called, within the test."""
    taken: list[str] = []
    hooks = [register_optimizer_step_pre_hook(lambda *_: taken.append("step"))]
    hooks.append(register_module_forward_pre_hook(lambda *_: taken.append("layer")))
    yield taken
    for hook in hooks:
        hook.remove()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and the place of temporary files, with a file and a folder in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "FILE").write_text("old")
    (tmp_path / "FOLDER").mkdir()
    return tmp_path


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*")}


def begun(path: str, arguments: dict[str, Any]) -> None:
    """Call the function; of a generator or a `with` block, the first part."""
    result = function(path)(**arguments)
    if inspect.isgenerator(result):
        next(result)
    elif hasattr(result, "__enter__"):
        result.__enter__()


def named(case: Case) -> str:
    value = "huge" if isinstance(case.value, int) and case.value > 10**30 else case.value
    label = re.sub(r"[^ -~]", "", getattr(value, "__name__", "") or str(value))
    return f"{case.path}-{case.parameter}-{label[:20].strip()}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_wrong_value_is_told_before_any_work(case: Case, here: Path, work: list[str]) -> None:
    arguments = case.arguments()
    before = contents(here)
    work.clear()
    with pytest.raises(ValueError, match=rf"(?s)^{re.escape(case.told)}=.*: expected .+") as error:
        begun(case.path, arguments)
    parsed = case.path == "paper.profiles.parameters"  # which tells what it read in a text
    if not parsed and isinstance(case.value, (type(None), float, str)) and len(repr(case.value)) < 100:
        assert repr(case.value) in str(error.value) or type(case.value).__name__ in str(error.value)
    assert contents(here) == before
    assert "step" not in work and len(work) < 100  # some look at what a pass through a small network gives
    pyplot.close("all")


# Which functions have a case

# They take what checked functions of their module hand over, in every step of training.
UNCHECKED = {
    "quantizers": "is_full round_ste fake_quantize dorefa_grid learned_grid pact_step weight_grid"
    " dorefa_weight minmax_weight lsq_weight dorefa_activation pact_activation lsq_activation",
    "coreset": "spread",
}


def public_functions() -> set[str]:
    """What `import emqlib` gives, and the functions of the modules that it gives."""
    found = set()
    for name in emq.__all__:
        given = getattr(emq, name)
        if not inspect.ismodule(given):
            found.add(name)
            continue
        own = [f for _, f in inspect.getmembers(given, inspect.isfunction) if f.__module__ == given.__name__]
        found |= {f"{name}.{f.__name__}" for f in own if f.__name__[0] != "_"}
    return found


def test_every_public_function_has_a_case() -> None:
    unchecked = {f"{module}.{name}" for module, names in UNCHECKED.items() for name in names.split()}
    unchecked |= {"Dataset"}  # made by the library itself
    tried = {case.path for case in CASES}
    assert public_functions() - tried == unchecked


@pytest.mark.parametrize(("path", "source", "right"), OF_ROWS, ids=[path for path, _, _ in OF_ROWS])
def test_a_table_without_a_column(path: str, source: str, right: dict[str, Any]) -> None:
    """The column is named, or was not needed."""
    draw, whole, needed = function(f"paper.{path}"), table(source), 0
    draw(whole, **right)  # the whole table is right
    for column in whole.columns.difference(UNUSED):
        try:
            draw(whole.drop(columns=column), **right)
        except ValueError as error:
            assert re.match(rf"(rows|draws|histograms)=.*: expected the column '{column}' too$", str(error))
            needed += 1
        pyplot.close("all")
    assert needed >= 2


UNUSED = ["commit", "dirty", "python", "torch", "torchvision", "device", "data_sha256", "loss", "n", "norm"]


# Anything at all


class Hostile:
    """Whatever it is asked to be, it raises."""

    def fail(self, *_: object) -> NoReturn:
        raise ArithmeticError("no")

    __index__ = __float__ = __bool__ = __len__ = __iter__ = __repr__ = __str__ = __fspath__ = fail


SHAPES = st.lists(st.integers(0, 2), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64, torch.bfloat16])
WORDS = ["auto", "top", "sample", "joint", "tdds", "none", "first", torch.bfloat16, emq.TrainConfig, range(9)]
LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(-4, 40), st.floats(), st.text(), st.binary()),
    *(st.complex_numbers(), st.fractions(), st.decimals(), st.just(10**5000), st.builds(Hostile)),
    *(st.builds(np.float32, st.floats(0, 1)), st.builds(np.int64, st.integers(0, 9)), st.builds(np.ones, SHAPES)),
    *(st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, DTYPES), st.sampled_from(WORDS)),
)
HASHED = st.one_of(st.none(), st.integers(-4, 40), st.text(max_size=3))
ANYTHING = st.one_of(
    *(LEAVES, st.lists(LEAVES, max_size=3), st.tuples(LEAVES, LEAVES), st.sets(HASHED, max_size=3)),
    st.dictionaries(HASHED, LEAVES, max_size=3),
)
# A value that is right alone may ask another field for something.
PARTNERS = {"momentum": "nesterov", "candidates": "score", "scoring_epochs": "score"}


def fits_or_is_told(call: Callable[..., object], name: str, value: object, **right: object) -> None:
    try:
        call(**right | {name: value})
    except ValueError as error:
        assert re.match(rf"(?s)({name}|{PARTNERS.get(name, name)})=.*: expected .+", str(error)), str(error)


@pytest.mark.parametrize("config", [emq.QuantSpec, emq.TrainConfig, emq.CoresetConfig])
@given(data=st.data())
@settings(max_examples=300)
def test_any_field_of_a_config(config: type, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([field.name for field in fields(config)]))
    right = {"bits": (2, 4)} if config is emq.QuantSpec else {}
    fits_or_is_told(config, name, data.draw(ANYTHING), **right)


def written(value: object) -> str:
    """As papermill writes it."""
    return "9" * 5000 if isinstance(value, int) and abs(value) > 10**4000 else repr(value)


NASTY = ["[" * 10_000, "(" * 200 + ")" * 200, "9" * 5000, "1e999", "10**10**10", "__import__('os').system('exit')"]
NASTY += ["\0", "\ud800", "imagefolder:\0", "imagefolder:~nobody/x", "a" * 5000, "~nobody", "-" * 5000 + "1", "timm."]
TEXTS = st.one_of(st.text(), st.sampled_from(NASTY), LEAVES.filter(lambda x: not isinstance(x, Hostile)).map(written))


@given(name=st.sampled_from(sorted(inspect.signature(parameters).parameters)), value=st.one_of(ANYTHING, TEXTS))
@settings(max_examples=400)
def test_any_parameter_of_a_notebook(name: str, value: object) -> None:
    fits_or_is_told(parameters, name, value, profile="smoke")


# Files that ask for more than they hold

HUGE = [
    {"name": "resnet8", "num_classes": 10, "width": 10**9},
    {"name": "resnet50", "num_classes": 10**6},
    {"name": "vit_small", "num_classes": 10, "depth": 100, "width": 4096, "heads": 1},
    {"name": "resnet8", "num_classes": 10, "no_such_argument": 1},
    {"name": "../resnet8", "num_classes": 10},
    [1, 2],
]


@pytest.mark.parametrize("recipe", HUGE, ids=str)
def test_a_file_that_asks_for_what_it_does_not_hold(recipe: object, here: Path) -> None:
    model = emq.convert(emq.models.resnet8(10, width=2), emq.QuantSpec(bits=(2, 4)))
    model.emq.network = recipe
    emq.save(model, "hostile.safetensors")
    before = getrusage(RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"(?s)^path='hostile.safetensors': expected a network of emqlib.models"):
        emq.load("hostile.safetensors")
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
