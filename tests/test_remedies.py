"""Moments of normal inputs against closed forms and simulations, each remedy against its formula and by hand."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emqlib as emq
from emqlib import models, remedies
from emqlib.checks import BIT_WIDTHS
from emqlib.data import Dataset, augment, normalize
from emqlib.layers import QuantConv2d, QuantLinear
from emqlib.norms import MultiBitBatchNorm
from emqlib.remedies import ACTIVATIONS, RULES, compare, gaussian_inputs, gaussian_moments

pytestmark = pytest.mark.processor

BITS = (2, 4, 8)
Pair = tuple[np.ndarray, np.ndarray]  # mean and variance of each channel, (C,) each


def spec(**fields: object) -> emq.QuantSpec:
    return emq.QuantSpec(**{"bits": BITS, "norm": "shared_affine"} | fields)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return emq.load_dataset("digits").subset(60, 30)


@pytest.fixture(scope="module")
def images(data: Dataset) -> Tensor:
    """All training images as `batches` gives them."""
    return normalize(augment(data.train.images, data, torch.Generator().manual_seed(0)), data)


@pytest.fixture(scope="module")
def trained(data: Dataset) -> nn.Module:
    """Three bit-widths that took a few steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = emq.convert(models.resnet8(width=4), spec())
    emq.train(made, data, emq.TrainConfig(epochs=2, batch_size=20), progress=False)
    return made


def norms_of(model: nn.Module) -> dict[str, MultiBitBatchNorm]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MultiBitBatchNorm)}


def quantized(model: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}


def set_affines(model: nn.Module, rng: torch.Generator) -> None:
    """Scales of either sign, shifts around half of the clipping range."""
    for m in norms_of(model).values():
        sign = torch.randint(2, m.weight.shape, generator=rng) * 2 - 1
        m.weight.data = sign * (0.2 + torch.rand(m.weight.shape, generator=rng))
        m.bias.data = 0.4 + 0.5 * torch.randn(m.bias.shape, generator=rng)


def row(bits: int) -> int:
    return BIT_WIDTHS.index(bits)


@pytest.fixture
def small(rng: torch.Generator, images: Tensor) -> nn.Module:
    """Four norms: after a full-precision layer, a convolution, a layer of pooled inputs, a linear layer.

    Statistics set by hand: about those of the data, and different at each trained bit-width.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = {"stem": nn.Conv2d(3, 6, 4, stride=4), "bn0": nn.BatchNorm2d(6), "relu0": nn.ReLU()}
        conv = {"conv": nn.Conv2d(6, 5, 3, padding=1), "bn1": nn.BatchNorm2d(5), "relu1": nn.ReLU()}
        pool = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        hidden = {"hidden": nn.Linear(5, 8), "bn2": nn.BatchNorm1d(8), "relu2": nn.ReLU()}
        last = {"last": nn.Linear(8, 7), "bn3": nn.BatchNorm1d(7), "relu3": nn.ReLU(), "head": nn.Linear(7, 10)}
        model = emq.convert(nn.Sequential(OrderedDict({**stem, **conv, **pool, **hidden, **last})), spec())
    set_affines(model, rng)
    emq.adapt_norm(model, [(images, torch.zeros(60))], BITS)
    for m in norms_of(model).values():
        noise, factor = torch.randn(m.running_mean.shape, generator=rng), torch.rand(m.running_var.shape, generator=rng)
        m.running_mean += 0.2 * m.running_var.sqrt() * noise
        m.running_var *= 0.7 + 0.6 * factor
    return model.eval()


# Normal inputs


def rectified(mean: float, std: float) -> tuple[float, float]:
    """Mean and variance of max(x, 0): m P + s p and (m^2 + s^2) P + m s p minus its square, at z = m / s."""
    P, p = NormalDist().cdf(mean / std), NormalDist().pdf(mean / std)
    first = mean * P + std * p
    return first, (mean**2 + std**2) * P + mean * std * p - first**2


def discrete(mean: float, std: float, bits: int) -> tuple[float, float]:
    """Of DoReFa's k / n, each as probable as x is to fall between the thresholds (k - 1/2) / n and (k + 1/2) / n."""
    if bits == 32:
        return rectified(mean, std)
    n, normal = 2**bits - 1, NormalDist(mean, std)
    below = [0.0, *(normal.cdf((k + 0.5) / n) for k in range(n)), 1.0]
    chances = np.diff(below)
    values = np.arange(n + 1) / n
    first = float(chances @ values)
    return first, float(chances @ values**2) - first**2


