"""One child model as a plain network for inference in PyTorch."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import Bits, replaced
from ..layers import geometry
from .pack import FixedQuantizer, PackedConv2d, PackedLayer, pack


def freeze(model: nn.Module, bits: Bits) -> nn.Module:
    """Make one child model a plain network, which computes in floating point what the child model does.

    Its weights are quantized and corrected once, batch norms are folded into the layers before them, and inputs are
    quantized by one operation. It can be compiled, exported or cast to another type like any other module, and knows
    one bit-width. `pack` makes a network of the same answers whose file is small, `export_onnx` a file that runtimes
    compute in integers.

    Args:
        model: a converted network.
        bits: as for `pack`.

    Returns:
        A copy in evaluation mode, whose Conv2d and Linear layers have ordinary weights.

    Raises:
        ValueError: as `pack`.
    """
    packed = pack(model, bits)
    network = replaced(packed, {m: _frozen(m) for m in packed.modules() if isinstance(m, PackedLayer)})
    vars(network).pop("emq", None)  # what `save` writes; a network that was one layer has a new one
    return network


class FrozenQuantizer(nn.Module):
    """An input quantizer whose grid is Python's numbers: codes of `low` to `high`, rounded and clipped.

    A grid with an offset gives values instead, because zeros that a convolution pads with have no code in it.
    """

    def __init__(self, fixed: FixedQuantizer) -> None:
        super().__init__()
        self.scale, self.low, self.high, offset = fixed.numbers.tolist()
        self.offset = offset if fixed.shifted else None

    def forward(self, x: Tensor) -> Tensor:
        """x (any shape) on the grid."""
        x = x / self.scale if self.offset is None else (x - self.offset).div_(self.scale)
        x = F.hardtanh_(x, self.low, self.high).round_()
        return x if self.offset is None else x.mul_(self.scale).add_(self.offset)

    def extra_repr(self) -> str:
        """The grid."""
        return f"scale={self.scale:.4g}, low={self.low:g}, high={self.high:g}, offset={self.offset}"


class FrozenConv2d(nn.Conv2d):
    """A Conv2d of quantized weights that quantizes its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        return self._conv_forward(self.input_quantizer(x), self.weight, self.bias)


class FrozenLinear(nn.Linear):
    """A Linear of quantized weights that quantizes its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(self.input_quantizer(x), self.weight, self.bias)


def _frozen(packed: PackedLayer) -> nn.Module:
    """The twin of a packed layer. Where its inputs are codes, their scale becomes a part of the weight."""
    twin = FrozenConv2d if isinstance(packed, PackedConv2d) else FrozenLinear
    layer = twin(**geometry(packed), device="meta")
    fixed, weight = packed.input_quantizer, packed.dense
    if isinstance(fixed, FixedQuantizer):
        weight = weight if fixed.shifted else (weight.double() * float(fixed.numbers[0])).to(weight.dtype)
        fixed = FrozenQuantizer(fixed)
    layer.weight, layer.input_quantizer = nn.Parameter(weight, requires_grad=False), fixed
    layer.bias = None if packed.bias is None else nn.Parameter(packed.bias, requires_grad=False)
    return layer.eval()
