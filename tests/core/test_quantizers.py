"""Every quantizer against the loops of reference.py, its gradient against the stated rule, and its properties."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emqlib import quantizers
from emqlib.quantizers import quantize_activation, quantize_weight

pytestmark = pytest.mark.processor

LOW_BITS = range(1, 9)
ALL_BITS = (*LOW_BITS, 32)
SIGNS = (False, True)
WEIGHTS = {
    "dorefa": reference.dorefa_weight,
    "minmax": reference.minmax_weight,
    "lsq": lambda w, bits: reference.lsq_weight(w, bits, reference.lsq_initial_scale(w, bits, signed=True)),
}
ACTIVATIONS = {
    "dorefa": lambda x, bits, s, signed: reference.dorefa_activation(x, bits, -s if signed else None, s),
    "pact": reference.pact_activation,
    "lsq": reference.lsq_activation,
}


def on_its_grid(actual: Tensor, expected: tuple[np.ndarray, np.ndarray], rtol: float) -> None:
    """Equal, but where the number before rounding lay so near a tie that the last bit of a sum decides."""
    values, place = expected
    decided = torch.from_numpy(np.abs(place - np.floor(place) - 0.5) > (1e-5 if rtol < 1e-6 else 2e-4))
    assert decided.double().mean() > 0.9
    wanted = torch.from_numpy(values)
    torch.testing.assert_close(actual.double()[decided], wanted[decided], rtol=rtol, atol=rtol)


def inputs(rng: torch.Generator, *shape: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(*shape, generator=rng, dtype=torch.float64)


def scalar(value: float | list[float], **kwargs: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, **kwargs)


# The formulas


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("method", WEIGHTS)
def test_weight(method: str, bits: int, rng: torch.Generator) -> None:
    for shape in ((5, 3, 3, 3), (4, 1, 3, 3), (6, 7)):
        w = inputs(rng, *shape, spread=0.3)
        expected, before = WEIGHTS[method](w.numpy(), bits), w.clone()
        on_its_grid(quantize_weight(w, bits, method), expected, rtol=1e-12)
        on_its_grid(quantize_weight(w.float(), bits, method), expected, rtol=1e-6)
        assert torch.equal(w, before)


@pytest.mark.parametrize("bits", ALL_BITS[1:])
def test_minmax_with_a_zero_level(bits: int, rng: torch.Generator) -> None:
    w = inputs(rng, 5, 3, 3, 3)
    w_q = quantize_weight(w, bits, "minmax", zero_level=True)
    on_its_grid(w_q, reference.minmax_weight(w.numpy(), bits, zero_level=True), rtol=1e-12)
    assert len(w_q[0].unique()) <= 2**bits - 1
    assert (quantize_weight(torch.zeros(2, 3), bits, "minmax", zero_level=True) == 0).all()


@pytest.mark.parametrize("signed", SIGNS)
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("method", ACTIVATIONS)
def test_activation(method: str, bits: int, signed: bool, rng: torch.Generator) -> None:
    x = inputs(rng, 2, 5, 6, 6)
    scale = 1.7 if method != "lsq" else reference.lsq_initial_scale(x.numpy(), bits, signed)
    expected, before = ACTIVATIONS[method](x.numpy(), bits, scale, signed), x.clone()
    on_its_grid(quantize_activation(x, bits, method, scalar(scale), signed), expected, rtol=1e-12)
    on_its_grid(quantize_activation(x.float(), bits, method, torch.tensor(scale), signed), expected, rtol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_activation_default_ranges(bits: int, rng: torch.Generator) -> None:
    """Without a scale: [0, 1] as DoReFa and Any-Precision have it, and LSQ's initial step."""
    x = inputs(rng, 200)
    for signed in SIGNS:
        for method in ("dorefa", "pact"):
            on_its_grid(
                quantize_activation(x, bits, method, signed=signed),
                ACTIVATIONS[method](x.numpy(), bits, 1.0, signed),
                1e-12,
            )
        start = reference.lsq_initial_scale(x.numpy(), bits, signed)
        expected = reference.lsq_activation(x.numpy(), bits, start, signed)
        on_its_grid(quantize_activation(x, bits, "lsq", signed=signed), expected, 1e-12)
    assert torch.equal(quantize_activation(x, bits, "none"), x)


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize(("low", "high"), [(-0.3, 2.0), (-5.0, 0.5), (-1.0, 1.0), (-1e-6, 3.0), (-2.0, 1e-6)])
def test_affine_grid(bits: int, low: float, high: float, rng: torch.Generator) -> None:
    x = inputs(rng, 300)
    n = quantizers.levels(bits)
    x_q = quantizers.dorefa_activation(x, n, scalar(high), scalar(low))
    on_its_grid(x_q, reference.dorefa_activation(x.numpy(), bits, low, high), rtol=1e-12)
    assert len(x_q.unique()) <= 2**bits
    assert bits == 1 or quantizers.dorefa_activation(torch.zeros(1), n, scalar(high), scalar(low)) == 0


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_learned_clipping_level_never_tips_its_grid_over(bits: int, rng: torch.Generator) -> None:
    """Signed PACT is centred on a rounding tie; the grid must not hang on the last bit of alpha."""
    big = torch.tensor([-1e9, 1e9])
    for alpha in torch.rand(100, generator=rng) * 10:
        low, high = quantize_activation(big, bits, "pact", alpha, signed=True) * (2**bits - 1) / (2 * alpha)
        assert (round(float(low)), round(float(high))) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize(
    ("method", "zero_level"), [("dorefa", False), ("minmax", False), ("minmax", True), ("lsq", False)]
)
def test_weight_grid(method: str, zero_level: bool, bits: int, rng: torch.Generator) -> None:
    """Of weights that reach both ends: low is the lowest of them, and all are whole steps above it."""
    if zero_level and bits == 1:
        return
    half = inputs(rng, 3, 40) * torch.tensor([[1.0], [2.0], [3.0]])
    w, scale = torch.cat([half, -half], 1), scalar(0.005) if method == "lsq" else None
    n = quantizers.levels(bits)
    options = {"zero_level": True} if zero_level else {}  # not by default
    low, step = quantizers.weight_grid(w, n, method, scale, **options)
    place = (quantize_weight(w, bits, method, scale, zero_level) - low) / step
    torch.testing.assert_close(place, place.round(), rtol=0, atol=1e-9)
    ends = (place.amin(1), place.amax(1)) if method == "minmax" else place.aminmax()
    assert [set(end.round().view(-1).tolist()) for end in ends] == [{0.0}, {n - zero_level}]