def by_channel(function: Callable[..., tuple[float, float]], pair: Pair, *more: int) -> Pair:
    found = [function(float(m), math.sqrt(v), *more) for m, v in zip(*pair, strict=True)]
    return tuple(np.array(column) for column in zip(*found, strict=True))


def close(found: tuple[Tensor, Tensor], wanted: Pair, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x.numpy(), y, atol=atol, rtol=rtol)


MEANS = np.array([-1.5, -0.2, 0.0, 0.3, 0.5, 0.9, 2.0])
STDS = np.array([1.0, 0.25, 1.0, 0.5, 2.0, 0.3, 1.0])


def check_moments(function: Callable[[Tensor], Tensor], wanted: Pair) -> None:
    mean, var = gaussian_moments(torch.tensor(MEANS).float(), torch.tensor(STDS**2).float(), function)
    np.testing.assert_array_less(np.abs(mean.numpy() - wanted[0]) / STDS, 2e-3)
    np.testing.assert_array_less(np.abs(var.numpy() - wanted[1]) / STDS**2, 4e-3)


def test_moments_of_a_normal_distribution_and_of_its_positive_part() -> None:
    check_moments(lambda x: x, (MEANS, STDS**2))
    check_moments(F.relu, by_channel(rectified, (MEANS, STDS**2)))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_moments_of_a_quantized_normal_distribution(bits: int) -> None:
    quantize = emq.quantizers.quantize_activation
    check_moments(lambda x: quantize(x, bits), by_channel(discrete, (MEANS, STDS**2), bits))


# What is known of each layer's input


def normal_of(model: nn.Module, name: str) -> Pair:
    """(bias, weight^2) of a batch norm."""
    norm = model.get_submodule(name)
    return norm.bias[0].detach().double().numpy(), norm.weight[0].detach().double().numpy() ** 2


def added(*pairs: Pair) -> Pair:
    return sum(mean for mean, _ in pairs), sum(var for _, var in pairs)


def test_inputs_of_a_residual_network(rng: torch.Generator) -> None:
    """Where the shape stays, a sum with the positive part of a normal distribution; else one of two of them."""
    model = emq.convert(models.resnet8(width=4), spec())
    set_affines(model, rng)
    normal = {name: normal_of(model, name) for name in norms_of(model)}
    after1 = added(normal["layer1.0.bn2"], by_channel(rectified, normal["bn1"]))
    after2 = added(normal["layer2.0.bn2"], normal["layer2.0.shortcut.1"])
    expected = {"layer1.0.conv1": normal["bn1"], "layer2.0.conv1": after1, "layer3.0.conv1": after2}
    expected |= {"layer2.0.shortcut.0": after1, "layer3.0.shortcut.0": after2}
    expected |= {f"layer{i}.0.conv2": normal[f"layer{i}.0.bn1"] for i in (1, 2, 3)}
    inputs, reads = gaussian_inputs(model)
    assert inputs.keys() == expected.keys() == quantized(model).keys()
    for name, pair in expected.items():
        close(inputs[name], pair, atol=2e-3, rtol=2e-3)
    assert reads == {name: name.replace("bn", "conv").replace("shortcut.1", "shortcut.0") for name in normal}


def test_inputs_after_several_identity_shortcuts(rng: torch.Generator) -> None:
    model = emq.convert(models.resnet20(width=2), spec())
    set_affines(model, rng)
    inputs, _ = gaussian_inputs(model)
    stream = normal_of(model, "bn1")
    for block in (0, 1, 2):
        close(inputs[f"layer1.{block}.conv1"], stream, atol=4e-3, rtol=4e-3)
        stream = added(normal_of(model, f"layer1.{block}.bn2"), by_channel(rectified, stream))


