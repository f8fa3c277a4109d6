"""Layers that run at any bit-width: quantized Conv2d and Linear, and the quantizers of their inputs.

In a compiled graph the number of levels of a layer is a tensor buffer, not a Python number, so that one graph serves
1 to 8 bits; 32 bits have another one. The attribute `bits` is for reading only: `set_bits` keeps all of them equal.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from typing import Annotated, Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, kernels, quantizers
from .checks import BIT_WIDTHS, Own, choice_or_own, invalid
from .correction import Correction, output_shift

Norm = Literal["shared", "shared_affine", "switchable"]
NORMS = get_args(Norm)
Gather = Callable[[Tensor], Tensor]  # a tensor (...) of each process that shares a batch, stacked: (P, ...)
LONGEST = 16384  # the most weights of an output channel that one program in Triton takes


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    try:
        patterns = (None,) if isinstance(value, str) else tuple(islice(value, 10_000))
    except Exception:  # iterating may raise anything
        patterns = (None,)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        expected = 'a tuple of "first", "last" and name patterns, for example ("first",), or () for none'
        raise invalid(name, value, expected)
    return patterns


def _weight(name: str, value: Any) -> str:
    what = "(w, n) that returns two tensors shaped as w and passes a gradient to it"
    return choice_or_own(name, value, quantizers.WEIGHT_METHODS, what, lambda f: _try(f, outputs=2))


def _activation(name: str, value: Any) -> str:
    what = "(x, n) that returns a tensor shaped as x and passes a gradient to it"
    return choice_or_own(name, value, quantizers.ACTIVATION_METHODS, what, lambda f: _try(f, outputs=1))


@torch.enable_grad()
def _try(function: Callable[..., Any], outputs: int) -> None:
    """Call a quantizer of one's own with a small tensor. ValueError: it does not return what it should."""
    x = torch.linspace(-1, 1, 12, device="cpu").view(3, 4).requires_grad_()
    found = function(x, 3.0)
    given = [found] if outputs == 1 else list(found)
    if len(given) != outputs or not all(t.shape == x.shape and t.is_floating_point() for t in given):
        raise ValueError("it returned something else")
    (gradient,) = torch.autograd.grad((given[0] * (x.detach() + 2)).sum(), x)
    if not gradient.isfinite().all() or not gradient.any():
        raise ValueError("its gradient is zero or not finite")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a network is quantized. ValueError: names the field, its value and what is allowed."""

    bits: Annotated[tuple[int, ...], checks.bit_widths]  # the trained bit-widths
    # The quantizers: a name, or a function of your own. n is the number of levels above the lowest one: a float, or a
    # scalar tensor in a compiled or captured graph, of whose value no function may ask (`if n > 1`). weight: (w, n),
    # with w (O, ...), to the quantized weight and the full-precision weight that it approaches with more bits, as
    # `quantizers.dorefa_weight` returns them.
    weight: Annotated[quantizers.Weight | Callable[..., Any], _weight] = "dorefa"
    # activation: (x, n) to x on its grid, for inputs of either sign; "none" leaves activations as they are.
    activation: Annotated[quantizers.Activation | Callable[..., Any], _activation] = "dorefa"
    correction: Correction = "mean_var"  # weight bias correction: the moments that each output channel keeps
    # "shared": one batch norm for all bit-widths. "switchable": one for each. "shared_affine": one affine for all, and
    # running statistics for each trained bit-width, between which those of other bit-widths are interpolated.
    norm: Norm = "shared"
    full_precision: Annotated[tuple[str, ...], _patterns] = ("first", "last")  # what to keep; also "*.shortcut"
    zero_level: bool = False  # whether the grid of "minmax" has a zero
    correction_gradient: bool = True  # whether the statistics of the correction carry gradient
    # The range of "dorefa" activations. "unit": [0, 1], as published. "tracked": the running minimum and maximum, which
    # inputs that can be negative always have. "auto": "unit" if the network's batch norms have seen no data yet.
    activation_range: Literal["auto", "unit", "tracked"] = "auto"
    output_correction: bool = False  # whether layers subtract `correction.output_shift`, which is beyond the paper

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.zero_level and (self.weight != "minmax" or 1 in self.bits):
            raise invalid("zero_level", True, 'weight="minmax" and bit-widths from 2 up')


def nearest(trained: tuple[int, ...], bits: int) -> int:
    """The trained bit-width nearest to `bits`, the lower of two."""
    return min(trained, key=lambda b: abs(b - bits))


def again() -> bool:
    """Whether this forward pass is the second one of activation checkpointing, which runs inside a backward pass.

    It has to compute what the first one did, and must not measure the same batch once more.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def writes_of(*tensors: Tensor) -> list[tuple[int, int]]:
    """Which tensors (any shape) these are, and how often each was written to: what `overwritten` compares."""
    return [(id(t), 0 if t.is_inference() else t._version) for t in tensors]


