"""ONNX files: what is in them, and what onnxruntime answers, with and without PyTorch beside it."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import emqlib as emq
from emqlib import models
from emqlib.deploy import onnx as export
from emqlib.deploy.integers import int8_weight
from emqlib.deploy.pack import PackedConv2d, PackedLinear
from emqlib.train.evaluate import batches

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

MIXTURE = {"*1.*": 2, "*": 4}
Export = Callable[[int | dict[str, int]], Path]
BLOCKS = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 1, 2]]  # of MobileNet: expansion, channels, repeats, stride
VIT = {"image_size": 8, "patch_size": 2, "width": 32, "depth": 2, "heads": 2}
PREACT = {"norm": "shared_affine", "output_correction": True}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "resnet8": (lambda: models.resnet8(10, width=8), {}),
    "resnet20": (lambda: models.resnet20(10, width=4), {}),
    "pre-activation": (lambda: models.preact_resnet20(10, width_factor=1), PREACT),
    "mobilenet": (lambda: mobilenet_v2(num_classes=10, width_mult=0.25, inverted_residual_setting=BLOCKS), {}),
    "vit": (lambda: models.vit_tiny(10, **VIT), {"weight": "minmax", "activation": "lsq"}),
}
ASKED = (1, 2, 3, 4, 5, 6, 7, 8, 32, MIXTURE)
FLOATING = {
    "vit": {"Conv": 1, "MatMul": 2, "FusedMatMul": 2, "Gemm": 1},  # attention has products of its own
    "pre-activation": {"Conv": 2, "Gemm": 1},  # onnxruntime scales channels by a convolution
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
    build, spec = CASES[case]
    torch.manual_seed(0)
    model = emq.convert(build(), emq.QuantSpec(bits=(2, 4, 8), **spec))
    config = emq.TrainConfig(epochs=8, batch_size=32, optimizer="adamw", lr=4e-3)
    emq.train(model, digits, config, progress=False)
    return model.eval()


@pytest.fixture(scope="module")
def exported(case: str, model: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The file of `model` at a bit-width, written once.

    PyTorch's exporter is asked once, since it sees no bit-width, but where norms that are not folded have statistics of
    each bit-width's own.
    """
    folder, files, graphs, whole = tmp_path_factory.mktemp("exported"), {}, [], export._exported

    def once(network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        graphs.append(graphs[0] if graphs else whole(network, inputs))
        return graphs[0].clone()

    def write(bits: int | dict[str, int]) -> Path:
        path = folder / f"{len(files)}.onnx"
        if str(bits) not in files:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export, "_exported", whole if bits == 32 or case == "pre-activation" else once)
                emq.export_onnx(model, path, bits, images)
            files[str(bits)] = path
        return files[str(bits)]

    return write


def answers(path: Path, *inputs: Tensor, **options: Any) -> np.ndarray:
    """The logits that onnxruntime gives; options: attributes of its session's options."""
    chosen = onnxruntime.SessionOptions()
    for name, value in ({"intra_op_num_threads": 1, "log_severity_level": 3} | options).items():
        setattr(chosen, name, value)
    session = onnxruntime.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])
    named = zip(session.get_inputs(), inputs, strict=True)
    return session.run(None, {given.name: x.numpy() for given, x in named})[0]


def off(found: np.ndarray, model: nn.Module, bits: Any, images: Tensor) -> float:
    """The root mean square of how far logits are off, in standard deviations of the network's."""
    with emq.at_bits(model, bits), torch.no_grad():
        expected = model(images).numpy()
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


# What rounding of weights and sums may do to logits: it tips activations over, by a level of their bit-width.
ROUNDING = {1: 1.5, 2: 1.0, 3: 0.65, 4: 0.45, 5: 0.3, 6: 0.3, 7: 0.3, 8: 0.3, 32: 1e-5}
PASSED_ON = {"resnet20": 2, "pre-activation": 3}  # the first is deep and has four channels; of the other see the guide


def test_the_runtime_answers_as_the_network_does(case: str, model: nn.Module, images: Tensor, exported: Export) -> None:
    """It rounds weights and sums to 8 bits, which these networks, hardly trained, pass on from layer to layer."""
    found = {str(bits): off(answers(exported(bits), images), model, bits, images) for bits in ASKED}
    assert all(found[str(bits)] < most * (2 if case == "resnet20" else 1) for bits, most in ROUNDING.items()), found


