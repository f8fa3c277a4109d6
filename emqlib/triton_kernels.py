"""Quantization on a GPU, in Triton: activations, and all weights of a network at once, by DoReFa and with correction.

By the formulas of `quantizers` and `correction`, a layer's weight takes about 60 small kernels in a training step, each
of which costs its launch. Here all layers share two kernels forward, statistics and values, and two backward. What
Triton calls a program has one output channel. Activations are quantized in float32, whatever their type. This module is
imported only where it is needed, since Triton takes long to load.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from triton.language import constexpr

from .quantizers import Number, is_full

COLUMNS = constexpr(4)  # of the table of channels, see `_table`
ROUND = constexpr(1.5 * 2**23)  # adding it to a float32 of few levels rounds half to even, as torch.round does


@triton.jit
def _channel(table, BLOCK: constexpr):
    """A program's channel: its places in a flat buffer, which of them exist, K, its layer's first channel and end."""
    row = table + tl.program_id(0) * COLUMNS
    start, K = tl.load(row), tl.load(row + 1)
    o = tl.arange(0, BLOCK)
    return start + o, o < K, K.to(tl.float32), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _over_layer(values, first, end, PEAK: constexpr, CHANNELS: constexpr):
    """The sum, or the maximum of numbers >= 0, of a number that each channel of the layer has left."""
    c = first + tl.arange(0, CHANNELS)
    found = tl.load(values + c, mask=c < end, other=0.0)
    return tl.max(found, 0) if PEAK else tl.sum(found, 0)


@triton.jit
def _weights(tanh, size, peak, places, mine, K, first, end, levels, FULL: constexpr, CHANNELS: constexpr):
    """E, M, tanh(w), the weight in the quantizer's domain; of each channel d_q, d_w, m_w, R, v_q, v_w of `_Correct`.

    A variance that is no divisor is infinite.
    """
    n = tl.load(levels).to(tl.float32)
    E = _over_layer(size, first, end, False, CHANNELS) / ((end - first).to(tl.float32) * K)
    M = tl.maximum(_over_layer(peak, first, end, True, CHANNELS), 1.1754943508222875e-38)
    th = tl.load(tanh + places, mask=mine, other=0.0)
    t = tl.div_rn(th, M)
    domain = E * t
    q = domain if FULL else E * (tl.div_rn(2.0, n) * ((n / 2 * (t + 1) + ROUND) - ROUND) - 1)
    m_q, m_w = tl.sum(tl.where(mine, q, 0.0), 0) / K, tl.sum(domain, 0) / K
    d_q, d_w = tl.where(mine, q - m_q, 0.0), tl.where(mine, domain - m_w, 0.0)
    v_q, v_w = tl.sum(d_q * d_q, 0) / K, tl.sum(d_w * d_w, 0) / K
    constant = v_q <= 1e-12 * (v_q + m_q * m_q)
    R = tl.where(constant, 1.0, tl.sqrt(v_w / tl.where(constant, 1.0, v_q)))
    fixed = constant | (v_w <= 0)
    return E, M, th, domain, d_q, d_w, m_w, R, tl.where(fixed, float("inf"), v_q), tl.where(fixed, float("inf"), v_w)


@triton.jit
def statistics(w, tanh, table, size, peak, BLOCK: constexpr):
    """The sum of |w| and the maximum of |tanh(w)| of each channel."""
    places, mine, _, _, _ = _channel(table, BLOCK)
    row = tl.program_id(0)
    tl.store(size + row, tl.sum(tl.abs(tl.load(w + places, mask=mine, other=0.0)), 0))
    tl.store(peak + row, tl.max(tl.abs(tl.load(tanh + places, mask=mine, other=0.0)), 0))


@triton.jit
def values(tanh, table, size, peak, out, levels, FULL: constexpr, BLOCK: constexpr, CHANNELS: constexpr):
    """The quantized and corrected weight; at 32 bits the weight in the quantizer's domain."""
    places, mine, K, first, end = _channel(table, BLOCK)
    _, _, _, domain, d_q, _, m_w, R, _, _ = _weights(
        tanh, size, peak, places, mine, K, first, end, levels, FULL, CHANNELS
    )
    tl.store(out + places, domain if FULL else m_w + R * d_q, mask=mine)


@triton.jit
def slopes(
    tanh, table, size, peak, grad, g, total, peaks, levels, FULL: constexpr, BLOCK: constexpr, CHANNELS: constexpr
):
    """g of `kernels._DoReFaWeight`, from the gradient as in `kernels._Correct`; and what each channel adds to g_M."""
    places, mine, K, first, end = _channel(table, BLOCK)
    E, M, th, _, d_q, d_w, _, R, v_q, v_w = _weights(
        tanh, size, peak, places, mine, K, first, end, levels, FULL, CHANNELS
    )
    G = tl.load(grad + places, mask=mine, other=0.0).to(tl.float32)
    if not FULL:
        mean, S = tl.sum(G, 0) / K, tl.sum(G * d_q, 0) / K * R
        G = R * (G - mean) - S / v_q * d_q + mean + S / v_w * d_w
    G = tl.where(mine, G * tl.where(E > 0, E / M, 1.0), 0.0)
    tl.store(g + places, G, mask=mine)
    tl.store(total + tl.program_id(0), tl.sum(G * th, 0))
    tl.store(peaks + tl.program_id(0), tl.sum(tl.where(mine & (tl.abs(th) == M), 1.0, 0.0), 0))


