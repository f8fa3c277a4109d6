"""The benchmark of runtimes: its rows against what is known of the network, its clock against one of our own."""

import itertools
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from matplotlib import pyplot

import emqlib as emq
from emqlib.train.data import normalize

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import serving

    return serving


def test_rows_are_those_of_the_network(serving: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(serving, "seconds", lambda network, x: float(len(network(x))))
    torch.manual_seed(0)
    data = emq.load_dataset("digits", image_size=8).subset(300, 200)
    model = emq.convert(emq.models.resnet8(10, width=4), emq.QuantSpec(bits=(2, 4)))
    emq.train(model, data, emq.TrainConfig(epochs=1, batch_size=30, optimizer="adamw", lr=3e-3), progress=False)
    test = normalize(data.test.images, data), data.test.labels
    rows = serving.measure("tiny", model.eval(), (4, 32), test[0], 2, test)
    assert len(rows) == 4 * rows.runtime.nunique() and set(rows.bits) == {4, 32} and set(rows.repeat) == {0, 1}
    assert {"PyTorch", "onnxruntime"} <= set(rows.runtime) <= {"PyTorch", "onnxruntime", "OpenVINO"}
    assert (rows.latency == 1).all() and (rows.images_a_second == 1).all() and (rows["size"] == 8).all()
    for b, accuracy in zip((4, 32), emq.evaluate(model, data, (4, 32)).top1, strict=True):
        assert rows[rows.bits == b].trained_top1.tolist() == pytest.approx([accuracy] * (len(rows) // 2))
    assert (rows[rows.bits == 32].agreement == 100).all() and (rows.agreement > 70).all()
    assert rows[rows.bits == 4].file.iloc[0] < rows[rows.bits == 32].file.iloc[0]
    named = rows[(rows.bits == 4) & (rows.runtime != "OpenVINO")].kernels
    assert named.str.fullmatch(r"\w+ \d+, \w+ \d+, \w+ \d+").all() and named.str.contains("onv").all()


def test_seconds_are_the_least_of_three_rows_of_calls(serving: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], itertools.count()
    times = [9.0, 0.01, *[0.02] * 5, *[0.01] * 5, *[0.03] * 5]

    def network(_: object) -> None:
        now[0] += times[next(calls)]

    monkeypatch.setattr(serving, "process_time", lambda: now[0])
    assert serving.seconds(network, None) == pytest.approx(0.01) and next(calls) == len(times)


def test_the_table_compares_with_float32_of_the_same_runtime(serving: ModuleType) -> None:
    case = {"network": "n", "size": 32, "file": 12345, "top1": 70.126, "trained_top1": 70.2, "agreement": 99.987}
    case["kernels"] = "QLinearConv 60"
    rows = pd.DataFrame(
        [
            case | {"runtime": runtime, "bits": bits, "latency": latency, "images_a_second": 1 / latency}
            for runtime, bits, times in (("a", 4, (0.002, 0.001)), ("a", 32, (0.003, 0.004)), ("b", 32, (0.5, 0.6)))
            for latency in times
        ]
    )
    assert serving.summary(rows).to_dict("list") == {
        "network": ["n"] * 3,
        "image side (pixels)": [32] * 3,
        "runtime": ["a", "a", "b"],
        "bit-width": [4, 32, 32],
        "file (KB)": [12.3] * 3,
        "latency (ms)": [1.0, 3.0, 500.0],
        "images a second": [1000, 333, 2],
        "top-1 (%)": [70.13] * 3,
        "top-1 of the network (%)": [70.2] * 3,
        "same answers as the network (%)": [99.99] * 3,
        "one image: times as fast as float32": [3.0, 1.0, 1.0],
        "batch: times as fast as float32": [3.0, 1.0, 1.0],
        "operations with most time (% of it)": ["QLinearConv 60"] * 3,
    }
    pyplot.close(serving.figure(rows.assign(bits=rows.bits.replace(4, 8))).figure)
