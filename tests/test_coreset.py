"""Selection against a literal reference and against the probabilities it promises; coresets by scheme and epoch."""

from collections import Counter
from itertools import permutations

import pytest
import torch

from emqlib import CoresetConfig, TrainConfig
from emqlib.coreset import select
from emqlib.training import coresets


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("how", ["top", "sample"])
def test_size_order_and_uniqueness(how: str, rng: torch.Generator) -> None:
    for n in range(1, 51):
        scores = torch.rand(n, generator=rng) + 0.01
        for rate in [*(percent / 100 for percent in range(0, 100, 3)), 0.5, 0.99]:
            indices = select(scores, rate, how=how, generator=rng)
            assert len(indices) == max(1, round((1 - rate) * n))
            assert indices.dtype == torch.int64 and indices.min() >= 0 and indices.max() < n
            assert bool((indices.diff() > 0).all())


def test_top_is_the_reference(rng: torch.Generator) -> None:
    for n in range(1, 31):
        scores = torch.randint(-3, 4, (n,), generator=rng).float()  # many ties
        for rate in (0.0, 0.3, 0.5, 0.8):
            indices = select(scores, rate)
            assert indices.tolist() == top_reference(scores.tolist(), len(indices))


def test_of_equal_scores_the_first_are_kept() -> None:
    assert select(torch.zeros(1000), 0.9).tolist() == list(range(100))
    assert select(torch.tensor([1, 2, 2, 2, 0]), 0.6).tolist() == [1, 2]


def test_top_draws_nothing(rng: torch.Generator) -> None:
    before = rng.get_state()
    select(torch.arange(9.0), 0.5, generator=rng)
    assert torch.equal(rng.get_state(), before)


def assert_frequencies(counts: Counter, expected: dict, draws: int) -> None:
    """Each within 4.5 standard deviations of a binomial: wrong once in 150,000, and the seed is fixed."""
    assert set(counts) <= set(expected)
    for outcome, p in expected.items():
        assert abs(counts[outcome] - draws * p) <= 4.5 * (draws * p * (1 - p)) ** 0.5, outcome


def test_equal_weights_are_drawn_uniformly(rng: torch.Generator) -> None:
    draws = 4000
    counts = Counter(i for _ in range(draws) for i in select(torch.ones(10), 0.7, "sample", rng).tolist())
    assert_frequencies(counts, dict.fromkeys(range(10), 0.3), draws)


def test_a_single_draw_follows_the_weights(rng: torch.Generator) -> None:
    weights, draws = torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0]), 4000
    counts = Counter(select(weights, 0.8, "sample", rng).item() for _ in range(draws))
    assert_frequencies(counts, {0: 0.1, 1: 0.2, 2: 0.3, 4: 0.4}, draws)


def test_pairs_are_drawn_one_after_the_other_by_weight(rng: torch.Generator) -> None:
    weights, draws = [1.0, 2.0, 5.0], 4000
    expected: Counter = Counter()
    for first, second in permutations(range(3), 2):
        p = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
        expected[tuple(sorted((first, second)))] += p
    counts = Counter(tuple(select(torch.tensor(weights), 1 / 3, "sample", rng).tolist()) for _ in range(draws))
    assert_frequencies(counts, expected, draws)


def test_weights_of_zero_are_never_drawn(rng: torch.Generator) -> None:
    weights = torch.zeros(20)
    weights[[3, 7, 19]] = torch.tensor([1e-30, 1.0, 1e30])
    for _ in range(20):
        assert select(weights, 0.85, "sample", rng).tolist() == [3, 7, 19]


def test_sampling_draws_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    draws = [select(torch.ones(100), 0.5, "sample", seeded(seed)).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)
    rng = seeded(1)
    first, second = (select(torch.ones(100), 0.5, "sample", rng).tolist() for _ in range(2))
    assert first == draws[0] != second


@pytest.mark.parametrize(
    "scores", [[1.0], torch.ones(2, 3), torch.ones(()), torch.ones(0), torch.tensor([1.0, torch.nan]), None]
)
def test_wrong_scores(scores: object) -> None:
    with pytest.raises(ValueError, match=r"(?s)^scores=.*expected a tensor \(N,\) of finite numbers"):
        select(scores, 0.5)


