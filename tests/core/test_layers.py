"""The layers that training uses against literal float64 loops, and batch norm against PyTorch's own."""

import copy
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emqlib.correction import CORRECTIONS
from emqlib.layers import NORMS, LearnedScale, QuantConv2d, QuantLinear, QuantSpec, input_quantizer
from emqlib.norms import MultiBitBatchNorm
from emqlib.quantizers import ACTIVATION_METHODS, WEIGHT_METHODS

pytestmark = pytest.mark.processor

ALL_BITS = (*range(1, 9), 32)
TRAINED = (2, 4, 8)
STATISTICS = ("running_mean", "running_var")
CONVOLUTIONS = {
    "plain": ({"in_channels": 3, "out_channels": 4, "kernel_size": 3}, {"stride": 1, "padding": 1}),
    "grouped": ({"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2)}, {"stride": 2, "padding": 2, "groups": 2}),
    "depthwise": ({"in_channels": 4, "out_channels": 4, "kernel_size": 3}, {"padding": 1, "groups": 4}),
    "dilated": ({"in_channels": 2, "out_channels": 3, "kernel_size": 2, "bias": False}, {"padding": 1, "dilation": 2}),
    "pointwise": ({"in_channels": 1, "out_channels": 3, "kernel_size": 1}, {}),
}

Layer = QuantConv2d | QuantLinear


def spec(**kwargs: object) -> QuantSpec:
    return QuantSpec(**{"bits": TRAINED, "activation_range": "unit"} | kwargs)


def learned(trained: dict[int, float], reach: dict[int, float], bits: int) -> float:
    """The scale at `bits`: the nearest trained one's (the lower of two), stretched to reach as far."""
    nearest = min(sorted(trained), key=lambda b: abs(b - bits))
    return trained[nearest] * reach[nearest] / reach[bits]


def reach(signed: bool) -> dict[int, float]:
    """How many steps the largest level is away from zero; {-s/2, s/2} at 1 signed bit."""
    levels = {b: float(reference.lsq_levels(b, signed)[1]) for b in ALL_BITS}
    return levels | {1: 0.5} if signed else levels


@pytest.mark.parametrize("activation", ACTIVATION_METHODS)
def test_an_empty_batch_is_measured_by_nobody(activation: str) -> None:
    """As of a detector without proposals, before and after the range has started."""
    torch.manual_seed(0)
    layer = QuantLinear.from_float(nn.Linear(6, 4), spec(activation=activation, output_correction=True), signed=True)
    twin, x = copy.deepcopy(layer), torch.randn(5, 6)
    for batch in (torch.zeros(0, 6), x, torch.zeros(0, 6)):
        y = layer(batch)
        assert y.shape == (len(batch), 4)
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    twin(x)
    torch.testing.assert_close(layer(x), twin(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bits", [2, 3, 8, 32])
def test_a_network_in_half_precision(norm: str, bits: int) -> None:
    torch.manual_seed(0)
    asked = spec(norm=norm, output_correction=True)
    layer, batch_norm = nn.Conv2d(3, 4, 3).bfloat16(), nn.BatchNorm2d(4).bfloat16()
    model = nn.Sequential(QuantConv2d.from_float(layer, asked, signed=True), MultiBitBatchNorm(batch_norm, asked))
    x = torch.randn(4, 3, 6, 6).bfloat16()
    assert model(x).dtype == torch.bfloat16
    for part in model if bits in TRAINED or norm != "switchable" else model[:1]:
        part.set_bits(bits)
    assert model.eval()(x).dtype == torch.bfloat16


def set_scales(scale: LearnedScale, rng: torch.Generator, size: float) -> dict[int, float]:
    """Give each trained bit-width a scale of its own; returns them."""
    values = size * (0.5 + torch.rand(len(TRAINED), generator=rng, dtype=torch.float64))
    scale.values.data = values
    return dict(zip(TRAINED, values.tolist(), strict=True))


def expected_weight(layer: Layer, scales: dict[int, float], bits: int) -> np.ndarray:
    w = layer.weight.detach().numpy()
    if layer.spec.weight == "lsq":
        s = learned(scales, reach(signed=True), bits)
        w_q, full = reference.lsq_weight(w, bits, s)[0], w
    elif layer.spec.weight == "minmax":
        zero = layer.spec.zero_level
        w_q, full = reference.minmax_weight(w, bits, zero)[0], w
    else:
        w_q, full = reference.dorefa_weight(w, bits)[0], reference.dorefa_weight(w, 32)[0]
    return reference.correct_weight(w_q, full, layer.spec.correction)


def expected_input(layer: Layer, x: np.ndarray, scales: dict[int, float], bits: int) -> np.ndarray:
    method, signed = layer.spec.activation, layer.input_quantizer.signed
    if method == "none":
        return x
    if method == "lsq":
        return reference.lsq_activation(x, bits, learned(scales, reach(signed), bits), signed)[0]
    if method == "pact":
        return reference.pact_activation(x, bits, learned(scales, dict.fromkeys(ALL_BITS, 1.0), bits), signed)[0]
    if layer.input_quantizer.range == "tracked":
        return reference.dorefa_activation(x, bits, float(x.min()) if signed else None, float(x.max()))[0]
    return reference.dorefa_activation(x, bits)[0]


def check(layer: Layer, x: Tensor, rng: torch.Generator, bits: tuple[int, ...], arguments: dict[str, int]) -> None:
    """`layer` on x, float64, at each of `bits` against the loops."""
    layer = layer.double()
    layer(x)  # what is learned or tracked starts here
    weight_scales = set_scales(layer.weight_scale, rng, 0.1) if layer.spec.weight == "lsq" else {}
    input_scales = {}
    if layer.spec.activation in ("lsq", "pact"):
        input_scales = set_scales(layer.input_quantizer.scale, rng, 0.3 if layer.spec.activation == "lsq" else 1.5)
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    for b in bits:
        layer.set_bits(b)
        w, x_q = expected_weight(layer, weight_scales, b), expected_input(layer, x.numpy(), input_scales, b)
        torch.testing.assert_close(layer.weight_and_bias()[0], torch.from_numpy(w), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            layer.input_quantizer(x, layer.known_levels), torch.from_numpy(x_q), rtol=1e-9, atol=1e-11
        )
        product = reference.linear if isinstance(layer, QuantLinear) else reference.conv2d
        expected = torch.from_numpy(product(x_q, w, bias, **arguments))
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-10)


def images(channels: int, signed: bool, rng: torch.Generator) -> Tensor:
    x = torch.randn(2, channels, 5, 4, generator=rng, dtype=torch.float64)
    return x if signed else x.abs()


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("weight", WEIGHT_METHODS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_conv2d_against_reference(kind: str, weight: str, correction: str, rng: torch.Generator) -> None:
    shape, arguments = CONVOLUTIONS[kind]
    conv = nn.Conv2d(**shape, **arguments).eval()
    layer = QuantConv2d.from_float(conv, spec(weight=weight, correction=correction), signed=False)
    check(layer, images(shape["in_channels"], False, rng), rng, ALL_BITS, arguments)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(("weight", "zero_level"), [*((method, False) for method in WEIGHT_METHODS), ("minmax", True)])
def test_linear_against_reference(weight: str, zero_level: bool, correction: str, rng: torch.Generator) -> None:
    settings = spec(weight=weight, correction=correction, zero_level=zero_level)
    for bias in (True, False):
        layer = QuantLinear.from_float(nn.Linear(7, 5, bias=bias).eval(), settings, signed=False)
        x = torch.rand(4, 7, generator=rng, dtype=torch.float64) * 1.5
        check(layer, x, rng, ALL_BITS[zero_level:], {})  # a zero takes two bits


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_output_correction_keeps_the_mean_output_of_the_full_precision_weight(kind: str, rng: torch.Generator) -> None:
    shape, arguments = CONVOLUTIONS[kind]
    settings = spec(weight="minmax", activation="none", output_correction=True)
    layer = QuantConv2d.from_float(nn.Conv2d(**shape, **arguments | {"padding": 0}), settings, signed=False).double()
    means = torch.rand(shape["in_channels"], generator=rng, dtype=torch.float64) * 3
    x = means[:, None, None].expand(8, -1, 6, 6)
    for _ in range(300):  # until the running mean has arrived
        layer.train()(x)
    torch.testing.assert_close(layer.mean_input, means)
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    wanted = reference.conv2d(x.numpy(), layer.weight.detach().numpy(), bias, **arguments | {"padding": 0})
    for b in (1, 2, 3):
        layer.set_bits(b)
        torch.testing.assert_close(layer.eval()(x), torch.from_numpy(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_output_correction_follows_the_mean_input(dtype: torch.dtype, rng: torch.Generator) -> None:
    settings = spec(activation="none", output_correction=True)
    conv = QuantConv2d.from_float(nn.Conv2d(3, 2, 1), settings, signed=True).to(dtype)
    linear = QuantLinear.from_float(nn.Linear(3, 2), settings, signed=True).to(dtype)
    x = torch.randn(20, 3, 4, 5, generator=rng).to(dtype)
    for layer, part, means in (
        (conv, x, x[:16].mean((0, 2, 3))),  # of the first 16 images
        (conv, x[0], x[0].mean((1, 2))),
        (linear, x.movedim(1, -1), x[:16].mean((0, 2, 3))),
        (linear, x[:, :, 0, 0], x[:16, :, 0, 0].mean(0)),
        (linear, x[0, :, 0, 0], x[0, :, 0, 0]),
    ):
        before = layer.mean_input.clone()
        layer.eval()(part)
        torch.testing.assert_close(layer.mean_input, before)
        layer.train()(part)
        torch.testing.assert_close(layer.mean_input, 0.9 * before + 0.1 * means, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("activation_range", ["unit", "tracked"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("activation", ACTIVATION_METHODS)
def test_inputs_against_reference(activation: str, signed: bool, activation_range: str, rng: torch.Generator) -> None:
    settings = spec(weight="minmax", activation=activation, activation_range=activation_range)
    shape, arguments = CONVOLUTIONS["plain"]
    layer = QuantConv2d.from_float(nn.Conv2d(**shape, **arguments).eval(), settings, signed)
    check(layer, images(3, signed, rng), rng, ALL_BITS, arguments)
    layer = QuantLinear.from_float(nn.Linear(7, 5).eval(), settings, signed)
    x = torch.randn(4, 7, generator=rng, dtype=torch.float64)
    check(layer, x if signed else x.abs(), rng, ALL_BITS, {})


@pytest.mark.parametrize("weight", WEIGHT_METHODS)
def test_gradients_reach_every_parameter(weight: str, rng: torch.Generator) -> None:
    x = images(3, True, rng).float()
    for activation in ACTIVATION_METHODS:
        conv = nn.Conv2d(3, 4, 3)
        layer = QuantConv2d.from_float(conv, spec(weight=weight, activation=activation, correction="none"), signed=True)
        layer(x)
        if activation in ("lsq", "pact"):
            layer.input_quantizer.scale.values.data *= 0.5  # so that some inputs are clipped
        for bits in TRAINED:
            layer.set_bits(bits)
            layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and (parameter.grad != 0).all(), name  # of every bit-width's scale too


def test_a_layer_takes_over_the_plain_ones_parameters_and_settings() -> None:
    conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding="valid", dilation=2, groups=2, padding_mode="reflect").eval()
    conv.weight.requires_grad_(False)
    layer = QuantConv2d.from_float(conv, spec(), signed=False)
    assert layer.weight is conv.weight and layer.bias is conv.bias and not layer.training
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels"):
        assert getattr(layer, name) == getattr(conv, name)
    assert "bits=8, weight=dorefa, correction=mean_var" in repr(layer)
    assert "dorefa, signed=False, range=unit" in repr(layer)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_modes_at_32_bits(padding_mode: str, rng: torch.Generator) -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding_mode)
    layer = QuantConv2d.from_float(conv, spec(weight="minmax", activation="none", correction="none"), signed=True)
    layer.set_bits(32)
    x = torch.randn(2, 2, 5, 5, generator=rng)
    assert torch.equal(layer(x), conv(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATION_METHODS)
def test_half_precision_layers(activation: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """A whole layer, at every bit-width, 32 included: near the float32 one, and neither NaN nor a NaN gradient."""
    for weight in WEIGHT_METHODS:
        settings = spec(weight=weight, activation=activation, activation_range="tracked")
        layer = QuantLinear.from_float(nn.Linear(8, 5), settings, signed=True)
        x = torch.randn(6, 8, generator=rng)
        layer(x)
        half = copy.deepcopy(layer).to(dtype).eval()
        for bits in ALL_BITS:
            half.set_bits(bits)
            layer.eval().set_bits(bits)
            half.zero_grad()
            y = half(x.to(dtype))
            y.sum().backward()
            assert y.dtype == half.weight.grad.dtype == dtype and y.isfinite().all()
            assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)
            if bits in (8, 32):
                torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)


# What is learned or tracked


def test_learned_scales_start_from_the_first_batch(rng: torch.Generator) -> None:
    x = 3 * torch.rand(10, 20, generator=rng)
    for signed in (False, True):
        lsq = input_quantizer(spec(activation="lsq"), signed)
        pact = input_quantizer(spec(activation="pact"), signed)
        for quantizer in (lsq, pact):
            quantizer(x, torch.tensor(255.0))
            quantizer(100 * x, torch.tensor(255.0))  # the second batch moves nothing
        starts = [reference.lsq_initial_scale(x.double().numpy(), b, signed) for b in TRAINED]
        assert lsq.scale.values.tolist() == pytest.approx(starts, rel=1e-5)
        assert pact.scale.values.tolist() == pytest.approx([x.max().item()] * 3)
    layer = QuantLinear.from_float(nn.Linear(9, 4), spec(weight="lsq"), signed=False)
    weight = layer.weight.detach().double().numpy()
    starts = [reference.lsq_initial_scale(weight, b, signed=True) for b in TRAINED]
    assert layer.weight_scale.values.tolist() == pytest.approx(starts, rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_learned_scales_that_were_trained_at_32_bits_alone(bits: int, rng: torch.Generator) -> None:
    """They have no scale to learn there, and others start as those of 8 bits do."""
    plain, x, found = nn.Linear(64, 64), torch.randn(32, 64, generator=rng), []
    for trained in ((8,), (32,)):
        settings = QuantSpec(bits=trained, weight="lsq", activation="lsq")
        layer = QuantLinear.from_float(plain, settings, signed=True)
        layer.set_bits(bits)
        found.append(layer(x))
    assert torch.equal(*found) and len(layer.weight_and_domain()[0].unique()) > 2


def test_a_scale_stays_positive() -> None:
    scale = LearnedScale(TRAINED, reach(signed=False))
    for value in (-0.1, 0.0):
        scale.values.data.fill_(value)
        assert scale() > 0


def test_tracked_ranges_follow_the_data(rng: torch.Generator) -> None:
    quantizer, n = input_quantizer(spec(), signed=True), torch.tensor(255.0)
    batches = [torch.randn(50, generator=rng) * size for size in (1.0, 4.0, 0.5)]
    low = high = None
    for x in batches:
        quantizer(x, n)
        low = float(x.min()) if low is None else 0.9 * low + 0.1 * float(x.min())
        high = float(x.max()) if high is None else 0.9 * high + 0.1 * float(x.max())
        assert (quantizer.low.item(), quantizer.high.item()) == pytest.approx((low, high), rel=1e-5)
    quantizer.eval()(1000 * batches[0], n)
    assert (quantizer.low.item(), quantizer.high.item()) == pytest.approx((low, high), rel=1e-5)


@pytest.mark.parametrize("activation", ACTIVATION_METHODS)
@pytest.mark.parametrize("signed", [False, True])
def test_first_batch_of_zeros(activation: str, signed: bool) -> None:
    quantizer = input_quantizer(spec(activation=activation, activation_range="tracked"), signed)
    x = torch.zeros(2, 3, requires_grad=True)
    for n in (1.0, 3.0, 255.0, 2.0**32 - 1):
        y = quantizer(x, torch.tensor(n))
        y.sum().backward()
        assert y.abs().max() < 1e-5 and x.grad.isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_a_weight_that_starts_at_zero_learns(bits: int) -> None:
    """Straight through, as if nothing was rounded."""
    plain = nn.Linear(3, 4)
    nn.init.zeros_(plain.weight)
    layer, grad = QuantLinear.from_float(plain, spec(activation="none"), True), torch.rand(4, 3)
    layer.set_bits(bits)
    weight, _ = layer.weight_and_bias()
    weight.backward(grad)
    assert not weight.any()
    torch.testing.assert_close(layer.weight.grad, grad)


# Batch norm


def norm_inputs(kind: type[nn.Module], rng: torch.Generator) -> Tensor:
    return torch.randn(*{nn.BatchNorm1d: (8, 5), nn.BatchNorm2d: (4, 5, 3, 3)}[kind], generator=rng) * 2 + 1


def uneven(norm: nn.Module, rng: torch.Generator) -> nn.Module:
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data = 0.5 + torch.rand(tensor.shape, generator=rng)
    return norm


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_shared_norm_is_batch_norm(kind: type[nn.Module], rng: torch.Generator) -> None:
    """Bit for bit over several training steps at changing bit-widths: outputs, gradients, running statistics."""
    plain = uneven(kind(5, eps=1e-3, momentum=0.3), rng)
    ours = MultiBitBatchNorm(plain, spec())
    for bits in (2, 8, 3, 4, 32):
        x = norm_inputs(kind, rng).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        ours.set_bits(bits)
        expected, actual = plain(x), ours(twin)
        assert torch.equal(actual, expected)
        expected.square().sum().backward()
        actual.square().sum().backward()
        assert torch.equal(twin.grad, x.grad)
        assert torch.equal(ours.weight.grad[0], plain.weight.grad) and torch.equal(ours.bias.grad[0], plain.bias.grad)
        assert torch.equal(ours.running_mean[-1], plain.running_mean)
        assert torch.equal(ours.running_var[-1], plain.running_var)
    x = norm_inputs(kind, rng)
    assert torch.equal(ours.eval()(x), plain.eval()(x))


def test_switchable_norm_is_one_batch_norm_a_bit_width(rng: torch.Generator) -> None:
    start = uneven(nn.BatchNorm2d(5), rng)
    ours = MultiBitBatchNorm(start, spec(norm="switchable"))
    plain = {bits: copy.deepcopy(start) for bits in TRAINED}
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, *plain.values())]
    for bits in (2, 8, 8, 4, 2):
        x = norm_inputs(nn.BatchNorm2d, rng) * bits
        ours.set_bits(bits)
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert torch.equal(ours(x), plain[bits](x))
        for module in (ours, plain[bits]):
            module(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    x = norm_inputs(nn.BatchNorm2d, rng)
    for bits in TRAINED:
        ours.eval().set_bits(bits)
        assert torch.equal(ours(x), plain[bits].eval()(x))
    assert [ours.serves(b) for b in ALL_BITS] == [b in TRAINED for b in ALL_BITS]
    assert "5, switchable, bits=8, own=[2, 4, 8]" in repr(ours)


def test_own_statistics(rng: torch.Generator) -> None:
    """A new row starts from what the bit-width used, and others do not move it; a step of training drops it."""
    shared = MultiBitBatchNorm(uneven(nn.BatchNorm1d(5), rng), spec())
    shared.own_statistics(3)
    shared.set_bits(3)
    x = norm_inputs(nn.BatchNorm1d, rng)
    before = shared.eval()(x)
    shared.train().set_bits(4)
    assert torch.equal(before, shared.eval()(x))  # 3 bits started from the shared statistics
    with torch.no_grad():
        shared.train()(100 * x)
    assert not torch.equal(before, shared.eval()(x))
    shared.set_bits(3)
    assert torch.equal(before, shared(x))
    shared.train()(x)
    assert not shared.own and shared.eval()(x).ne(before).any()
    switchable = MultiBitBatchNorm(nn.BatchNorm1d(5), spec(norm="switchable"))
    switchable.set_bits(4)
    switchable(100 * x)
    switchable.own_statistics(5)
    assert switchable.serves(5)
    before = switchable.eval()(x)
    switchable.set_bits(5)
    assert torch.equal(before, switchable(x))


def test_shared_affine_norm_has_statistics_a_bit_width_and_mixes_them_between(rng: torch.Generator) -> None:
    """Each trained bit-width as a plain batch norm with the common affine; others by linear interpolation in 1/n^2."""
    start = uneven(nn.BatchNorm2d(5), rng)
    ours = MultiBitBatchNorm(start, spec(norm="shared_affine"))
    plain = {bits: copy.deepcopy(start) for bits in TRAINED}
    for bits in (2, 8, 4, 4, 2):
        x = norm_inputs(nn.BatchNorm2d, rng) * bits
        ours.set_bits(bits)
        assert torch.equal(ours(x), plain[bits](x))
    assert ours.weight.shape == (1, 5) and torch.equal(ours.weight[0], start.weight)
    x, ours = norm_inputs(nn.BatchNorm2d, rng), ours.eval()
    for bits in ALL_BITS:
        noise = [(2.0**b - 1) ** -2 for b in TRAINED][::-1]  # increasing, as numpy wants it; constant beyond its ends
        tables = [np.stack([getattr(plain[b], name).numpy() for b in TRAINED[::-1]]) for name in STATISTICS]
        at = (2.0**bits - 1) ** -2
        mean, var = (np.array([np.interp(at, noise, column) for column in table.T]) for table in tables)
        ours.set_bits(bits)
        expected = F.batch_norm(x, *(torch.from_numpy(v).to(x.dtype) for v in (mean, var)), start.weight, start.bias)
        torch.testing.assert_close(ours(x), expected, rtol=1e-6, atol=1e-6)
        assert ours.serves(bits)
    ours.set_bits(3)
    mixed = ours(x)
    ours.own_statistics(3)
    ours.set_bits(3)
    torch.testing.assert_close(ours(x), mixed)  # a row of its own starts from the mixture


def test_norm_without_affine_and_frozen_norm(rng: torch.Generator) -> None:
    for norm in NORMS:
        ours = MultiBitBatchNorm(nn.BatchNorm1d(5, affine=False), spec(norm=norm))
        x = norm_inputs(nn.BatchNorm1d, rng)
        assert ours.weight is None and torch.equal(ours(x), nn.BatchNorm1d(5, affine=False)(x))
        frozen = MultiBitBatchNorm(nn.BatchNorm1d(5).requires_grad_(False), spec(norm=norm))
        assert not any(p.requires_grad for p in frozen.parameters())


# QuantSpec


def test_a_spec_is_ordered_hashed_and_frozen() -> None:
    default = QuantSpec(bits=[8, 2, 4])
    assert default.bits == (2, 4, 8) and default.full_precision == ("first", "last")
    assert QuantSpec(bits=iter([4]), full_precision=iter(["first"])).full_precision == ("first",)
    assert hash(default) == hash(QuantSpec(bits=(2, 4, 8)))
    with pytest.raises(FrozenInstanceError):
        default.bits = (2,)
