"""Layers that run at any bit-width: quantized Conv2d and Linear.

In a compiled graph a layer's bit-width is the number of levels in a tensor buffer, not a Python int. Its `bits`
attribute is for reading only; `set_bits` keeps both equal.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import devices, quantizers, ranks
from .checks import BIT_WIDTHS, bit_widths, choice, flag, invalid
from .correction import CORRECTIONS, correct_weight, output_shift

NORMS = ("shared", "shared_affine", "switchable")
RANGES = ("auto", "unit", "tracked")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a network is quantized. ValueError names the field, its value and what is allowed.

    bits: the trained bit-widths. weight: "dorefa", "minmax" or "lsq". activation: "dorefa", "pact", "lsq" or "none".
    correction: weight bias correction, "none", "mean" or "mean_var". norm: one batch norm for all bit-widths
    ("shared"), one each ("switchable"), or one affine for all with running statistics for each trained bit-width, those
    of the others interpolated ("shared_affine"). full_precision: what stays unquantized: "first", "last", or name
    patterns such as "*.shortcut". zero_level: min-max's grid with a zero. correction_gradient: whether the correction's
    statistics carry gradient. output_correction: whether layers take the mean of what rounding their weight does off
    their output (`correction.output_shift`, beyond the paper). activation_range, for "dorefa": "unit" clips to [0, 1]
    as published, "tracked" follows the running minimum and maximum, "auto" takes "unit" for a network whose batch norms
    have seen no data yet, and "tracked" for any other; an input that can be negative is always tracked.
    """

    bits: tuple[int, ...]
    weight: str = "dorefa"
    activation: str = "dorefa"
    correction: str = "mean_var"
    norm: str = "shared"
    full_precision: tuple[str, ...] = ("first", "last")
    zero_level: bool = False
    correction_gradient: bool = True
    activation_range: str = "auto"
    output_correction: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", bit_widths("bits", self.bits))
        choice("weight", self.weight, quantizers.WEIGHT_METHODS)
        choice("activation", self.activation, quantizers.ACTIVATION_METHODS)
        choice("correction", self.correction, CORRECTIONS)
        choice("norm", self.norm, NORMS)
        choice("activation_range", self.activation_range, RANGES)
        flag("zero_level", self.zero_level)
        flag("correction_gradient", self.correction_gradient)
        flag("output_correction", self.output_correction)
        expected = 'a tuple of "first", "last" and name patterns, for example ("first",), or () for none'
        try:
            kept = (None,) if isinstance(self.full_precision, str) else tuple(islice(self.full_precision, 10_000))
        except Exception:  # whatever iterating raises
            kept = (None,)
        if not all(isinstance(name, str) and name for name in kept):
            raise invalid("full_precision", self.full_precision, expected)
        object.__setattr__(self, "full_precision", kept)
        if self.zero_level and (self.weight != "minmax" or 1 in self.bits):
            raise invalid("zero_level", True, 'weight="minmax" and bit-widths from 2 up')


def nearest(trained: tuple[int, ...], bits: int) -> int:
    """The trained bit-width nearest to `bits`, the lower of two.

    >>> nearest((2, 4, 8), 3)
    2
    """
    return min(trained, key=lambda b: abs(b - bits))


class LearnedScale(nn.Module):
    """One learned positive scalar for each trained bit-width; another bit-width takes the nearest one's clipping range.

    `reach` holds, for each bit-width of BIT_WIDTHS, the largest level in units of the scale.
    """

    def __init__(self, bits: tuple[int, ...], reach: dict[int, float]) -> None:
        super().__init__()
        self.trained, self.reach = bits, reach
        self.values = nn.Parameter(torch.ones(len(bits)))
        self.register_buffer("pick", torch.zeros(len(bits)), persistent=False)
        self.set_bits(bits[-1])

    def set_bits(self, bits: int) -> None:
        """Take the scale of `bits`, or of the nearest trained bit-width, stretched to its clipping range."""
        source = nearest(self.trained, bits)
        self.pick.zero_()
        self.pick[self.trained.index(source)] = self.reach[source] / self.reach[bits]

    def start(self, size: Tensor) -> None:
        """Set every bit-width's scalar to size / sqrt(reach), LSQ's start; size: scalar, 2 mean|x|."""
        reach = torch.tensor([self.reach[b] for b in self.trained], device=size.device)
        self.values.data.copy_((size / reach.clamp_min(1).sqrt()).clamp_min(1e-6))

    def forward(self) -> Tensor:
        """The scalar in force, positive even where an optimizer step has carried its parameter past zero."""
        return (self.values * self.pick).sum().abs().clamp_min(1e-12)


def _reach(signed: bool) -> dict[int, float]:
    """q_max by bit-width; the signed grid at 1 bit is {-s/2, s/2}."""
    return {b: max(2.0 ** (b - 1) - 1, 0.5) if signed else quantizers.levels(b) for b in BIT_WIDTHS}


