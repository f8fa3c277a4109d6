"""Scores against literal references; selection against a reference and against the probabilities it promises."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

from emqlib import coreset
from emqlib.coreset import HOW, inclusion, select

pytestmark = pytest.mark.processor

N, C, D, T = 23, 4, 5, 7
DRAWS = 4000


@pytest.fixture(autouse=True)
def _the_global_generator_is_untouched() -> Iterator[None]:
    """Whatever a test of this file calls."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log(rng: torch.Generator, n: int = N) -> dict[str, Tensor]:
    """T epochs of N samples in float64: probabilities, some of them zero; class 2 has no sample, class 3 one."""
    walk = torch.randn(T, n, C, dtype=torch.float64, generator=rng).cumsum(0)
    p = (2 * walk).softmax(2)
    p[:, 1::5] = nn.functional.one_hot(p[:, 1::5].argmax(2), C).double()
    labels = torch.randint(0, 2, (n,), generator=rng)
    labels[-1] = 3
    features = torch.randn(n, D, dtype=torch.float64, generator=rng)
    correct = torch.rand(T, n, generator=rng) < 0.4
    correct[:, 2], correct[:, 3] = False, True
    return {"p": p[0], "trajectory": p, "labels": labels, "features": features, "correct": correct}


def each_forgetting(correct: np.ndarray) -> np.ndarray:
    return np.array([reference.forgetting(column.tolist()) for column in correct.T])


def grand_reference(p: np.ndarray, labels: np.ndarray, features: np.ndarray) -> np.ndarray:
    return reference.el2n(p, labels) * np.array([(sum(v**2 for v in h) + 1) ** 0.5 for h in features])


# Each score: library, reference, what it takes
SCORES = {
    "entropy": (coreset.entropy, reference.entropy, ("p",)),
    "el2n": (coreset.el2n, reference.el2n, ("p", "labels")),
    "grand": (coreset.grand, grand_reference, ("p", "labels", "features")),
    "forgetting": (coreset.forgetting, each_forgetting, ("correct",)),
    "moderate": (coreset.moderate, reference.moderate, ("features", "labels")),
    "tdds": (lambda p: coreset.tdds(p, 4), lambda p: reference.tdds(p, 4, 0.9), ("trajectory",)),
}