def test_inputs_of_a_pre_activation_network(rng: torch.Generator) -> None:
    """Every layer reads a batch norm, but few batch norms a layer: most read sums, of which nothing is known."""
    model = emq.convert(models.preact_resnet20(width_factor=1), spec())
    set_affines(model, rng)
    inputs, reads = gaussian_inputs(model)
    assert inputs.keys() == quantized(model).keys()
    for name in inputs:
        norm = name.replace("conv", "bn").replace("shortcut.0", "bn1")
        close(inputs[name], normal_of(model, norm))
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
    expected = {f"{block}.bn2": f"{block}.conv1" for block in blocks} | {"layer1.0.bn1": "conv1"}
    assert reads == expected | {f"layer{i}.0.shortcut.1": f"layer{i}.0.shortcut.0" for i in (2, 3)}


def test_layers_that_read_anything_else_are_left_out(small: nn.Module) -> None:
    """`hidden` reads a mean over pixels; `stem` and `head` are not quantized."""
    inputs, reads = gaussian_inputs(small)
    assert inputs.keys() == {"conv", "last"}
    close(inputs["conv"], normal_of(small, "bn0"))
    close(inputs["last"], normal_of(small, "bn2"))
    assert reads == {"bn0": "stem", "bn1": "conv", "bn2": "hidden", "bn3": "last"}


class Summed(nn.Module):
    """A batch norm's output, and what else is added to it, before a convolution."""

    def __init__(self, change: Callable[[Tensor], Tensor], affine: bool = True) -> None:
        super().__init__()
        self.stem, self.conv, self.head = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.bn, self.change = nn.BatchNorm2d(3, affine=affine), change

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.change(self.bn(self.stem(x))))).mean((2, 3))


@pytest.mark.parametrize(
    ("change", "factor", "shift"),
    [
        (lambda x: x + 1, 1, 1),
        (lambda x: x + x, 2, 0),
        (lambda x: torch.add(x, x, alpha=3), 4, 0),
        (lambda x: 2 * x, 2, 0),
        (lambda x: x - 1, 1, -1),
    ],
)
def test_what_is_added_to_a_normal_input_counts(
    change: Callable, factor: int, shift: int, rng: torch.Generator
) -> None:
    """Or else the layer is left out."""
    model = emq.convert(Summed(change), spec())
    set_affines(model, rng)
    mean, var = normal_of(model, "bn")
    inputs, reads = gaussian_inputs(model)
    assert reads == {"bn": "stem"}
    if "conv" in inputs:
        close(inputs["conv"], (factor * mean + shift, factor**2 * var))