# 32 bits: the identity, bit for bit


@pytest.mark.parametrize("method", ["dorefa", "pact", "lsq"])
def test_32_bit_activations_are_untouched(method: str, rng: torch.Generator) -> None:
    powers = 2.0 ** torch.arange(-76, 27, 0.25)
    x = torch.cat([powers, -powers, torch.zeros(1), torch.randn(1000, generator=rng)]).requires_grad_()
    for signed in SIGNS:
        x.grad = None
        y = quantize_activation(x, 32, method, signed=signed)
        assert torch.equal(y, x if signed else x.relu())
        y.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x) if signed else (x > 0).float())


# Gradients: against finite differences where the formula is smooth, else against the stated rule


def finite_differences(function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(x)
    for i in range(x.size):
        shift = np.zeros(x.size)
        shift[i] = step
        shift = shift.reshape(x.shape)
        gradient.flat[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize("bits", ALL_BITS)
def test_dorefa_weight_gradient(bits: int, rng: torch.Generator) -> None:
    """That of E tanh(w) / max|tanh(w)|, the maximum included, E held fixed: rounding passes gradients through."""
    w, grad = inputs(rng, 3, 5), inputs(rng, 3, 5)
    mean = float(w.abs().mean())

    def smooth(v: np.ndarray) -> float:
        return float(mean * (grad.numpy() * np.tanh(v)).sum() / np.abs(np.tanh(v)).max())

    leaf = w.clone().requires_grad_()
    quantize_weight(leaf, bits, "dorefa").backward(grad)
    torch.testing.assert_close(leaf.grad, torch.from_numpy(finite_differences(smooth, w.numpy())), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_minmax_weight_gradient_is_one(bits: int, rng: torch.Generator) -> None:
    """As LSQ's is at 32 bits."""
    cases = [("minmax", False)] + [("minmax", True)] * (bits > 1) + [("lsq", False)] * (bits == 32)
    for method, zero_level in cases:
        leaf, grad = inputs(rng, 3, 5).requires_grad_(), inputs(rng, 3, 5)
        quantize_weight(leaf, bits, method, zero_level=zero_level).backward(grad)
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-12, atol=1e-12)


def lsq_rule(x: Tensor, grad: Tensor, bits: int, s: float, signed: bool) -> tuple[Tensor, float]:
    """LSQ, section 2: ds is r(x/s) - x/s inside, the outer level outside, times 1 / sqrt(numel q_max); dx 1 and 0."""
    q_n, q_p = reference.lsq_levels(bits, signed)
    shift = 0.5 if signed and bits == 1 else 0.0  # the two levels -1 and 0, moved to -1/2 and 1/2
    grad_x, grad_s = torch.zeros_like(x), 0.0
    for i, (v, g) in enumerate(zip(x.flatten().tolist(), grad.flatten().tolist(), strict=True)):
        u = v / s - shift
        if -q_n < u < q_p:
            grad_x.view(-1)[i] = g
            grad_s += g * (reference.round_even(u) - u)
        else:
            grad_s += g * (shift + (-q_n if u <= -q_n else q_p))
    return grad_x, grad_s / math.sqrt(x.numel() * max(q_p, 1))


@pytest.mark.parametrize("signed", SIGNS)
@pytest.mark.parametrize("bits", LOW_BITS)
def test_lsq_gradients(bits: int, signed: bool, rng: torch.Generator) -> None:
    values, grad = inputs(rng, 10, 30), inputs(rng, 10, 30)
    s = 1.5 / 2 ** (bits - signed)  # so that some inputs fall outside
    expected = lsq_rule(values, grad, bits, s, signed)
    functions = [lambda x, scale: quantize_activation(x, bits, "lsq", scale, signed)]
    if signed:
        functions.append(lambda w, scale: quantize_weight(w, bits, "lsq", scale))
    for function in functions:
        x, scale = values.clone().requires_grad_(), scalar(s, requires_grad=True)
        function(x, scale).backward(grad)
        torch.testing.assert_close(x.grad, expected[0], rtol=1e-12, atol=0)
        assert scale.grad.item() == pytest.approx(expected[1], rel=1e-9)


def test_parts_of_a_batch_add_up_to_its_gradient(rng: torch.Generator) -> None:
    x, grad, n = inputs(rng, 12, 5), inputs(rng, 12, 5), quantizers.levels(3)
    whole, parts = scalar(0.2, requires_grad=True), scalar(0.2, requires_grad=True)
    quantizers.lsq_activation(x, n, whole, signed=True).backward(grad)
    for part, part_grad in zip(x.chunk(4), grad.chunk(4), strict=True):
        quantizers.lsq_activation(part, n, parts, signed=True, parts=4).backward(part_grad)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("method", ["pact", "dorefa"])
def test_gradients_of_a_clipped_range(method: str, bits: int, rng: torch.Generator) -> None:
    """PACT, eq. 3: to alpha, 1 where x >= alpha and 0 elsewhere; to x, 1 between 0 and alpha, also of DoReFa."""
    values, grad = inputs(rng, 200), inputs(rng, 200)
    x, alpha = values.clone().requires_grad_(), scalar(0.8, requires_grad=True)
    quantize_activation(x, bits, method, alpha if method == "pact" else alpha.detach()).backward(grad)
    assert method == "dorefa" or alpha.grad.item() == pytest.approx(grad[values >= 0.8].sum().item(), rel=1e-9)
    torch.testing.assert_close(x.grad, torch.where((values > 0) & (values < 0.8), grad, 0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", LOW_BITS)
def test_signed_pact_gradients(bits: int, rng: torch.Generator) -> None:
    """Outside, the outermost level in units of alpha; inside, none."""
    values, grad = inputs(rng, 200), inputs(rng, 200)
    x, alpha = values.clone().requires_grad_(), scalar(0.8, requires_grad=True)
    x_q = quantize_activation(x, bits, "pact", alpha, signed=True)
    x_q.backward(grad)
    low, high = x_q.min().item(), x_q.max().item()
    outside = (values <= low) | (values >= high)
    expected = (grad * x_q.detach() / 0.8)[outside].sum().item()
    assert alpha.grad.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(x.grad, torch.where(outside, 0.0, grad), rtol=1e-12, atol=0)


# Properties


numbers = st.floats(-100, 100, width=32)


@settings(max_examples=40)
@given(st.lists(numbers, min_size=1, max_size=30), st.sampled_from(LOW_BITS), st.sampled_from(sorted(WEIGHTS)))
def test_weight_properties(values: list[float], bits: int, method: str) -> None:
    """One channel: at most 2**b values, no larger than allowed, in the order of the weights."""
    w = torch.tensor([sorted(values)])
    w_q = quantize_weight(w, bits, method)
    assert w_q.shape == w.shape and w_q.isfinite().all()
    assert len(w_q.unique()) <= 2**bits
    assert (w_q.diff() >= 0).all()
    largest = {"dorefa": w.abs().mean(), "minmax": w.abs().max(), "lsq": math.inf}[method]
    assert w_q.abs().max() <= largest * (1 + 1e-6) + 1e-30


@settings(max_examples=60)
@given(
    values=st.lists(numbers, min_size=1, max_size=30),
    bits=st.sampled_from(LOW_BITS),
    method=st.sampled_from(sorted(ACTIVATIONS)),
    signed=st.booleans(),
    scale=st.floats(1 / 1024, 128, width=32),
)
def test_activation_properties(values: list[float], bits: int, method: str, signed: bool, scale: float) -> None:
    x, s = torch.tensor(sorted(values)), torch.tensor(scale)
    x_q = quantize_activation(x, bits, method, s, signed)
    assert x_q.shape == x.shape and x_q.isfinite().all()
    assert len(x_q.unique()) <= 2**bits
    assert (x_q.diff() >= 0).all()
    assert signed or (x_q >= 0).all()
    again = quantize_activation(x_q, bits, method, s, signed)  # on the grid already: nothing moves
    torch.testing.assert_close(again, x_q, rtol=1e-6, atol=0)


# Degenerate inputs


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-20, -1e30])
def test_constant_weight(method: str, bits: int, value: float) -> None:
    w = torch.full((2, 3), value, requires_grad=True)
    w_q = quantize_weight(w, bits, method)
    w_q.sum().backward()
    assert w_q.isfinite().all() and w.grad.isfinite().all() and len(w_q.unique()) == 1
    if method != "lsq":
        torch.testing.assert_close(w_q, w)  # the outermost level, or E tanh(w) / max|tanh(w)|


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("method", ACTIVATIONS)
def test_degenerate_activations(method: str, bits: int) -> None:
    for signed in SIGNS:
        for value in (0.0, 1e-30, 1e30, -1e30):
            x = torch.full((2, 3), value, requires_grad=True)
            x_q = quantize_activation(x, bits, method, signed=signed)
            x_q.sum().backward()
            assert x_q.isfinite().all() and x.grad.isfinite().all()
