"""Wrong input: told at once, by name, value and what is allowed, before a file is written or a step is taken."""

import importlib
import inspect
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import process_time
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
import torch
from bad_input import CASES, OF_ROWS, Case, late, table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

import emqlib as emq
from emqlib.profiles import parameters

pyplot = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("seaborn")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pyplot.switch_backend("agg")


@pytest.fixture
def steps() -> Iterator[list[object]]:
    """The optimizer steps that are taken within the test."""
    taken: list[object] = []
    hook = register_optimizer_step_pre_hook(lambda *_: taken.append(1))
    yield taken
    hook.remove()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and the place of temporary files, with a file and a folder in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("EMQ_PROFILE", raising=False)
    (tmp_path / "FILE").write_text("old")
    (tmp_path / "FOLDER").mkdir()
    return tmp_path


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*")}


def made(value: object) -> object:
    return value.make() if isinstance(value, late) else value


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_wrong_value(case: Case, here: Path, steps: list[object]) -> None:
    arguments = {name: made(value) for name, value in (case.right | {case.parameter: case.value}).items()}
    before, start = contents(here), process_time()
    with pytest.raises(ValueError, match=rf"(?s)^{re.escape(case.told)}=.*: expected .+") as error:
        case.call(**arguments)
    parsed = case.name.startswith(
        ("parameters-", "experiments.main-", "suite.main-")
    )  # and told as what was read in it
    if not parsed and isinstance(case.value, (type(None), float, str)) and len(repr(case.value)) < 100:
        assert repr(case.value) in str(error.value) or type(case.value).__name__ in str(error.value)
    assert process_time() - start < 2
    assert contents(here) == before and not steps
    pyplot.close("all")


# Which functions have a case: all, but for those that take what is known to be right

EXEMPT = {
    "the checks themselves, see test_checks": {"checks"},
    "in every step of training, on what the checked functions of its module hand over": {
        *("quantizers.is_full", "quantizers.round_ste", "quantizers.fake_quantize", "quantizers.unsigned_grid"),
        *("quantizers.signed_grid", "quantizers.step", "quantizers.dorefa_weight", "quantizers.minmax_weight"),
        *("quantizers.lsq_weight", "quantizers.lsq_initial_scale", "quantizers.scale_gradient"),
        *("quantizers.affine_grid", "quantizers.dorefa_grid", "quantizers.learned_grid", "quantizers.pact_step"),
        *("quantizers.dorefa_activation", "quantizers.pact_activation", "quantizers.lsq_activation"),
        *("quantizers.weight_grid", "coreset.entropy_of", "coreset.el2n_of", "coreset.grand_of", "coreset.spread"),
        *("config.learning_rate", "norms.interpolation", "layers.nearest", "sampling.generator", "training.plan"),
        *("ranks.total", "ranks.mean", "ranks.lowest", "ranks.synchronized", "devices.autocast", "data.augment"),
        *("devices.noise", "devices.set_noise", "data.normalize", "multibit.quantized_layers", "finite"),
        *("versions.returned",),
    },
    "inside a function that has checked the network": {
        *("attention.open_attention", "signs.walk", "layers.geometry", "packing.pack_as_set", "packing.replaced"),
        *("remedies.gaussian_moments", "analysis.watched", "training.optimizer", "devices.memory_format"),
        *(
            "devices.compiled",
            "devices.enough_memory",
            "checkpoints.identity",
            "provenance.provenance",
            "recorder.recorder",
            "loading.loader",
        ),
    },
    "of a device that is checked where a run is asked for": {"ranks.current"},
    "files, at places and with contents that the library has made": {
        *("files.write_atomic", "files.write_text", "files.canonical_json", "files.digest", "files.alone"),
        *("files.can_hold_files", "files.remove_parts", "container", "checkpoints.save", "checkpoints.load"),
        *("images.list_classes", "images.list_annotated", "images.load_images", "images.decode", "images.pixels"),
        *("methods.write_class_folders", "methods.as_files", "runs.rows_file", "runs.checkpoint_file", "runs.data_of"),
    },
    "nothing but the parameters of a notebook, which profiles.parameters has checked": {
        *("experiments.quickstart", "experiments.table2", "experiments.vit", "studies.layer_norms"),
    },
    "any name will do: not a number for one that is not there": {"serving.resident"},
    "a command line, each part of which goes to a checked function": {"serving.main"},
}


def functions() -> dict[str, Callable[..., object]]:
    """The public functions of all modules that take an argument, by module and name."""
    found = {}
    for path in sorted(Path(emq.__file__).parent.glob("[!_]*.py")):
        module = importlib.import_module(f"emqlib.{path.stem}")
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
            if own and inspect.signature(function).parameters:
                found[f"{path.stem}.{name}"] = function
    return found


def exported(function: Callable[..., object]) -> bool:
    """Whether `import emqlib` gives this very function, or a notebook calls it by its name alone."""
    return function in (getattr(emq, function.__name__, None), parameters)


def test_every_public_function_has_a_case() -> None:
    """By the function's name, or the name that `import emqlib` gives it."""
    tried = {case.name.split("-")[0].split(" ")[0] for case in CASES}
    exempt, known = {name for names in EXEMPT.values() for name in names}, functions()
    untried = {name for name, f in known.items() if name not in tried and not (f.__name__ in tried and exported(f))}
    assert not {full for full in untried if not {full, full.split(".")[0]} & exempt}
    assert not exempt - untried - {"checks", "container", "finite"}
    configured = {"QuantSpec", "TrainConfig", "CoresetConfig", "Run", "Dataset.subset"}
    assert configured <= tried and len(CASES) >= 200 and len({case.name for case in CASES}) == len(CASES)


