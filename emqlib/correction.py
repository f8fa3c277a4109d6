"""Weight bias correction: each output channel of a quantized weight keeps the moments of its full-precision weight.

`output_shift`, beyond the paper, is what these moments leave: the mean output where input channels differ in mean.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from .checks import choice, flag, invalid, tensor

CORRECTIONS = ("none", "mean", "mean_var")


def correct_weight(w_q: Tensor, w: Tensor, mode: str = "mean_var", gradient: bool = True) -> Tensor:
    """Give each output channel o of `w_q` the mean ("mean"), or the mean and variance ("mean_var"), of that of `w`.

        mean      w' = w_q - mean_o(w_q) + mean_o(w)
        mean_var  w' = std_o(w) / std_o(w_q) (w_q - mean_o(w_q)) + mean_o(w)

    w_q, w: (O, ...) of equal shape; returns (O, ...); "none" returns w_q. w is the full-precision weight *in the
    quantizer's own domain*, `quantize_weight(w, 32, method)`. `gradient` says whether the statistics carry gradient;
    either way the result is differentiable. A channel whose quantized weights are all equal has no variance to match:
    it keeps its mean correction, without NaN.
    Source: Kim et al. 2025 (arXiv 2510.20673), weight bias correction; the same family as ACIQ's (arXiv 1810.05723).
    ValueError: unknown `mode`, no floating-point tensors, unequal shapes, fewer than two dimensions.

    >>> correct_weight(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 2.0]]), mode="mean")
    tensor([[0.5000, 2.5000]])
    """
    choice("mode", mode, CORRECTIONS)
    flag("gradient", gradient)
    for name, given in (("w_q", w_q), ("w", w)):
        if not tensor(name, given, "a floating-point tensor (O, ...)").is_floating_point():
            raise invalid(name, given, "a floating-point tensor (O, ...)")
    if w_q.shape != w.shape or w.dim() < 2 or w.numel() == 0:
        raise invalid("w_q, w shapes", (tuple(w_q.shape), tuple(w.shape)), "two equal shapes (O, ...), not empty")
    if mode == "none":
        return w_q
    return _Correct.apply(w_q, w, mode == "mean_var", gradient)


class _Correct(Function):
    """`correct_weight`, with its gradient in closed form: of so small tensors every operation costs the same.

    With G the gradient of w', K the weights of a channel, m, v and d = x - m a channel's mean, variance and deviation,
    R = sqrt(v_w / v_q) (1 for "mean") and S = sum(G d_q) R / K (0 for "mean" and where a variance is no divisor):
    dL/dw_q = R (G - mean(G)) - S d_q / v_q and dL/dw = mean(G) + S d_w / v_w.
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
        # A constant channel's variance is rounding noise, not 0: it is measured against the channel's own size.
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


def output_shift(w_q: Tensor, w: Tensor, mean_input: Tensor) -> Tensor:
    """E[y_q] - E[y] of each output channel o, from rounding the weight alone: sum_i sum_k (w_q - w)_oik E[x_i].

    w_q, w: (O, I / groups, ...) of equal shape; mean_input E[x]: (I,), the mean of each input channel; returns (O,).
    Weight bias correction makes this 0 where all input channels have one mean, and only there. Zero padding counts as
    if it were input. Source: bias correction, Nagel et al. 2019 (arXiv 1906.04721), section 4.2. ValueError: shapes
    that do not fit together.

    >>> output_shift(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([2.0, 1.0]))
    tensor([0.5000])
    """
    if tensor("w", w, "a tensor (O, I / groups, ...), not empty").dim() < 2 or w.numel() == 0:
        raise invalid("w", w, "a tensor (O, I / groups, ...), not empty")
    if tensor("w_q", w_q, "a tensor of the shape of w").shape != w.shape:
        raise invalid("w_q", w_q, f"a tensor of the shape of w, {tuple(w.shape)}")
    groups, left = divmod(len(tensor("mean_input", mean_input, "a tensor (I,)", dims=1)), w.shape[1])
    if left or groups == 0 or len(w) % groups:
        raise invalid("mean_input", mean_input, f"a tensor (I,), I a multiple of {w.shape[1]}")
    error = (w_q - w).reshape(*w.shape[:2], -1).sum(2)
    return (error * mean_input.view(groups, -1).repeat_interleave(len(w) // groups, 0)).sum(1)
