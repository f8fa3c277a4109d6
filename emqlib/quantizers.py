"""Quantizers as pure, differentiable functions on tensors, each formula in plain lines as in its paper.

Notation: a bit-width b has n = 2**b - 1 levels above the lowest one; r(x) rounds x and has the gradient dr/dx = 1.
32 bits mean "not quantized", which `quantize_weight` and `quantize_activation` decide; the formulas know nothing of it.
Layers use the faster twins in `kernels`, which give the same values and gradients. In a compiled or captured graph the
number of levels is a tensor, so that one graph serves every bit-width; everywhere else it is a float.

Sources: DoReFa (arXiv 1606.06160) as used by Any-Precision (arXiv 1911.07346), LSQ (arXiv 1902.08153), PACT (arXiv
1805.06085).
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import bit_width, choice, flag, invalid

Weight = Literal["dorefa", "minmax", "lsq"]
Activation = Literal["dorefa", "pact", "lsq", "none"]
WEIGHT_METHODS, ACTIVATION_METHODS = get_args(Weight), get_args(Activation)

Number = Tensor | float  # a scalar tensor, or a number that Python knows
Grid = tuple[Number, Number, Number, Tensor | None]  # (scale, q_min, q_max, offset), as `fake_quantize` takes them


def levels(bits: int) -> float:
    """n = 2**bits - 1, the number of levels above the lowest one; 32 bits give 2**32 - 1."""
    return float(2 ** bit_width("bits", bits) - 1)


def is_full(n: Number) -> bool:
    """Whether n is the number of levels at 32 bits. A tensor never is: such graphs serve 1 to 8 bits."""
    return not isinstance(n, Tensor) and n > 2**15


def round_ste(x: Tensor) -> Tensor:
    """r(x): round to the nearest integer, ties to even; the gradient passes straight through. Any shape."""
    return x + (x.round() - x).detach()


# Weights. Each function takes w (O, ...) and n, and returns two tensors (O, ...): the quantized weight, and the weight
# in full precision in the quantizer's own domain, which is what the quantized one approaches with more bits.


def dorefa_weight(w: Tensor, n: Number) -> tuple[Tensor, Tensor]:
    """E (2 r(n (t/2 + 1/2)) / n - 1) and E t, with t = tanh(w) / max|tanh(w)| and E = mean|w|.

    w is (O, ...), and so are both results. E and the maximum are of the whole tensor. E carries no gradient, and the
    maximum does. An all-zero weight gives zeros. Source: Any-Precision-DNNs, models/quan_ops.py; DoReFa, eq. 9.
    """
    E, tanh = w.detach().abs().mean(), w.tanh()
    t = tanh / tanh.abs().max().clamp_min(torch.finfo(w.dtype).tiny)
    return E * (2 / n * round_ste(n / 2 * (t + 1)) - 1), E * t


def minmax_weight(w: Tensor, n: Number, zero_level: bool = False) -> tuple[Tensor, Tensor]:
    """s (2 r(n (w/(2s) + 1/2)) / n - 1) and w, with s = max|w_o| for each output channel o.

    w is (O, ...), and so are both results. This grid of n + 1 levels has no zero. With `zero_level` it is
    s r(m w/s) / m, m = (n - 1) / 2: the n levels around zero that integer kernels want, for 2 bits at least. s carries
    no gradient.
    """
    s = _largest(w)
    if zero_level:
        m = (n - 1) / 2
        return s * round_ste(m * w / s) / m, w
    return s * (2 * round_ste(n * (w / (2 * s) + 0.5)) / n - 1), w


def _largest(w: Tensor) -> Tensor:
    """max|w_o| of each output channel o of w (O, ...): (O, 1, ...), never zero."""
    s = w.detach().abs().reshape(len(w), -1).amax(1).clamp_min(torch.finfo(w.dtype).tiny)
    return s.view(-1, *[1] * (w.dim() - 1))


def lsq_weight(w: Tensor, n: Number, scale: Tensor) -> tuple[Tensor, Tensor]:
    """s r(clip(w/s, -2**(b-1), 2**(b-1) - 1)) and w, with a learned scalar s. 1 bit gives {-s/2, s/2}.

    Source: LSQ, eq. 1-3 and section 2.2.
    """
    return lsq_activation(w, n, scale, signed=True), w


# Activations. Each function takes x of any shape and returns that shape; n and whatever says the range are scalar.


def dorefa_activation(x: Tensor, n: Number, high: Number = 1.0, low: Tensor | None = None) -> Tensor:
    """r(n clip(x, 0, c) / c) c / n, c = high, for x of any shape; with a `low` < 0, n + 1 levels over [low, high].

    Layers keep the range in buffers, which do not learn.
    Source: Any-Precision-DNNs, models/quan_ops.py, which has c = 1 and no `low`.
    """
    return fake_quantize(x, *dorefa_grid(n, high, low))


def pact_activation(x: Tensor, n: Number, alpha: Tensor, signed: bool) -> Tensor:
    """r(n clip(x, 0, a) / a) a / n with a learned clipping level a = alpha, of x in any shape.

    Signed, the levels are -2**(b-1) to 2**(b-1) - 1 steps of 2 a / n, see `learned_grid`.
    The gradient to alpha is 1 where x >= alpha and 0 inside. Signed: outside, the outermost level in units of alpha.
    Source: PACT, eq. 1-3.
    """
    return fake_quantize(x, *learned_grid(n, pact_step(n, alpha, signed), signed), learn_step=False)


def lsq_activation(x: Tensor, n: Number, scale: Tensor, signed: bool, parts: int = 1) -> Tensor:
    """s r(clip(x/s, 0, 2**b - 1)) with a learned scalar s = scale; signed: clip(x/s, -2**(b-1), 2**(b-1) - 1).

    The gradient to s is multiplied by g = 1 / sqrt(N q_max) for the N numbers of a whole batch, of which x is one of
    `parts` equal parts. Source: LSQ, eq. 1-3 and section 2.2.
    """
    q_max = learned_grid(n, scale, signed)[2]
    g = (max(x.numel(), 1) * parts * max(q_max, 1)) ** -0.5
    s = (scale - scale * g).detach() + scale * g
    return fake_quantize(x, *learned_grid(n, s, signed))


def fake_quantize(
    x: Tensor, scale: Number, q_min: float, q_max: float, offset: Tensor | None = None, learn_step: bool = True
) -> Tensor:
    """s r(clip((x - o) / s, q_min, q_max)) + o: the uniform quantizer that all activation methods share. Any shape.

    With u = (x - o) / s, the gradient to x is 1 for q_min < u < q_max and 0 outside; to s it is r(u) - u inside, or 0
    without `learn_step`, and q_min or q_max outside; to o it is 0 inside and 1 outside.
    Source: LSQ, eq. 1-5; the offset is LSQ+'s (arXiv 2004.09576).

    Examples:
        >>> fake_quantize(torch.tensor([0.4, 1.2, 9.0]), 1.0, 0.0, 3.0)
        tensor([0., 1., 3.])
    """
    x = x if offset is None else x - offset
    if not learn_step:
        scale = torch.where((x / scale > q_min) & (x / scale < q_max), scale.detach(), scale)
    x_q = scale * round_ste(F.hardtanh(x / scale, q_min, q_max))  # hardtanh is clip, with no gradient at its ends
    return x_q if offset is None else x_q + offset


# Grids, for the formulas above and for their twins


def _where(condition: Tensor | bool, yes: Any, no: Any) -> Any:
    """`torch.where`, or Python's own choice if Python knows the condition."""
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else yes if condition else no


