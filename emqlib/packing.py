"""Integers for deployment: the weights of one child in 1 to 8 bits each, a scale and an offset for each channel."""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import quantizers
from .attention import MultiheadAttention
from .checks import instance, integer, invalid
from .correction import correct_weight
from .layers import InputQuantizer, QuantConv2d, QuantLinear, SafeConv2d, geometry
from .multibit import Bits, at_bits, converted, quantized_layers
from .norms import MultiBitBatchNorm
from .signs import read


def pack_integers(codes: Tensor, bits: int) -> Tensor:
    """N integers in [0, 2**bits), of any shape, one after the other, lowest bit first: uint8 (ceil(N bits / 8),).

    >>> pack_integers(torch.tensor([1, 2, 3, 0]), bits=2)
    tensor([57], dtype=torch.uint8)
    """
    integer("bits", bits, 1, 8)
    whole = isinstance(codes, Tensor) and not (codes.is_floating_point() or codes.is_complex())
    if not whole or bool(((codes < 0) | (codes >= 2**bits)).any()):
        raise invalid("codes", codes, f"a tensor of integers in [0, {2**bits})")
    places = torch.arange(bits, device=codes.device)
    stream = (codes.reshape(-1, 1) >> places & 1).flatten()
    octets = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (octets << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack_integers(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first N = `count` integers of what `pack_integers` packed, uint8 (ceil(N bits / 8),): int64 (N,).

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
    """gain y + shift for each channel, (C,) in float64: what a batch norm is in evaluation mode."""

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
        """The bias (C,) of a layer with `bias` and this after it."""
        return self.shift if bias is None else self.shift + bias.double() * self.gain


class ChannelAffine(nn.Module):
    """gain x + shift for each channel: a batch norm that no layer could take in. (N, C, ...) -> (N, C, ...)."""

    def __init__(self, affine: Affine, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("gain", affine.gain.to(dtype))
        self.register_buffer("shift", affine.shift.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...)."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.shift.view(shape), x, self.gain.view(shape))


def _unpack(module: nn.Module, _: object) -> None:
    module.unpack()


class FixedQuantizer(nn.Module):
    """An input quantizer at one bit-width, whose grid is four numbers: scale, q_min, q_max and offset."""

    def __init__(self, quantizer: InputQuantizer, bits: int) -> None:
        super().__init__()
        scale, q_min, q_max, offset = quantizer.grid(quantizers.levels(bits))
        self.shifted = offset is not None
        numbers = [float(v) for v in (scale, q_min, q_max, 0.0 if offset is None else offset)]
        self.register_buffer("numbers", quantizer.high.new_tensor(numbers))
        self.unpack()
        self.register_load_state_dict_post_hook(_unpack)

    def unpack(self) -> None:
        """Take the grid from the buffer, once: a forward pass must not wait for a device to tell it."""
        self.scale, self.q_min, self.q_max = self.numbers[:3].tolist()

    def forward(self, x: Tensor) -> Tensor:
        """x (any shape) on the grid."""
        offset = self.numbers[3].to(x.dtype) if self.shifted else None
        return quantizers.fake_quantize(x, self.scale, self.q_min, self.q_max, offset)


class _Guarded(Tensor):
    """A packed weight, outside its layer: it tells its shape and type, but who computes with it is refused."""

    layer = ""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs)
        if not isinstance(result, Tensor):
            return result
        name = next((a.layer for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls)), "")
        expected = "a network that reads no packed weight outside its layer; convert with this one in full_precision"
        raise invalid("model", name, expected)


class _PackedLayer(nn.Module):
    """What PackedConv2d and PackedLinear share: `codes`, and `affine`, which holds scale, offset and, if any, bias.

    PyTorch multiplies with no integers of few bits: weight and bias are unpacked once, and are no part of the state.
    """

    codes: Tensor
    affine: Tensor
    guarded = ""  # the layer's name, in a network of which nobody knows what it reads

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name == "weight" and self.guarded:
            found = found.as_subclass(_Guarded)
            found.layer = self.guarded
        return found

    def _adopt(self, layer: QuantConv2d | QuantLinear, norm: Affine | None) -> Self:
        bias, (codes, scale, offset) = layer.weight_and_bias()[1], _integers(layer)
        if norm is not None:
            scale, offset = scale * norm.gain, offset * norm.gain
            bias = norm.after(bias)
        # -1 - c is -(c + 1/2) - 1/2, and runtimes want steps above zero
        codes = torch.where(_per_channel(scale < 0, codes), -1 - codes, codes)
        rows = [scale.abs(), offset] if bias is None else [scale.abs(), offset, bias]
        del self.weight, self.bias
        self.bits, self.shape = layer.bits, codes.shape
        self.register_buffer("codes", pack_integers(codes + 2 ** (self.bits - 1), self.bits))
        self.register_buffer("affine", torch.stack(rows).to(layer.weight.dtype))
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        fixed = layer.input_quantizer.method != "none"
        self.input_quantizer = FixedQuantizer(layer.input_quantizer, self.bits) if fixed else nn.Identity()
        self.unpack()
        self.register_load_state_dict_post_hook(_unpack)
        return self.eval().requires_grad_(False)

    def integers(self) -> Tensor:
        """The weight's integers in [-2**(bits - 1), 2**(bits - 1)): int64 (O, ...)."""
        return unpack_integers(self.codes, self.bits, self.shape.numel()).view(self.shape) - 2 ** (self.bits - 1)

    def unpack(self) -> None:
        """weight = scale (integers + 1/2) + offset, (O, ...), rounded once."""
        centred = self.integers().double() + 0.5
        scale, offset = (_per_channel(row.double(), centred) for row in self.affine[:2])
        self.weight = (scale * centred + offset).to(self.affine.dtype)
        self.bias = self.affine[2].clone() if len(self.affine) == 3 else None

    def extra_repr(self) -> str:
        """The plain layer's, with the bit-width."""
        return f"{super().extra_repr()}, bits={self.bits}"


class PackedConv2d(_PackedLayer, nn.Conv2d):
    """A QuantConv2d at one bit-width, its weights integers. (N, I, H, W) -> (N, O, H', W')."""

    @classmethod
    @torch.no_grad()
    def from_quantized(cls, conv: QuantConv2d, affine: Affine | None) -> "PackedConv2d":
        """That of `conv` at the bit-width it is set to, with what comes after it folded in."""
        return cls(**geometry(conv), device="meta")._adopt(conv, affine)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        return self._conv_forward(self.input_quantizer(x), self._buffers["weight"], self.bias)


class PackedLinear(_PackedLayer, nn.Linear):
    """A QuantLinear at one bit-width, its weights integers. (..., I) -> (..., O)."""

    @classmethod
    @torch.no_grad()
    def from_quantized(cls, linear: QuantLinear, affine: Affine | None) -> "PackedLinear":
        """That of `linear` at the bit-width it is set to, with what comes after it folded in."""
        return cls(linear.in_features, linear.out_features, device="meta")._adopt(linear, affine)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(self.input_quantizer(x), self._buffers["weight"], self.bias)


_PACKED = {QuantConv2d: PackedConv2d, QuantLinear: PackedLinear}


def pack(model: nn.Module, bits: Bits) -> nn.Module:
    """One child of a converted `model` as a network of integers, for inference: a copy, in evaluation mode.

    bits: 1 to 8 or 32, or a dict as for `set_bits`. A weight quantized to b bits is w_q = low + step r with integers r
    from 0 to n = 2^b - 1. Weight bias correction is affine for each output channel o, w' = R_o (w_q - m_q) + m_w with
    the means m and R_o = std(w) / std(w_q) (1 for "mean"), and so is a batch norm after a convolution, g_o y + h_o. So

        g_o w' = scale_o (c + 1/2) + offset_o, scale_o = g_o R_o step, offset_o = g_o (R_o (low + n/2 step - m_q) + m_w)

    with integers c = r - 2^(b-1), which take b bits each; the layer's bias becomes g_o bias_o + h_o. A batch norm after
    anything else becomes a gain and a shift for each channel. What was kept in full precision stays so, as does all at
    32 bits. Unpacked to float32, a weight is off by one unit in the last place of its channel's largest at most, which
    is 2^-23 of that and a step; the training layer's own float32 arithmetic is off by up to four. Size: N b / 8 bytes
    for N weights of a layer, 8 for each of its output channels, 12 with a bias, and 16 for its input. `saving.save`
    writes it, `export.export_onnx` makes a file for other runtimes.
    ValueError: as `set_bits`, or an input quantizer that has seen no images yet. Where torch.fx cannot trace the
    network, what reads a packed weight outside its layer, such as a tied decoder, is refused in the first forward pass.
    """
    network = converted(model)
    with at_bits(network, bits):
        for name, layer in network.named_modules():
            if isinstance(layer, InputQuantizer) and not layer.started:
                raise invalid("model", name, "a network that has seen images, from which its input ranges start")
        return pack_as_set(network)


def pack_as_set(network: nn.Module) -> nn.Module:
    """`pack`, at the bit-widths that `network` is set to, unchecked."""
    packed = copy.deepcopy(network).eval()
    layers = {name: layer.bits for name, layer in quantized_layers(packed).items()}
    traced = _traced(packed)
    folded = _folded(packed, *traced) if traced else {}
    with torch.no_grad():
        new = {norm: nn.Identity() for norm in folded.values()}
        for module in packed.modules():
            if isinstance(module, MultiBitBatchNorm) and module not in new:
                new[module] = ChannelAffine(Affine.of(module), module.running_mean.dtype)
            elif type(module) in _PACKED or module in folded:
                new[module] = _packed(module, Affine.of(folded[module]) if module in folded else None)
    packed = replaced(packed, new)
    for name, layer in packed.named_modules():
        if isinstance(layer, _PackedLayer) and not traced:
            layer.guarded = name or type(layer).__name__
    packed.packed_spec, packed.packed_bits = network.quant_spec, layers
    for name in ("quant_spec", "kept"):
        packed.__dict__.pop(name, None)
    return packed.requires_grad_(False)


def replaced(network: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """`network`, changed in place: each module that has an entry in `new`, under all its names, by that one."""
    for module in list(network.modules()):
        for name, child in module._modules.items():
            module._modules[name] = new.get(child, child)
    return new.get(network, network)


def packed_bytes(network: nn.Module) -> int:
    """Bytes that the numbers of a packed network take, whatever file they lie in."""
    instance("network", network, nn.Module, "a network that pack made")
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


def _packed(layer: nn.Module, affine: Affine | None) -> nn.Module:
    if type(layer) in _PACKED and layer.bits != 32:
        return _PACKED[type(layer)].from_quantized(layer, affine)
    weight, bias = layer.weight_and_bias() if type(layer) in _PACKED else (layer.weight, layer.bias)
    if affine is not None:
        weight = weight.double() * _per_channel(affine.gain, weight)
        bias = affine.after(bias)
    plain = _plain(layer, bias is not None)
    plain.weight = nn.Parameter(weight.to(layer.weight.dtype))
    plain.bias = None if bias is None else nn.Parameter(bias.to(layer.weight.dtype))
    quantizer = getattr(layer, "input_quantizer", None)
    clips = quantizer is not None and not quantizer.signed and quantizer.method != "none"
    return nn.Sequential(nn.ReLU(), plain) if clips else plain  # which conversion left to the quantizer


def _plain(layer: nn.Module, bias: bool) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias=bias, device="meta").eval()
    return nn.Conv2d(**geometry(layer), bias=bias, device="meta").eval()


def _integers(layer: QuantConv2d | QuantLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Integers c in [-2**(b-1), 2**(b-1)) (O, ...), and scale and offset (O,) in float64, of the weight of a layer.

    Two points would do for an affine map; least squares take all, whichever of them a channel has.
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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = (MultiheadAttention, SafeConv2d, QuantLinear, MultiBitBatchNorm)
        return isinstance(module, own) or super().is_leaf_module(module, name)


def _traced(network: nn.Module) -> tuple[fx.Graph, set[str]] | None:
    """The graph of `network` and the names of the parameters it reads past their modules, if torch.fx can trace it."""
    network = copy.deepcopy(network)  # where the tracer leaves what it meets
    try:
        graph = _Tracer().trace(network)
    except Exception:  # whatever a network's own forward raises when it meets a proxy instead of a tensor
        return None
    return graph, read(graph, network)


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
        if type(layer) in (nn.Conv2d, SafeConv2d, QuantConv2d) and own and calls[layer] == calls[norm] == 1:
            found[layer] = norm
    return found
