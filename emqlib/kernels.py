"""Fast twins of the formulas in `quantizers` and `correction`, and what differs between PyTorch's releases.

A twin takes the arguments of its plain formula, some one more, and gives the same values and gradients, in fewer passes
over memory or fewer operations. The tests compare the two at every bit-width.
"""

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from .correction import correct_weight as plain_correction
from .quantizers import Number, is_full, learned_grid
from .quantizers import dorefa_weight as plain_dorefa_weight

_BEFORE_2_13 = torch.__version__ < (2, 13)
_TRITON = find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether `triton_kernels` takes x (any shape): on a GPU, and on a CPU if TRITON_INTERPRET=1 is set.

    It takes no classes derived from Tensor, which may be spread over devices or have no numbers.
    """
    there = type(x) in (Tensor, nn.Parameter) and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    return there and _TRITON and not torch.compiler.is_compiling() and (not x.is_cuda or _agree(x.device))


@cache
def _agree(device: torch.device) -> bool:
    """Whether the forward kernels give on `device` what the formulas give; if not, a warning says so.

    The kernels of the backward pass are taken to be right if these are.
    """
    from . import triton_kernels

    w = torch.rand(5, 31, generator=torch.Generator().manual_seed(0)).sub_(0.5).to(device)
    expected, reason = plain_correction(*plain_dorefa_weight(w, 3.0)), "they give other numbers"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            good = torch.allclose(triton_kernels.correct_dorefa_weights([w], 3.0)[0], expected, atol=1e-5)
            rounded = (w / 0.1).clamp(0, 3).round() * 0.1
            good = good and torch.allclose(triton_kernels.fake_quantize(w, 0.1, 0.0, 3.0), rounded, atol=1e-6)
    except Exception as error:  # a driver, a compiler or a device that Triton does not know
        good, reason = False, repr(error)
    if not good:
        warnings.warn(f"Triton's kernels are not used on {device}, where {reason}", stacklevel=3)
    return good


def awaited(x: Tensor, parameter: Tensor) -> Tensor:
    """x (any shape) itself; its backward pass gives zeros to a `parameter` (any shape) that plays no part in it.

    Several processes wait for a gradient of every parameter; a single one does the same, so that momentum goes on.
    """
    return x + 0 * parameter.sum()


# Activations and LSQ's weights


class _FakeQuantize(Function):
    """Its time is that of memory: without Triton, four to seven passes over it forward and one to three backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Number, offset: Tensor | None, q_min: Number, q_max: Number, *how: bool
    ) -> Tensor:
        grid = (scale, offset, q_min, q_max)
        ctx.save_for_backward(x, *(v if isinstance(v, Tensor) else None for v in grid))
        ctx.known, ctx.how = tuple(None if isinstance(v, Tensor) else v for v in grid), how
        dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        alike = offset is None and len({isinstance(v, Tensor) for v in (scale, q_min, q_max)}) == 1
        if dense and x.dtype != torch.float64 and alike and runs_triton(x):
            from . import triton_kernels  # Triton takes long to load, and only few need it

            return triton_kernels.fake_quantize(x, scale, q_min, q_max)
        q = x / scale if offset is None else (x - offset).div_(scale)
        q.round_()
        if isinstance(q_max, Tensor):  # on a CPU, clamp with tensors takes eight times as long
            torch.maximum(q, q_min, out=q)
            torch.minimum(q, q_max, out=q)
        else:
            q.clamp_(q_min, q_max)
        q.mul_(scale)
        y = q if offset is None else q.add_(offset)
        # PyTorch 2.11 compiles a Function that returns what it wrote in place to one of gradient zero; 2.13 does not
        return y.clone() if _BEFORE_2_13 and torch.compiler.is_compiling() else y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        scale, offset, q_min, q_max = (v if k is None else k for v, k in zip(saved, ctx.known, strict=True))
        learn_step, unit = ctx.how
        place = x if unit else _place(x, scale, offset, q_min, q_max)
        if torch.compiler.is_compiling() and not x.is_cuda:  # there, to keep a mask takes longer than all the rest
            c = place.clamp(0, 1)
            grad_x = grad * (c.ceil() - c.floor())
        else:
            grad_x = torch.ops.aten.hardtanh_backward(grad, place, 0.0, 1.0)
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[1]:
            u = x / scale if offset is None else (x - offset) / scale
            q, inside = u.round().clamp(q_min, q_max), (place > 0) & (place < 1)
            rule = torch.where(inside, q - u if learn_step else 0.0, q)
            grad_scale = (grad * rule).sum().to(scale.dtype)
        if offset is not None and ctx.needs_input_grad[2]:
            grad_offset = (grad - grad_x).sum().to(offset.dtype)
        return grad_x, grad_scale, grad_offset, None, None, None, None


def _place(x: Tensor, scale: Number, offset: Tensor | None, q_min: Number, q_max: Number) -> Tensor:
    """The place of x in its range, 0 at the lower end and 1 at the upper: hardtanh's fused backward masks by it."""
    from_zero = offset is None and not isinstance(q_min, Tensor) and q_min == 0
    low = q_min * scale if offset is None else q_min * scale + offset
    whole = 1 / ((q_max - q_min) * scale)
    return x * whole if from_zero else (x - low).mul_(whole)


