"""Weight bias correction against literal loops, and what it must do where a channel has no variance to match."""

from collections.abc import Callable

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emqlib import kernels
from emqlib.correction import CORRECTIONS, correct_weight
from emqlib.quantizers import WEIGHT_METHODS, quantize_weight

pytestmark = pytest.mark.processor

SHAPES = [(6, 4, 3, 3), (8, 1, 3, 3), (5, 7), (3, 2, 1, 1), (4, 3, 5)]  # the second one depthwise
BITS = (1, 2, 4, 8)


def pair(shape: tuple[int, ...], bits: int, method: str, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A quantized weight and the full-precision one in the quantizer's own domain, float64."""
    w = 0.3 * torch.randn(*shape, generator=rng, dtype=torch.float64)
    return quantize_weight(w, bits, method), quantize_weight(w, 32, method)


def moments(w: Tensor) -> tuple[Tensor, Tensor]:
    channels = w.double().flatten(1)
    return channels.mean(1), channels.var(1, correction=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_against_reference(method: str, bits: int, shape: tuple[int, ...], rng: torch.Generator) -> None:
    w_q, w = pair(shape, bits, method, rng)
    for mode in CORRECTIONS:
        expected = torch.from_numpy(reference.correct_weight(w_q.numpy(), w.numpy(), mode))
        for gradient in (True, False):
            torch.testing.assert_close(correct_weight(w_q, w, mode, gradient), expected, rtol=1e-11, atol=1e-12)
        single = correct_weight(w_q.float(), w.float(), mode)
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("correct", [correct_weight, kernels.correct_weight])
def test_small_weights_in_float16(correct: Callable[..., Tensor], rng: torch.Generator) -> None:
    """Their squares are below float16's smallest number, and their deviations are not."""
    w = 1e-3 * torch.randn(8, 576, generator=rng)
    w_q = 2e-3 * w.sign()
    found, expected = correct(w_q.half(), w.half()), correct_weight(w_q, w)
    assert found.dtype == torch.float16
    assert (found.float() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 1, 3, 3), (3, 5)])
def test_gradient_through_the_statistics(shape: tuple[int, ...], mode: str, rng: torch.Generator) -> None:
    w_q, w = (v.requires_grad_() for v in pair(shape, 3, "minmax", rng))
    assert torch.autograd.gradcheck(lambda q, full: correct_weight(q, full, mode), (w_q.detach().requires_grad_(), w))


@pytest.mark.parametrize("mode", ["mean", "mean_var"])
def test_statistics_without_gradient(mode: str, rng: torch.Generator) -> None:
    """The statistics are constants: w gets no gradient, w_q the channel's ratio of deviations."""
    w_q, w = (v.detach().requires_grad_() for v in pair((4, 2, 3, 3), 3, "minmax", rng))
    grad = torch.randn(w.shape, generator=rng, dtype=torch.float64)
    correct_weight(w_q, w, mode, gradient=False).backward(grad)
    ratio = (moments(w)[1] / moments(w_q)[1]).sqrt() if mode == "mean_var" else torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(w_q.grad, grad * ratio.view(4, 1, 1, 1))
    assert w.grad is None


CONSTANT = {  # w_q and w of one channel, and what is expected of mean_var
    "quantized_constant": ([0.2, 0.2, 0.2], [0.1, 0.2, 0.6], [0.3, 0.3, 0.3]),
    "weight_constant": ([0.0, 0.2, 0.4], [0.3, 0.3, 0.3], [0.3, 0.3, 0.3]),
    "both_constant": ([0.2, 0.2, 0.2], [0.3, 0.3, 0.3], [0.3, 0.3, 0.3]),
    "both_zero": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    "quantized_zero": ([0.0, 0.0, 0.0], [-0.1, 0.2, 0.2], [0.1, 0.1, 0.1]),
    "weight_zero": ([-0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    "huge_constant": ([1e10, 1e10, 1e10], [1e10, 2e10, 3e10], [2e10, 2e10, 2e10]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("case", CONSTANT)
def test_constant_channel(case: str, gradient: bool, dtype: torch.dtype) -> None:
    """No NaN in value or gradient; another channel is corrected as if the constant one were not there."""
    if case == "huge_constant" and dtype == torch.float16:
        return
    *values, expected = CONSTANT[case]
    other = ([-1.0, 0.0, 1.0], [0.0, 0.5, 1.5])
    w_q, w = (torch.tensor([v, o], dtype=dtype).requires_grad_() for v, o in zip(values, other, strict=True))
    corrected = correct_weight(w_q, w, "mean_var", gradient)
    (corrected * torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)).sum().backward()
    assert w_q.grad.isfinite().all() and (w.grad is None or w.grad.isfinite().all())
    tolerance = 4 * torch.finfo(dtype).eps
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(corrected[0].detach().double(), wanted, rtol=tolerance, atol=tolerance)
    alone = correct_weight(w_q[1:], w[1:], "mean_var", gradient)
    assert torch.equal(corrected[1:], alone)


def test_a_large_constant_channel_counts_as_constant() -> None:
    """The mean of many equal numbers is not exactly that number: the rounding must not be blown up to a deviation."""
    for count in (27, 4608, 25088):
        for value in (0.1, 1 / 3, 7.7e-5, 123.456):
            w_q = torch.full((1, count), value)
            w = torch.linspace(-1, 1, count)[None]
            torch.testing.assert_close(correct_weight(w_q, w), torch.zeros(1, count), rtol=0, atol=1e-5 * max(1, value))


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(-8, 8, width=16), min_size=4, max_size=24),
    bits=st.sampled_from((*range(1, 9), 32)),
    method=st.sampled_from(WEIGHT_METHODS),
    gradient=st.booleans(),
)
def test_never_nan(values: list[float], bits: int, method: str, gradient: bool) -> None:
    w = torch.tensor(values[: len(values) // 2 * 2]).view(2, -1).requires_grad_()
    full = quantize_weight(w, 32, method)
    corrected = correct_weight(quantize_weight(w, bits, method), full, gradient=gradient)
    corrected.sum().backward()
    assert corrected.isfinite().all() and w.grad.isfinite().all()
    torch.testing.assert_close(corrected.mean(1), full.mean(1), rtol=1e-4, atol=1e-4)
