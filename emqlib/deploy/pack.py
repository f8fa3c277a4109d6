"""Integers for deployment: the weights of one child in 1 to 8 bits each, a scale and an offset for each channel."""

import copy
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import quantizers
from ..checks import Own, integer, invalid
from ..convert import Bits, at_bits, converted, has_hooks, quantized_layers, replaced
from ..correction import correct_weight
from ..layers import InputQuantizer, QuantConv2d, QuantizedLayer, SafeConv2d, geometry
from ..norms import MultiBitBatchNorm
from ..tracing import is_patched, trace


def pack_integers(codes: Tensor, bits: int) -> Tensor:
    """Write integers one after the other, lowest bit first.

    Examples:
        >>> pack_integers(torch.tensor([1, 2, 3, 0]), bits=2)
        tensor([57], dtype=torch.uint8)

    Args:
        codes: N integers in [0, 2**bits), of any shape.
        bits: 1 to 8.

    Returns:
        uint8 (ceil(N bits / 8),).
    """
    integer("bits", bits, 1, 8)
    whole = isinstance(codes, Tensor) and not (codes.is_floating_point() or codes.is_complex())
    if not whole or bool(((codes < 0) | (codes >= 2**bits)).any()):
        raise invalid("codes", codes, f"a tensor of integers in [0, {2**bits})")
    stream = (codes.reshape(-1, 1) >> torch.arange(bits, device=codes.device) & 1).flatten()
    octets = F.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (octets << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack_integers(packed: Tensor, bits: int, count: int) -> Tensor:
    """Read the first `count` integers of what `pack_integers` wrote, uint8 (K,): int64 (N,), N = count.

    Examples:
        >>> unpack_integers(torch.tensor([57], dtype=torch.uint8), bits=2, count=4)
        tensor([1, 2, 3, 0])
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise invalid("packed", packed, "a uint8 tensor (ceil(N bits / 8),)")
    integer("count", count, 0, 8 * len(packed) // integer("bits", bits, 1, 8))
    stream = (packed.long().unsqueeze(1) >> torch.arange(8, device=packed.device) & 1).flatten()
    return (stream[: count * bits].view(count, bits) << torch.arange(bits, device=packed.device)).sum(1)


@dataclass(frozen=True)
class Affine:
    """A batch norm in evaluation mode: gain y + shift for each channel, both (C,) in float64."""

    gain: Tensor
    shift: Tensor

    @classmethod
    def of(cls, norm: MultiBitBatchNorm) -> "Affine":
        """That of `norm` at the bit-width it is set to."""
        (mean, var), (weight, bias) = norm.statistics(), norm.affine()
        gain = (var.double() + norm.eps).rsqrt()
        gain = gain if weight is None else gain * weight.double()
        shift = -mean.double() * gain
        return cls(gain, shift if bias is None else shift + bias.double())

    def after(self, bias: Tensor | None) -> Tensor:
        """The bias (C,) that a layer with `bias` has once this is part of it."""
        return self.shift if bias is None else self.shift + bias.double() * self.gain


class ChannelAffine(nn.Module):
    """gain x + shift for each channel, in place of a batch norm that could not become part of a layer."""

    def __init__(self, affine: Affine, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("gain", affine.gain.to(dtype))
        self.register_buffer("shift", affine.shift.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...)."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.shift.view(shape), x, self.gain.view(shape))


class FixedQuantizer(nn.Module):
    """An input quantizer at one bit-width. Its grid is four numbers: scale, q_min, q_max and offset."""

    def __init__(self, quantizer: InputQuantizer, bits: int) -> None:
        super().__init__()
        scale, q_min, q_max, offset = quantizer.grid(quantizers.levels(bits))
        self.shifted = offset is not None
        numbers = [float(v) for v in (scale, q_min, q_max, offset if self.shifted else 0.0)]
        self.register_buffer("numbers", quantizer.high.new_tensor(numbers))

    def forward(self, x: Tensor) -> Tensor:
        """x (any shape) on the grid."""
        scale, q_min, q_max, offset = self.numbers
        return quantizers.fake_quantize(x, scale, q_min, q_max, offset if self.shifted else None)


class PackedLayer(nn.Module):
    """What PackedConv2d and PackedLinear share: a weight of integers, and a scale and an offset for each channel.

    `codes` holds the integers; `affine` holds scale, offset and, if there is one, bias. PyTorch cannot multiply
    integers of few bits, so weight and bias are unpacked once. They are not part of the state.
    """

    codes: Tensor
    affine: Tensor
    untraced = ""  # the layer's name, if torch.fx could not tell who else reads its weight

    @property
    def weight(self) -> Tensor:
        """The weight (O, ...), unpacked. ValueError: it may be read outside the layer, where training reads another."""
        if self.untraced:
            expected = "no packed weight to be read outside its layer: convert with this layer in full_precision"
            raise invalid("model", self.untraced, expected)
        return self.dense

    def take(self, layer: QuantizedLayer, norm: Affine | None) -> nn.Module:
        """Become `layer` at the bit-width it is set to, with `norm` after it folded in; returns itself."""
        bias, (codes, scale, offset) = layer.weight_and_bias()[1], _integers(layer)
        if norm is not None:
            scale, offset, bias = scale * norm.gain, offset * norm.gain, norm.after(bias)
        # runtimes want positive scales: a negative one changes its sign, and c becomes -1 - c, whose middle is opposite
        codes = torch.where(_per_channel(scale < 0, codes), -1 - codes, codes)
        rows = [scale.abs(), offset] if bias is None else [scale.abs(), offset, bias]
        del self.weight, self.bias
        self.bits, self.shape = layer.bits, codes.shape
        self.register_buffer("codes", pack_integers(codes + 2 ** (self.bits - 1), self.bits))
        self.register_buffer("affine", torch.stack(rows).to(layer.weight.dtype))
        self.register_buffer("dense", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        fixed = layer.input_quantizer.method != "none"
        self.input_quantizer = FixedQuantizer(layer.input_quantizer, self.bits) if fixed else nn.Identity()
        self.unpack()
        self.register_load_state_dict_post_hook(PackedLayer.unpack)
        return self.eval().requires_grad_(False)

    def integers(self) -> Tensor:
        """The weight's integers in [-2**(bits - 1), 2**(bits - 1)): int64 (O, ...)."""
        return unpack_integers(self.codes, self.bits, self.shape.numel()).view(self.shape) - 2 ** (self.bits - 1)

    def unpack(self, _: object = None) -> None:
        """Set weight = scale (integers + 1/2) + offset, (O, ...), rounded once, and the bias; after loading too."""
        centred = self.integers().double() + 0.5
        scale, offset = (_per_channel(row.double(), centred) for row in self.affine[:2])
        self.dense = (scale * centred + offset).to(self.affine.dtype)
        self.bias = self.affine[2].clone() if len(self.affine) == 3 else None

    def extra_repr(self) -> str:
        """The plain layer's, with the bit-width."""
        return f"{super().extra_repr()}, bits={self.bits}"


class PackedConv2d(PackedLayer, nn.Conv2d):
    """A QuantConv2d at one bit-width, its weight integers."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        return self._conv_forward(self.input_quantizer(x), self.dense, self.bias)


class PackedLinear(PackedLayer, nn.Linear):
    """A QuantLinear at one bit-width, its weight integers."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(self.input_quantizer(x), self.dense, self.bias)


@torch.no_grad()
def pack_layer(layer: nn.Module, norm: Affine | None = None) -> nn.Module:
    """The packed twin of a quantized layer at the bit-width it is set to, with `norm` after it folded in.

    A layer at 32 bits, or one that was never quantized, becomes a plain layer.
    """
    linear, quantized = isinstance(layer, nn.Linear), isinstance(layer, QuantizedLayer)
    arguments = geometry(layer)
    if quantized and layer.bits != 32:
        return (PackedLinear if linear else PackedConv2d)(**arguments, device="meta").take(layer, norm)
    weight, bias = layer.weight_and_bias() if quantized else (layer.weight, layer.bias)
    if norm is not None:
        weight, bias = weight.double() * _per_channel(norm.gain, weight), norm.after(bias)
    plain = (nn.Linear if linear else nn.Conv2d)(**arguments, bias=bias is not None, device="meta").eval()
    plain.weight = nn.Parameter(weight.to(layer.weight.dtype))
    plain.bias = None if bias is None else nn.Parameter(bias.to(layer.weight.dtype))
    quantizer = layer.input_quantizer if quantized else None
    clips = quantizer is not None and not quantizer.signed and quantizer.method != "none"
    return nn.Sequential(nn.ReLU(), plain) if clips else plain  # `convert` may have left this ReLU to the quantizer


def pack(model: nn.Module, bits: Bits) -> nn.Module:
    """Make one child model a network of integers, for inference.

    A weight quantized to b bits is w_q = low + step r with integers r from 0 to n = 2^b - 1. Weight bias correction is
    affine for each output channel o: w' = R_o (w_q - m_q) + m_w with the means m and R_o = std(w) / std(w_q), or 1 for
    "mean". A batch norm after a convolution, g_o y + h_o, is affine too. So, with integers c = r - 2^(b-1) of b bits,

        g_o w' = scale_o (c + 1/2) + offset_o, scale_o = g_o R_o step, offset_o = g_o (R_o (low + n/2 step - m_q) + m_w)

    and the layer's bias becomes g_o bias_o + h_o. A batch norm after anything else becomes a gain and a shift for each
    channel. What was kept in full precision stays so, as does everything at 32 bits. A weight unpacked to float32 is
    off by at most 2^-23 times the sum of its channel's largest weight and a step: one unit in the last place.

    Size: N b / 8 bytes for the N weights of a layer, 8 for each output channel, 12 with a bias, and 16 for its input.

    Args:
        model: a converted network.
        bits: 1 to 8 or 32, or a dict as for `set_bits`.

    Returns:
        A copy in evaluation mode, which `emqlib.save` writes. `export_onnx` makes a file for other runtimes.

    Raises:
        ValueError: as `set_bits`; an input quantizer has seen no images yet; quantizers of one's own.
    """
    network = converted(model)
    for method in (network.emq.spec.weight, network.emq.spec.activation):
        if isinstance(method, Own):
            raise invalid("model", method, "a network whose quantizers are emqlib's own: integers need a known grid")
    with at_bits(network, bits):
        quantizers_of = {name: m for name, m in network.named_modules() if isinstance(m, InputQuantizer)}
        unseen = [name for name, m in quantizers_of.items() if not (m.started or m.provisional)]
        graphs = trace(network) if unseen else []
        called = {node.target for graph, _ in graphs for node in graph.nodes}
        for name in unseen:  # a head that is never called needs no range
            if not called or name.removesuffix(".input_quantizer") in called:
                raise invalid("model", name, "a network that has seen images, from which its input ranges start")
        return pack_as_set(network)


@torch.no_grad()
def pack_as_set(network: nn.Module) -> nn.Module:
    """`pack` at the bit-widths that `network` is set to, unchecked."""
    packed = copy.deepcopy(network).eval()
    layers = {name: layer.bits for name, layer in quantized_layers(packed).items()}
    traced = trace(packed)
    folded = _folded(packed, *traced[0]) if traced else {}
    for graph, read in traced[1:]:
        also = _folded(packed, graph, read)
        folded = {layer: norm for layer, norm in folded.items() if layer in also}
    new: dict[nn.Module, nn.Module] = {norm: nn.Identity() for norm in folded.values()}
    for module in packed.modules():
        if isinstance(module, MultiBitBatchNorm) and module not in new:
            new[module] = ChannelAffine(Affine.of(module), module.running_mean.dtype)
        elif isinstance(module, QuantizedLayer) or module in folded:
            new[module] = pack_layer(module, Affine.of(folded[module]) if module in folded else None)
    packed = replaced(packed, new)
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLayer) and not traced:
            layer.untraced = name or type(layer).__name__
    packed.emq = replace(network.emq, packed=layers)
    return packed.requires_grad_(False)