def dorefa_grid(n: Number, high: Number, low: Tensor | None = None) -> Grid:
    """The grid of `dorefa_activation`, of scalars: n + 1 levels over [0, high], or over [low, high] with low < 0.

    With a `low`, one level is zero. At 1 bit that would leave one side without any level, so there the two levels are
    low and high themselves.
    """
    if low is None:
        return high / n, 0 * n, n, None
    # not low / scale, which is rounded twice: a range symmetric about zero would miss its tie and tip over
    q_min = _where(n == 1, 0.0, torch.round(low * n / (high - low)))
    none = torch.zeros_like(low) if isinstance(n, Tensor) else None
    return (high - low) / n, q_min, q_min + n, _where(n == 1, low, none)


def learned_grid(n: Number, scale: Number, signed: bool) -> Grid:
    """The grid of `pact_activation` and `lsq_activation`, of scalars: 0 to n, or signed -2**(b-1) to 2**(b-1) - 1.

    At 1 bit the signed grid would be {-s, 0} and lose every positive input, so there the offset is s/2: {-s/2, s/2}.
    """
    if not signed:
        return scale, 0 * n, n, None
    half = (n + 1) / 2
    none = torch.zeros_like(scale) if isinstance(n, Tensor) else None
    return scale, -half, half - 1, _where(n == 1, scale / 2, none)


def pact_step(n: Number, alpha: Number, signed: bool) -> Number:
    """The step of n levels above the lowest one over [0, alpha], or [-alpha, alpha]."""
    return (2 * alpha if signed else alpha) / n


