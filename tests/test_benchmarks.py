"""The benchmarks still run; what they measure is never a test's business."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import emqlib as emq

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recording() -> None:
    pytest.importorskip("sklearn")
    recording = benchmark("recording")
    rows = recording.measure(emq.load_dataset("digits").subset(32, 10), scores=("tdds", "el2n"), repeats=2)
    assert list(zip(rows.repeat, rows.score, strict=True)) == [(0, "tdds"), (0, "el2n"), (1, "tdds"), (1, "el2n")]
    assert (rows.ratio == rows.scored / rows.plain).all() and (rows.plain > 0).all()
    summary = recording.summary(rows)
    assert list(summary.score) == ["tdds", "el2n"] and list(summary.classes) == [10, 10]
    assert (summary["min"] <= summary["median"]).all() and (summary["median"] <= summary["max"]).all()