def missed(function: Callable[..., object], rows: pd.DataFrame, right: dict[str, Any]) -> str | None:
    """The column that an error asks for."""
    try:
        function(rows, **right)
    except ValueError as error:
        told = re.match(r"(?:rows|draws|histograms)=.*: expected the column '(\w+)' too$", str(error))
        assert told, error
        return told[1]
    return None


@pytest.mark.parametrize("function", OF_ROWS, ids=lambda function: f"{function.__module__[7:]}.{function.__name__}")
def test_a_table_without_a_column(function: Callable[..., object], steps: list[object]) -> None:
    """One after the other is named and given, until the table is enough."""
    source, right = OF_ROWS[function]
    whole = table(source)
    function(whole, **right)  # the whole table is right
    whole, given = whole.assign(nobody_asks=0), ["nobody_asks", *sorted(ANY.intersection(whole))]
    start = len(given)
    while (missing := missed(function, whole[given], right)) is not None:
        assert missing not in given
        given.append(missing)
    pyplot.close("all")
    assert len(given) >= start + 2


ANY = {"commit", "dirty", "python", "torch", "torchvision", "device", "data_sha256", "loss", "n", "norm"}


# Anything at all


class Hostile:
    """Whatever it is asked to be, it raises."""

    def fail(self, *_: object) -> NoReturn:
        raise ArithmeticError("no")

    __index__ = __float__ = __bool__ = __len__ = __iter__ = __repr__ = __str__ = __fspath__ = fail


SHAPES = st.lists(st.integers(0, 2), max_size=3)
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    SHAPES,
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64, torch.bfloat16]),
)
LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(-4, 40), st.floats(), st.text(), st.binary()),
    *(st.complex_numbers(), st.just(10**5000), TENSORS, st.builds(Hostile), st.builds(Path, st.just("here"))),
    *(st.fractions(), st.decimals(), st.builds(np.float32, st.floats(0, 1)), st.builds(np.int64, st.integers(0, 9))),
    st.builds(lambda shape: np.ones(shape), SHAPES),
    st.sampled_from(
        ["auto", "top", "sample", "joint", "tdds", "none", "first", torch.bfloat16, emq.TrainConfig, range(9)]
    ),
)
HASHED = st.one_of(st.none(), st.integers(-4, 40), st.text(max_size=3))
ANYTHING = st.one_of(
    *(LEAVES, st.lists(LEAVES, max_size=3), st.tuples(LEAVES, LEAVES), st.sets(HASHED, max_size=3)),
    st.dictionaries(HASHED, LEAVES, max_size=3),
)
# a value that is right alone may ask another field for something
PARTNERS = {"momentum": "nesterov", "rescore": "score", "candidates": "score", "scoring_epochs": "score"}


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


NAMES = sorted(set(inspect.signature(parameters).parameters))
NASTY = ["[" * 10_000, "(" * 200 + ")" * 200, "9" * 5000, "1e999", "10**10**10", "__import__('os').system('exit')"]
NASTY += ["\0", "\ud800", "imagefolder:\0", "imagefolder:~nobody/x", "a" * 5000, "~nobody", "-" * 5000 + "1", "timm."]
TEXTS = st.one_of(st.text(), st.sampled_from(NASTY), LEAVES.filter(lambda x: not isinstance(x, Hostile)).map(written))


@given(name=st.sampled_from(NAMES), value=st.one_of(ANYTHING, TEXTS))
@settings(max_examples=400)
def test_any_parameter_of_a_notebook(name: str, value: object) -> None:
    fits_or_is_told(parameters, name, value, profile="smoke")


# Files that ask for more than they hold

HUGE = [
    {"name": "resnet8", "num_classes": 10, "width": 10**9},
    {"name": "resnet18", "num_classes": 10, "width": 4096},
    {"name": "resnet50", "num_classes": 10**6},
    {"name": "vit_tiny", "num_classes": 10, "depth": 10**9},
    {"name": "vit_small", "num_classes": 10, "depth": 100, "width": 4096, "heads": 1},
    {"name": "preact_resnet20", "num_classes": 10, "width_factor": 10**30},
    {"name": "resnet8", "num_classes": 10, "no_such_argument": 1},
    {"name": "../resnet8", "num_classes": 10},
    {"name": ["resnet8"], "num_classes": 10},
    [1, 2],
]


@pytest.mark.parametrize("recipe", HUGE, ids=str)
def test_a_file_that_asks_for_what_it_does_not_hold(recipe: object, here: Path) -> None:
    model = emq.convert(emq.models.resnet8(10, width=2), emq.QuantSpec(bits=(2, 4)))
    model.recipe = recipe
    emq.save(model, "hostile.safetensors")
    before, start = getrusage(RUSAGE_SELF).ru_maxrss, process_time()
    with pytest.raises(ValueError, match=r"(?s)^path='hostile.safetensors': expected a network of emqlib.models"):
        emq.load("hostile.safetensors")
    assert process_time() - start < 2
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
