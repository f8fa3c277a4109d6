"""Quantizers as pure, differentiable functions on tensors.

Notation, as in the papers: b bits, n = 2**b - 1 levels above the lowest one, r(x) = round with a straight-through
gradient (dr/dx = 1). A bit-width enters as the number n: in a compiled graph as a *tensor*, so that one graph serves
every bit-width, else as a float, which costs fewer passes over memory and gives the same values. 32 bits mean "not
quantized": the identity of the quantizer's own domain. Only `levels`, `quantize_weight` and `quantize_activation` check
what they are given: the others run in every step.
Sources: DoReFa as used by Any-Precision (arXiv 1911.07346), LSQ (arXiv 1902.08153), PACT (arXiv 1805.06085).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from . import kernels as versions
from .checks import bit_width, choice, flag, invalid

Number = Tensor | float  # a scalar tensor, or what Python knows already
Grid = tuple[Number, Number, Number, Tensor | None]  # (scale, q_min, q_max, offset), as `fake_quantize` takes them

WEIGHT_METHODS = ("dorefa", "minmax", "lsq")
ACTIVATION_METHODS = ("dorefa", "pact", "lsq", "none")

# At 32 bits an activation is divided by a power of two so small, and clipped so far out, that rounding and clipping
# change no float32 between 2**-76 and 2**27: the same graph computes the identity, bit for bit. One power of two more
# and the width of the signed range, q_max - q_min, would be infinite and all gradients zero.
_FULL_SCALE, _FULL_LEVELS = 2.0**-99, 2.0**126


def levels(bits: int) -> float:
    """n = 2**bits - 1, the number of levels above the lowest one; 32 bits give 2**32 - 1.

    >>> [levels(b) for b in (1, 2, 8)]
    [1.0, 3.0, 255.0]
    """
    return float(2 ** bit_width("bits", bits) - 1)


def is_full(n: Number) -> Tensor | bool:
    """Whether the levels n (scalar) stand for 32 bits; of a tensor a scalar tensor, never read back to the host."""
    return n > 2.0**15  # in float16 the levels of 32 bits are infinite, and so is 2**16


def _where(condition: Tensor | bool, yes: Any, no: Any) -> Any:
    """`torch.where`, or Python's own choice of a condition that Python knows."""
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else yes if condition else no


def round_ste(x: Tensor) -> Tensor:
    """r(x): round to the nearest integer, ties to even; straight-through gradient. Any shape.

    >>> round_ste(torch.tensor([0.4, 1.5]))
    tensor([0., 2.])
    """
    return x + (x.round() - x).detach()


class _FakeQuantize(Function):
    """`fake_quantize` in few passes over memory, which is what bounds it: four to seven forward, one to three back."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        scale: Number,
        offset: Tensor | None,
        q_min: Number,
        q_max: Number,
        learn_step: bool,
    ) -> Tensor:
        grid = (scale, offset, q_min, q_max)
        ctx.save_for_backward(x, *(v if isinstance(v, Tensor) else None for v in grid))
        ctx.known, ctx.learn_step = tuple(None if isinstance(v, Tensor) else v for v in grid), learn_step
        q = x / scale if offset is None else (x - offset).div_(scale)
        q.round_()
        if isinstance(q_max, Tensor):  # on a CPU, clamp with tensor bounds takes eight times as long as these two
            torch.maximum(q, q_min, out=q)
            torch.minimum(q, q_max, out=q)
        else:
            q.clamp_(q_min, q_max)
        q.mul_(scale)
        return versions.returned(q if offset is None else q.add_(offset))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        scale, offset, q_min, q_max = (v if k is None else k for v, k in zip(saved, ctx.known, strict=True))
        place = _place(x, scale, offset, q_min, q_max)
        if torch.compiler.is_compiling() and not x.is_cuda:  # there, to keep a mask takes longer than all the rest
            c = place.clamp(0, 1)
            grad_x = grad * (c.ceil() - c.floor())
        else:
            grad_x = torch.ops.aten.hardtanh_backward(grad, place, 0.0, 1.0)
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[1]:
            u = x / scale if offset is None else (x - offset) / scale
            q, inside = u.round().clamp(q_min, q_max), (place > 0) & (place < 1)
            rule = torch.where(inside, q - u if ctx.learn_step else 0.0, q)
            grad_scale = (grad * rule).sum().to(scale.dtype)
        if offset is not None and ctx.needs_input_grad[2]:
            grad_offset = (grad - grad_x).sum().to(offset.dtype)
        return grad_x, grad_scale, grad_offset, None, None, None


def _place(x: Tensor, scale: Number, offset: Tensor | None, q_min: Number, q_max: Number) -> Tensor:
    """The place of x in its range, 0 at the lower end and 1 at the upper: hardtanh's fused backward masks by it."""
    from_zero = offset is None and not isinstance(q_min, Tensor) and q_min == 0
    if from_zero and not isinstance(scale, Tensor) and abs(q_max * scale - 1) < 1e-9:  # the range is [0, 1]
        return x
    low = q_min * scale if offset is None else q_min * scale + offset
    whole = 1 / ((q_max - q_min) * scale)
    return x * whole if from_zero else (x - low).mul_(whole)