def overwritten(before: list[tuple[int, int]], *tensors: Tensor) -> bool:
    """Whether something else, such as an average of weights, has written to tensors (any shape) since `before`."""
    unknown = torch.compiler.is_compiling() or any(t.is_inference() for t in tensors)  # which count none
    return not unknown and writes_of(*tensors) != before


class LearnedScale(nn.Module):
    """One learned positive scalar for each trained bit-width; another bit-width takes the nearest one's clipping range.

    `reach` holds, for each of BIT_WIDTHS, the largest level in units of the scale.
    """

    def __init__(self, bits: tuple[int, ...], reach: dict[int, float]) -> None:
        super().__init__()
        self.trained, self.reach, self.bits = bits, reach, bits[-1]
        self.values = nn.Parameter(torch.ones(len(bits)))
        self.register_buffer("pick", torch.zeros(len(bits)), persistent=False)
        self.set_bits(bits[-1])

    def set_bits(self, bits: int) -> None:
        """Take the scale of `bits`, or that of the nearest trained bit-width, stretched to its clipping range."""
        self.bits, source = bits, nearest(self.trained, bits)
        self.pick.zero_()
        self.pick[self.trained.index(source)] = self.reach[source] / self.reach[bits]
        self.written = writes_of(self.pick)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.set_bits(self.bits)  # after `to_empty`, the buffer of no state is not set

    def start(self, size: Tensor) -> None:
        """Set the scalar of every bit-width to size / sqrt(reach), where LSQ starts; size: scalar, 2 mean|x|."""
        reach = torch.tensor([self.reach[b] for b in self.trained], device=size.device)
        self.values.data.copy_((size / reach.clamp_min(1).sqrt()).clamp_min(1e-6))

    def forward(self) -> Tensor:
        """The scalar in force, positive even if an optimizer step has carried its parameter past zero."""
        if overwritten(self.written, self.pick):  # by the buffer of another bit-width
            self.set_bits(self.bits)
        pick = self.pick.clone()  # the next `set_bits` overwrites it, maybe before the backward pass of this one
        return (self.values * pick).sum().abs().clamp_min(1e-12)


def _reach(signed: bool) -> dict[int, float]:
    """q_max by bit-width; the signed grid at 1 bit is {-s/2, s/2}."""
    usual = {b: min(b, 8) for b in BIT_WIDTHS}  # 32 bits have no scale: what is trained at them alone starts as 8 bits
    return {b: max(2.0 ** (u - 1) - 1, 0.5) if signed else quantizers.levels(u) for b, u in usual.items()}