def _integers(layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Integers c in [-2**(b-1), 2**(b-1)) (O, ...), and scale and offset (O,) in float64, of the weight of a layer.

    The corrected weight is affine in c. Its slope is fitted by least squares, because a channel may use few levels.
    """
    twin, spec, n = copy.deepcopy(layer).double(), layer.spec, layer.known_levels
    scale = layer.weight_scale() if spec.weight == "lsq" else None
    grids = (quantizers.weight_grid(w, n, spec.weight, scale, spec.zero_level) for w in (layer.weight, twin.weight))
    (low, step), (low_64, step_64) = grids
    r = ((layer.weight_and_domain()[0] - low) / step).round().nan_to_num().double()  # all zero: a step of zero
    w = correct_weight(low_64 + step_64 * r, twin.weight_and_domain()[1], spec.correction).flatten(1)
    x = (r - n / 2).flatten(1)
    d = x - x.mean(1, keepdim=True)
    slope = (d * w).sum(1) / d.square().sum(1)
    slope = torch.where(slope.isnan(), step_64.flatten().double(), slope)  # one level: any slope fits
    return (r - 2 ** (layer.bits - 1)).long(), slope, w.mean(1) - slope * x.mean(1)


def _per_channel(v: Tensor, like: Tensor) -> Tensor:
    """v (O,) as (O, 1, ...), against `like` (O, ...)."""
    return v.view(-1, *[1] * (like.dim() - 1))


def _folded(network: nn.Module, graph: fx.Graph, read: set[str]) -> dict[nn.Module, MultiBitBatchNorm]:
    """Of each convolution that nothing else reads and whose output goes to a batch norm alone, that batch norm."""
    modules = dict(network.named_modules(remove_duplicate=False))
    called = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(modules[node.target] for node in called)
    found = {}
    for node in called:
        norm, source = modules[node.target], node.args[0] if node.args else None
        if not isinstance(norm, MultiBitBatchNorm) or source not in called or len(source.users) > 1:
            continue
        layer = modules[source.target]
        own = not any(f"{source.target}.{name}" in read for name in ("weight", "bias"))
        changed = is_patched(layer) or has_hooks(layer) or has_hooks(norm)
        plain = type(layer) in (nn.Conv2d, SafeConv2d, QuantConv2d) and not changed
        if plain and own and calls[layer] == calls[norm] == 1:
            found[layer] = norm
    return found
