"""Batch norm at any bit-width: one affine or several, and running statistics by bit-width."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from . import quantizers
from .checks import BIT_WIDTHS
from .layers import Gather, QuantSpec, again, nearest, overwritten, writes_of


def interpolation(trained: tuple[int, ...], bits: int) -> dict[int, float]:
    """The shares of the trained bit-widths on either side of `bits` in its statistics, linear in 1 / n^2 at n levels.

    1 / n^2 is the power of the quantization noise. A trained `bits`, or one beyond the ends, takes the nearest alone.

    Examples:
        >>> {b: round(share, 3) for b, share in interpolation((2, 4, 8), 3).items()}
        {2: 0.15, 4: 0.85}
    """
    low = max((b for b in trained if b <= bits), default=trained[0])
    high = min((b for b in trained if b >= bits), default=trained[-1])
    if low == high:
        return {low: 1.0}
    at_low, at, at_high = (quantizers.levels(b) ** -2 for b in (low, bits, high))
    share = (at_low - at) / (at_low - at_high)
    return {low: 1 - share, high: share}


class _OverProcesses(Function):
    """`F.batch_norm` in training mode by the statistics of a batch of which several processes have a part each.

    They exchange numbers once forward and once backward. mean and var (C,) are updated in place.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, *how: Any
    ) -> Tensor:
        momentum, ctx.eps, ctx.gathered = how
        local = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        own_var, own_mean = torch.var_mean(local, [0, *range(2, x.dim())], correction=0)
        size = own_var.new_full((1,), x.numel() // x.shape[1])
        parts = ctx.gathered(torch.cat([own_mean, own_var, size]))
        means, variances, sizes = parts.split([len(mean), len(mean), 1], dim=1)
        n = sizes.sum()
        batch_mean = (sizes / n * means).sum(0)  # sums of squares would lose digits where the mean is large
        batch_var = (sizes / n * (variances + (means - batch_mean).square())).sum(0)
        mean.lerp_(batch_mean.to(mean.dtype), momentum)
        var.lerp_((batch_var * (n / (n - 1))).to(var.dtype), momentum)
        batch_mean, batch_var = batch_mean.to(mean.dtype), batch_var.to(var.dtype)
        ctx.save_for_backward(x, weight, batch_mean, batch_var, n)
        return F.batch_norm(x, batch_mean, batch_var, weight, bias, False, 0.0, ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, n = ctx.saved_tensors
        slope = torch.ones_like(mean) if weight is None else weight
        fixed = (slope, mean, var, None, None, False, ctx.eps, [True, True, True])  # as if statistics were constants
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(grad, x, *fixed)
        along, level = ctx.gathered(torch.stack([grad_weight, grad_bias])).sum(0) / n  # through statistics
        rate, shape = (var + ctx.eps).rsqrt(), (1, -1, *[1] * (x.dim() - 2))
        through = (x - mean.view(shape)) * (along * rate).view(shape) + level.view(shape)
        grad_x = (grad_x - (slope * rate).view(shape) * through).to(x.dtype)
        affine = (None, None) if weight is None else (grad_weight, grad_bias)
        return grad_x, None, None, *affine, None, None, None  # momentum, eps and gathered have none


class MultiBitBatchNorm(nn.Module):
    """Batch norm over (N, C, ...) at any bit-width.

    Its affine is one for all bit-widths, or under "switchable" one for each trained bit-width. Its running statistics
    lie in a table. Under "switchable" and "shared_affine" each trained bit-width has a row of its own, and batch-norm
    adaptation adds rows. All bit-widths without a row share the last one under "shared". Under "shared_affine" they mix
    the rows of the trained bit-widths on either side, see `interpolation`.

    Source: switchable batch norm, Any-Precision (arXiv 1911.07346) and AdaBits (arXiv 1912.09666). "shared_affine" is
    beyond the paper.
    """

    SHARED = len(BIT_WIDTHS)
    bits_in_tensors = False  # as of quantized layers

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, spec: QuantSpec) -> None:
        super().__init__()
        self.trained, self.norm, self.switchable = spec.bits, spec.norm, spec.norm == "switchable"
        self.gathered: Gather | None = None
        self.eps, self.momentum, self.bits = norm.eps, norm.momentum, spec.bits[-1]
        self.own: set[int] = set() if self.norm == "shared" else set(spec.bits)
        sets = len(spec.bits) if self.switchable else 1
        self.weight, self.bias = (
            None if p is None else nn.Parameter(p.detach().repeat(sets, 1), requires_grad=p.requires_grad)
            for p in (norm.weight, norm.bias)
        )
        self.register_buffer("running_mean", norm.running_mean.repeat(self.SHARED + 1, 1))
        self.register_buffer("running_var", norm.running_var.repeat(self.SHARED + 1, 1))
        new = norm.running_mean.new_zeros
        self.register_buffer("affine_pick", new(sets, 1), persistent=False)
        self.register_buffer("stats_pick", new(self.SHARED + 1, 1), persistent=False)
        self.register_buffer("stats_row", new(1, dtype=torch.long), persistent=False)
        self.picked: tuple[Any, ...] | None = None
        self.set_bits(self.bits)

    def serves(self, bits: int) -> bool:
        """Whether `bits` can be set: a switchable norm serves what it was built for or adapted to."""
        return not self.switchable or bits in self.own

    def set_bits(self, bits: int) -> None:
        """Use the affine and the statistics of `bits` from now on (`serves` says whether they are there)."""
        self.bits = bits
        affine = self.trained.index(nearest(self.trained, bits)) if self.switchable else 0
        row = BIT_WIDTHS.index(bits) if bits in self.own else self.SHARED
        rows = self._rows(bits)
        if (affine, row, rows, writes_of(*self._picks())) == self.picked:  # as in every step under a shared norm
            return  # nothing changes, so nothing is written
        self.affine_pick.zero_()
        self.affine_pick[affine] = 1
        self.stats_pick.zero_()
        for source, share in rows.items():
            self.stats_pick[source] = share
        self.stats_row.fill_(row)
        self.picked = (affine, row, rows, writes_of(*self._picks()))
        self.row = row if rows == {row: 1.0} else None  # None for a mixture, which is no row

    def _picks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The buffers that tell what is in force."""
        return self.affine_pick, self.stats_pick, self.stats_row

    def _rows(self, bits: int) -> dict[int, float]:
        """The rows of the table that the statistics of `bits` come from, each with its share."""
        if bits in self.own:
            return {BIT_WIDTHS.index(bits): 1.0}
        if self.norm == "shared":
            return {self.SHARED: 1.0}
        shares = {nearest(self.trained, bits): 1.0} if self.switchable else interpolation(self.trained, bits)
        return {BIT_WIDTHS.index(b): share for b, share in shares.items()}

    def own_statistics(self, bits: int) -> None:
        """Give `bits` a row of its own, starting from the statistics that it has without one."""
        if bits in self.own:
            return
        rows = self._rows(bits)
        for table in (self.running_mean, self.running_var):
            table[BIT_WIDTHS.index(bits)] = sum(share * table[row] for row, share in rows.items())
        self.own.add(bits)

    def forget_adaptation(self) -> None:
        """Drop the rows that adaptation has added: they are of weights that training is about to change."""
        own = set() if self.norm == "shared" else set(self.trained)
        needs_its_row = self.switchable and self.bits not in own  # it trains at an adapted bit-width
        if self.own != own and not needs_its_row:
            self.own = own
            self.set_bits(self.bits)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance in force, (C,) each."""
        return (self.running_mean * self.stats_pick).sum(0), (self.running_var * self.stats_pick).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...); in training mode it updates the running statistics that the bit-width uses.

        Under "shared_affine" a bit-width that is not trained uses a mixture of others', which is then not updated.
        """
        if not torch.compiler.is_compiling():
            if self.training and torch.is_grad_enabled():
                self.forget_adaptation()
            reads_picks = (self.switchable or self.row is None) and not self.bits_in_tensors
            if reads_picks and overwritten(self.picked[-1], *self._picks()):
                self.set_bits(self.bits)
        for_all = torch.compiler.is_compiling() or (self.bits_in_tensors and self.own)
        in_place = not for_all and self.row is not None
        if in_place:  # views of the table, which the norm updates: the same numbers with fewer operations
            mean, var = self.running_mean[self.row], self.running_var[self.row]
        else:
            mean, var = self.statistics()
        weight, bias = self.affine()
        momentum = 0.0 if again() else self.momentum
        if self.training and self.gathered:
            y = _OverProcesses.apply(x, mean, var, weight, bias, momentum, self.eps, self.gathered)
        else:
            y = F.batch_norm(x, mean, var, weight, bias, self.training, momentum, self.eps)
        if self.training and not in_place:
            self.running_mean.index_copy_(0, self.stats_row, mean[None])
            self.running_var.index_copy_(0, self.stats_row, var[None])
        return y

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias (C,) in force."""
        if not self.switchable:
            return tuple(None if p is None else p.view(-1) for p in (self.weight, self.bias))
        # a product with a one-hot column: on a CPU the gradient of index_select takes longer than the whole norm
        pick = self.affine_pick.clone()  # the next `set_bits` overwrites it, maybe before this pass's gradient is due
        return tuple(None if p is None else (p * pick).sum(0) for p in (self.weight, self.bias))

    def get_extra_state(self) -> Tensor:
        """The K bit-widths that have statistics of their own, a tensor (K,): checkpoints hold no pickled objects."""
        return torch.tensor(sorted(self.own), dtype=torch.long)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over `get_extra_state`'s answer, a tensor (K,)."""
        self.own = set(state.tolist())
        if self.serves(self.bits):
            self.set_bits(self.bits)

    def extra_repr(self) -> str:
        """Channels, kind, and the bit-widths with statistics of their own."""
        return f"{self.running_mean.shape[1]}, {self.norm}, bits={self.bits}, own={sorted(self.own)}"
