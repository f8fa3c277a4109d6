"""The benchmark of served files: its rows against what is known of the network, its clock against one of our own."""

import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from torch import nn

import emqlib as emq

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import serving

    return serving


@pytest.fixture(scope="module")
def digits() -> emq.Dataset:
    pytest.importorskip("sklearn")
    return emq.load_dataset("digits").subset(300, 200)


def trained(data: emq.Dataset, bits: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    model = emq.convert(emq.models.resnet8(10, width=4), emq.QuantSpec(bits=bits))
    config = emq.TrainConfig(epochs=2, batch_size=30, optimizer="adamw", lr=3e-3)
    emq.train(model, data, config, progress=False)
    return model


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_rows_are_those_of_the_network(serving: ModuleType, digits: emq.Dataset) -> None:
    model, full = trained(digits, (2, 4)), trained(digits, (32,))
    rows = serving.measure(model, full, digits, bits=(2, 8), repeats=1)
    assert list(zip(rows.runtime, rows.weights, rows.bits, strict=True)) == [
        ("onnxruntime", "int2", 2),
        ("onnxruntime", "int8", 8),
        ("onnxruntime", "float32", 32),
        ("PyTorch", "float32", 32),
        ("PyTorch", "int8", 8),
    ]
    accuracies = [*emq.evaluate(model, digits, (2, 8)).top1, *2 * [emq.evaluate(full, digits, (32,)).top1.item()]]
    assert list(rows.top1[:4]) == pytest.approx(accuracies, abs=0.5)  # one of 200 images
    assert (rows.agreement[:4] >= 99.5).all() and (rows.difference[:4] < 0.1).all()
    assert 50 < rows.agreement[4] <= 100 and rows.difference[4] > rows.difference[3]
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, emq.layers.QuantConv2d))
    assert rows.arithmetic[1] - rows.arithmetic[0] == weights * 6 / 8
    assert (rows.packed[:3] > rows.arithmetic[:3]).all() and (rows.packed[:3] < rows.arithmetic[:3] + 5000).all()
    assert rows.file[0] < rows.file[1] < rows.file[2] and rows.packed[3:].isna().all()
    assert (rows[["load", "latency", "images_a_second", "peak"]] > 0).all(axis=None)
    assert (rows.peak_batch >= rows.peak).all()


def test_every_way_to_switch_is_timed(serving: ModuleType, digits: emq.Dataset) -> None:
    rows = serving.switches(trained(digits, (2, 4)), digits, bits=(2, 4), repeats=2)
    asked = itertools.product((0, 1), (2, 4), ("set_bits", "packed file", "ONNX file"))
    assert list(zip(rows.repeat, rows.bits, rows.runtime, strict=True)) == list(asked) and (rows.switch > 0).all()


def test_seconds_are_the_median_of_enough_calls(serving: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    times, now = iter([9.0, 1.0, 2.0, 3.0, 4.0, 50.0]), [0.0]

    def passing(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(serving, "perf_counter", lambda: now[0])
    assert serving.seconds(lambda: passing(next(times))) == 3.0  # the first call is not counted
    calls = itertools.count()
    assert serving.seconds(lambda: (next(calls), passing(0.03)), least=0.3) == pytest.approx(0.03)
    assert next(calls) == 11  # one, and ten of 0.03 seconds


def test_the_table_has_medians_and_the_figure_means(serving: ModuleType) -> None:
    case = {"runtime": "onnxruntime", "weights": "int4", "bits": 3, "switch": np.nan}
    middle = {"top1": 70.126, "agreement": 99.987, "difference": 1.23456789e-3, "peak": 10.46, "peak_batch": 20.46}
    middle |= {"file": 98765432, "packed": 87654321, "arithmetic": 76543210}
    middle |= {"load": 0.0123456, "latency": 0.000123456, "images_a_second": 1234.56}
    rows = [case | {name: value * factor for name, value in middle.items()} for factor in (0.5, 1, 4)]
    rows += [{"runtime": "set_bits", "bits": b, "switch": ms} for b, ms in ((2, 0.126), (4, 0.311), (8, 0.5))]
    file, way = serving.summary(pd.DataFrame(rows)).to_dict("records")
    expected = {"top1": 70.13, "agreement": 99.99, "difference": 0.00123, "file": 98765.4, "packed": 87654.3}
    expected |= {"arithmetic": 76543.2, "load": 12.3, "latency": 0.123, "images_a_second": 1235, "peak": 10}
    assert {name: file[name] for name in expected} == expected and (way["runtime"], way["switch"]) == ("set_bits", 0.31)
    ax = serving.figure(pd.DataFrame(rows))
    (label,) = ax.texts
    assert label.get_text() == "3" and label.xy == pytest.approx((87654.321 * 5.5 / 3, 70.126 * 5.5 / 3))
    pyplot.close(ax.figure)