class Weighted(Summed):
    """One batch norm's output and three times another's."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.other = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.conv(torch.add(self.bn(x), self.other(x), alpha=3))).mean((2, 3))


def test_a_weighted_sum_is_no_plain_sum(rng: torch.Generator) -> None:
    """Or else the layer is left out."""
    model = emq.convert(Weighted(), spec())
    set_affines(model, rng)
    (mean, var), (other_mean, other_var) = (normal_of(model, name) for name in ("bn", "other"))
    inputs, _ = gaussian_inputs(model)
    if "conv" in inputs:
        close(inputs["conv"], (mean + 3 * other_mean, var + 9 * other_var))


def test_a_batch_norm_without_scale_and_shift_is_standard_normal() -> None:
    inputs, _ = gaussian_inputs(emq.convert(Summed(lambda x: x, affine=False), spec()))
    close(inputs["conv"], (np.zeros(3), np.ones(3)))


class Untraceable(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if x.mean() > 0 else -x).mean((2, 3))


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 32])
@pytest.mark.parametrize(
    ("layer", "relu", "activation"),
    [
        ({"kernel_size": 1}, True, "dorefa"),
        ({"kernel_size": 1}, False, "dorefa"),
        ({"kernel_size": 1}, True, "pact"),
        ({"kernel_size": 1}, False, "lsq"),
        ({"kernel_size": 1}, True, "none"),
        ({"kernel_size": (3, 2)}, True, "dorefa"),
        ({"kernel_size": 2, "groups": 2}, True, "dorefa"),
    ],
)
def test_predicted_moments_are_those_of_a_simulation(
    layer: dict, relu: bool, activation: str, bits: int, rng: torch.Generator
) -> None:
    """Of a layer's outputs for normal inputs that are independent indeed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU() if relu else nn.Identity()]
        net = nn.Sequential(*before, nn.Conv2d(4, 6, bias=False, **layer), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
        model = emq.convert(net, spec(activation=activation))
    set_affines(model, rng)
    model.train()(torch.randn(20, 3, 5, 5, generator=rng))  # starts the input ranges
    mean, var = remedies._Network(model.eval()).predicted("4", bits)
    weight, bias = (p[0].detach().view(-1, 1, 1) for p in (model[1].weight, model[1].bias))
    kernel = model[3].weight.shape[2:]
    x = bias + weight * torch.randn(40_000, 4, *kernel, generator=rng)
    with emq.at_bits(model, bits), torch.no_grad():
        y = model[3](model[2](x)).double()[..., 0, 0].numpy()
    np.testing.assert_allclose(mean.numpy() / y.std(0), y.mean(0) / y.std(0), atol=0.02)
    np.testing.assert_allclose(var.numpy(), y.var(0), rtol=0.04)


# Rules


def interpolated(tables: dict[int, np.ndarray], bits: int) -> np.ndarray:
    """Linear in 1 / (2^b - 1)^2 between 2, 4 and 8 bits, constant beyond."""
    place = {b: 1 / (2**b - 1) ** 2 for b in (*BITS, bits)}
    for low, high in ((2, 4), (4, 8)):
        if low <= bits <= high:
            share = (place[bits] - place[high]) / (place[low] - place[high])
            return share * tables[low] + (1 - share) * tables[high]
    return tables[2 if bits < 2 else 8]


def output_moments(model: nn.Module, layer: str, norm: str, bits: int) -> Pair:
    """sum_i sum_k w_oik E[x_i] and sum_i sum_k w_oik^2 Var[x_i], for the normal input that `norm` gives `layer`."""
    w = model.get_submodule(layer).weight.detach().double().numpy()
    w = reference.correct_weight(reference.dorefa_weight(w, bits)[0], reference.dorefa_weight(w, 32)[0], "mean_var")
    mean, var = by_channel(discrete, normal_of(model, norm), bits)
    flat = w.reshape(*w.shape[:2], -1)
    return flat.sum(2) @ mean, (flat**2).sum(2) @ var


def expected_statistics(model: nn.Module, bits: int) -> dict[str, dict[str, Pair]]:
    """What each remedy assumes of each norm of `small`, by remedy and norm."""
    nearest = {1: 2, 2: 2, 3: 2, 6: 4, 7: 8, 8: 8, 32: 8}[bits]  # of two the lower
    predicted = {
        norm: {b: output_moments(model, layer, before, b) for b in (*BITS, bits)}
        for norm, layer, before in (("bn1", "conv", "bn0"), ("bn3", "last", "bn2"))
    }
    expected: dict[str, dict[str, Pair]] = {remedy: {} for remedy in (*RULES, ACTIVATIONS)}
    for name, norm in norms_of(model).items():
        means = {b: norm.running_mean[row(b)].double().numpy() for b in BITS}
        variances = {b: norm.running_var[row(b)].double().numpy() for b in BITS}
        shared = sum(means.values()) / 3, sum(variances.values()) / 3
        own = interpolated(means, bits), interpolated(variances, bits)
        expected["shared"][name], expected["own, nearest"][name] = shared, (means[nearest], variances[nearest])
        expected[ACTIVATIONS][name] = means[8], variances[8]
        if name in predicted:
            m, v = ({b: pair[i] for b, pair in predicted[name].items()} for i in (0, 1))
            m_trained, v_trained = (sum(x[b] for b in BITS) / 3 for x in (m, v))
            shared = shared[0] + m[bits] - m_trained, shared[1] * v[bits] / v_trained
            own = own[0] + m[bits] - interpolated(m, bits), own[1]
        expected["shared, closed form"][name], expected["own, closed form"][name] = shared, own
    return expected


def test_each_rule_is_its_formula(small: nn.Module, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the norms themselves whenever the network is evaluated."""
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def watching(model: nn.Module, data: Dataset, bits: tuple[int, ...]) -> pd.DataFrame:
        for b in bits:
            with emq.at_bits(model, b):
                seen.append({name: m.statistics() for name, m in norms_of(model).items()})
        return emq.evaluate(model, data, bits)

    wanted = (1, 2, 3, 6, 7, 8, 32)
    expected = {b: expected_statistics(small, b) for b in wanted}
    monkeypatch.setattr(remedies, "evaluate", watching)
    table = compare(small, data, wanted, samples=60)
    assert len(table) == len(seen) == len(wanted) * (len(RULES) + 1)
    for rowed, found in zip(table.itertuples(), seen, strict=True):
        for name, pair in expected[rowed.bits][rowed.remedy].items():
            close(found[name], pair, atol=3e-3, rtol=5e-3)
    for remedy, before in (("shared, closed form", "shared"), ("own, closed form", "own, nearest")):
        for name in norms_of(small):
            (mean, _), (plain, var) = (expected[1][r][name] for r in (remedy, before))
            change = np.abs((mean - plain) / np.sqrt(var)).max()
            assert change > 0.2 if name in ("bn1", "bn3") else change == 0


# Activations


def quantized_inputs(model: nn.Module, x: Tensor, bits: int) -> dict[str, np.ndarray]:
    """What each layer multiplies with, (N, C, pixels), by its name."""
    kept: dict[str, np.ndarray] = {}
    hooks = [
        layer.input_quantizer.register_forward_hook(
            lambda _, __, y, name=name: kept.update({name: y.double().reshape(*y.shape[:2], -1).numpy()})
        )
        for name, layer in quantized(model).items()
    ]
    with emq.at_bits(model, bits), torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return kept


def channel_moments(x: np.ndarray) -> Pair:
    return x.mean((0, 2)), x.var((0, 2))


def give_all(model: nn.Module, bits: int) -> None:
    """Every bit-width takes the statistics of one of them."""
    for m in norms_of(model).values():
        m.running_mean[:], m.running_var[:] = m.running_mean[row(bits)].clone(), m.running_var[row(bits)].clone()


def test_corrected_inputs_have_the_moments_of_the_highest_bit_width(
    small: nn.Module, data: Dataset, images: Tensor
) -> None:
    """Those of the first quantized layer, whose input before its quantizer is the same at every bit-width."""
    give_all(small, 8)
    with torch.no_grad():
        net = remedies._Network(small)
        moments = {b: remedies._input_moments(small, data, b, 60) for b in BITS}
        wanted = channel_moments(quantized_inputs(small, images, 8)["conv"])
        for b in (2, 4):
            plain = channel_moments(quantized_inputs(small, images, b)["conv"])
            assert min(plain[1]) > 1e-4 and np.abs(plain[0] - wanted[0]).max() > (0.01 if b == 2 else 0)
            with remedies._corrected(small, net, moments, b):
                found = channel_moments(quantized_inputs(small, images, b)["conv"])
            np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
            np.testing.assert_allclose(found[1], wanted[1], rtol=1e-3)
        with remedies._corrected(small, net, moments, 8):
            found = quantized_inputs(small, images, 8)
        for name, x in quantized_inputs(small, images, 8).items():
            np.testing.assert_allclose(found[name], x, atol=1e-5)


def test_a_channel_that_is_constant_keeps_its_scale(small: nn.Module, data: Dataset, images: Tensor) -> None:
    """Always 0 at 2 bits, now and then above it at 8: there is no variance to match, and no NaN."""
    norm = small.get_submodule("bn0")
    norm.weight.data[0, 0], norm.bias.data[0, 0] = 0.02, 0.03
    give_all(small, 8)
    with torch.no_grad():
        net = remedies._Network(small)
        moments = {b: remedies._input_moments(small, data, b, 60) for b in BITS}
        mean, var = channel_moments(quantized_inputs(small, images, 8)["conv"])
        assert quantized_inputs(small, images, 2)["conv"][:, 0].max() == 0 < var[0]
        with remedies._corrected(small, net, moments, 2):
            found = quantized_inputs(small, images, 2)["conv"]
    np.testing.assert_allclose(found[:, 0], mean[0], atol=1e-6)
    assert np.isfinite(found).all()


class Tokens(nn.Module):
    """A linear layer whose inputs (N, T, I) have their channels last: T is 16, I is 6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0, self.relu = nn.Conv2d(3, 6, 8, stride=8), nn.BatchNorm2d(6), nn.ReLU()
        self.mix, self.bn1, self.head = nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.stem(x))).flatten(2).transpose(1, 2)
        return self.head(self.bn1(self.mix(x).transpose(1, 2)).mean(2))


