"""Weight bias correction: each output channel of a quantized weight keeps the moments of its full-precision weight.

`output_shift`, beyond the paper, is what these moments leave: the mean output where input channels differ in mean.
"""

import torch
from torch import Tensor

from .checks import choice, flag, invalid

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
    for name, tensor in (("w_q", w_q), ("w", w)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise invalid(name, tensor, "a floating-point tensor (O, ...)")
    if w_q.shape != w.shape or w.dim() < 2 or w.numel() == 0:
        raise invalid("w_q, w shapes", (tuple(w_q.shape), tuple(w.shape)), "two equal shapes (O, ...), not empty")
    if mode == "none":
        return w_q
    dims = tuple(range(1, w.dim()))
    reference, source = (w, w_q) if gradient else (w.detach(), w_q.detach())
    mean_w, mean_q = reference.mean(dims, keepdim=True), source.mean(dims, keepdim=True)
    if mode == "mean":
        return w_q - mean_q + mean_w
    return _std_ratio(reference - mean_w, source - mean_q, source, dims) * (w_q - mean_q) + mean_w


def _std_ratio(deviation_w: Tensor, deviation_q: Tensor, w_q: Tensor, dims: tuple[int, ...]) -> Tensor:
    """std_o(w) / std_o(w_q), (O, 1, ...); 1 where w_q is constant, 0 where only w is."""
    var_w, var_q = (d.square().mean(dims, keepdim=True) for d in (deviation_w, deviation_q))
    # A constant channel's variance is rounding noise, not 0: it is measured against the channel's own size.
    constant_q = var_q <= 1e-12 * w_q.square().mean(dims, keepdim=True)
    constant_w = var_w <= 0
    # sqrt has no finite gradient at 0, so the excluded channels never reach it
    ratio = torch.where(constant_w | constant_q, 1.0, var_w) / torch.where(constant_w | constant_q, 1.0, var_q)
    return torch.where(constant_w & ~constant_q, 0.0, ratio.sqrt())


def output_shift(w_q: Tensor, w: Tensor, mean_input: Tensor) -> Tensor:
    """E[y_q] - E[y] of each output channel o, from rounding the weight alone: sum_i sum_k (w_q - w)_oik E[x_i].

    w_q, w: (O, I / groups, ...) of equal shape; mean_input E[x]: (I,), the mean of each input channel; returns (O,).
    Weight bias correction makes this 0 where all input channels have one mean, and only there. Zero padding counts as
    if it were input. Source: bias correction, Nagel et al. 2019 (arXiv 1906.04721), section 4.2.

    >>> output_shift(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([2.0, 1.0]))
    tensor([0.5000])
    """
    error = (w_q - w).reshape(*w.shape[:2], -1).sum(2)
    groups = len(mean_input) // w.shape[1]
    return (error * mean_input.view(groups, -1).repeat_interleave(len(w) // groups, 0)).sum(1)
