"""The integers that kernels of int8 multiply, and the bytes that a file holds them in."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .pack import FixedQuantizer

STEPS = torch.linspace(1, 2, 128, dtype=torch.float64).tolist()  # a channel's candidates, in units of the finest one
CORRELATION = 0.25  # assumed between any two inputs of an output


def largest_weight(most: int) -> int:
    """The largest int8 weight with which no processor's kernel overflows where activations have codes of 0 to `most`.

    Without the instructions called VNNI, x86 processors add two products of a uint8 and an int8 in 16 bits, which hold
    numbers up to 32767, and cut off what is larger. So 2 most w has to fit.

    Examples:
        >>> [largest_weight(most) for most in (1, 127, 255)]
        [127, 127, 64]
    """
    return min(127, (2**15 - 1) // (2 * most))


def int8_weight(levels: Tensor, counts: Tensor, largest: int, least: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and a step for each channel, for the levels of a weight.

    Levels have an offset, which integer kernels do not allow, so they are rounded to a finer grid without one. Each
    channel tries steps from max|w| / largest to twice that, and those by which the distance of two levels can be
    divided. It takes the one with the least sum of e^2 + CORRELATION (sum of e)^2, where e are the errors of its
    weights: the expected squared error of its output. No error is above max|w| / largest.

    Args:
        levels: the values (O, L) that the weights of an output channel can have, at equal distances.
        counts: how many of its weights have each of them, (O, L).
        largest: the largest integer.
        least: the smallest step that each channel may have, (O,).

    Returns:
        The integer of each level (O, L) and the steps (O,).
    """
    used, distance = levels * (counts > 0), levels[:, 1] - levels[:, 0]
    finest = torch.maximum(used.abs().amax(1) / largest, least)
    divided = [distance / k for k in range(1, 2 * largest + 1)] if levels.shape[1] < 2 * largest else []
    best, step = torch.full_like(finest, math.inf), finest.clone()
    for candidate in [finest * ratio for ratio in STEPS] + divided:
        grid = torch.where((candidate >= finest) & (candidate <= 2 * finest), candidate, finest)
        error = (used / grid.unsqueeze(1)).round() * grid.unsqueeze(1) - used
        total = (counts * error.square()).sum(1) + CORRELATION * (counts * error).sum(1).square()
        step, best = torch.where(total < best, grid, step), torch.minimum(total, best)
    return (used / step.unsqueeze(1)).round().long(), step


def byte_codes(codes: Tensor, bits: int) -> tuple[Tensor, list[int]]:
    """As many integers of [0, 2**bits) in each byte as fit: uint8 (K, 1), and the divisors that bring them back.

    Examples:
        >>> byte_codes(torch.tensor([1, 2, 3]), bits=4)
        (tensor([[33],
                [ 3]], dtype=torch.uint8), [1, 16])
    """
    divisors = [2 ** (bits * i) for i in range(8 // bits)]
    rows = F.pad(codes.flatten(), (0, -codes.numel() % len(divisors))).view(-1, len(divisors))
    return (rows * torch.tensor(divisors)).sum(1, keepdim=True).to(torch.uint8), divisors


@dataclass(frozen=True)
class ByteGrid:
    """The codes 0 to `most` of uint8, which stand for scale (code - zero) + offset."""

    scale: float
    zero: int
    most: int
    offset: float | None = None  # of two levels, neither of which is zero

    @classmethod
    def of(cls, fixed: FixedQuantizer) -> Self:
        """That of an input quantizer."""
        scale, q_min, q_max, offset = fixed.numbers.tolist()
        return cls(scale, int(-q_min), int(q_max - q_min), offset if fixed.shifted else None)

    @classmethod
    def over(cls, low: float, high: float) -> Self:
        """All of uint8 over [low, high], of which zero is a part."""
        scale = max(high - low, 1e-20) / 255
        return cls(scale, round(-low / scale), 255)

    def with_zero(self) -> Self:
        """This grid if it has no offset; else one of at most 128 codes with zero and its two levels.

        Each of the two is off by a 254th of their distance at most.
        Convolutions pad with zeros, so that zero needs a code.
        """
        if self.offset is None:
            return self
        low, high = (self.scale * (code - self.zero) + self.offset for code in (0, self.most))
        zero, above = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
        step = (high - low) / (zero + above)
        off = torch.where((zero + above > 0) & (zero + above <= 127), (low + step * zero).abs(), math.inf)
        zero, above = divmod(int(off.argmin()), 128)
        return replace(self, scale=(high - low) / (zero + above), zero=zero, most=zero + above, offset=None)

    def code(self, x: float) -> int:
        """The code of x, or of the end of uint8 that it lies beyond."""
        return 0 if x == -math.inf else 255 if x == math.inf else min(max(round(x / self.scale) + self.zero, 0), 255)
