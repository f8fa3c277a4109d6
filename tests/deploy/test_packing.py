"""Networks of integers: the packed weight against literal formulas, the packed network against the trained one."""

import copy
import math
import pickle
import struct
from itertools import product
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from test_saving import NETWORKS, SPECS, X, edited, trained
from torch import Tensor, nn

import emqlib as emq
from emqlib import models
from emqlib.correction import CORRECTIONS
from emqlib.deploy import pack as packing
from emqlib.deploy.pack import ChannelAffine, PackedConv2d, PackedLinear
from emqlib.layers import QuantConv2d, QuantLinear
from emqlib.norms import MultiBitBatchNorm

pytestmark = pytest.mark.processor

EPSILON = 2.0**-23


def packed_layers(network: nn.Module) -> dict[str, PackedConv2d | PackedLinear]:
    return {name: m for name, m in network.named_modules() if isinstance(m, (PackedConv2d, PackedLinear))}


@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=40))))
def test_integers_come_back_from_the_bits_of_one_large_number(case: tuple[int, list[int]]) -> None:
    bits, values = case
    packed = packing.pack_integers(torch.tensor(values, dtype=torch.long), bits)
    assert len(packed) == math.ceil(len(values) * bits / 8)
    assert int.from_bytes(bytes(packed.tolist()), "little") == sum(v << i * bits for i, v in enumerate(values))
    assert packing.unpack_integers(packed, bits, len(values)).tolist() == values