def fake_quantize(
    x: Tensor, scale: Number, q_min: Number, q_max: Number, offset: Tensor | None = None, learn_step: bool = True
) -> Tensor:
    """x_q = s clip(r((x - o) / s), q_min, q_max) + o: the uniform quantizer all activation methods share.

    x: any shape; scale s, offset o, and q_min and q_max, both tensors or both floats: scalar; returns the shape of x.
    Gradients: to x, 1 inside the clipping range and 0 outside; to s, r(u) - u inside with u = (x - o) / s, and q_min or
    q_max outside; to o, 0 inside and 1 outside. Source: LSQ, eq. 1-3 (arXiv 1902.08153); the offset is LSQ+'s (arXiv
    2004.09576).

    >>> one = torch.tensor(1.0)
    >>> fake_quantize(torch.tensor([0.4, 1.2, 9.0]), one, 0 * one, 3 * one)
    tensor([0., 1., 3.])
    """
    if x.dtype == torch.float16:  # the constants of 32 bits do not fit float16
        return _FakeQuantize.apply(x.float(), scale, offset, q_min, q_max, learn_step).to(x.dtype)
    return _FakeQuantize.apply(x, scale, offset, q_min, q_max, learn_step)


def unsigned_grid(n: Number) -> tuple[Number, Number, None]:
    """(q_min, q_max, offset) = (0, n, none) for inputs that are never negative; n: scalar levels.

    At 32 bits q_max is out of reach: with `step` this is ReLU without an upper clip.
    """
    return 0 / n, _where(is_full(n), _FULL_LEVELS, n), None


def signed_grid(n: Number, scale: Tensor) -> tuple[Number, Number, Tensor | None]:
    """(q_min, q_max, offset) = (-2**(b-1), 2**(b-1) - 1, 0) for inputs of either sign; n, scale: scalar.

    At 1 bit that grid would be {-s, 0} and lose every positive input, so there the offset is s/2: {-s/2, s/2}.
    """
    half = (n + 1) / 2
    full = is_full(n)
    q_min = _where(full, -_FULL_LEVELS, -half)
    q_max = _where(full, _FULL_LEVELS, half - 1)
    none = torch.zeros_like(scale) if isinstance(n, Tensor) else None  # no offset at all where Python knows it
    return q_min, q_max, _where(n == 1, scale / 2, none)


def step(n: Number, scale: Number) -> Number:
    """The step size to use at n levels: `scale`, or one too small to round anything at 32 bits. Scalars."""
    return _where(is_full(n), _FULL_SCALE, scale)