class InputQuantizer(nn.Module):
    """The base of the input quantizers: at 32 bits an unsigned one is a ReLU and a signed one the identity.

    A measured range is measured on the first batch of training. A batch in evaluation mode that comes earlier, such as
    one that only asks for shapes, gives a provisional range: before training, batch norms give other outputs.
    """

    method, range = "", ""  # the method of QuantSpec, and where the ends of the range come from
    starts = True  # whether something starts from the first batch

    def __init__(self, bits: tuple[int, ...], signed: bool) -> None:
        super().__init__()
        self.signed, self.started, self.provisional = signed, not self.starts, False
        self.set_to: list[float] | None = None
        self.gathered: Gather | None = None  # set by a training loop of several processes
        self.parts = 1  # the parts of a step's batch, of which each forward pass sees one
        self.scale: LearnedScale | None = None  # of a learned range
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def forward(self, x: Tensor, n: quantizers.Number) -> Tensor:
        """x (any shape) at n levels (scalar)."""
        some = x.numel() > 0  # a detector without proposals has none, and nothing can be measured
        if some and not self.started:
            self._begin(x.detach())
        elif some and self.training and not again():
            self._follow(x.detach())
        if not quantizers.is_full(n):
            return self._quantize(x, n)
        y = x if self.signed else x.relu()
        return y if self.scale is None else kernels.awaited(y, self.scale.values)

    def _quantize(self, x: Tensor, n: quantizers.Number) -> Tensor:
        return kernels.fake_quantize(x, *self.grid(n), learn_step=False, unit=self.range == "unit")

    def grid(self, n: quantizers.Number) -> quantizers.Grid:
        """(scale, q_min, q_max, offset) in force at n levels (scalar)."""
        raise NotImplementedError

    def _begin(self, x: Tensor) -> None:
        """Start from a batch (any shape), in training for good, else unless something else has given a range."""
        if self.training and getattr(self, "_is_replica", False):
            raise RuntimeError("run a batch in training mode through the network before nn.DataParallel copies it")
        if not self.training and self._was_given():
            self.started, self.provisional = True, False
        elif self.training or not self.provisional:
            # without a sign, a ReLU stood before this until conversion left it to the quantizer
            self._start(x if self.signed else x.clamp_min(0))
            self.started, self.provisional = self.training, not self.training
            self.set_to = None if self.training else self._ends()  # a step of training waits for no number

    def _was_given(self) -> bool:
        """Whether the range is not what this quantizer has set: it was learned, averaged or loaded."""
        ends = self._ends()
        if ends is None:
            return False
        if self.set_to is None:  # by the constructor, or before it was saved
            self.set_to = ends if self.provisional else [0.0, *[1.0] * (len(ends) - 1)]
        return ends != self.set_to

    def _ends(self) -> list[float] | None:
        """The range in numbers; None where tensors have none, as in tracing."""
        if torch.compiler.is_compiling():
            return None
        learned = [] if self.scale is None else [self.scale.values]
        try:
            return torch.cat([self.low[None], self.high[None], *learned]).tolist()
        except RuntimeError:
            return None

    def _start(self, x: Tensor) -> None:
        """Start from the first batch."""

    def _follow(self, x: Tensor) -> None:
        """Follow a later batch of training."""

    def would_lose_its_start(self) -> bool:
        """Whether the first batch would write its range to a copy of a parameter that FSDP2 has sharded."""
        return not self.started and any(hasattr(p, "full_tensor") for p in self.parameters())

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number in x, of all processes."""
        ends = torch.stack([x.amin(), -x.amax()])
        low, negated = self.gathered(ends).amin(0) if self.gathered else ends
        return low, -negated

    def get_extra_state(self) -> Tensor:
        """1 if the range has started, 2 if provisionally, as a scalar tensor: checkpoints hold no pickled objects."""
        return torch.tensor(1 if self.started or self._was_given() else 2 * self.provisional)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` gave, a scalar."""
        self.started, self.provisional, self.set_to = int(state) == 1, int(state) == 2, None

    def extra_repr(self) -> str:
        """Method, sign and range."""
        return f"{self.method}, signed={self.signed}, range={self.range}"


class NoInputQuantizer(InputQuantizer):
    """Leaves its input as it is."""

    method, range, starts = "none", "-", False

    def forward(self, x: Tensor, n: quantizers.Number) -> Tensor:
        """x (any shape) itself."""
        return x