def test_integer_kernels_are_chosen(case: str, images: Tensor, exported: Export, tmp_path: Path) -> None:
    """No float convolution but the first in what onnxruntime makes of the file, and no product but the last."""
    for bits in (1, 4, 8):
        answers(exported(bits), images[:2], optimized_model_filepath=str(tmp_path / "optimized.onnx"))
        proto = onnx.load(tmp_path / "optimized.onnx")
        kinds = Counter(node.op_type for node in proto.graph.node)
        floating = {
            k: kinds[k] for k in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul") if kinds[k]
        }
        assert floating == FLOATING.get(case, {"Conv": 1, "Gemm": 1})
        assert not case.startswith("resnet") or kinds["Transpose"] <= 2  # in between all is channels-last
        layers = sum(
            t.name.endswith(".step") and ".bias" not in t.name for t in onnx.load(exported(bits)).graph.initializer
        )
        assert kinds["QLinearConv"] + kinds["MatMulIntegerToFloat"] == layers > 5


def test_integer_kernels_compute_what_the_file_says(case: str, images: Tensor, exported: Export) -> None:
    """Without its optimizations onnxruntime computes each node as ONNX defines it, in floating point."""
    plain = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for bits in (2, 8):
        found, expected = (answers(exported(bits), images, **o) for o in ({}, {"graph_optimization_level": plain}))
        assert np.quantile(np.abs(found - expected).max(1) / np.abs(expected).max(), 0.95) < 1e-3


def test_openvino_runs_the_same_file(case: str, model: nn.Module, images: Tensor, exported: Export) -> None:
    """It does not round what is added, and so answers a little closer to the network."""
    openvino = pytest.importorskip("openvino")
    for bits in (2, 5, 8):
        precise = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        found = openvino.compile_model(exported(bits), "CPU", precise)(images.numpy())[0]
        assert off(found, model, bits, images) < ROUNDING[bits] * PASSED_ON.get(case, 1)