def fake_quantize(
    x: Tensor,
    scale: Number,
    q_min: Number,
    q_max: Number,
    offset: Tensor | None = None,
    learn_step: bool = True,
    unit: bool = False,
) -> Tensor:
    """The twin of `quantizers.fake_quantize`; q_min and q_max are both floats or both scalar tensors.

    unit: whether the grid spans [0, 1]; the gradient is then masked by x itself.
    """
    wide = x.float() if x.dtype == torch.float16 else x  # whose largest number, 65504, a range may pass on the way
    return _FakeQuantize.apply(wide, scale, offset, q_min, q_max, learn_step, unit).to(x.dtype)


def lsq_activation(x: Tensor, n: Number, scale: Tensor, signed: bool, parts: int = 1) -> Tensor:
    """The twin of `quantizers.lsq_activation`."""
    _, _, q_max, _ = learned_grid(n, scale, signed)
    q_max = q_max if isinstance(q_max, Tensor) else scale.new_full((), q_max)  # made on its device: no copy to a GPU
    g = (max(x.numel(), 1) * parts * q_max.clamp_min(1)).rsqrt()
    s = (scale - scale * g).detach() + scale * g
    return fake_quantize(x, *learned_grid(n, s, signed))


# Weights


class _DoReFaWeight(Function):
    """Autograd alone would take three times as many small operations.

    Rounding passes gradients through, so both outputs have the same slope: d/dt = E. With M = max|tanh(w)| and g the
    sum of their gradients, dL/dtanh(w) = E g / M - [|tanh(w)| = M] sign(w) sum(E g tanh(w)) / M**2. Equal maxima share
    the second term. For a weight of zeros E / M counts as 1: with 0 / 0 = 0 it would stay at zero.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, w: Tensor, n: Number) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        tanh, E = torch.tanh(w), w.abs().mean()
        M = tanh.abs().max().clamp_min(torch.finfo(w.dtype).tiny)
        ctx.save_for_backward(tanh, M, E.clamp_min(torch.finfo(w.dtype).tiny))
        domain = E * (t := tanh / M)
        return domain.clone() if is_full(n) else E * (2 / n * torch.round(n / 2 * (t + 1)) - 1), domain

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        tanh, M, E = ctx.saved_tensors
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None, None
        g = (given[0] + given[1] if len(given) == 2 else given[0]) * (E / M)
        peak = tanh.abs() == M
        g_M = (g * tanh).sum() / (M * peak.sum().clamp_min(1))
        g = g.addcmul(peak, g_M * tanh.sign(), value=-1)
        return torch.ops.aten.tanh_backward(g, tanh), None


def dorefa_weight(w: Tensor, n: Number) -> tuple[Tensor, Tensor]:
    """The twin of `quantizers.dorefa_weight`; at 32 bits it rounds nothing and both outputs are equal."""
    return _DoReFaWeight.apply(w, n)


class _Correct(Function):
    """Weights are small tensors, of which every operation costs the same: the gradient is in closed form.

    G is the gradient of w' and K the number of weights in a channel; m, v and d = x - m are a channel's mean, variance
    and deviation. With R = sqrt(v_w / v_q), or 1 for "mean", and S = sum(G d_q) R / K, or 0 for "mean" and where a
    variance is no divisor: dL/dw_q = R (G - mean(G)) - S d_q / v_q and dL/dw = mean(G) + S d_w / v_w.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, w_q: Tensor, w: Tensor, scaled: bool, gradient: bool) -> Tensor:
        dims = tuple(range(1, w.dim()))
        m_q, m_w = w_q.mean(dims, keepdim=True), w.mean(dims, keepdim=True)
        d_q = w_q - m_q
        ctx.scaled, ctx.gradient = scaled, gradient
        if not scaled:
            return d_q + m_w
        d_w = w - m_w
        v_q, v_w = d_q.square().mean(dims, keepdim=True), d_w.square().mean(dims, keepdim=True)
        # rounding noise, see `correction`
        constant_q = v_q <= 1e-12 * (v_q + m_q.square())
        R = torch.where(constant_q, 1.0, (v_w / v_q).sqrt())
        fixed = constant_q | (v_w <= 0)
        ctx.save_for_backward(d_q, d_w, R, v_q.masked_fill(fixed, torch.inf), v_w.masked_fill(fixed, torch.inf))
        return torch.addcmul(m_w, R, d_q)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.scaled:
            mean = grad.mean(tuple(range(1, grad.dim())), keepdim=True)
            return (grad - mean, mean.expand_as(grad), None, None) if ctx.gradient else (grad, None, None, None)
        d_q, d_w, R, v_q, v_w = ctx.saved_tensors
        if not ctx.gradient:
            return R * grad, None, None, None
        dims = tuple(range(1, grad.dim()))
        mean, S = grad.mean(dims, keepdim=True), (grad * d_q).mean(dims, keepdim=True) * R
        grad_q = torch.addcmul(-R * mean, R, grad).addcmul_(S / v_q, d_q, value=-1)
        return grad_q, torch.addcmul(mean, S / v_w, d_w), None, None


def correct_weight(w_q: Tensor, w: Tensor, mode: str = "mean_var", gradient: bool = True) -> Tensor:
    """The twin of `correction.correct_weight`, unchecked."""
    if w.dtype == torch.float16 and mode != "none":  # squares of small weights are zero in it
        return correct_weight(w_q.float(), w.float(), mode, gradient).to(w_q.dtype)
    return w_q if mode == "none" else _Correct.apply(w_q, w, mode == "mean_var", gradient)
