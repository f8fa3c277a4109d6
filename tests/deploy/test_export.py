"""ONNX files: what is in them, and what onnxruntime answers, with and without PyTorch beside it."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import emqlib as emq
from emqlib import models
from emqlib.deploy import onnx as export
from emqlib.deploy.pack import PackedConv2d, PackedLinear
from emqlib.train.evaluate import batches

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

TYPES = {2: "INT2", 3: "INT4", 8: "INT8"}
MIXTURE = {"*1.*": 2, "*": 4}
Export = Callable[[int | dict[str, int]], Path]
CASES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "quickstart": ("resnet8", {"width": 8}, {}),
    "pre-activation": ("preact_resnet20", {"width_factor": 1}, {"norm": "shared_affine", "output_correction": True}),
    "vit": (
        "vit_tiny",
        {"image_size": 8, "patch_size": 2, "width": 32, "depth": 2, "heads": 2},
        {"weight": "minmax", "activation": "lsq"},
    ),
}
# How integers are packed depends on the bit-width, which operations there are on the network: not each at each.
ASKED: dict[str, tuple[int | dict[str, int], ...]] = {
    "quickstart": (1, 2, 3, 4, 5, 8, 32, MIXTURE),
    "pre-activation": (3,),
    "vit": (1, 4),
}


@pytest.fixture(scope="module")
def digits() -> emq.Dataset:
    pytest.importorskip("sklearn")
    return emq.load_dataset("digits", image_size=8)


@pytest.fixture(scope="module")
def images(digits: emq.Dataset) -> Tensor:
    return torch.cat([x for x, _ in batches(digits, "test", torch.device("cpu"), 500)])


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(case: str, digits: emq.Dataset) -> nn.Module:
    """Trained for two epochs: logits of a network that knows nothing lie too close together to be told apart."""
    name, arguments, spec = CASES[case]
    torch.manual_seed(0)
    model = emq.convert(models.build(name, 10, **arguments), emq.QuantSpec(**{"bits": (2, 4, 8)} | spec))
    config = emq.TrainConfig(epochs=2, batch_size=64, optimizer="adamw", lr=2e-3)
    emq.train(model, digits, config, progress=False)
    return model.eval()


@pytest.fixture(scope="module")
def exported(model: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The file of `model` at a bit-width, written once."""
    folder, files = tmp_path_factory.mktemp("exported"), {}

    def export(bits: int | dict[str, int]) -> Path:
        path = folder / f"{len(files)}.onnx"
        if str(bits) not in files:
            emq.export_onnx(model, path, bits, images[:1])
            files[str(bits)] = path
        return files[str(bits)]

    return export


def answers(path: Path, *inputs: Tensor) -> np.ndarray:
    """The logits that onnxruntime gives, with weights dequantized once, as the guide says."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    named = zip(session.get_inputs(), inputs, strict=True)
    return session.run(None, {given.name: x.numpy() for given, x in named})[0]


def test_the_runtime_answers_as_the_network_does(case: str, model: nn.Module, images: Tensor, exported: Export) -> None:
    """At most one answer of the 355 to a file differs, over the files of a network.

    A logit may be off where an activation lies on the edge between two levels, and rounding tips it over; at 2 bits the
    levels lie far apart. How many do depends on what was trained, and so on the release of PyTorch.
    """
    same, off = [], []
    for bits in ASKED[case]:
        found = answers(exported(bits), images)
        with emq.at_bits(model, bits), torch.no_grad():
            expected = model(images).numpy()
        same.append(found.argmax(1) == expected.argmax(1))
        off.append(np.abs(found - expected).max(1) / np.abs(expected).max())
    assert np.size(same) == 355 * len(ASKED[case]) and np.mean(same) >= 0.997
    assert np.median(off) < 1e-6 and np.quantile(off, 0.9) < 1e-3 and np.quantile(off, 0.999) < 0.05


def test_what_is_in_a_file(case: str, model: nn.Module, exported: Export) -> None:
    for bits in ASKED[case]:
        if isinstance(bits, int) and bits in TYPES:
            holds_the_packed_integers(exported(bits), model, bits)


def holds_the_packed_integers(path: Path, model: nn.Module, bits: int) -> None:
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    layers = {n: m for n, m in emq.pack(model, bits).named_modules() if isinstance(m, (PackedConv2d, PackedLinear))}
    found = {t.name.removesuffix(".codes"): t for t in proto.graph.initializer if t.name.endswith(".codes")}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert onnx.TensorProto.DataType.Name(found[name].data_type) == TYPES[bits]
        values = onnx.numpy_helper.to_array(found[name]).astype(np.int64)
        expected = layer.integers().numpy()
        assert np.array_equal(values, expected if isinstance(layer, PackedConv2d) else expected.T)
        assert len(found[name].raw_data) == -(-layer.weight.numel() * export.native(bits) // 8)  # rounded up
    kinds = [node.op_type for node in proto.graph.node]
    inputs = kinds.count("QuantizeLinear")  # layers that read one activation quantize it once
    assert len(layers) / 2 < inputs <= len(layers) and kinds.count("DequantizeLinear") == inputs + len(layers)
    assert "BatchNormalization" not in kinds
    (given,), (answer,) = proto.graph.input, proto.graph.output
    assert (given.name, answer.name) == ("images", "logits")
    assert given.type.tensor_type.shape.dim[0].dim_param and answer.type.tensor_type.shape.dim[0].dim_param
    assert str(Path.cwd()).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


def test_any_size_of_batch(images: Tensor, exported: Export) -> None:
    whole = answers(exported(4), images[:8])
    for size in (1, 3, 8):
        np.testing.assert_allclose(answers(exported(4), images[:size]), whole[:size], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_the_same_network_gives_the_same_bytes(
    model: nn.Module, images: Tensor, exported: Export, tmp_path: Path
) -> None:
    emq.export_onnx(model, tmp_path / "again", 1, images[:7])
    assert (tmp_path / "again").read_bytes() == exported(1).read_bytes()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x) + self.a(y)))))


def test_a_network_of_several_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(4, 3), torch.randn(4, 3))
    model = emq.convert(TwoInputs(), emq.QuantSpec(bits=(4,))).train()
    model(*inputs)
    emq.export_onnx(model.eval(), tmp_path / "net.onnx", 4, inputs)
    assert [i.name for i in onnx.load(tmp_path / "net.onnx").graph.input] == ["input_0", "input_1"]
    found = answers(tmp_path / "net.onnx", *inputs)
    np.testing.assert_allclose(found, model(*inputs).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_nothing_is_written_where_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = emq.convert(models.resnet8(width=4), emq.QuantSpec(bits=(2, 4)))
    path, x = tmp_path / "net.onnx", torch.randn(2, 3, 32, 32)
    path.write_bytes(b"before")
    for bits, inputs, message in (
        (9, x, "bits=9"),
        (4, None, "example_inputs='NoneType'"),
        (4, x[:0], "example_inputs="),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            emq.export_onnx(model, path, bits, inputs)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"emqlib\[deploy\]"):
        emq.export_onnx(model, path, 4, x)
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
