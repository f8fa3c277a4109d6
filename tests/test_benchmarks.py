"""The benchmarks still run; what they measure is never a test's business."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from torch import nn

import emqlib as emq
from emqlib.data import write_class_folders

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


def test_schemes() -> None:
    pytest.importorskip("sklearn")
    schemes = benchmark("schemes")
    rows = schemes.measure(emq.load_dataset("digits").subset(30, 10), repeats=2, epochs=4)
    names = ["Any-Precision", "ours, 80% pruned", "ours, 80% pruned, redrawn"]
    assert list(zip(rows.repeat, rows.scheme, strict=True)) == [(r, name) for r in (0, 1) for name in names]
    summary = schemes.summary(rows).set_index("scheme")
    passes = dict(zip(names, (3 * 4 * 30, 3 * (3 * 8 + 6), 3 * (3 * 8 + 6)), strict=True))  # a phase of 3 epochs on 8
    assert (rows.sample_passes == rows.scheme.map(passes)).all()
    assert summary["fewer passes"].to_dict() == {name: 360 / count for name, count in passes.items()}
    assert summary["times faster, median"]["Any-Precision"] == 1 and (rows.seconds > 0).all()
    first = [rows[(rows.repeat == 0) & (rows.scheme == name)].seconds.item() for name in names]
    assert rows.repeat.nunique() == 2 and summary["times faster, min"][names[1]] <= round(first[0] / first[1], 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_streaming() -> None:
    pytest.importorskip("sklearn")
    streaming = benchmark("streaming")
    data = streaming.enlarged(emq.load_dataset("digits").subset(32, 10), 48)
    assert data.train.images.shape == (32, 3, 48, 48)
    row = streaming._measured("gradient_angles", data, "resnet8", 48, torch.get_num_threads())
    assert row["peak"] == row["before"] + row["beyond"] and row["seconds"] > 0
    assert set(streaming.summary(pd.DataFrame([row])).columns) == {"analysis", "batch", "seconds", "network", "beyond"}
    assert streaming._size(nn.Sequential(nn.Linear(999, 250), nn.BatchNorm1d(250, affine=False))) == 1.002008
    before = streaming.resident("VmRSS")
    kept = torch.ones(50_000_000)
    grown = streaming.resident("VmRSS") - before
    assert 100 <= grown <= 300 and kept.numel() * 4 == 200_000_000
    del kept
    assert streaming.resident("VmHWM") >= before + grown


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_score_tables() -> None:
    rows = benchmark("score_tables").measure(n=1000, classes=10, window=3, epochs=2, batch=64)
    assert list(rows.epoch) == [1, 2] and (rows.seconds > 0).all()
    assert set(rows.table) == {1000 * 10 * 2 / 1e6} and rows.others.tolist() == pytest.approx(
        [1000 * (4 * 2 + 8) / 1e6] * 2
    )
    assert list(benchmark("score_tables").summary(rows).samples) == [1000, 1000]


def test_decoding(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    write_class_folders(emq.load_dataset("digits").subset(20, 10), tmp_path / "digits")
    decoding = benchmark("decoding")
    rows = decoding.measure(tmp_path / "digits/train", workers=(0, 1), repeats=2, batch=8)
    assert list(zip(rows.repeat, rows.workers, strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert set(rows.images) == {20} and list(decoding.summary(rows).workers) == [0, 1]