def close(actual: Tensor, expected: object, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


@pytest.mark.parametrize("score", SCORES)
def test_score_is_the_reference(score: str, rng: torch.Generator) -> None:
    function, expected, names = SCORES[score]
    data = log(rng)
    close(function(*(data[name] for name in names)), expected(*(data[name].numpy() for name in names)))


def test_grand_is_the_gradient_norm_of_the_last_linear_layer(rng: torch.Generator) -> None:
    data = log(rng)
    layer = nn.utils.skip_init(nn.Linear, D, C, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=rng)
    norms = []
    for h, label in zip(data["features"], data["labels"], strict=True):
        layer.zero_grad()
        nn.functional.cross_entropy(layer(h), label).backward()
        norms.append(sum(float(parameter.grad.square().sum()) for parameter in layer.parameters()) ** 0.5)
    p = layer(data["features"]).detach().softmax(1)
    close(coreset.grand(p, data["labels"], data["features"]), norms)


def test_moderate_by_hand() -> None:
    """The median of an even class lies between its middle two; a class's only member is its own median."""
    features = torch.tensor([[0.0, 0.0], [2.0, 8.0], [9.0, 9.0], [1.0, 1.0], [8.0, 2.0], [1.0, 5.0], [3.0, 5.0]])
    features = torch.cat([features, torch.tensor([[1.0, 1.0], [7.0, 5.0], [2.0, 9.0]])])
    labels = torch.tensor([0, 0, 7, 0, 0, 2, 2, 4, 4, 4])  # medians: (1.5, 1.5), (9, 9), (2, 5), (2, 5)
    squares = [4.5, 42.5, 0, 0.5, 42.5, 1, 1, 17, 25, 16]
    close(coreset.moderate(features, labels), torch.tensor(squares).sqrt(), atol=1e-6)


def test_ranks_and_centrality_are_the_reference(rng: torch.Generator) -> None:
    for n in range(1, 12):
        scores = torch.randint(0, 4, (n,), generator=rng).double()  # ties
        ranks = reference.ranks(scores.tolist())
        assert coreset.ranks(scores).tolist() == ranks
        assert coreset.centrality(scores).tolist() == [-abs(rank - (n - 1) / 2) for rank in ranks]


@pytest.mark.parametrize(
    ("epochs", "window", "decay"), [(3, 3, 0.9), (7, 3, 0.9), (7, 4, 0.5), (7, 7, 0.2), (6, 5, 1.0), (5, 3, 1)]
)
def test_tdds_is_the_formula(epochs: int, window: int, decay: float, rng: torch.Generator) -> None:
    p = log(rng)["trajectory"][:epochs]
    close(coreset.tdds(p, window, decay), reference.tdds(p.numpy(), window, decay))


def top_reference(scores: list[float], keep: int) -> list[int]:
    """One after the other, the first sample that no remaining one beats."""
    left = list(range(len(scores)))
    chosen = []
    for _ in range(keep):
        best = left[0]
        for i in left:
            if scores[i] > scores[best]:
                best = i
        chosen.append(best)
        left.remove(best)
    return sorted(chosen)


@pytest.mark.parametrize("how", HOW)
def test_size_order_and_uniqueness(how: str, rng: torch.Generator) -> None:
    for n in (1, 2, 3, 8, 25, 50):
        scores = torch.rand(n, generator=rng) + 0.01
        for rate in (0, 0.01, 0.1, 0.33, 0.5, 0.75, 0.8, 0.9, 0.99):
            indices = select(scores, rate, how, rng)
            assert len(indices) == max(1, round((1 - rate) * n))
            assert indices.dtype == torch.int64 and indices.min() >= 0 and indices.max() < n
            assert bool((indices.diff() > 0).all())


def test_top_is_the_reference(rng: torch.Generator) -> None:
    for n in range(1, 31):
        scores = torch.randint(-3, 4, (n,), generator=rng).float()  # many ties
        for rate in (0.0, 0.3, 0.5, 0.8):
            indices = select(scores, rate)
            assert indices.tolist() == top_reference(scores.tolist(), len(indices))


def assert_frequencies(counts: Counter, expected: dict, draws: int = DRAWS) -> None:
    """Each within 4.5 standard deviations of a binomial: wrong once in 150,000, and the seed is fixed."""
    assert set(counts) <= {outcome for outcome, p in expected.items() if p > 0}
    for outcome, p in expected.items():
        assert abs(counts[outcome] - draws * p) <= 4.5 * (draws * p * (1 - p)) ** 0.5, outcome


WEIGHTS = {
    "unequal": ([1, 2, 3, 4, 5], 2),
    "one certain, one impossible": ([1, 1, 2, 6, 0], 2),
    "certain in two rounds": ([1, 2, 4, 30], 3),
    "one of many": ([1, 2, 3, 0, 4], 1),
    "equal": ([1, 1, 1, 1, 1], 3),
    "equal or nothing": ([2, 0, 2, 2], 2),
    "all": ([1, 5, 2], 3),
}
each_weights = pytest.mark.parametrize(("weights", "keep"), WEIGHTS.values(), ids=WEIGHTS)


def exact_inclusion(weights: list[int], keep: int) -> list[Fraction]:
    return [Fraction(p) for p in reference.inclusion([Fraction(w) for w in weights], keep)]


@each_weights
def test_inclusion_is_the_reference(weights: list[int], keep: int) -> None:
    expected = exact_inclusion(weights, keep)
    assert sum(expected) == keep
    close(inclusion(torch.tensor(weights), keep), [float(p) for p in expected], atol=1e-14)


@each_weights
def test_subsets_are_drawn_systematically_along_a_random_order(
    weights: list[int], keep: int, rng: torch.Generator
) -> None:
    expected = reference.systematic(exact_inclusion(weights, keep), keep)
    assert sum(expected.values()) == 1
    rate = 1 - keep / len(weights)
    draws = (select(torch.tensor(weights), rate, "sample", rng) for _ in range(DRAWS))
    assert_frequencies(Counter(tuple(subset.tolist()) for subset in draws), expected)


def test_weights_of_any_size_are_drawn(rng: torch.Generator) -> None:
    weights = torch.zeros(20)
    weights[[3, 7, 19]] = torch.tensor([1e-30, 1.0, 1e30])
    for _ in range(20):
        assert select(weights, 0.85, "sample", rng).tolist() == [3, 7, 19]


@pytest.mark.parametrize("weights", [torch.ones(100), torch.arange(1.0, 11.0).repeat(10)], ids=["equal", "unequal"])
def test_the_generator_decides_the_draw(weights: Tensor) -> None:
    draws = [select(weights, 0.5, "sample", seeded(seed)).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    rng = seeded(1)
    first, second = (select(weights, 0.5, "sample", rng).tolist() for _ in range(2))
    assert first == draws[0] != second


def test_at_the_edges_of_what_can_be_kept() -> None:
    assert coreset.kept(1, 0.9) == 1
    assert coreset.choose(torch.ones(3), 0, "top").tolist() == [] and len(coreset.choose(torch.ones(3), 3, "top")) == 3
    for weights in ([1.0, math.inf], [1.0, math.nan]):
        with pytest.raises(ValueError, match=r"^scores=.*: expected scores >= 0, at least 1 of them positive$"):
            coreset.inclusion(torch.tensor(weights), 1)
    for window, expected in ((10_000, "at most the 4 epochs there are"), (10_001, "an integer in [3, 10000]")):
        with pytest.raises(ValueError, match=rf"^window={window}: expected {re.escape(expected)}$"):
            coreset.tdds(torch.full((4, 2, 2), 0.5), window)