@triton.jit
def gradients(tanh, table, peak, g, total, peaks, BLOCK: constexpr, CHANNELS: constexpr):
    """The gradient of the weight, in place of g."""
    places, mine, _, first, end = _channel(table, BLOCK)
    M = tl.maximum(_over_layer(peak, first, end, True, CHANNELS), 1.1754943508222875e-38)
    count = tl.maximum(_over_layer(peaks, first, end, False, CHANNELS), 1.0)
    g_M = _over_layer(total, first, end, False, CHANNELS) / (M * count)
    th = tl.load(tanh + places, mask=mine, other=0.0)
    sign = tl.where(th > 0, 1.0, tl.where(th < 0, -1.0, 0.0))
    grad = tl.load(g + places, mask=mine, other=0.0) - tl.where(tl.abs(th) == M, g_M * sign, 0.0)
    tl.store(g + places, grad * (1 - th * th), mask=mine)


@triton.jit
def quantize(x, out, size, scale, q_min, q_max, LOADED: constexpr, BLOCK: constexpr):
    """x rounded to the grid; NaN stays NaN. LOADED: scale, q_min and q_max are pointers."""
    if LOADED:
        scale, q_min = tl.load(scale).to(tl.float32), tl.load(q_min).to(tl.float32)
        q_max = tl.load(q_max).to(tl.float32)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    q = tl.div_rn(tl.load(x + o, mask=o < size, other=0.0).to(tl.float32), scale)
    q = tl.where(q < q_min, q_min, tl.where(q > q_max, q_max, q))
    tl.store(out + o, ((q + ROUND) - ROUND) * scale, mask=o < size)


@cache  # never freed, since CUDA graphs may use it
def _table(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Of each channel start, length, first channel of its layer and of the next: (channels, 4); sizes: O and K."""
    rows, start, first = [], 0, 0
    for channels, length in sizes:
        rows += [(start + o * length, length, first, first + channels) for o in range(channels)]
        start, first = start + channels * length, first + channels
    return torch.tensor(rows, device=device)


def _in_order(x: Tensor, channels_last: bool) -> Tensor:
    """The numbers of a weight, flat, channel by channel, as they lie in memory."""
    return (x.permute(0, 2, 3, 1) if channels_last else x).reshape(-1)


def _apart(flat: Tensor, shapes: list[torch.Size], channels_last: list[bool]) -> list[Tensor]:
    """The weights of which `flat` has the numbers, see `_in_order`."""
    parts = flat.split([shape.numel() for shape in shapes])
    return [
        part.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2) if last else part.view(shape)
        for part, shape, last in zip(parts, shapes, channels_last, strict=True)
    ]


def launch(kernel: triton.JITFunction, programs: int, *tensors: Tensor | float, **sizes: int | bool) -> None:
    """Run a kernel on tensors of any shape. Products and sums are not fused, since ties would not be PyTorch's."""
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](*tensors, **sizes, num_warps=8, enable_fp_fusion=False)


def fake_quantize(x: Tensor, scale: Number, q_min: Number, q_max: Number) -> Tensor:
    """The values of `quantizers.fake_quantize` for x (any shape), which is dense and stays in its memory format.

    The grid is of floats, or of scalar tensors.
    """
    out, grid = torch.empty_like(x), (scale, q_min, q_max)
    loaded = isinstance(scale, Tensor)
    launch(quantize, triton.cdiv(x.numel(), 2048), x, out, x.numel(), *grid, LOADED=loaded, BLOCK=2048)
    return out


class _CorrectedWeights(Function):
    """The gradients are in closed form, see `kernels`."""

    @staticmethod
    def forward(ctx: FunctionCtx, n: Number, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        last = [not w.is_contiguous() and w.dim() == 4 for w in weights]
        flat = torch.cat([_in_order(w, how) for w, how in zip(weights, last, strict=True)])
        tanh, table = flat.tanh(), _table(tuple((len(w), w[0].numel()) for w in weights), flat.device)
        size, peak = flat.new_empty(2, len(table))
        block = triton.next_power_of_2(max(w[0].numel() for w in weights))
        ctx.sizes = {"FULL": is_full(n), "BLOCK": block, "CHANNELS": triton.next_power_of_2(max(map(len, weights)))}
        ctx.layout = [w.shape for w in weights], last
        levels = n.clone() if isinstance(n, Tensor) else torch.full((), n, device=flat.device)
        out = torch.empty_like(flat, dtype=dtype)
        launch(statistics, len(table), flat, tanh, table, size, peak, BLOCK=block)
        launch(values, len(table), tanh, table, size, peak, out, levels, **ctx.sizes)
        ctx.save_for_backward(tanh, table, size, peak, levels)
        return tuple(_apart(out, *ctx.layout))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tanh, table, size, peak, levels = ctx.saved_tensors
        given = [tanh.new_zeros(s) if x is None else x for x, s in zip(grads, ctx.layout[0], strict=True)]
        grad = torch.cat([_in_order(x, last) for x, last in zip(given, ctx.layout[1], strict=True)])
        g, (total, peaks) = torch.empty_like(tanh), tanh.new_empty(2, len(table))
        launch(slopes, len(table), tanh, table, size, peak, grad, g, total, peaks, levels, **ctx.sizes)
        sizes = {name: ctx.sizes[name] for name in ("BLOCK", "CHANNELS")}
        launch(gradients, len(table), tanh, table, peak, g, total, peaks, **sizes)
        found = _apart(g, *ctx.layout)
        return None, None, *(None if x is None else y for x, y in zip(grads, found, strict=True))


def correct_dorefa_weights(weights: Sequence[Tensor], n: Number) -> tuple[Tensor, ...]:
    """The twin of `correct_weight(*dorefa_weight(w, n))` for many weights (O, ...) at once; at 32 bits of the domain.

    Under autocast they come in its type, to which each product would cast them.
    """
    kind = weights[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return _CorrectedWeights.apply(n, dtype, *weights)
