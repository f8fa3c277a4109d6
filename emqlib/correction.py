"""Weight bias correction: each output channel of a quantized weight keeps the moments of its full-precision weight.

`output_shift`, beyond the paper, is the error that remains in the mean output where input channels differ in mean.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from .checks import choice, flag, invalid, tensor

Correction = Literal["none", "mean", "mean_var"]
CORRECTIONS = get_args(Correction)


def correct_weight(w_q: Tensor, w: Tensor, mode: Correction = "mean_var", gradient: bool = True) -> Tensor:
    """Give each output channel of `w_q` the mean, or the mean and the variance, of that channel of `w`.

        mean      w' = w_q - mean(w_q) + mean(w)
        mean_var  w' = std(w) / std(w_q) (w_q - mean(w_q)) + mean(w)

    A channel whose quantized weights are all equal has no variance to match: it keeps its mean correction, without NaN.

    Args:
        w_q: the quantized weight (O, ...).
        w: the full-precision weight (O, ...) in the quantizer's own domain, `quantize_weight(w, 32, method)`.
        mode: "mean", "mean_var", or "none" for `w_q` itself.
        gradient: whether the statistics carry gradient; the result is differentiable either way.

    Returns:
        The corrected weight (O, ...).

    Raises:
        ValueError: names the argument that is wrong, or shapes that are unequal, empty or of one dimension.

    Source: Kim et al. 2025 (arXiv 2510.20673), weight bias correction; the same family as ACIQ's (arXiv 1810.05723).

    Examples:
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
    if w.dtype == torch.float16:  # squares of small weights are zero in it
        return correct_weight(w_q.float(), w.float(), mode, gradient).to(w_q.dtype)
    mean_q, std_q = _moments(w_q if gradient else w_q.detach())
    mean, std = _moments(w if gradient else w.detach())
    if mode == "mean":
        return w_q - mean_q + mean
    # the deviation of a constant channel is rounding noise, not 0: it is measured against the channel's own size
    constant = std_q.square() <= 1e-12 * (std_q.square() + mean_q.square())
    ratio = torch.where(constant, 1.0, std / torch.where(constant, 1.0, std_q))
    return ratio * (w_q - mean_q) + mean


def _moments(w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each output channel, (O, 1, ...) each; a deviation of 0 passes no gradient."""
    dims = tuple(range(1, w.dim()))
    mean = w.mean(dims, keepdim=True)
    variance = (w - mean).square().mean(dims, keepdim=True)
    return mean, torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)


def output_shift(w_q: Tensor, w: Tensor, mean_input: Tensor) -> Tensor:
    """E[y_q] - E[y] of each output channel o, from rounding the weight alone: sum_i sum_k (w_q - w)_oik E[x_i].

    w_q, w: (O, I / groups, ...) of equal shape; mean_input E[x]: (I,), the mean of each input channel; returns (O,).
    Weight bias correction makes this 0 where all input channels have one mean, and only there. Zero padding counts as
    if it were input. Source: bias correction, Nagel et al. 2019 (arXiv 1906.04721), section 4.2. ValueError: shapes
    that do not fit together.

    Examples:
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