@pytest.mark.parametrize("scores", [[1.0, -0.1, 2.0], [0.0, 0.0, 1.0]])
def test_weights_that_cannot_be_sampled(scores: list[float], rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"^scores=.*expected weights >= 0, at least 2 of them positive"):
        select(torch.tensor(scores), 0.4, "sample", rng)


@pytest.mark.parametrize("how", ["best", "", None, 1])
def test_unknown_how(how: object) -> None:
    with pytest.raises(ValueError, match=r"^how=.*expected one of sample, top"):
        select(torch.ones(3), 0.5, how)


@pytest.mark.parametrize("generator", [None, 0, "seed", torch.Generator])
def test_sampling_needs_a_generator(generator: object) -> None:
    with pytest.raises(ValueError, match=r"^generator=.*expected a torch.Generator"):
        select(torch.ones(3), 0.5, "sample", generator)


WRONG = {
    "score": ["", "tdd", "Random", None, 1, ["random"]],
    "pruning_rate": [1, 1.5, -0.1, float("nan"), float("inf"), "0.8", True, None, [0.5]],
    "resample_every": [-1, 1.0, "1", True, None, float("nan")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_config(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected .+"):
        CoresetConfig(**{name: value})
    if name == "pruning_rate":
        with pytest.raises(ValueError, match=r"^pruning_rate=.*expected a fraction in \[0, 1\)"):
            select(torch.ones(3), value)


# Which child trains on what, and when


def draws(scheme: str, epochs: int, n: int = 200, bits: tuple[int, ...] = (2, 4, 8), **fields: object) -> list[dict]:
    """For each epoch, each bit-width's coreset as a tuple."""
    config = TrainConfig(scheme=scheme, epochs=epochs, coreset=CoresetConfig(**fields))
    return [{b: tuple(i.tolist()) for b, i in coresets(n, bits, config, e).items()} for e in range(epochs)]


def test_bitwise_children_draw_independently() -> None:
    epoch = draws("bitwise", 1, n=2000, pruning_rate=0.5)[0]
    for a, b in ((2, 4), (2, 8), (4, 8)):  # hypergeometric: 500 +- 11
        assert abs(len(set(epoch[a]) & set(epoch[b])) - 500) < 50


def test_joint_children_share_a_batch_so_also_a_coreset() -> None:
    epoch = draws("joint", 1, pruning_rate=0.8)[0]
    assert epoch[2] == epoch[4] == epoch[8] and len(epoch[2]) == 40


@pytest.mark.parametrize("scheme", ["joint", "bitwise"])
@pytest.mark.parametrize(("every", "numbers"), [(0, "000000"), (1, "012345"), (2, "001122"), (4, "000011")])
def test_coresets_are_drawn_again(scheme: str, every: int, numbers: str) -> None:
    epochs = draws(scheme, 6, resample_every=every)
    for b in (2, 4, 8):
        names: dict[tuple, str] = {}
        assert "".join(names.setdefault(epoch[b], str(len(names))) for epoch in epochs) == numbers


@pytest.mark.parametrize("scheme", ["joint", "bitwise"])
def test_no_pruning_is_the_full_data(scheme: str) -> None:
    assert draws(scheme, 1, pruning_rate=0)[0] == dict.fromkeys((2, 4, 8), tuple(range(200)))
    full = coresets(200, (2, 4), TrainConfig(scheme=scheme), 0)
    assert all(indices.tolist() == list(range(200)) for indices in full.values())


def test_another_child_does_not_change_a_childs_coreset() -> None:
    """Dedicated networks and the children of one bit-wise run see the same subsets: only the sharing differs."""
    together = draws("bitwise", 2, bits=(2, 4, 8))
    assert [e[4] for e in together] == [e[4] for e in draws("bitwise", 2, bits=(4,))]
    assert [e[4] for e in together] == [e[4] for e in draws("dedicated", 2, bits=(4,))]


def test_numpy_numbers_become_plain_ones() -> None:
    numpy = pytest.importorskip("numpy")
    config = CoresetConfig(pruning_rate=numpy.float32(0.5), resample_every=numpy.int64(2))
    assert config == CoresetConfig(pruning_rate=0.5, resample_every=2)
    assert (type(config.pruning_rate), type(config.resample_every)) == (float, int)