def literal(w: np.ndarray, bits: int, method: str, correction: str, scale: float, zero_level: bool) -> list[np.ndarray]:
    """Integers r from 0, scale and offset (O, 1) of the corrected weight w (O, K) in float64, and the weight."""
    n, domain = 2**bits - 1, w
    if method == "dorefa":
        t, E = np.tanh(w) / np.abs(np.tanh(w)).max(), np.abs(w).mean()
        r, step, low, domain = np.round(n * (t / 2 + 0.5)), 2 * E / n, -E, E * t
    elif method == "minmax":
        s = np.abs(w).max(1, keepdims=True)
        m = (n - 1) / 2
        r = np.round(m * w / s) + m if zero_level else np.round(n * (w / (2 * s) + 0.5))
        step, low = (s / m if zero_level else 2 * s / n), -s
    else:
        offset = scale / 2 if bits == 1 else 0.0
        low, step = -(2 ** (bits - 1)) * scale + offset, scale
        r = np.clip(np.round((w - offset) / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
    w_q = low + step * r
    mean, R = (lambda x: x.mean(1, keepdims=True)), np.ones((len(w), 1))
    m_q, m_w = mean(w_q), mean(domain)
    if correction == "none":
        m_q = m_w = 0 * m_q
    if correction == "mean_var":
        spread = w_q.var(1, keepdims=True)
        R = np.where(spread > 1e-20, np.sqrt(domain.var(1, keepdims=True) / np.where(spread > 1e-20, spread, 1)), 1)
    alpha, beta = R * step, R * (low + n / 2 * step - m_q) + m_w
    return [r, np.broadcast_to(alpha, (len(w), 1)), beta, R * (w_q - m_q) + m_w]


METHODS = [("dorefa", False), ("minmax", False), ("minmax", True), ("lsq", False)]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(("method", "zero_level"), METHODS)
def test_scale_and_offset_are_those_of_the_algebra(
    method: str, zero_level: bool, correction: str, rng: torch.Generator
) -> None:
    conv = nn.Conv2d(8, 16, 3)
    conv.weight.data = 0.1 * torch.randn(conv.weight.shape, generator=rng) + 0.02
    spec = emq.QuantSpec(bits=(4,), weight=method, zero_level=zero_level, correction=correction)
    layer = QuantConv2d.from_float(conv, spec, signed=False)
    for bits in range(1 + zero_level, 9):
        layer.set_bits(bits)
        packed = packing.pack_layer(layer, None)
        w = conv.weight.detach().double().flatten(1).numpy()
        scale = layer.weight_scale().item() if method == "lsq" else 0.0
        r, alpha, beta, exact = literal(w, bits, method, correction, scale, zero_level)
        assert np.array_equal(packed.integers().flatten(1).numpy(), r - 2 ** (bits - 1))
        np.testing.assert_allclose(packed.affine[0].numpy(), alpha[:, 0], rtol=1e-6)
        np.testing.assert_allclose(packed.affine[1].numpy(), beta[:, 0], rtol=1e-6, atol=1e-8)
        largest = np.abs(exact).max(1, keepdims=True) + alpha
        unpacked = packed.weight.flatten(1).numpy().astype(np.float64)
        assert (np.abs(unpacked - exact) <= EPSILON * largest).all()
        # what the training layer itself, in float32, is off by
        trained = layer.weight_and_bias()[0].detach().flatten(1).numpy()
        assert (np.abs(unpacked - trained) <= 4 * EPSILON * largest).all()


def test_a_batch_norm_goes_into_scale_offset_and_bias(rng: torch.Generator) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=True), nn.BatchNorm2d(6))
    norm = net[1]
    norm.weight.data, norm.bias.data = torch.randn(2, 6, generator=rng)
    norm.running_mean, norm.running_var = torch.randn(6, generator=rng), torch.rand(6, generator=rng) + 0.1
    model = emq.convert(net, emq.QuantSpec(bits=(2, 4), full_precision=(), activation="none")).eval()
    packed = emq.pack(model, 2)
    emq.set_bits(model, 2)
    alone = packing.pack_layer(model[0], None)
    assert isinstance(packed[1], nn.Identity)
    g = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert (g < 0).any() and (packed[0].affine[0] >= 0).all()
    torch.testing.assert_close(packed[0].affine[0].double(), g.abs() * alone.affine[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(packed[0].affine[1].double(), g * alone.affine[1], rtol=1e-5, atol=1e-8)
    bias = norm.bias + g * (net[0].bias - norm.running_mean)
    torch.testing.assert_close(packed[0].bias, bias.float(), rtol=1e-5, atol=1e-6)
    folded = g.view(-1, 1, 1, 1) * alone.weight.double()
    torch.testing.assert_close(packed[0].weight.double(), folded, rtol=1e-5, atol=1e-7)
    flipped = torch.where((g < 0).view(-1, 1, 1, 1), -1 - alone.integers(), alone.integers())
    assert torch.equal(packed[0].integers(), flipped)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_packed_network_computes_what_the_trained_one_does(network: str, spec: str) -> None:
    """In double precision, where no rounding of an activation tips over."""
    model = trained(network, spec).double()
    before = copy.deepcopy(model.state_dict())
    known = (2, 4) if spec == "switchable, learned" and network == "resnet" else (2, 3, 4, 7, 8, 32)
    for bits in known:
        packed = emq.pack(model, bits)
        assert not packed.training and not any(isinstance(m, MultiBitBatchNorm) for m in packed.modules())
        assert bool(packed_layers(packed)) == (bits != 32)
        with emq.at_bits(model, bits), torch.no_grad():
            torch.testing.assert_close(packed(X.double()), model(X.double()), rtol=1e-8, atol=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_mixed_precision_and_networks_of_others() -> None:
    torch.manual_seed(0)
    nets = [torchvision.models.resnet18(num_classes=5), torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25)]
    for net in nets:
        model = emq.convert(net, emq.QuantSpec(bits=(2, 4), activation="lsq", weight="minmax")).double().train()
        model(X.double())
        first = next(name for name, m in model.named_modules() if isinstance(m, QuantConv2d))
        mixture = {first: 2, "*": 4}
        packed = emq.pack(model.eval(), mixture)
        assert {name: m.bits for name, m in packed_layers(packed).items()}[first] == 2
        assert set(packed.emq.packed.values()) == {2, 4}
        with emq.at_bits(model, mixture), torch.no_grad():
            torch.testing.assert_close(packed(X.double()), model(X.double()), rtol=1e-8, atol=1e-9)


class Shared(nn.Module):
    """One batch norm after two convolutions, and a convolution whose output goes two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.shared, self.own, self.alone = (nn.BatchNorm2d(3) for _ in range(3))
        self.fourth = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.second(self.shared(self.first(x))))
        y = self.third(x)
        return self.own(y) + y + self.alone(self.fourth(x))


class Untraceable(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -math.inf else x


def test_only_a_norm_that_one_convolution_feeds_is_folded() -> None:
    torch.manual_seed(0)
    spec = emq.QuantSpec(bits=(2, 4), full_precision=())
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    for net, folded in ((Shared(), {"alone"}), (Untraceable(*inner), set())):
        model = emq.convert(net, spec).double().train()
        model(X.double())
        packed = emq.pack(model.eval(), 4)
        norms = [name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
        for name in norms:
            assert isinstance(packed.get_submodule(name), nn.Identity if name in folded else ChannelAffine)
        with torch.no_grad():
            torch.testing.assert_close(packed(X.double()), model(X.double()), rtol=1e-8, atol=1e-9)


def test_where_norms_stand_before_convolutions_they_become_gain_and_shift() -> None:
    model = emq.convert(models.preact_resnet20(width_factor=1), emq.QuantSpec(bits=(2, 4)))
    model(X)
    packed = emq.pack(model, 4)
    assert not any(t.requires_grad for t in packed.state_dict(keep_vars=True).values())
    kinds = {name: type(m) for name, m in packed.named_modules()}
    assert {kinds[f"layer1.{i}.bn1"] for i in range(3)} == {ChannelAffine}  # what feeds them feeds a sum too
    assert {kinds[f"layer{i}.0.bn2"] for i in (1, 2, 3)} == {kinds["layer2.0.shortcut.1"]} == {nn.Identity}


@pytest.mark.parametrize("weight", ["zero", "constant", "one channel"])
def test_weights_without_spread(weight: str) -> None:
    conv = nn.Conv2d(4, 3, 1, bias=False)
    conv.weight.data = {"zero": 0 * conv.weight, "constant": 0 * conv.weight + 0.3}.get(weight, conv.weight).detach()
    if weight == "one channel":
        conv.weight.data[1] = 0.2
    for method, bits in product(("dorefa", "minmax", "lsq"), (1, 2, 8)):
        layer = QuantConv2d.from_float(conv, emq.QuantSpec(bits=(2,), weight=method), signed=True)
        layer.set_bits(bits)
        packed = packing.pack_layer(layer, None)
        torch.testing.assert_close(packed.weight, layer.weight_and_bias()[0].detach(), rtol=1e-6, atol=1e-7)
        assert packed.affine.isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8])
def test_a_file_takes_the_bytes_that_arithmetic_says(bits: int, tmp_path: Any) -> None:
    """The published network within 5 %; the quickstart's small one but for the file's description of itself."""
    for net, whole in ((models.resnet8(), None), (models.preact_resnet20(), 1.05)):
        model = emq.convert(net, emq.QuantSpec(bits=(2, 4)))
        layers = [m for m in model.modules() if isinstance(m, QuantConv2d)]
        packed = emq.pack(model, bits)
        unfolded = sum(len(m.gain) for m in packed.modules() if isinstance(m, ChannelAffine))
        rows = sum(len(m.weight) * (2 + (m.bias is not None)) for m in packed_layers(packed).values())
        kept = sum(p.numel() for m in (model.conv1, model.fc) for p in m.parameters())
        kept += len(model.conv1.weight) * isinstance(packed.get_submodule("bn1"), nn.Identity) if whole is None else 0
        expected = sum(math.ceil(m.weight.numel() * bits / 8) for m in layers)
        expected += 4 * (rows + 2 * unfolded + kept + 4 * len(layers))
        assert sum(t.numel() * t.element_size() for t in packed.state_dict().values()) == expected
        emq.save(packed, tmp_path / "net")
        size, described = (tmp_path / "net").stat().st_size, struct.unpack("<Q", (tmp_path / "net").read_bytes()[:8])[0]
        assert size == expected + 8 + described
        assert described < 5000 if whole is None else size <= whole * expected


def test_a_packed_network_comes_back_from_its_file(tmp_path: Any) -> None:
    path = tmp_path / "net"
    for network, bits in (("resnet", 3), ("vit", {"*self_attention*": 2, "*": 4}), ("resnet", 32)):
        packed = emq.pack(trained(network), bits)
        emq.save(packed, path)
        again = emq.load(path)
        assert torch.equal(again(X), packed(X)) and not again.training
        assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(packed)))(X), packed(X))
        assert again.emq.packed == packed.emq.packed and again.emq.spec == packed.emq.spec
        assert again.state_dict().keys() == packed.state_dict().keys()


@pytest.mark.parametrize(
    "bits", [{}, {"layer1.0.conv1": 3}, 3, "__import__('os')", [3], None, 9, "layer1.0.conv1=9", "layer1.0.conv1='x'"]
)
def test_edited_bit_widths_of_a_packed_file(bits: Any, tmp_path: Any) -> None:
    emq.save(emq.pack(trained(), 3), tmp_path / "net")

    def change(about: dict[str, Any]) -> None:
        if isinstance(bits, str) and "=" in bits:
            name, value = bits.split("=")
            about["packed"][name] = 9 if value == "9" else "x"
        else:
            about["packed"] = bits

    with pytest.raises(ValueError, match="net"):
        emq.load(edited(tmp_path / "net", change))


def test_what_cannot_be_packed() -> None:
    packed = emq.pack(trained(), 4)
    for call in (lambda: emq.pack(packed, 4), lambda: emq.set_bits(packed, 2), lambda: emq.evaluate(packed, [(X, X)])):
        with pytest.raises(ValueError, match="convert"):
            call()
    fresh = emq.convert(models.vit_tiny(**NETWORKS["vit"][1]), emq.QuantSpec(bits=(2, 4), activation="lsq"))
    with pytest.raises(ValueError, match=r"input_quantizer'.*has seen images"):
        emq.pack(fresh, 4)


class Spare(nn.Module):
    """It has a head that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare = nn.Linear(4, 8), nn.Linear(8, 3)
        self.body, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.first(x).relu()).relu())


