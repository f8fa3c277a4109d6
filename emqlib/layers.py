"""Layers that run at any bit-width: quantized Conv2d and Linear.

In a compiled graph a layer's bit-width is the number of levels in a tensor buffer, not a Python int. Its `bits`
attribute is for reading only; `set_bits` keeps both equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import devices, quantizers, ranks
from .checks import BIT_WIDTHS, bit_widths, choice, flag, invalid
from .correction import CORRECTIONS, correct_weight, output_shift

NORMS = ("shared", "shared_affine", "switchable")
RANGES = ("auto", "unit", "tracked")
PLAIN = (Tensor, nn.Parameter)  # no classes derived from them, which may count writes otherwise


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


def again() -> bool:
    """Whether this is a forward pass within a backward one: activation checkpointing's second, which measures nothing.

    It has to compute what the first one did, whose batch must not count twice.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
        pick = self.pick.clone()  # the next `set_bits` overwrites it, maybe before this pass's gradient is asked for
        return (self.values * pick).sum().abs().clamp_min(1e-12)


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
        elif self.tracked and self.training and not again():
            self._follow(x.detach(), momentum=0.1)
        if self.method == "none":
            return x
        if not isinstance(n, Tensor) and quantizers.is_full(n):
            x = x if self.signed else x.relu()
            return x if self.method == "dorefa" else ranks.awaited(x, self.scale.values)
        if self.method == "lsq":
            return quantizers.lsq_activation(x, n, self.scale(), self.signed, self.parts)
        return quantizers.fake_quantize(x, *self.grid(n), learn_step=False)

    def grid(self, n: quantizers.Number) -> quantizers.Grid:
        """(scale, q_min, q_max, offset) in force at n levels (scalar), of any method but "none"."""
        if self.method == "dorefa":
            high = self.high if self.tracked else 1.0
            # at 1 bit a grid's offset is the lower end itself, which the next batch moves
            return quantizers.dorefa_grid(n, high, self.low.clone() if self.signed else None)
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


class Kept:
    """What a weight was turned into, and the `key` by which later passes see that it still holds; no copy has it.

    alive: the tensors in the key, whose ids and addresses no others can get that way.
    """

    def __init__(self, value: tuple[Tensor, Tensor | None], key: Any, alive: Any = None) -> None:
        self.value, self.key, self.alive = value, key, alive

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class _QuantizedLayer(nn.Module):
    """What QuantConv2d and QuantLinear share; they bring `weight` and the product with it.

    In evaluation mode and without gradients, a forward pass keeps the quantized weight for the next ones, until the
    weight, by PyTorch's count of the writes to it, the bit-width or the mode changes. Writes through `.data` are not
    counted: after them, call `eval()`. Nor are those of fused optimizers: nothing is kept while a weight has a `.grad`.
    """

    weight: nn.Parameter
    levels: Tensor
    across_ranks = False  # whether the mean input is that of all ranks
    prepared: Kept | None = None  # the weight of the training step at hand, and its domain
    kept: Kept | None = None  # weight and bias in use

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

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; either way the next forward pass looks at the weight anew."""
        self.kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.kept = None  # which would stay behind, on another device for one
        return super()._apply(fn, recurse)

    def quantized_weight(self) -> Tensor:
        """The weight the layer multiplies with, quantized and corrected: (O, ...)."""
        return self._corrected_and_domain()[0]

    def prepare(self, step: Lock) -> None:
        """Quantize and correct the weight now, for all forward passes with gradients while the lock `step` is held."""
        self.prepared = Kept(self._corrected_and_domain(), step)

    def _corrected_and_domain(self) -> tuple[Tensor, Tensor]:
        w_q, w = self.weight_and_domain()
        if w_q is w:  # correction would change nothing
            return w, w
        return correct_weight(w_q, w, self.spec.correction, self.spec.correction_gradient), w

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight (O, ...), quantized and corrected, and the bias (O,) that the layer adds."""
        return self._with_bias(*self._corrected_and_domain())

    def _with_bias(self, weight: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.spec.output_correction or weight is w:
            return weight, self.bias
        with torch.no_grad():
            shift = output_shift(weight, w, self.mean_input)
        return weight, -shift if self.bias is None else self.bias - shift

    def _at_hand(self) -> tuple[Tensor, Tensor | None]:
        """`weight_and_bias`, with what the training step at hand, or an earlier pass in use, has made of the weight."""
        if torch.compiler.is_compiling():
            return self.weight_and_bias()
        if not self.training and not torch.is_grad_enabled():
            return self._in_use()
        self.kept, prepared = None, self.prepared
        if prepared is None or not prepared.key.locked():
            return self.weight_and_bias()
        if torch.is_grad_enabled():
            return self._with_bias(*prepared.value)
        self.prepared = None  # of reentrant checkpointing, whose second pass goes backward on its own
        return self.weight_and_bias()

    def _in_use(self) -> tuple[Tensor, Tensor | None]:
        """`weight_and_bias` in evaluation mode without gradients, kept from pass to pass."""
        scale, mean = getattr(self, "weight_scale", None), getattr(self, "mean_input", None)
        sources = [t for t in (self.weight, self.bias, mean, scale and scale.values) if t is not None]
        kept, key = self.kept, self._key(sources)
        if kept is None or key is None or kept.key != key:
            kept = Kept(self.weight_and_bias(), key, [(t, t.detach()) for t in sources])
            self.kept = None if key is None or type(kept.value[0]) not in PLAIN else kept
        return kept.value

    def _key(self, sources: list[Tensor]) -> tuple[Any, ...] | None:
        """What `weight_and_bias` depends on; None where a change could not be seen, or a CUDA graph is captured."""
        seen = all(type(t) in PLAIN and (not t.is_leaf or t.grad is None) for t in sources)
        if not seen or (self.weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        try:
            told = [(id(t), t._version, t.data_ptr()) for t in sources]
        except RuntimeError:  # an inference tensor counts no writes, one inside torch.func has no address
            return None
        return self.bits, self.spec, torch.is_autocast_enabled(self.weight.device.type), *told

    def _operands(self, x: Tensor, channel: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Quantized input, quantized and corrected weight, and bias; channel: which dimension of x has the channels."""
        x = self.input_quantizer(x, self._n())
        if self.spec.output_correction and self.training and not again():
            with torch.no_grad():
                some = x.movedim(channel, 0).unsqueeze(-1)[:, :16].flatten(1)  # all images would cost 9 % of a step
                mean = some.mean(1, dtype=self.mean_input.dtype)
                self.mean_input.lerp_(ranks.mean(mean) if self.across_ranks else mean, 0.1)
        return x, *self._at_hand()

    def weight_and_domain(self) -> tuple[Tensor, Tensor]:
        """The weight quantized but not corrected, and in full precision in the quantizer's own domain: two (O, ...).

        At 32 bits, except in a compiled graph, both are the same tensor.
        """
        n, method = self._n(), self.spec.weight
        full = not isinstance(n, Tensor) and quantizers.is_full(n)
        if method == "dorefa":
            w_q, w = quantizers.dorefa_weight(self.weight, n)
        elif full:
            w = self.weight if method == "minmax" else ranks.awaited(self.weight, self.weight_scale.values)
        elif method == "minmax":
            w_q, w = quantizers.minmax_weight(self.weight, n, self.spec.zero_level)
        else:
            w_q, w = quantizers.lsq_weight(self.weight, n, self.weight_scale())
        return (w, w) if full else (w_q, w)

    def _n(self) -> quantizers.Number:
        """The levels in force: a tensor in a compiled graph, which would else be compiled for each bit-width."""
        if not torch.compiler.is_compiling():
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
