"""Every fast twin against its plain formula, at every bit-width; and what differs between releases of PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emqlib import kernels, quantizers
from emqlib.correction import CORRECTIONS, correct_weight
from emqlib.quantizers import levels
from emqlib.train import distributed

LOW_BITS = range(1, 9)


def scalar(value: float, **kwargs: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, **kwargs)


def with_ties(rng: torch.Generator, step: float) -> Tensor:
    """Numbers inside and outside every range, and multiples of half a step, on which rounding and clipping turn."""
    halves = torch.arange(-6, 7, dtype=torch.float64) * step / 2
    return torch.cat([2 * torch.randn(60, generator=rng, dtype=torch.float64), halves]).view(1, -1)


# The name of a quantizer: its plain formula and its twin, of x, n and a learned or tracked scalar
TWINS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dorefa, [0, 1]": (
        lambda x, n, s: quantizers.dorefa_activation(x, n),
        lambda x, n, s: kernels.fake_quantize(x, *quantizers.dorefa_grid(n, 1.0)),
    ),
    "dorefa, [0, c]": (
        lambda x, n, s: quantizers.dorefa_activation(x, n, s),
        lambda x, n, s: kernels.fake_quantize(x, *quantizers.dorefa_grid(n, s)),
    ),
    "dorefa, [low, c]": (
        lambda x, n, s: quantizers.dorefa_activation(x, n, s.detach(), scalar(-0.25)),
        lambda x, n, s: kernels.fake_quantize(x, *quantizers.dorefa_grid(n, s.detach(), scalar(-0.25))),
    ),
    **{
        f"pact, {signed=}": (
            lambda x, n, s, signed=signed: quantizers.pact_activation(x, n, s, signed),
            lambda x, n, s, signed=signed: kernels.fake_quantize(
                x, *quantizers.learned_grid(n, quantizers.pact_step(n, s, signed), signed), learn_step=False
            ),
        )
        for signed in (False, True)
    },
    **{
        f"lsq, {signed=}, {parts=}": (
            lambda x, n, s, signed=signed, parts=parts: quantizers.lsq_activation(x, n, s, signed, parts),
            lambda x, n, s, signed=signed, parts=parts: kernels.lsq_activation(x, n, s, signed, parts),
        )
        for signed in (False, True)
        for parts in (1, 3)
    },
}


def gradients(function: Callable[..., Tensor], x: Tensor, n: Any, s: float, grad: Tensor) -> tuple[Tensor, ...]:
    x, scale = x.clone().requires_grad_(), scalar(s, requires_grad=True)
    y = function(x, n, scale)
    y.backward(grad)
    return y.detach(), x.grad, scalar(0.0) if scale.grad is None else scale.grad


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("name", TWINS)
def test_an_activation_s_twin(name: str, bits: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a number of levels and by a tensor, as compiled graphs have it; those mask a gradient in another way."""
    plain, twin = TWINS[name]
    n, s = levels(bits), 0.5  # powers of two, so that half levels are exact
    x = with_ties(rng, s if "lsq" in name else s / 4)
    grad = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    expected = gradients(plain, x, n, s, grad)
    for known, compiling in ((n, False), (scalar(n), False), (n, True), (scalar(n), True)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        torch.testing.assert_close(gradients(twin, x, known, s, grad), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("learn_step", [True, False])
def test_the_ends_of_a_range_lie_outside(known: bool, learn_step: bool) -> None:
    """Exactly at q_min s and q_max s: nothing to x; q_min and q_max to s."""
    values, grad = scalar([-1.0, -0.99, 0.1, 0.99, 1.0]), scalar([1.0, 10.0, 100.0, 1000.0, 10000.0])
    for function in (quantizers.fake_quantize, kernels.fake_quantize) if known else (kernels.fake_quantize,):
        x, s = values.clone().requires_grad_(), scalar(0.25, requires_grad=True)
        bounds = (-4.0, 4.0) if known else (scalar(-4.0), scalar(4.0))
        function(x, s, *bounds, learn_step=learn_step).backward(grad)
        assert x.grad.tolist() == [0, 10, 100, 1000, 0]
        inside = -4 - -3.96, 0 - 0.4, 4 - 3.96  # r(u) - u
        steps = sum(g * rule for g, rule in zip((10, 100, 1000), inside, strict=True)) if learn_step else 0
        assert s.grad.item() == pytest.approx(-4 + steps + 40000, rel=1e-12)


def test_a_learned_offset_moves_what_lies_outside(rng: torch.Generator) -> None:
    values, grad = (torch.randn(100, generator=rng, dtype=torch.float64) for _ in range(2))
    for function in (quantizers.fake_quantize, kernels.fake_quantize):
        x, s, offset = (
            values.clone().requires_grad_(),
            scalar(0.2, requires_grad=True),
            scalar(-0.4, requires_grad=True),
        )
        function(x, s, 0.0, 7.0, offset).backward(grad)
        u = (values + 0.4) / 0.2
        inside = (u > 0) & (u < 7)
        torch.testing.assert_close(x.grad, torch.where(inside, grad, 0.0), rtol=1e-12, atol=0)
        assert offset.grad.item() == pytest.approx(grad[~inside].sum().item(), rel=1e-9)
        rule = torch.where(inside, u.round() - u, u.clamp(0, 7))
        assert s.grad.item() == pytest.approx((grad * rule).sum().item(), rel=1e-9)


@pytest.mark.parametrize("bits", (*LOW_BITS, 32))
@pytest.mark.parametrize("asked", [(1, 1), (1, 0), (0, 1)])
def test_dorefa_weight_s_twin(asked: tuple[int, int], bits: int, rng: torch.Generator) -> None:
    """Through each output alone and both; equal largest weights share the gradient of the maximum."""
    values = torch.cat([with_ties(rng, 0.5), scalar([[2.5, -2.5, 2.5, 0.0, -1.0]])], 1)
    n, grads = levels(bits), torch.randn(2, *values.shape, generator=rng, dtype=torch.float64)

    def found(function: Callable[..., tuple[Tensor, Tensor]], n: Any) -> tuple[Tensor, ...]:
        w = values.clone().requires_grad_()
        outputs = function(w, n)
        sum((o * g).sum() for o, g, a in zip(outputs, grads, asked, strict=True) if a).backward()
        return (outputs[1] if bits == 32 else outputs[0]).detach(), outputs[1].detach(), w.grad

    expected = found(quantizers.dorefa_weight, n)
    for known in (n,) if bits == 32 else (n, scalar(n)):
        torch.testing.assert_close(found(kernels.dorefa_weight, known), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("bits", LOW_BITS)
def test_correction_s_twin(mode: str, gradient: bool, bits: int, rng: torch.Generator) -> None:
    """With channels that are constant, in one or the other weight or both."""
    full = torch.randn(6, 3, 2, generator=rng, dtype=torch.float64)
    quantized = quantizers.quantize_weight(full, bits, "minmax")
    full[1], quantized[2], full[3], quantized[3] = 0.3, 0.2, 0.1, 0.4
    grad, found = torch.randn(full.shape, generator=rng, dtype=torch.float64), []
    for function in (correct_weight, kernels.correct_weight):
        w_q, w = quantized.clone().requires_grad_(), full.clone().requires_grad_()
        corrected = function(w_q, w, mode, gradient)
        corrected.backward(grad)
        found.append((corrected.detach(), w_q.grad, torch.zeros(()) if w.grad is None else w.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_a_parameter_that_is_awaited_gets_zeros() -> None:
    x, parameter = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    (kernels.awaited(x, parameter) * 2).sum().backward()
    assert x.grad.tolist() == [2, 2] and parameter.grad.tolist() == [0, 0, 0]


# Releases


@pytest.mark.usefixtures("process_group")
def test_buffers_are_left_alone() -> None:
    """By an argument of which this release does not warn: here a warning is an error."""
    assert nn.parallel.DistributedDataParallel(nn.BatchNorm1d(2)).broadcast_buffers
    assert not distributed.Place(0, 2).wrap(nn.BatchNorm1d(2)).broadcast_buffers