class OwnInputQuantizer(InputQuantizer):
    """A function of one's own."""

    range, starts = "own", False

    def __init__(self, bits: tuple[int, ...], signed: bool, own: Own) -> None:
        super().__init__(bits, signed)
        self.method, self.function = own, own.function

    def _quantize(self, x: Tensor, n: quantizers.Number) -> Tensor:
        return self.function(x, n)


class UnitDoReFa(InputQuantizer):
    """DoReFa over [0, 1], as published."""

    method, range, starts = "dorefa", "unit", False

    def grid(self, n: quantizers.Number) -> quantizers.Grid:
        """See `InputQuantizer.grid`."""
        return quantizers.dorefa_grid(n, 1.0)


class TrackedDoReFa(InputQuantizer):
    """DoReFa over the running minimum and maximum of the input."""

    method, range = "dorefa", "tracked"

    def grid(self, n: quantizers.Number) -> quantizers.Grid:
        """See `InputQuantizer.grid`."""
        # a copy of the lower end, which the next batch moves and which at 1 bit is the offset itself
        return quantizers.dorefa_grid(n, self.high, self.low.clone() if self.signed else None)

    def _start(self, x: Tensor) -> None:
        self._follow(x, momentum=1.0)

    def _follow(self, x: Tensor, momentum: float = 0.1) -> None:
        low, high = self._extremes(x)  # the range never has width zero, by which a grid would divide
        self.low.lerp_(low.to(self.low.dtype).clamp_max(-1e-6), momentum)
        self.high.lerp_(high.to(self.high.dtype).clamp_min(1e-6), momentum)


class PACT(InputQuantizer):
    """PACT, with a clipping level for each trained bit-width."""

    method, range = "pact", "learned"

    def __init__(self, bits: tuple[int, ...], signed: bool) -> None:
        super().__init__(bits, signed)
        self.scale = LearnedScale(bits, dict.fromkeys(BIT_WIDTHS, 1.0))

    def grid(self, n: quantizers.Number) -> quantizers.Grid:
        """See `InputQuantizer.grid`."""
        return quantizers.learned_grid(n, quantizers.pact_step(n, self.scale(), self.signed), self.signed)

    def _start(self, x: Tensor) -> None:
        low, high = self._extremes(x.float())
        self.scale.start(torch.maximum(-low, high))


class LSQ(InputQuantizer):
    """LSQ, with a step for each trained bit-width."""

    method, range = "lsq", "learned"

    def __init__(self, bits: tuple[int, ...], signed: bool) -> None:
        super().__init__(bits, signed)
        self.scale = LearnedScale(bits, _reach(signed))

    def _quantize(self, x: Tensor, n: quantizers.Number) -> Tensor:
        return kernels.lsq_activation(x, n, self.scale(), self.signed, self.parts)

    def grid(self, n: quantizers.Number) -> quantizers.Grid:
        """See `InputQuantizer.grid`."""
        return quantizers.learned_grid(n, self.scale(), self.signed)

    def _start(self, x: Tensor) -> None:
        size = 2 * x.float().abs().mean()
        self.scale.start(self.gathered(size).mean(0) if self.gathered else size)


def input_quantizer(spec: QuantSpec, signed: bool) -> InputQuantizer:
    """The input quantizer of a layer; signed: whether its input can be negative."""
    if isinstance(spec.activation, Own):
        return OwnInputQuantizer(spec.bits, signed, spec.activation)
    tracked = signed or spec.activation_range == "tracked"
    dorefa = TrackedDoReFa if tracked else UnitDoReFa
    kinds = {"none": NoInputQuantizer, "dorefa": dorefa, "pact": PACT, "lsq": LSQ}
    return kinds[spec.activation](spec.bits, signed)