def weights_in(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights (O, ...) of the quantized layers of a file as its graph computes them, and their integers."""
    proto = onnx.load(path)
    nodes = {n.output[0]: n for n in proto.graph.node}
    found = [n for n in nodes.values() if n.op_type == "DequantizeLinear" and n.input[1].endswith(".dense.step")]
    names = [n.input[1].removesuffix(".dense.step") for n in found]
    for n in found:
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(v) for v in (n.output[0], n.input[0]))
        proto.graph.output[-2].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        proto.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.INT8
    del proto.graph.output[0]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(None, {"images": np.zeros((1, 3, 8, 8), np.float32)})
    values = [v.T if v.ndim == 2 else v for v in values]
    return dict(zip(names, values[::2], strict=True)), dict(zip(names, values[1::2], strict=True))


def test_no_weight_is_far_off_and_no_kernel_overflows(case: str, model: nn.Module, exported: Export) -> None:
    """Two products of the largest activation and the largest weight fit the 16 bits that AVX2 adds them in."""
    for bits in ASKED[:8]:
        layers = {n: m for n, m in emq.pack(model, bits).named_modules() if isinstance(m, (PackedConv2d, PackedLinear))}
        found, integers = weights_in(exported(bits))
        assert found.keys() == layers.keys()
        for name, layer in layers.items():
            expected, largest = layer.weight.numpy(), 64 if bits == 8 else 127
            assert np.abs(integers[name].astype(int)).max() <= largest and 2 * (2**bits - 1) * largest <= 32767
            bound = np.abs(expected).reshape(len(expected), -1).max(1) / largest
            off = np.abs(found[name] - expected).reshape(len(expected), -1).max(1)
            assert (off <= 1.001 * bound + 1e-12).all()


@pytest.mark.parametrize("case", ["resnet8"], indirect=True)
def test_what_is_in_a_file(model: nn.Module, exported: Export) -> None:
    sizes = []
    for bits in ASKED[:8]:
        proto = onnx.load(exported(bits))
        onnx.checker.check_model(proto, full_check=True)
        kinds = Counter(node.op_type for node in proto.graph.node)
        assert "BatchNormalization" not in kinds and not any(t.name.endswith(".dense") for t in proto.graph.initializer)
        codes = {t.name.removesuffix(".dense.codes"): t for t in proto.graph.initializer if t.name.endswith(".codes")}
        for name, tensor in codes.items():
            layer, each = emq.pack(model, bits).get_submodule(name), 8 // bits
            octets = onnx.numpy_helper.to_array(tensor)[:, 0].astype(int)
            unpacked = (octets[:, None] >> bits * np.arange(each) & (2**bits - 1)).ravel()[: layer.weight.numel()]
            assert np.array_equal(unpacked, layer.integers().flatten() + 2 ** (bits - 1))
        assert len(codes) >= 6 if bits <= 4 else not codes  # small layers would gain nothing
        (given,), (answer,) = proto.graph.input, proto.graph.output
        assert (given.name, answer.name) == ("images", "logits")
        assert given.type.tensor_type.shape.dim[0].dim_param and answer.type.tensor_type.shape.dim[0].dim_param
        assert str(Path.cwd()).encode() not in exported(bits).read_bytes()
        assert b"site-packages" not in exported(bits).read_bytes()
        sizes.append(exported(bits).stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2] < sizes[4] and sizes[7] <= sizes[4]


@pytest.mark.parametrize("case", ["resnet8", "vit"], indirect=True)
def test_any_size_of_batch(images: Tensor, exported: Export) -> None:
    whole = answers(exported(4), images[:8])
    for size in (1, 3, 8):
        np.testing.assert_allclose(answers(exported(4), images[:size]), whole[:size], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_the_same_network_gives_the_same_bytes(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    for name in ("one", "again"):
        emq.export_onnx(model, tmp_path / name, 1, images)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()


def test_integers_of_a_weight_against_all_steps_tried(rng: torch.Generator) -> None:
    """The step found is nearly as good as the best of 20,000."""
    levels = 0.1 * torch.arange(4.0).sub(1.5).repeat(3, 1).double() + torch.tensor([[0.013], [-0.04], [0.0]])
    counts = torch.tensor([[5.0, 9, 9, 5], [0, 3, 3, 0], [1, 0, 0, 1]]).double()
    table, step = int8_weight(levels, counts, 127, torch.full((3,), 1e-20).double())
    off = (table * step[:, None] - levels) * (counts > 0)
    assert (off.abs() <= (levels.abs() * (counts > 0)).amax(1, keepdim=True) / 127).all()
    for o in range(3):
        largest = (levels[o].abs() * (counts[o] > 0)).max() / 127
        tried = largest * torch.linspace(1, 2, 20_000).double()[:, None]
        errors = ((levels[o] / tried).round() * tried - levels[o]) * (counts[o] > 0)
        costs = (counts[o] * errors**2).sum(1) + 0.25 * (counts[o] * errors).sum(1) ** 2
        own = (counts[o] * off[o] ** 2).sum() + 0.25 * (counts[o] * off[o]).sum() ** 2
        assert own <= 25 * costs.min() + 1e-12 and own < costs.median() / 10


def test_a_weight_without_spread_and_a_bias_that_must_fit() -> None:
    zero, least = torch.zeros(2, 4).double(), torch.tensor([1e-20, 0.5]).double()
    table, step = int8_weight(zero, zero + 1, 127, least)
    assert not table.any() and torch.equal(step, least)


@pytest.mark.parametrize("bits", [1, 2])
def test_layers_whose_inputs_are_not_quantized_keep_their_weights(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 3, bias=False))
    model = emq.convert(net, emq.QuantSpec(bits=(2, 4), activation="none", full_precision=())).eval()
    emq.export_onnx(model, tmp_path / "net", bits, x)
    with emq.at_bits(model, bits), torch.no_grad():
        np.testing.assert_allclose(answers(tmp_path / "net", x), model(x).numpy(), rtol=1e-4, atol=1e-5)


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
    found, expected = answers(tmp_path / "net.onnx", *inputs), model(*inputs).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
    answers(tmp_path / "net.onnx", *inputs, optimized_model_filepath=str(tmp_path / "optimized.onnx"))
    assert "MatMulIntegerToFloat" in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}


class ClippedAtOneEnd(nn.Module):
    """With an addition of two dimensions after integer convolutions, one side of which is in floating point."""

    def __init__(self, **clip: float) -> None:
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6))
        self.middle, self.last, self.clip = nn.Linear(6, 2), nn.Linear(2, 2), clip

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(self.first(x)).clamp(**self.clip))
        return self.middle(y.mean((2, 3))) + self.last(x[:, :2, 0, 0])


class AddedAfterAClip(ClippedAtOneEnd):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.first(x)).clamp(**self.clip)
        y = self.b(y).clamp(**self.clip) + y
        return self.middle(y.mean((2, 3))) + self.last(x[:, :2, 0, 0])


@pytest.mark.parametrize(
    ("kind", "clip"),
    [
        *((ClippedAtOneEnd, clip) for clip in ({"min": 0.0}, {"max": 0.1}, {"min": -0.1, "max": 0.1})),
        *((AddedAfterAClip, clip) for clip in ({"min": 0.2}, {"min": 0.2, "max": 0.5}, {"max": -0.2}, {"max": 0.1})),
    ],
    ids=str,
)
def test_bounds_at_one_end_and_bounds_that_leave_zero_out(
    kind: type[nn.Module], clip: dict[str, float], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    model = emq.convert(kind(**clip), emq.QuantSpec(bits=(8,))).train()
    model(x)
    emq.export_onnx(model.eval(), tmp_path / "net.onnx", 8, x)
    assert off(answers(tmp_path / "net.onnx", x), model, 8, x) < 0.05


def twice() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), block, block, nn.Flatten(), nn.Linear(128, 4))


def hooked() -> nn.Module:
    """What hooks make of the outputs of a quantized convolution and of a quantized linear layer."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 9), nn.ReLU())
    for layer in (net[2], net[4]):
        layer.register_forward_hook(lambda _, given, y: 0.5 * y + 0.1)
    return net.append(nn.Linear(9, 4))


@pytest.mark.parametrize("kind", [twice, hooked])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_layers_of_several_names_hooks_and_other_types(kind: Callable, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 6, 6)
    model = emq.convert(kind(), emq.QuantSpec(bits=(2, 8), weight="minmax")).train()
    model(x)
    emq.export_onnx(model.eval().to(dtype), tmp_path / "net.onnx", 8, x.to(dtype))
    assert off(answers(tmp_path / "net.onnx", x), model.float(), 8, x) < 0.05


class TokensAndTheirMean(nn.Module):
    """One layer reads tokens and vectors: the bias of one call is added, and of the other subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.first(x))
        return self.last(torch.cat([self.both(tokens).mean(1), self.both(tokens.mean(1))], 1))


@pytest.mark.parametrize("activation", ["lsq", "none"])  # in integers, and in floating point
def test_a_layer_of_tokens_and_of_vectors(activation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6, 8)
    model = emq.convert(TokensAndTheirMean(), emq.QuantSpec(bits=(8,), weight="minmax", activation=activation)).train()
    model(x)
    emq.export_onnx(model.eval(), tmp_path / "net.onnx", 8, x)
    assert off(answers(tmp_path / "net.onnx", x), model, 8, x) < 0.05


class LearnedToken(nn.Module):
    """A layer of tokens and of a learned one, which the exporter could compute by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 16))
        self.first, self.both, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.both(self.first(x)).mean(1) + self.both(self.token))


def test_a_layer_of_a_constant(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6, 8)
    model = emq.convert(LearnedToken(), emq.QuantSpec(bits=(8,), weight="minmax", activation="lsq")).train()
    model(x)
    emq.export_onnx(model.eval(), tmp_path / "net.onnx", 8, x)
    assert off(answers(tmp_path / "net.onnx", x), model, 8, x) < 0.05


class CallsForNothing(LearnedToken):
    """What one of its layers gives is used nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        self.both(self.token)
        return self.last(self.first(x).mean(1))


def test_a_layer_that_the_output_does_not_need_is_named(tmp_path: Path) -> None:
    model, x = emq.convert(CallsForNothing(), emq.QuantSpec(bits=(8,), full_precision=("last",))), torch.randn(4, 6, 8)
    model.train()(x)
    with pytest.raises(ValueError, match=r"^model='both': expected a network in whose output every layer"):
        emq.export_onnx(model.eval(), tmp_path / "net.onnx", 8, x)


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