class InputQuantizer(nn.Module):
    """Quantizes a layer's input; what it learns or tracks starts from the first batch it sees."""

    across_ranks = False  # whether what it measures of a batch is measured over all ranks
    parts = 1  # of a step's batch, of which each forward pass sees one

    def __init__(self, spec: QuantSpec, signed: bool) -> None:
        super().__init__()
        self.method, self.signed = spec.activation, signed
        self.tracked = self.method == "dorefa" and (signed or spec.activation_range == "tracked")
        self.started = self.method == "none" or (self.method == "dorefa" and not self.tracked)
        if self.method == "lsq":
            self.scale = LearnedScale(spec.bits, _reach(signed))
        elif self.method == "pact":
            self.scale = LearnedScale(spec.bits, dict.fromkeys(BIT_WIDTHS, 1.0))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def forward(self, x: Tensor, n: quantizers.Number) -> Tensor:
        """x (any shape) at n levels (scalar)."""
        if isinstance(n, Tensor):  # in float16 the constants of 32 bits would not fit
            n = n.to(torch.promote_types(n.dtype, torch.float32))
        if not self.started:
            self._start(x.detach())
        elif self.tracked and self.training:
            self._follow(x.detach(), momentum=0.1)
        if self.method == "none":
            return x
        if self.method == "lsq":
            return quantizers.lsq_activation(x, n, self.scale(), self.signed, self.parts)
        return quantizers.fake_quantize(x, *self.grid(n), learn_step=False)

    def grid(self, n: quantizers.Number) -> quantizers.Grid:
        """(scale, q_min, q_max, offset) in force at n levels (scalar), of any method but "none"."""
        if self.method == "dorefa":
            high = self.high if self.tracked else 1.0
            return quantizers.dorefa_grid(n, high, self.low if self.signed else None)
        scale = self.scale()
        scale = quantizers.pact_step(n, scale, self.signed) if self.method == "pact" else scale
        return quantizers.learned_grid(n, scale, self.signed)

    def _start(self, x: Tensor) -> None:
        x = x if self.signed else x.clamp_min(0)  # which a ReLU did before it was left to the quantizer
        if self.method == "lsq":
            size = 2 * x.float().abs().mean()
            self.scale.start(ranks.mean(size) if self.across_ranks else size)
        elif self.method == "pact":
            low, high = self._extremes(x.float())
            self.scale.start(torch.maximum(-low, high))
        else:
            self._follow(x, momentum=1.0)
        self.started = True

    def _follow(self, x: Tensor, momentum: float) -> None:
        # a range of no width would divide by zero
        low, high = self._extremes(x)
        self.low.lerp_(low.to(self.low.dtype).clamp_max(-1e-6), momentum)
        self.high.lerp_(high.to(self.high.dtype).clamp_min(1e-6), momentum)

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ends = torch.stack([x.amin(), -x.amax()])
        low, negated = ranks.lowest(ends) if self.across_ranks else ends
        return low, -negated

    def get_extra_state(self) -> Tensor:
        """Whether the first batch has been seen, as a scalar tensor: checkpoints hold no pickled objects."""
        return torch.tensor(self.started)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over `get_extra_state`'s answer, a scalar."""
        self.started = bool(state)

    def extra_repr(self) -> str:
        """Method, sign and kind of range."""
        span = "tracked" if self.tracked else {"dorefa": "unit", "none": "-"}.get(self.method, "learned")
        return f"{self.method}, signed={self.signed}, range={span}"