class _DoReFaWeight(Function):
    """`dorefa_weight`, whose gradient autograd would take three times as many small operations for.

    Both outputs have the same slope, since rounding is straight through: d/dt = E. With M = max|tanh(w)| and g the sum
    of their gradients, dL/dtanh(w) = E g / M - [|tanh(w)| = M] sign(w) sum(E g tanh(w)) / M**2; equal maxima share it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, w: Tensor, n: Number) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        tanh, E = torch.tanh(w), w.abs().mean()
        M = tanh.abs().max().clamp_min(torch.finfo(w.dtype).tiny)
        ctx.save_for_backward(tanh, M, E)
        domain = E * (t := tanh / M)
        if is_full(n) is True:
            return domain.clone(), domain
        return _where(is_full(n), domain, E * (2 / n * torch.round(n / 2 * (t + 1)) - 1)), domain

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
    """E (2 r(n (t/2 + 1/2)) / n - 1), and its own domain E t, with t = tanh(w) / max|tanh(w)| and E = mean|w|.

    w: (O, ...); n: scalar levels; returns two (O, ...). E and the range are per tensor; E carries no gradient, the
    maximum does. Source: Any-Precision-DNNs, models/quan_ops.py; DoReFa (arXiv 1606.06160), eq. 9. An all-zero weight
    gives zeros (NaN there).
    """
    return _DoReFaWeight.apply(w, n)


def minmax_weight(w: Tensor, n: Number, zero_level: bool = False) -> tuple[Tensor, Tensor]:
    """Symmetric min-max with s = max|w_o| for each output channel o, and its own domain, w.

    s (2 r(n (w/(2s) + 1/2)) / n - 1), the odd-symmetric grid of n + 1 levels, which has no zero; with `zero_level`
    s r(m w/s) / m, m = (n - 1) / 2, the restricted range of n levels around zero that integer kernels want.
    w: (O, ...); n: scalar levels; returns two (O, ...). s is a statistic and carries no gradient.
    """
    s = _largest(w)
    if zero_level:
        m = (n - 1) / 2
        w_q = s * round_ste(m * w / s) / m
    else:
        w_q = s * (2 * round_ste(n * (w / (2 * s) + 0.5)) / n - 1)
    return _where(is_full(n), w, w_q), w


def _largest(w: Tensor) -> Tensor:
    """max|w_o| of each output channel o of w (O, ...): (O, 1, ...), never zero."""
    s = w.detach().abs().reshape(len(w), -1).amax(1).clamp_min(torch.finfo(w.dtype).tiny)
    return s.view(-1, *[1] * (w.dim() - 1))


def lsq_weight(w: Tensor, n: Number, scale: Tensor) -> tuple[Tensor, Tensor]:
    """s r(clip(w/s, -2**(b-1), 2**(b-1) - 1)) with a learned scalar s, and its own domain, w.

    w: (O, ...); n: scalar levels; scale s: scalar, whose gradient is scaled by 1 / sqrt(numel q_max); returns two
    (O, ...). 1 bit gives {-s/2, s/2}. Source: LSQ, eq. 1-3 and section 2.2 (arXiv 1902.08153).
    """
    s = scale_gradient(scale, w.numel(), signed_grid(n, scale)[1])
    w_q = fake_quantize(w, s, *signed_grid(n, s))
    return _where(is_full(n), w, w_q), w


def lsq_initial_scale(x: Tensor, q_max: Tensor) -> Tensor:
    """s = 2 mean|x| / sqrt(q_max), LSQ's start; x of any shape, q_max and the result scalar (1 bit counts as q_max 1).

    Source: LSQ, section 2.1.
    """
    return (2 * x.detach().abs().mean() / q_max.clamp_min(1).sqrt()).clamp_min(1e-6)


def scale_gradient(scale: Tensor, numel: int, q_max: Number) -> Tensor:
    """The scalar `scale` itself, its gradient multiplied by g = 1 / sqrt(numel q_max). Source: LSQ, section 2.2."""
    q_max = q_max if isinstance(q_max, Tensor) else scale.new_full((), q_max)  # filled where it lies: no copy to a GPU
    g = (numel * q_max.clamp_min(1)).rsqrt()
    return (scale - scale * g).detach() + scale * g


def affine_grid(n: Number, low: Tensor, high: Tensor) -> Grid:
    """The grid of n + 1 levels over [low, high], low < 0 < high, one of them zero; all scalar.

    At 1 bit a zero level would leave one side without any, so there the two levels are low and high themselves.
    """
    full, binary = is_full(n), n == 1
    scale = (high - low) / n
    # not low / scale: rounded twice, a range symmetric about zero would miss its tie and tip over to either side
    q_min = _where(binary, 0.0, torch.round(low * n / (high - low)))
    q_max = q_min + n
    offset = _where(binary, low, torch.zeros_like(low) if isinstance(n, Tensor) else None)
    return step(n, scale), _where(full, -_FULL_LEVELS, q_min), _where(full, _FULL_LEVELS, q_max), offset


def dorefa_grid(n: Number, high: Number, low: Tensor | None = None) -> Grid:
    """The grid of `dorefa_activation`: n + 1 levels over [0, high], or with a negative `low` over both; all scalar."""
    return (step(n, high / n), *unsigned_grid(n)) if low is None else affine_grid(n, low, high)


def learned_grid(n: Number, scale: Number, signed: bool) -> Grid:
    """The grid of `pact_activation` and `lsq_activation`, whose step is the scalar `scale`."""
    return step(n, scale), *(signed_grid(n, scale) if signed else unsigned_grid(n))


def pact_step(n: Number, alpha: Number, signed: bool) -> Number:
    """The step of n levels above the lowest one over [0, alpha], or [-alpha, alpha]; all scalar."""
    return (2 * alpha if signed else alpha) / n


def dorefa_activation(x: Tensor, n: Number, high: Number, low: Tensor | None = None) -> Tensor:
    """r(n clip(x, 0, c) / c) c / n with c = high (1 in DoReFa); with a negative `low`, `affine_grid` over [low, high].

    x: any shape; n, high, low: scalar; returns the shape of x. No gradient to the range. 32 bits: x above zero
    (with `low`: x). Source: Any-Precision-DNNs, models/quan_ops.py, which has c = 1 and no `low`.
    """
    return fake_quantize(x, *dorefa_grid(n, high, low))


def pact_activation(x: Tensor, n: Number, alpha: Tensor, signed: bool) -> Tensor:
    """r(n clip(x, 0, a) / a) a / n with a learned clipping level a; signed: `signed_grid` with steps of 2 a / n.

    x: any shape; n, alpha: scalar; returns the shape of x. The gradient to a is 1 where x >= a, 0 inside (signed: the
    outermost level of the side, in units of a); 32 bits: x above zero (signed: x). Source: PACT, eq. 1-3
    (arXiv 1805.06085).
    """
    return fake_quantize(x, *learned_grid(n, pact_step(n, alpha, signed), signed), learn_step=False)


def lsq_activation(x: Tensor, n: Number, scale: Tensor, signed: bool, parts: int = 1) -> Tensor:
    """s r(clip(x/s, 0, 2**b - 1)) with a learned scalar s; signed: clip(x/s, -2**(b-1), 2**(b-1) - 1).

    x: any shape; n, scale: scalar; returns the shape of x. The gradient to s is scaled by 1 / sqrt(numel q_max), numel
    that of a whole batch, of which x is one of `parts` equal ones. 32 bits: x above zero (signed: x).
    Source: LSQ, eq. 1-3 and section 2.2 (arXiv 1902.08153).
    """
    q_max = signed_grid(n, scale)[1] if signed else n
    s = scale_gradient(scale, x.numel() * parts, q_max)
    return fake_quantize(x, *learned_grid(n, s, signed))


def quantize_weight(
    w: Tensor, bits: int, method: str = "dorefa", scale: Tensor | None = None, zero_level: bool = False
) -> Tensor:
    """Weight w (O, ...) at a bit-width; the same code the converted layers run. Returns (O, ...), differentiable.

    method: "dorefa" (`dorefa_weight`), "minmax" (`minmax_weight`, with or without a `zero_level`) or "lsq"
    (`lsq_weight`; scale: scalar, by default LSQ's initial one). bits: 1 to 8, or 32 for the identity of the method's
    own domain. ValueError: another method or bit-width, an empty or non-floating w, a scale that is not a positive
    scalar, a zero level at 1 bit.

    >>> quantize_weight(torch.tensor([[-0.3, 0.1, 0.2]]), 1)
    tensor([[-0.2000, 0.2000, 0.2000]])
    """
    choice("method", method, WEIGHT_METHODS)
    flag("zero_level", zero_level)
    n = _checked_levels("w", w, bits)
    _check_scale(scale)
    if w.dim() == 0:
        raise invalid("w", w, "a tensor (O, ...), with a dimension of output channels")
    if method == "dorefa":
        return dorefa_weight(w, n)[0]
    if method == "minmax":
        if zero_level and bits == 1:
            raise invalid("zero_level", True, "at least 2 bits, since one level cannot be both zero and not")
        return minmax_weight(w, n, zero_level)[0]
    if scale is None:
        scale = lsq_initial_scale(w, (n + 1) / 2 - 1)
    return lsq_weight(w, n, scale)[0]


def quantize_activation(
    x: Tensor, bits: int, method: str = "dorefa", scale: Tensor | None = None, signed: bool = False
) -> Tensor:
    """Activation x (any shape) at a bit-width; returns the shape of x, differentiable.

    method: "dorefa", r(n clip(x, 0, c)) / n with c = scale, 1 by default; "pact", the same with a learned clipping
    level `scale`; "lsq", with a learned step `scale`, by default LSQ's initial one; "none", x itself. signed: a grid
    with negative levels. bits 32: x above zero (signed: x). ValueError: another method or bit-width, an empty or
    non-floating x, a scale that is not a positive scalar.

    >>> quantize_activation(torch.tensor([0.1, 0.3, 1.7]), 2)
    tensor([0.0000, 0.3333, 1.0000])
    """
    choice("method", method, ACTIVATION_METHODS)
    flag("signed", signed)
    n = _checked_levels("x", x, bits)
    _check_scale(scale)
    if method == "none":
        return x
    if method == "lsq":
        scale = lsq_initial_scale(x, (n + 1) / 2 - 1 if signed else n) if scale is None else scale
        return lsq_activation(x, n, scale, signed)
    c = x.new_ones(()) if scale is None else scale
    if method == "pact":
        return pact_activation(x, n, c, signed)
    return dorefa_activation(x, n, c, -c if signed else None)


def weight_grid(
    w: Tensor, n: float, method: str, scale: Tensor | None = None, zero_level: bool = False
) -> tuple[Tensor, Tensor]:
    """(low, step) of the grid low + step r, r = 0, 1, ..., n, on which w (O, ...) is quantized by `method`.

    Both scalar or (O, 1, ...); arguments as `quantize_weight`'s, n levels.
    """
    if method == "dorefa":
        E = w.abs().mean()
        return -E, 2 * E / n
    if method == "minmax":
        s = _largest(w)
        return -s, 2 * s / (n - 1 if zero_level else n)
    q_min, _, offset = signed_grid(n, scale)
    return q_min * scale + (0.0 if offset is None else offset), scale


def _checked_levels(name: str, x: Tensor, bits: int) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
        raise invalid(name, x, "a floating-point tensor that is not empty")
    # half precision cannot count to 2**32, and float64 is to stay exact
    return torch.tensor(levels(bits), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _check_scale(scale: Tensor | None) -> None:
    scalar = isinstance(scale, Tensor) and scale.dim() == 0 and not scale.is_complex()
    if scale is None or (scalar and (scale.is_meta or 0 < scale < torch.inf)):
        return
    raise invalid("scale", scale, "a positive scalar tensor, for example torch.tensor(0.1)")
