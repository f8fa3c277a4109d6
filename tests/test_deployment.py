"""What serving costs: rows against what is known of the network, with a clock and a memory of our own."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import emqlib as emq
from emqlib import deployment, models, plots, results, serving

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def digits() -> emq.Dataset:
    pytest.importorskip("sklearn")
    return emq.load_dataset("digits", image_size=8).subset(300, 200)


def trained(data: emq.Dataset, bits: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    model = emq.convert(models.resnet8(10, width=4), emq.QuantSpec(bits=bits))
    config = emq.TrainConfig(epochs=2, batch_size=30, optimizer="adamw", lr=3e-3)
    emq.train(model, data, config, progress=False)
    return model


@pytest.fixture(scope="module")
def model(digits: emq.Dataset) -> nn.Module:
    return trained(digits, (2, 4))


def test_served(model: nn.Module, digits: emq.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each repeat measures each file; here, where that takes seconds, the first measurement stands for the others."""
    full, measured, costs = trained(digits, (32,)), {}, deployment._costs

    def once(path: Path, folder: Path, answers: bool) -> dict[str, float]:
        assert answers == (path not in measured)
        if answers:
            measured[path] = costs(path, folder, answers)
        return measured[path]

    monkeypatch.setattr(deployment, "_costs", once)
    rows, again = (
        part.reset_index(drop=True)
        for _, part in deployment.served(model, digits, full, bits=(2, 8), repeats=2).groupby("repeat")
    )
    known = ["runtime", "weights", "bits", "file", "top1", "agreement", "difference"]
    pd.testing.assert_frame_equal(rows[known], again[known])
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
    assert (rows.packed[:3] > rows.arithmetic[:3]).all() and (rows.packed[:3] < rows.arithmetic[:3] + 5000).all()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, emq.layers.QuantConv2d))
    assert rows.arithmetic[1] - rows.arithmetic[0] == weights * 6 / 8
    assert rows.file[0] < rows.file[1] < rows.file[2] and rows.packed[3:].isna().all()
    assert (rows[["load", "latency", "images_a_second", "peak"]] > 0).all(axis=None)
    assert (rows.peak_batch >= rows.peak).all()
    table = results.deployment_table(rows)
    assert len(table) == 5 and table.file[0] == round(rows.file[0] / 1000, 1)


def test_a_pytorch_without_quantization_of_its_own(
    digits: emq.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = emq.convert(models.resnet8(10, width=4), emq.QuantSpec(bits=(32,)))
    images = torch.rand(4, 3, 8, 8)
    for missing, weights in ((False, ["float32", "int8"]), (True, ["float32"])):
        if missing:
            monkeypatch.setitem(sys.modules, "torch.ao.quantization.quantize_fx", None)
        assert [case["weights"] for case in deployment._torchs_own(full, digits, images, tmp_path)] == weights


def test_switching(model: nn.Module, digits: emq.Dataset) -> None:
    rows = deployment.switching(model, digits, bits=(2, 4), repeats=2)
    asked = itertools.product((0, 1), (2, 4), ("set_bits", "packed file", "ONNX file"))
    assert list(zip(rows.repeat, rows.bits, rows.way, strict=True)) == list(asked)
    assert (rows.milliseconds > 0).all() and model.layer1[0].conv1.bits == 4
    assert list(results.switching_table(rows).way) == ["set_bits", "packed file", "ONNX file"]


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only `pass_by` moves."""
    now = [0.0]
    monkeypatch.setattr(serving, "perf_counter", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def test_seconds_are_the_median_of_enough_calls(ticking: Callable[[float], None]) -> None:
    times = iter([9.0, 1.0, 2.0, 3.0, 4.0, 50.0])
    assert serving.seconds(lambda x: ticking(next(times)), np.zeros(1)) == 3.0  # the first call is not counted
    calls = itertools.count()
    assert serving.seconds(lambda x: (next(calls), ticking(0.03)), np.zeros(1), least=0.3) == pytest.approx(0.03)
    assert next(calls) == 11  # one, and ten of 0.03 seconds


def test_cost_counts_memory_beyond_what_was_there(
    ticking: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"VmRSS": 100.0, "VmHWM": 100.0}
    monkeypatch.setattr(serving, "resident", lambda name="VmRSS": memory[name])

    def network(x: np.ndarray) -> np.ndarray:
        memory["VmHWM"] = max(memory["VmHWM"], 130.0 + len(x))
        ticking(0.001 * len(x))
        return x

    def load() -> serving.Network:
        memory["VmHWM"] = 120.0
        ticking(0.5)
        return network

    found = serving.cost(load, np.zeros((20, 1)), batch=16)
    assert found == pytest.approx(
        {"load": 0.5, "latency": 0.001, "peak": 31.0, "images_a_second": 1000.0, "peak_batch": 46.0}
    )


def test_logits_come_in_the_order_of_the_images() -> None:
    sizes = []
    found = serving.logits(lambda x: (sizes.append(len(x)), 2 * x)[1], np.arange(10.0)[:, None], batch=4)
    assert sizes == [4, 4, 2] and np.array_equal(found[:, 0], 2 * np.arange(10.0))


def test_figures(digits: emq.Dataset) -> None:
    rows = pd.DataFrame(
        {"runtime": ["onnxruntime"] * 3 + ["PyTorch"], "weights": ["int2", "int8", "float32", "int8"]}
        | {"bits": [2, 5, 32, 8], "top1": [60.0, 70.0, 72.0, 71.0], "file": [9e3, 2e4, 9e4, 3e4]}
        | {"packed": [8e3, 1e4, 9e4, np.nan], "latency": [1e-3] * 4, "dataset": "cifar10", "model": "resnet8"}
        | {"profile": "small", "seed": 0, "epochs": 4}
    )
    rows = pd.concat([rows.assign(top1=rows.top1 - 1), rows.assign(top1=rows.top1 + 1, seed=1)])
    ax = plots.accuracy_by_size(rows)
    lines = {line.get_label(): [list(map(float, v)) for v in line.get_data()] for line in ax.lines}
    assert lines["ONNX"] == [[9, 20, 90], [60, 70, 72]] and lines["packed"] == [[8, 10, 90], [60, 70, 72]]
    assert lines["TorchScript"] == [[30], [71]]
    assert [t.get_text() for t in ax.texts] == ["2", "5", "float32", "int8"]
    labels = [t.get_text() for t in plots.latency(rows).get_yticklabels()]
    assert labels == [
        "onnxruntime, int2, 2 bits",
        "onnxruntime, int8, 5 bits",
        "onnxruntime, float32",
        "PyTorch, int8, 8 bits",
    ]
    for draw in (plots.accuracy_by_size, plots.latency):
        with pytest.raises(ValueError, match="rows='none'"):
            draw(rows[:0])