class _QuantizedLayer(nn.Module):
    """What QuantConv2d and QuantLinear share; they bring `weight` and the product with it."""

    weight: nn.Parameter
    levels: Tensor
    across_ranks = False  # whether the mean input is that of all ranks
    prepared: tuple[Tensor, Tensor] | None = None  # the weight of the forward pass at hand, and its domain

    def _adopt(self, plain: nn.Module, spec: QuantSpec, signed: bool) -> Self:
        self.weight, self.bias = plain.weight, plain.bias
        self.spec, self.bits = spec, spec.bits[-1]
        with self.weight.device:  # whatever is new lies where the weight does
            self.input_quantizer = InputQuantizer(spec, signed)
            self.register_buffer("levels", torch.tensor(quantizers.levels(self.bits)), persistent=False)
            if spec.weight == "lsq":
                self.weight_scale = LearnedScale(spec.bits, _reach(signed=True))
                self.weight_scale.start(2 * self.weight.detach().abs().mean())
            if spec.output_correction:
                inputs = self.weight.shape[1] * getattr(plain, "groups", 1)
                self.register_buffer("mean_input", torch.zeros(inputs))
        self.set_bits(self.bits)
        return self.train(plain.training)

    def set_bits(self, bits: int, levels: Tensor | None = None) -> None:
        """Run at `bits` from now on; levels: a scalar of their number that other layers share, by default one's own.

        By a shared one a compiled graph sees that two layers which read one activation quantize it alike: once does.
        """
        self.bits, self.known_levels = bits, quantizers.levels(bits)
        if levels is not self.levels:
            self.levels = torch.full_like(self.levels, self.known_levels) if levels is None else levels
        for module in self.modules():
            if isinstance(module, LearnedScale):
                module.set_bits(bits)

    def quantized_weight(self) -> Tensor:
        """The weight the layer multiplies with, quantized and corrected: (O, ...)."""
        return self._corrected_and_domain()[0]

    def prepare(self) -> None:
        """Quantize and correct the weight now, for all uses until `prepared` is None again."""
        self.prepared = None
        self.prepared = self._corrected_and_domain()

    def _corrected_and_domain(self) -> tuple[Tensor, Tensor]:
        if self.prepared is not None:
            return self.prepared
        w_q, w = self.weight_and_domain()
        return correct_weight(w_q, w, self.spec.correction, self.spec.correction_gradient), w

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight (O, ...), quantized and corrected, and the bias (O,) that the layer adds."""
        weight, w = self._corrected_and_domain()
        if not self.spec.output_correction:
            return weight, self.bias
        with torch.no_grad():
            shift = output_shift(weight, w, self.mean_input)
        return weight, -shift if self.bias is None else self.bias - shift

    def _operands(self, x: Tensor, channel: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Quantized input, quantized and corrected weight, and bias; channel: which dimension of x has the channels."""
        x = self.input_quantizer(x, self._n())
        if self.spec.output_correction and self.training:
            with torch.no_grad():
                some = x.movedim(channel, 0).unsqueeze(-1)[:, :16].flatten(1)  # all images would cost 9 % of a step
                mean = some.mean(1, dtype=self.mean_input.dtype)
                self.mean_input.lerp_(ranks.mean(mean) if self.across_ranks else mean, 0.1)
        return x, *self.weight_and_bias()

    def weight_and_domain(self) -> tuple[Tensor, Tensor]:
        """The weight quantized but not corrected, and in full precision in the quantizer's own domain: two (O, ...)."""
        if self.spec.weight == "dorefa":
            return quantizers.dorefa_weight(self.weight, self._n())
        if self.spec.weight == "minmax":
            return quantizers.minmax_weight(self.weight, self._n(), self.spec.zero_level)
        return quantizers.lsq_weight(self.weight, self._n(), self.weight_scale())

    def _n(self) -> quantizers.Number:
        """The levels in force: a tensor in a compiled graph, which would else be compiled for each bit-width.

        Also at 32 bits, where a float would leave learned scales without a gradient, which several ranks wait for.
        """
        if not torch.compiler.is_compiling() and self.bits != 32:
            return self.known_levels
        return self.levels.float() if self.levels.dtype == torch.float16 else self.levels  # whose 2**16 is infinite

    def extra_repr(self) -> str:
        """The plain layer's, with bit-width, weight quantizer and correction."""
        return f"{super().extra_repr()}, bits={self.bits}, weight={self.spec.weight}, correction={self.spec.correction}"


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments of another convolution like `conv`, but for its bias."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names}


class SafeConv2d(nn.Conv2d):
    """A Conv2d whose gradient is right in every memory format, on a CPU too. (N, I, H, W) -> (N, O, H', W')."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (x.device.type == "cpu" and torch.is_grad_enabled() and devices.fails_channels_last(self)):
            return super()._conv_forward(x, weight, bias)
        if any(self._reversed_padding_repeated_twice):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode)
        down, right = self.stride  # pixels between are read by none of its 1x1 windows
        return F.conv2d(x[..., ::down, ::right], weight, bias, groups=self.groups)


class QuantConv2d(_QuantizedLayer, SafeConv2d):
    """A Conv2d (any groups, stride, padding) whose weight and input are quantized. (N, I, H, W) -> (N, O, H', W')."""

    @classmethod
    def from_float(cls, conv: nn.Conv2d, spec: QuantSpec, signed: bool) -> "QuantConv2d":
        """Take over `conv`, its parameters included. signed: whether its input can be negative."""
        return cls(**geometry(conv), device="meta")._adopt(conv, spec, signed)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W') at the bit-width in force."""
        return self._conv_forward(*self._operands(x, channel=-3))


class QuantLinear(_QuantizedLayer, nn.Linear):
    """A Linear whose weight and input are quantized. (..., I) -> (..., O)."""

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: QuantSpec, signed: bool) -> "QuantLinear":
        """Take over `linear`, its parameters included. signed: whether its input can be negative."""
        return cls(linear.in_features, linear.out_features, device="meta")._adopt(linear, spec, signed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) at the bit-width in force."""
        return F.linear(*self._operands(x, channel=-1))