class QuantizedLayer(nn.Module):
    """What QuantConv2d and QuantLinear share; they bring `weight` and the product with it."""

    weight: nn.Parameter
    levels: Tensor
    bits_in_tensors = False  # whether a CUDA graph is being made that is to serve every bit-width
    # During a training step: the quantized weight, its full-precision domain, and the lock of that step, which is held
    # as long as they are valid.
    prepared: tuple[tuple[Tensor, Tensor], Lock] | None = None

    @classmethod
    def from_float(cls, plain: nn.Conv2d | nn.Linear, spec: QuantSpec, signed: bool) -> Self:
        """Take over `plain` with its parameters; signed: whether its input can be negative."""
        self = cls(**geometry(plain), device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.spec, self.bits = spec, spec.bits[-1]
        self.gathered: Gather | None = None
        self.own = spec.weight.function if isinstance(spec.weight, Own) else None
        with self.weight.device:  # whatever is new lies where the weight does
            self.input_quantizer = input_quantizer(spec, signed)
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
        """Run at `bits` from now on; `levels`, a scalar of its number of levels, may be shared with other layers.

        By a shared one, a compiled graph sees that two layers quantize the same activation alike, and does it once.
        """
        self.bits, self.known_levels, self.full = bits, quantizers.levels(bits), bits == 32
        if levels is not self.levels:
            with torch.inference_mode(False):  # a tensor of inference mode could not be written to after it
                self.levels = torch.full_like(self.levels, self.known_levels) if levels is None else levels
        for module in self.modules():
            if isinstance(module, LearnedScale):
                module.set_bits(bits)

    def _n(self) -> quantizers.Number:
        """The levels in force: a tensor in a compiled or captured graph, which would else serve one bit-width alone."""
        if self.full or not (self.bits_in_tensors or torch.compiler.is_compiling()):
            return self.known_levels
        return self.levels.to(torch.promote_types(self.levels.dtype, torch.float32))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"prepared": None}  # copies come without

    def weight_and_domain(self) -> tuple[Tensor, Tensor]:
        """The weight quantized but not corrected, and in full precision in the quantizer's own domain: two (O, ...).

        At 32 bits both are the same tensor.
        """
        w, n, method = self.weight, self._n(), self.spec.weight
        if self.own or method == "dorefa":
            w_q, domain = (self.own or kernels.dorefa_weight)(w, n)
            return (domain if self.full else w_q), domain
        if self.full:
            w = w if method == "minmax" else kernels.awaited(w, self.weight_scale.values)
            return w, w
        if method == "minmax":
            return quantizers.minmax_weight(w, n, self.spec.zero_level)
        return kernels.lsq_activation(w, n, self.weight_scale(), signed=True), w

    def _corrected_and_domain(self) -> tuple[Tensor, Tensor]:
        w_q, w = self.weight_and_domain()
        if w_q is w:  # correction would change nothing
            return w, w
        return kernels.correct_weight(w_q, w, self.spec.correction, self.spec.correction_gradient), w

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight (O, ...), quantized and corrected, and the bias (O,) that the layer adds."""
        return self._with_bias(*self._corrected_and_domain())

    def _with_bias(self, weight: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.spec.output_correction or weight is w:
            return weight, self.bias
        with torch.no_grad():
            shift = output_shift(weight, w, self.mean_input).to(weight.dtype)
        return weight, -shift if self.bias is None else self.bias - shift

    def is_joint(self) -> bool:
        """Whether `triton_kernels` quantizes and corrects this weight, together with other layers'."""
        spec, w = self.spec, self.weight
        usual = (spec.weight, spec.correction, spec.correction_gradient) == ("dorefa", "mean_var", True)
        fits = w.dtype == torch.float32 and w[0].numel() <= LONGEST
        return usual and fits and not spec.output_correction and kernels.runs_triton(w)

    def _at_hand(self) -> tuple[Tensor, Tensor | None]:
        """`weight_and_bias`, from the training step at hand if it is there."""
        prepared, evaluating = self.prepared, not (self.training or torch.is_grad_enabled())
        if torch.compiler.is_compiling() or evaluating or prepared is None or not prepared[1].locked():
            return self.weight_and_bias()
        if torch.is_grad_enabled():
            # a weight of autocast's type does not fit where a network switches autocast off
            same = prepared[0][0].dtype == self.weight.dtype
            fits = same or torch.is_autocast_enabled(self.weight.device.type)
            return self._with_bias(*prepared[0]) if fits else self.weight_and_bias()
        # no gradients in training: the first pass of reentrant checkpointing, whose second one has a graph of its own
        self.prepared = None
        return self.weight_and_bias()

    def _operands(self, x: Tensor, channel: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Quantized input, quantized and corrected weight, and bias; channel: which dimension of x has the channels."""
        x = self.input_quantizer(x, self._n())
        if self.spec.output_correction and self.training and x.numel() and not again():
            with torch.no_grad():
                some = x.movedim(channel, 0).unsqueeze(-1)[:, :16].flatten(1)  # all images would cost 9 % of a step
                mean = some.mean(1, dtype=self.mean_input.dtype)
                self.mean_input.lerp_(self.gathered(mean).mean(0) if self.gathered else mean, 0.1)
        return x, *self._at_hand()

    def extra_repr(self) -> str:
        """That of the plain layer, with bit-width, weight quantizer and correction."""
        return f"{super().extra_repr()}, bits={self.bits}, weight={self.spec.weight}, correction={self.spec.correction}"


def prepare(layers: Iterable[QuantizedLayer], step: Lock) -> None:
    """Quantize and correct the weights of `layers`, for all forward passes with gradients while `step` is locked.

    Layers with hooks before their forward pass are left out.
    """
    joint: dict[float, list[QuantizedLayer]] = {}
    for layer in layers:
        if layer._forward_pre_hooks:
            continue
        if layer.is_joint():
            joint.setdefault(layer.known_levels, []).append(layer)
        else:
            layer.prepared = layer._corrected_and_domain(), step
    for group in joint.values():
        from .triton_kernels import correct_dorefa_weights

        weights = correct_dorefa_weights([layer.weight for layer in group], group[0]._n())
        for layer, weight in zip(group, weights, strict=True):
            layer.prepared = (weight, layer.weight), step


def geometry(layer: nn.Conv2d | nn.Linear) -> dict[str, Any]:
    """The arguments of another layer like `layer`, except its bias."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else names
    return {name: getattr(layer, name) for name in names}


def fails_channels_last(conv: nn.Conv2d) -> bool:
    """Whether a CPU computes a wrong gradient of `conv`, or crashes, where its input or its weight is channels-last.

    That of a strided 1x1 convolution of few input channels writes outside its buffer (oneDNN issue 6035, seen with
    torch 2.14.1).
    """
    return set(conv.kernel_size) == {1} and max(conv.stride) > 1 and conv.in_channels < 16


class SafeConv2d(nn.Conv2d):
    """A Conv2d whose gradient is right in every memory format, on a CPU too."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (x.device.type == "cpu" and torch.is_grad_enabled() and fails_channels_last(self)):
            return super()._conv_forward(x, weight, bias)
        if any(self._reversed_padding_repeated_twice):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode)
        down, right = self.stride  # a 1x1 convolution reads none of the pixels between
        return F.conv2d(x[..., ::down, ::right], weight, bias, groups=self.groups)


class QuantConv2d(QuantizedLayer, SafeConv2d):
    """A Conv2d (any groups, stride, padding) whose weight and input are quantized. (N, I, H, W) -> (N, O, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W') at the bit-width in force."""
        return self._conv_forward(*self._operands(x, channel=-3))


class QuantLinear(QuantizedLayer, nn.Linear):
    """A Linear whose weight and input are quantized. (..., I) -> (..., O)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) at the bit-width in force."""
        return F.linear(*self._operands(x, channel=-1))