def weight_grid(
    w: Tensor, n: float, method: Weight, scale: Tensor | None = None, zero_level: bool = False
) -> tuple[Tensor, Tensor]:
    """(low, step), scalar or (O, 1, ...) each, of the grid low + step r, r = 0, ..., n, of a quantized w (O, ...)."""
    if method == "dorefa":
        E = w.abs().mean()
        return -E, 2 * E / n
    if method == "minmax":
        s = _largest(w)
        return -s, 2 * s / (n - 1 if zero_level else n)
    _, q_min, _, offset = learned_grid(n, scale, signed=True)
    return q_min * scale + (0.0 if offset is None else offset), scale


# What users call


def quantize_weight(
    w: Tensor, bits: int, method: Weight = "dorefa", scale: Tensor | None = None, zero_level: bool = False
) -> Tensor:
    """Quantize a weight at a bit-width; differentiable.

    Args:
        w: the weight (O, ...), in floating point.
        bits: 1 to 8, or 32 for the weight in full precision in the method's own domain.
        method: "dorefa" (`dorefa_weight`), "minmax" (`minmax_weight`) or "lsq" (`lsq_weight`).
        scale: the step of "lsq", a positive scalar tensor; None for LSQ's initial one.
        zero_level: whether the grid of "minmax" has a zero.

    Returns:
        The quantized weight (O, ...).

    Raises:
        ValueError: names the argument that is wrong, such as `zero_level` at 1 bit.

    Examples:
        >>> quantize_weight(torch.tensor([[-0.3, 0.1, 0.2]]), 1)
        tensor([[-0.2000, 0.2000, 0.2000]])
    """
    choice("method", method, WEIGHT_METHODS)
    flag("zero_level", zero_level)
    n = _checked_levels("w", w, bits)
    _check_scale(scale)
    if w.dim() == 0:
        raise invalid("w", w, "a tensor (O, ...), with a dimension of output channels")
    if zero_level and method == "minmax" and bits == 1:
        raise invalid("zero_level", True, "at least 2 bits, since one level cannot be both zero and not")
    if method == "dorefa":
        return dorefa_weight(w, n)[1 if bits == 32 else 0]
    if bits == 32:
        return w
    if method == "minmax":
        return minmax_weight(w, n, zero_level)[0]
    return lsq_weight(w, n, _initial_scale(w, (n - 1) / 2) if scale is None else scale)[0]


def quantize_activation(
    x: Tensor, bits: int, method: Activation = "dorefa", scale: Tensor | None = None, signed: bool = False
) -> Tensor:
    """Quantize an activation at a bit-width; differentiable.

    Args:
        x: the activation, of any shape, in floating point.
        bits: 1 to 8, or 32 for x above zero (signed: x itself).
        method: "dorefa" (`dorefa_activation`), "pact" (`pact_activation`), "lsq" (`lsq_activation`) or "none".
        scale: a positive scalar tensor: the upper end of the range of "dorefa" and "pact", 1 by default, or the step of
            "lsq", by default LSQ's initial one.
        signed: whether the grid has negative levels.

    Returns:
        The quantized activation, in the shape of x.

    Raises:
        ValueError: names the argument that is wrong.

    Examples:
        >>> quantize_activation(torch.tensor([0.1, 0.3, 1.7]), 2)
        tensor([0.0000, 0.3333, 1.0000])
    """
    choice("method", method, ACTIVATION_METHODS)
    flag("signed", signed)
    n = _checked_levels("x", x, bits)
    _check_scale(scale)
    if method == "none":
        return x
    if bits == 32:
        return x if signed else x.relu()
    if method == "lsq":
        scale = _initial_scale(x, (n - 1) / 2 if signed else n) if scale is None else scale
        return lsq_activation(x, n, scale, signed)
    c = x.new_ones(()) if scale is None else scale
    if method == "pact":
        return pact_activation(x, n, c, signed)
    return dorefa_activation(x, n, c, -c if signed else None)


def _initial_scale(x: Tensor, q_max: float) -> Tensor:
    """s = 2 mean|x| / sqrt(q_max), where LSQ starts; 1 bit counts as q_max = 1. Source: LSQ, section 2.1."""
    return (2 * x.detach().abs().mean() / max(q_max, 1) ** 0.5).clamp_min(1e-6)


def _checked_levels(name: str, x: Tensor, bits: int) -> float:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
        raise invalid(name, x, "a floating-point tensor that is not empty")
    return levels(bits)


def _check_scale(scale: Tensor | None) -> None:
    scalar = isinstance(scale, Tensor) and scale.dim() == 0 and not scale.is_complex()
    if scale is None or (scalar and (scale.is_meta or 0 < scale < torch.inf)):
        return
    raise invalid("scale", scale, "a positive scalar tensor, for example torch.tensor(0.1)")
