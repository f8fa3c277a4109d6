"""Coresets as pure functions on tensors: importance scores, one number a sample, and the selection by them.

A score's docstring gives the end of it that is kept; all but `moderate` keep the highest.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from . import checks

How = Literal["top", "sample"]
HOW = get_args(How)
EPS = 1e-8  # inside TDDS' logarithms, as its authors have it


def entropy(probabilities: Tensor) -> Tensor:
    """H = -sum_c p_c log p_c in nats: (N, C) to (N,); high, uncertain, is kept. Source: Coleman et al. 2020."""
    return _entropy(_probabilities(probabilities, 2))


def el2n(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Error norm ||p - e_y||_2: (N, C), (N,) to (N,); high, wrong, is kept. Source: Paul et al., arXiv 2107.07075."""
    p = _probabilities(probabilities, 2)
    return _el2n(p, _labels(labels, p.shape))


def grand(probabilities: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """The norm of the last layer's gradient, weight and bias: (N, C), (N,), (N, D) to (N,); high is kept.

    The gradient of a sample's cross entropy is (p - e_y) h^T for the weight and p - e_y for the bias, so that its norm
    is ||p - e_y|| sqrt(||h||^2 + 1), with no gradient built. features: h, the last layer's input.
    Source: Paul et al., arXiv 2107.07075, of the last layer instead of all.
    """
    p = _probabilities(probabilities, 2)
    return _grand(p, _labels(labels, p.shape), _features(features, len(labels)))


# The same of p (B, C), labels (B,) and features (B, D) or None that are known to be such: to look at their values would
# make a GPU wait in every step of training, which averages these scores (B,) over the epochs of its scoring phase.


def _entropy(p: Tensor, labels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
    return torch.special.entr(p).sum(1)


def _el2n(p: Tensor, labels: Tensor, features: Tensor | None = None) -> Tensor:
    return p.scatter_add(1, labels[:, None], p.new_full((len(p), 1), -1)).norm(dim=1)


def _grand(p: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    return _el2n(p, labels) * (features.square().sum(1) + 1).sqrt()


SNAPSHOTS: dict[str, Callable[..., Tensor]] = {"entropy": _entropy, "el2n": _el2n, "grand": _grand}
OF_FEATURES = ("grand", "moderate")  # the scores that need features


def forgetting(correct: Tensor) -> Tensor:
    """How often a sample was right and then wrong: (T, N) bool to (N,); high is kept.

    A sample that was never right counts as T. Source: Toneva et al. 2019, arXiv 1812.05159.
    """
    if not isinstance(correct, Tensor) or correct.dim() != 2 or correct.dtype != torch.bool or len(correct) < 2:
        raise checks.invalid("correct", correct, "a bool tensor (T, N), T >= 2")
    forgotten = (correct[:-1] & ~correct[1:]).sum(0)
    return torch.where(correct.any(0), forgotten, len(correct)).float()


def moderate(features: Tensor, labels: Tensor) -> Tensor:
    """Distance of each sample's features to the coordinate-wise median of its class: (N, D), (N,) to (N,).

    Samples at a middle distance are kept: select by `centrality` of the distances. Source: Xia et al., ICLR 2023.
    """
    n = len(checks.tensor("labels", labels, "an int64 tensor (N,) of classes", dims=1))
    h = _features(features, n)
    distance = h.new_zeros(n)
    for label in _labels(labels, (n, 1 << 62)).unique():
        own = labels == label
        ordered, count = h[own].sort(0).values, int(own.sum())
        median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
        distance[own] = (h[own] - median).norm(dim=1)
    return distance


def centrality(scores: Tensor) -> Tensor:
    """-|rank - (N - 1) / 2|: (N,) to (N,); the highest are the samples in the middle of the order of `scores`."""
    return -(ranks(scores) - (len(scores) - 1) / 2).abs()


def ranks(scores: Tensor) -> Tensor:
    """Each sample's place, 0 to N - 1, in ascending order, (N,) to (N,); of equal scores the first comes first."""
    order = checks.tensor("scores", scores, "a tensor (N,)", dims=1).argsort(stable=True)
    return order.argsort().float()


def tdds(probabilities: Tensor, window: int, decay: float = 0.9) -> Tensor:
    """Temporal dual-depth score: (T, N, C), the softmax of T consecutive epochs, to (N,); high is kept.

    d_t = sum_c |p_{t+1} (log p_{t+1} - log p_t)| is the projection of a sample's gradient on the epoch's. A window k
    of `window` epochs has window - 1 of the d_t, and v_k = ||d - mean d||_2 says how much they vary. The score is the
    exponential moving average S <- (1 - decay) S + decay v_k, from 0, over all windows in their order.
    ValueError: window < 3, where every v is 0; fewer epochs than the window; decay outside (0, 1]; rows that are no
    probabilities, as logits are not. Source: Zhang et al., CVPR 2024, arXiv 2311.13613, as its published code has it.
    """
    p = _probabilities(probabilities, 3)
    window = checks.integer("window", window, 3, 10_000)
    decay = checks.Range(0, 1, low_open=True).number("decay", decay, float)
    if len(p) < window:
        raise checks.invalid("window", window, f"at most the {len(p)} epochs there are")
    log_p = (p + EPS).log()
    deltas = (p[1:] * (log_p[1:] - log_p[:-1])).abs().sum(2)
    score = p.new_zeros(p.shape[1])
    for first in range(len(p) - window + 1):
        score = (1 - decay) * score + decay * spread(deltas[first : first + window - 1], dim=0)
    return score


def spread(deltas: Tensor, dim: int) -> Tensor:
    """||d - mean d||_2 along `dim`, (..., J - 1, ...) to (...), known to be such: TDDS' variation in one window."""
    return (deltas - deltas.mean(dim, keepdim=True)).norm(dim=dim)


def _probabilities(p: Tensor, dims: int) -> Tensor:
    shape = {2: "(N, C)", 3: "(T, N, C)"}[dims]
    ok = isinstance(p, Tensor) and p.is_floating_point() and p.dim() == dims and p.numel() > 0
    if not ok or bool((p < 0).any()) or not bool(((p.sum(-1) - 1).abs() < 0.02).all()):
        raise checks.invalid("probabilities", p, f"a tensor {shape} of softmax outputs: >= 0, of sum 1 along C")
    return p if p.dtype == torch.float64 else p.float()


def _labels(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    ok = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == shape[:1]
    if not ok or bool((labels < 0).any()) or bool((labels >= shape[1]).any()):
        raise checks.invalid("labels", labels, f"an int64 tensor ({shape[0]},) of classes")
    return labels


def _features(features: Tensor, n: int) -> Tensor:
    if not isinstance(features, Tensor) or features.is_complex() or features.dim() != 2 or len(features) != n:
        raise checks.invalid("features", features, f"a tensor ({n}, D)")
    return features if features.dtype == torch.float64 else features.float()


def select(scores: Tensor, pruning_rate: float, how: How = "top", generator: torch.Generator | None = None) -> Tensor:
    """Select the round((1 - pruning_rate) N) samples to keep, at least one.

    Args:
        scores: finite numbers (N,).
        pruning_rate: the fraction of samples not to keep, in [0, 1).
        how: "top" keeps the highest scores, and of equal ones the first. "sample" draws without replacement: scores are
            weights >= 0, and each sample is kept with the probability that `inclusion` gives.
        generator: of the CPU; all draws come from it. "top" draws nothing.

    Returns:
        Their indices (K,), sorted.

    Raises:
        ValueError: names the argument that is wrong; also if fewer weights are positive than samples are to be kept.

    Examples:
        >>> select(torch.tensor([0.1, 0.9, 0.5, 0.7]), pruning_rate=0.5)
        tensor([1, 3])
    """
    if not isinstance(scores, Tensor) or scores.dim() != 1 or len(scores) == 0 or not bool(scores.isfinite().all()):
        raise checks.invalid("scores", scores, "a tensor (N,) of finite numbers, N >= 1")
    return choose(scores, kept(len(scores), pruning_rate), how, generator)


def kept(n: int, pruning_rate: float) -> int:
    """K = round((1 - pruning_rate) n), at least one."""
    return max(1, round((1 - checks.pruning_rate(pruning_rate)) * checks.integer("n", n, 1)))


def choose(scores: Tensor, keep: int, how: How, generator: torch.Generator | None = None) -> Tensor:
    """`select` on scores (N,), with the number of samples to keep in place of a rate: sorted indices (keep,)."""
    checks.choice("how", how, HOW)
    checks.integer("keep", keep, 0, len(checks.tensor("scores", scores, "a tensor (N,)", dims=1)))
    if how == "top":
        return scores.argsort(descending=True, stable=True)[:keep].sort().values
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise checks.invalid("generator", generator, 'a torch.Generator of the CPU when how="sample"')
    return _draw(inclusion(scores, keep), keep, generator).sort().values


def inclusion(scores: Tensor, keep: int) -> Tensor:
    """The probability (N,) that "sample" keeps each sample: min(1, c s), with c such that the sum is `keep`.

    ValueError: scores (N,) that are negative or not finite, or fewer positive ones than `keep`.

    Examples:
        >>> inclusion(torch.tensor([1.0, 1.0, 2.0, 6.0]), keep=2)
        tensor([0.2500, 0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    checks.integer("keep", keep, 0, len(checks.tensor("scores", scores, "a tensor (N,)", dims=1)))
    if bool((scores < 0).any()) or not bool(scores.isfinite().all()) or int((scores > 0).sum()) < keep:
        raise checks.invalid("scores", scores, f"scores >= 0, at least {keep} of them positive")
    w, certain = scores.double(), torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    while True:  # samples whose probability would pass 1 are certain, and the others share the rest: a few rounds
        rest = keep - int(certain.sum())
        scaled = torch.where(certain, 1.0, w * (rest / w[~certain].sum().clamp_min(1e-300)))
        over = (scaled > 1) & ~certain
        if not bool(over.any()):
            return scaled
        certain |= over


def _draw(probabilities: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """`keep` samples, each with its probability: a systematic sample along a random order, which keeps both exact."""
    n, p = len(probabilities), probabilities.cpu()
    order = torch.empty(n, dtype=torch.float64).exponential_(generator=generator).argsort(stable=True)
    if bool((p == p[:1]).all()):  # equal ones: the first of a random order
        return order[:keep].to(probabilities.device)
    ends = p[order].cumsum(0)
    points = torch.arange(keep, dtype=torch.float64) + torch.rand((), dtype=torch.float64, generator=generator)
    chosen = torch.searchsorted(ends * (keep / ends[-1]), points, right=True)  # 1 apart: none twice
    return order[chosen].to(probabilities.device)
