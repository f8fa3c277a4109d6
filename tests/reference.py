"""Each formula a second time: literal loops over float64 numbers, with nothing of emqlib and no tensors.

Arrays are NumPy's, of any shape unless stated; b is the number of bits. Activations at 32 bits are what they were
(unsigned: without their negative part), weights what their method makes of them without rounding.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray


def each(function: Callable[[float], float], x: Array) -> Array:
    """`function` of every number of x, one after the other."""
    return np.array([function(float(v)) for v in x.ravel()], dtype=np.float64).reshape(x.shape)


def round_even(v: float) -> float:
    """The nearest integer, ties to the even one."""
    low = math.floor(v)
    if v - low == 0.5:
        return low if low % 2 == 0 else low + 1
    return low if v - low < 0.5 else low + 1


def clip(v: float, low: float, high: float) -> float:
    return max(low, min(high, v))


# Weights: (O, ...) to (the quantized weight, where on the grid each number fell before rounding)


def dorefa_weight(w: Array, bits: int) -> tuple[Array, Array]:
    n = 2**bits - 1
    mean = sum(abs(v) for v in w.ravel()) / w.size
    largest = max(math.tanh(abs(v)) for v in w.ravel())
    t = each(lambda v: math.tanh(v) / largest if largest > 0 else 0.0, w)
    place = each(lambda v: n * (v / 2 + 1 / 2), t)
    if bits == 32:
        return mean * t, place
    return each(lambda p: mean * (2 * round_even(p) / n - 1), place), place


def minmax_weight(w: Array, bits: int, zero_level: bool = False) -> tuple[Array, Array]:
    n = 2**bits - 1
    w_q, place = np.zeros_like(w), np.zeros_like(w)
    for o in range(len(w)):
        s = max(abs(float(v)) for v in w[o].ravel()) or 1e-38
        if zero_level:
            m = 2 ** (bits - 1) - 1
            place[o] = each(lambda v, s=s, m=m: m * v / s, w[o])
            w_q[o] = each(lambda p, s=s, m=m: s * round_even(p) / m, place[o])
        else:
            place[o] = each(lambda v, s=s: n * (v / (2 * s) + 1 / 2), w[o])
            w_q[o] = each(lambda p, s=s: s * (2 * round_even(p) / n - 1), place[o])
    return (w, place) if bits == 32 else (w_q, place)


def lsq_levels(bits: int, signed: bool) -> tuple[int, int]:
    """Q_N and Q_P; 1 signed bit is a case of its own, {-s/2, s/2}."""
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def lsq(x: Array, bits: int, s: float, signed: bool) -> tuple[Array, Array]:
    q_n, q_p = lsq_levels(bits, signed)
    if signed and bits == 1:
        return each(lambda v: -s / 2 if v < 0 else s / 2, x), each(lambda v: v / s - 1 / 2, x)
    place = each(lambda v: v / s, x)
    return each(lambda p: s * round_even(clip(p, -q_n, q_p)), place), place


def lsq_initial_scale(x: Array, bits: int, signed: bool) -> float:
    mean = sum(abs(float(v)) for v in x.ravel()) / x.size
    return 2 * mean / math.sqrt(max(lsq_levels(bits, signed)[1], 1))


def lsq_weight(w: Array, bits: int, s: float) -> tuple[Array, Array]:
    w_q, place = lsq(w, bits, s, signed=True)
    return (w, place) if bits == 32 else (w_q, place)


# Activations: any shape to (the quantized activation, where on the grid each number fell before rounding)


def not_quantized(x: Array, signed: bool) -> tuple[Array, Array]:
    return (x if signed else each(lambda v: max(v, 0.0), x)), np.full_like(x, 0.25)  # far from every tie


def dorefa_activation(x: Array, bits: int, low: float | None = None, high: float = 1.0) -> tuple[Array, Array]:
    """low None: clip(x, 0, high), as published for high = 1; else 2**b levels from low to high, one of them zero."""
    n = 2**bits - 1
    if bits == 32:
        return not_quantized(x, low is not None)
    if low is None:
        place = each(lambda v: n * clip(v, 0, high) / high, x)
        return each(lambda p: round_even(p) * high / n, place), place
    if bits == 1:
        return each(lambda v: low if v < (low + high) / 2 else high, x), each(lambda v: (v - low) / (high - low), x)
    step = (high - low) / n
    lowest = round_even(low * n / (high - low))
    place = each(lambda v: v / step, x)
    return each(lambda p: step * clip(round_even(p), lowest, lowest + n), place), place


def pact_activation(x: Array, bits: int, alpha: float, signed: bool) -> tuple[Array, Array]:
    n = 2**bits - 1
    if bits == 32:
        return not_quantized(x, signed)
    if signed:
        return lsq(x, bits, 2 * alpha / n, signed=True)
    place = each(lambda v: n * clip(v, 0, alpha) / alpha, x)
    return each(lambda p: round_even(p) * alpha / n, place), place


def lsq_activation(x: Array, bits: int, s: float, signed: bool) -> tuple[Array, Array]:
    return not_quantized(x, signed) if bits == 32 else lsq(x, bits, s, signed)


# Weight bias correction


def moments(x: Array) -> tuple[float, float]:
    values = [float(v) for v in x.ravel()]
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def correct_weight(w_q: Array, w: Array, mode: str) -> Array:
    """(O, ...) and (O, ...); a channel whose quantized weights are all equal keeps the mean correction alone."""
    corrected = np.array(w_q, dtype=np.float64)
    for o in range(len(w)) if mode != "none" else ():
        mean_w, std_w = moments(w[o])
        mean_q, std_q = moments(w_q[o])
        ratio = std_w / std_q if mode == "mean_var" and len(set(w_q[o].ravel())) > 1 else 1.0
        corrected[o] = each(lambda v, r=ratio, q=mean_q, m=mean_w: r * (v - q) + m, w_q[o])
    return corrected


# Layers


def conv2d(
    x: Array, w: Array, bias: Array | None, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Array:
    """x: (N, I, H, W), w: (O, I / groups, K, L) to (N, O, H', W')."""
    images, _, height, width = x.shape
    outputs, inputs, rows, columns = w.shape
    out_height = (height + 2 * padding - dilation * (rows - 1) - 1) // stride + 1
    out_width = (width + 2 * padding - dilation * (columns - 1) - 1) // stride + 1
    y = np.zeros((images, outputs, out_height, out_width))
    for n, o, i, j in itertools.product(range(images), range(outputs), range(out_height), range(out_width)):
        total = 0.0 if bias is None else float(bias[o])
        first = o // (outputs // groups) * inputs  # of this group's input channels
        for c, k, m in itertools.product(range(inputs), range(rows), range(columns)):
            row, column = i * stride - padding + k * dilation, j * stride - padding + m * dilation
            if 0 <= row < height and 0 <= column < width:
                total += float(x[n, first + c, row, column]) * float(w[o, c, k, m])
        y[n, o, i, j] = total
    return y


def linear(x: Array, w: Array, bias: Array | None) -> Array:
    """x: (N, I), w: (O, I) to (N, O)."""
    y = np.zeros((len(x), len(w)))
    for n, o in itertools.product(range(len(x)), range(len(w))):
        y[n, o] = sum(float(a) * float(b) for a, b in zip(x[n], w[o], strict=True))
        y[n, o] += 0.0 if bias is None else float(bias[o])
    return y


# Coresets: probabilities (N, C), trajectories (T, N, C), labels (N,), to one number a sample


def entropy(p: Array) -> Array:
    return np.array([-sum(float(v) * math.log(v) for v in row if v > 0) for row in p])


def el2n(p: Array, labels: Array) -> Array:
    errors = [[float(v) - (c == y) for c, v in enumerate(row)] for row, y in zip(p, labels, strict=True)]
    return np.array([math.sqrt(sum(e**2 for e in row)) for row in errors])


def forgetting(correct: list[bool]) -> int:
    """Of one sample, epoch by epoch."""
    if not any(correct):
        return len(correct)
    return sum(1 for before, after in itertools.pairwise(correct) if before and not after)


def median(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def moderate(features: Array, labels: Array) -> Array:
    distances = []
    for h, label in zip(features, labels, strict=True):
        own = [other for other, y in zip(features, labels, strict=True) if y == label]
        medians = [median([float(other[d]) for other in own]) for d in range(len(h))]
        distances.append(math.sqrt(sum((float(v) - m) ** 2 for v, m in zip(h, medians, strict=True))))
    return np.array(distances)


def ranks(scores: list[float]) -> list[int]:
    """How many samples come before each: smaller ones, and of equal ones those that stand before it."""
    return [sum(1 for j, other in enumerate(scores) if (other, j) < (score, i)) for i, score in enumerate(scores)]


def tdds_difference(before: Array, after: Array) -> float:
    """d of one sample between two epochs, (C,) each."""
    pairs = zip(before, after, strict=True)
    return sum(abs(float(q) * (math.log(float(q) + 1e-8) - math.log(float(p) + 1e-8))) for p, q in pairs)


def tdds_window(snapshots: list[Array]) -> float:
    """v of one sample from the snapshots of one window, (C,) each."""
    differences = [tdds_difference(p, q) for p, q in itertools.pairwise(snapshots)]
    mean = sum(differences) / len(differences)
    return math.sqrt(sum((d - mean) ** 2 for d in differences))


def tdds(p: Array, window: int, decay: float) -> Array:
    """The sum over windows k = 0 .. T - J of decay (1 - decay)^(T - J - k) v_k."""
    last = len(p) - window
    scores = []
    for n in range(p.shape[1]):
        spreads = [tdds_window([p[t, n] for t in range(k, k + window)]) for k in range(last + 1)]
        scores.append(sum(decay * (1 - decay) ** (last - k) * v for k, v in enumerate(spreads)))
    return np.array(scores)


# Selection: numbers may be fractions, so that probabilities are exact


def inclusion(weights: list, keep: int) -> list:
    """min(1, c w) of sum `keep`: while the largest weight that is not yet certain would pass 1, it is certain."""
    certain: set[int] = set()
    while True:
        rest = [i for i in range(len(weights)) if i not in certain]
        total = sum(weights[i] for i in rest)
        c = (keep - len(certain)) / total if total else 0
        largest = max(rest, key=lambda i: weights[i], default=None)
        if largest is None or c * weights[largest] <= 1:
            return [1 if i in certain else c * w for i, w in enumerate(weights)]
        certain.add(largest)


def systematic(probabilities: list, keep: int) -> dict[tuple[int, ...], float]:
    """How probable each subset is: points u, u + 1, ... on the samples laid end to end, over every order and u."""
    n = len(probabilities)
    chances: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(n)):
        ends = list(itertools.accumulate(probabilities[i] for i in order))
        breaks = sorted({0, 1, *(end % 1 for end in ends)})
        for low, high in itertools.pairwise(breaks):
            points = [(low + high) / 2 + k for k in range(keep)]
            subset = tuple(sorted(order[sum(1 for end in ends if end <= point)] for point in points))
            chances[subset] = chances.get(subset, 0) + high - low
    return {subset: total / math.factorial(n) for subset, total in chances.items()}