def test_channels_of_a_linear_layer_are_last(data: Dataset, images: Tensor, rng: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = emq.convert(Tokens(), spec()).eval()
    set_affines(model, rng)
    emq.adapt_norm(model, [(images, torch.zeros(60))], (8,))
    give_all(model, 8)
    with torch.no_grad():
        net = remedies._Network(model)
        moments = {b: remedies._input_moments(model, data, b, 60) for b in BITS}
        wanted = quantized_inputs(model, images, 8)["mix"]
        with remedies._corrected(model, net, moments, 2):
            found = quantized_inputs(model, images, 2)["mix"]
    assert found.shape == (60, 16, 6)
    np.testing.assert_allclose(found.mean((0, 1)), wanted.mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(found.var((0, 1)), wanted.var((0, 1)), rtol=1e-3)


def corrected_by_hand(model: nn.Module, data: Dataset, images: Tensor, bits: int) -> float:
    """The loss at `bits` with corrected inputs and the statistics of 8 bits."""
    model = copy.deepcopy(model)
    seen = {b: {n: channel_moments(x) for n, x in quantized_inputs(model, images, b).items()} for b in BITS}
    give_all(model, 8)
    for name, layer in quantized(model).items():
        mean, var = (interpolated({b: seen[b][name][i] for b in BITS}, bits) for i in (0, 1))
        scale = np.where(var > 1e-12, np.sqrt(seen[8][name][1] / np.maximum(var, 1e-12)), 1)
        shift = seen[8][name][0] - scale * mean

        def change(_: nn.Module, __: object, x: Tensor, a: np.ndarray = scale, b: np.ndarray = shift) -> Tensor:
            factor, term = (torch.tensor(v).float().view(1, -1, *[1] * (x.dim() - 2)) for v in (a, b))
            return factor * x + term

        layer.input_quantizer.register_forward_hook(change)
    with emq.at_bits(model, bits), torch.no_grad():
        logits = model(normalize(data.test.images, data)).double()
    return float((logits.logsumexp(1) - logits[torch.arange(30), data.test.labels]).mean())


def test_remedies_by_hand(small: nn.Module, data: Dataset, images: Tensor) -> None:
    """Losses of corrected inputs, of the nearest statistics, and of the network itself, at trained bit-widths."""
    wanted = (1, 2, 3, 4, 8)
    table = compare(small, data, wanted, samples=60)
    loss = {(r.remedy, r.bits): r.loss for r in table.itertuples()}
    for b in wanted:
        assert loss[ACTIVATIONS, b] == pytest.approx(corrected_by_hand(small, data, images, b), rel=1e-3)
        other = copy.deepcopy(small)
        give_all(other, {1: 2, 3: 2}.get(b, b))
        assert loss["own, nearest", b] == pytest.approx(emq.evaluate(other, data, (b,)).loss.item(), rel=1e-5)
    for r in emq.evaluate(small, data, BITS).itertuples():
        for remedy in ("own, nearest", "own, closed form", *([ACTIVATIONS] if r.bits == 8 else [])):
            assert loss[remedy, r.bits] == pytest.approx(r.loss, rel=1e-5)
    assert len({round(x, 4) for x in loss.values()}) > 15


# The whole comparison


def test_one_row_a_remedy_and_bit_width(trained: nn.Module, data: Dataset) -> None:
    seen: list[int] = []
    hook = trained.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    table = compare(trained, data, (8, 3, 2), samples=24)
    hook.remove()
    assert seen == [30] * 12 + [24] * 3 + [30] * 3  # training images at the three trained bit-widths alone
    assert set(table.columns) == {"remedy", "bits", "top1", "loss", "trained", "n"}
    expected = [(remedy, b) for remedy in (*RULES, ACTIVATIONS) for b in (2, 3, 8)]
    assert list(zip(table.remedy, table.bits, strict=True)) == expected
    assert list(RULES) == ["shared", "own, nearest", "shared, closed form", "own, closed form"]
    assert (table.trained == table.bits.isin(BITS)).all() and (table.n == 30).all()
    plain = emq.evaluate(trained, data, (8,)).iloc[0]
    own = table[(table.bits == 8) & table.remedy.isin(["own, nearest", "own, closed form", ACTIVATIONS])]
    np.testing.assert_allclose(own.loss, plain.loss, rtol=1e-4)
    assert (own.top1 == plain.top1).all()


def snapshot(model: nn.Module) -> dict[str, list]:
    """All that could be left behind."""
    norms = norms_of(model).values()
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    return {
        "state": [(name, value.tolist()) for name, value in model.state_dict().items()],
        "own": [set(m.own) for m in norms],
        "statistics": [[x.tolist() for x in m.statistics()] for m in norms],
        "bits": [m.bits for m in model.modules() if hasattr(m, "bits")],
        "training": [m.training for m in model.modules()],
        "hooks": hooks,
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
    }


@pytest.mark.parametrize("failing", [None, 0, 5, 9, 12])
def test_the_network_is_left_as_it_was(failing: int | None, trained: nn.Module, data: Dataset) -> None:
    """After 8 evaluations, 3 measurements and 2 evaluations of corrected inputs, and if any of them fails."""
    model, calls = copy.deepcopy(trained).train(), []
    model.layer2.eval()
    emq.set_bits(model, 3)

    def count(*_: object) -> None:
        calls.append(None)
        if len(calls) - 1 == failing:
            raise RuntimeError("no more")

    model.register_forward_pre_hook(count)
    before = snapshot(model)
    if failing is None:
        compare(model, data, (2, 3), samples=60)
        assert len(calls) == 13
    else:
        with pytest.raises(RuntimeError, match="no more"):
            compare(model, data, (2, 3), samples=60)
    assert snapshot(model) == before


def test_wrong_arguments(trained: nn.Module, data: Dataset) -> None:
    def net(**fields: object) -> nn.Module:
        return emq.convert(models.resnet8(width=4), spec(**fields))

    untraceable = emq.convert(Untraceable(), spec())
    for call, message in [
        (lambda: gaussian_inputs(untraceable), r"^model='Untraceable': expected .*trace"),
        (lambda: compare(untraceable, data, BITS), r"^model='Untraceable': expected .*trace"),
        (lambda: compare(net(norm="shared"), data, BITS), r"^model=.*norm=\"shared_affine\""),
        (lambda: compare(net(norm="switchable"), data, BITS), r"^model=.*norm=\"shared_affine\""),
        (lambda: compare(net(output_correction=True), data, BITS), r"^model=.*without output_correction"),
        (lambda: compare(models.resnet8(width=4), data, BITS), r"^model='Sequential': expected a converted network"),
        (lambda: compare(trained, data, (2, 9)), r"^bits="),
        (lambda: compare(trained, data, ()), r"^bits="),
        (lambda: compare(trained, data, BITS, samples=1), r"^samples=1: "),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