def test_a_layer_that_is_never_called_needs_no_range() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(5, 4), emq.convert(Spare(), emq.QuantSpec(bits=(2, 4), activation="lsq"))
    with pytest.raises(ValueError, match=r"^model='body.input_quantizer': expected a network that has seen images"):
        emq.pack(model, 4)
    model(x)
    for made in (emq.pack(model.eval(), 4), emq.freeze(model, 4)):
        with emq.at_bits(model, 4), torch.no_grad():
            torch.testing.assert_close(made(x), model(x))


def test_hooks_stay_with_what_they_belong_to() -> None:
    """Also those of a convolution and a norm that would be folded, and of a layer in full precision."""
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    net, x = nn.Sequential(*parts, nn.Flatten(), nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 2)), torch.randn(5, 3, 6, 6)
    for i in (0, 1, 3, 7):
        net[i].register_forward_hook(lambda _, given, y: 0.5 * y + 0.1)
    net[4].register_forward_pre_hook(lambda _, given: (given[0] * 3,))
    model = emq.convert(net, emq.QuantSpec(bits=(2, 8), weight="minmax")).train()
    model(x)
    for bits in (2, 8, 32):
        for made in (emq.pack(model.eval(), bits), emq.freeze(model, bits)):
            with emq.at_bits(model, bits), torch.no_grad():
                torch.testing.assert_close(made(x), model(x))


def test_a_forward_of_its_own_stays() -> None:
    """That of a convolution whose norm would be folded, and of a ReLU that the quantizer after it would replace."""
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    net, x = nn.Sequential(*parts, nn.Flatten(), nn.Linear(24, 2)), torch.randn(5, 3, 6, 6)
    net[0]._conv_forward = MethodType(lambda conv, x, w, b: 2 * F.conv2d(x, w, b), net[0])
    net[2].forward = MethodType(lambda relu, x: x.clamp(-0.1, 0.1), net[2])
    model = emq.convert(net, emq.QuantSpec(bits=(2, 8), weight="minmax"))
    model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(emq.pack(model, 32)(x), net.eval()(x))


def test_packing_keeps_shared_layers_shared() -> None:
    layer = nn.Linear(8, 8)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 2))
    model = emq.convert(net, emq.QuantSpec(bits=(2, 4)))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    model(x)
    packed = emq.pack(model.eval(), 4)
    assert packed[2] is packed[4] and isinstance(packed[2], PackedLinear)
    assert isinstance(model[2], QuantLinear)
    emq.set_bits(model, 4)
    torch.testing.assert_close(packed(x), model(x).detach())
