"""Which child trains on what, and when: coresets by made-up observations, against scores and rows worked out anew."""

from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd
import pytest
import reference
import torch
from torch import Tensor, nn

import emqlib as emq
from emqlib import CoresetConfig, Coresets, TrainConfig, coreset

BITS, N, CLASSES, WIDTH = (2, 4, 8), 120, 4, 5
LABELS = torch.arange(N) % CLASSES
UNEVEN = torch.arange(N).sqrt().long() % CLASSES  # classes of different sizes, in runs
PAIRS = [(a, b) for a in BITS for b in BITS if a != b]


class Selection(NamedTuple):
    """What the child models train on in an epoch, by bit-width; loss weights of all samples; whether it is scored."""

    subsets: dict[int, Tensor]
    weights: dict[int, Tensor]
    scored: bool


def select(drawn: Coresets, epoch: int) -> Selection:
    return Selection(drawn.subsets(epoch), drawn.loss_weights, drawn.scoring)


def coresets(
    scheme: str = "bitwise", epochs: int = 8, labels: Tensor = LABELS, seed: int = 0, **options: Any
) -> Coresets:
    return Coresets(labels, BITS, CoresetConfig(**options), epochs=epochs, seed=seed, scheme=scheme)


def selections(drawn: Coresets, seen: "Observations | None" = None) -> list[Selection]:
    """All epochs of a run whose children see `seen`."""
    found = []
    for epoch in range(drawn.epochs):
        found.append(select(drawn, epoch))
        if seen is not None:
            seen.show(drawn, found[-1], epoch)
    return found


class Observations:
    """Made-up logits and features of each epoch, bit-width and sample."""

    def __init__(self, epochs: int = 8, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        base = torch.randn(N, CLASSES, generator=rng)  # in common: scores of different bit-widths are correlated
        noise = torch.randn(epochs, len(BITS), N, CLASSES, generator=rng)
        scale = 0.2 + torch.rand(len(BITS), N, 1, generator=rng)
        self.logits = 2 * base + noise * scale
        self.features = torch.randint(-64, 64, (epochs, len(BITS), N, WIDTH), generator=rng) / 16  # exact in float16

    def show(self, drawn: Coresets, selection: Selection, epoch: int) -> None:
        """What training does with a recorder: batches of each child's data, in no particular order."""
        for b, subset in selection.subsets.items():
            own = (epoch, BITS.index(b))
            for i in subset[torch.randperm(len(subset), generator=torch.Generator().manual_seed(epoch))].split(7):
                drawn.observe(b, i, self.logits[own][i], drawn.labels[i], self.features[own][i])

    def scores(self, score: str, b: int, epochs: int, labels: Tensor, window: int = 3, decay: float = 0.9) -> Tensor:
        """The score of all samples at `b` by the formula for whole arrays."""
        i = BITS.index(b)
        p, h = self.logits[:epochs, i].softmax(-1), self.features[:epochs, i]
        if score == "tdds":
            return coreset.tdds(p, window, decay)
        if score == "forgetting":
            return coreset.forgetting(p.argmax(-1) == labels)
        if score == "moderate":
            return coreset.centrality(coreset.moderate(h[-1], labels))
        arguments = {"entropy": 1, "el2n": 2, "grand": 3}[score]
        each = [(q, labels, own)[:arguments] for q, own in zip(p, h, strict=True)]
        return torch.stack([getattr(coreset, score)(*given) for given in each]).mean(0)


def sets(selection: Selection) -> dict[int, set[int]]:
    return {b: set(subset.tolist()) for b, subset in selection.subsets.items()}


def draws(scheme: str, epochs: int, n: int = 200, bits: tuple[int, ...] = BITS, **options: Any) -> list[dict]:
    """For each epoch, each bit-width's random coreset as a tuple."""
    drawn = Coresets(torch.arange(n) % CLASSES, bits, CoresetConfig(**options), epochs=epochs, scheme=scheme)
    return [{b: tuple(i.tolist()) for b, i in drawn.subsets(epoch).items()} for epoch in range(epochs)]


# Random coresets


def test_bitwise_children_draw_independently() -> None:
    epoch = draws("bitwise", 1, n=2000, pruning_rate=0.5)[0]
    for a, b in ((2, 4), (2, 8), (4, 8)):  # hypergeometric: 500 +- 11
        assert abs(len(set(epoch[a]) & set(epoch[b])) - 500) < 50


@pytest.mark.parametrize("scheme", ["joint", "bitwise"])
@pytest.mark.parametrize(("every", "numbers"), [(0, "000000"), (1, "012345"), (2, "001122"), (4, "000011")])
def test_coresets_are_drawn_again(scheme: str, every: int, numbers: str) -> None:
    epochs = draws(scheme, 6, resample_every=every)
    for b in BITS:
        names: dict[tuple, str] = {}
        assert "".join(names.setdefault(epoch[b], str(len(names))) for epoch in epochs) == numbers


@pytest.mark.parametrize("scheme", ["joint", "bitwise"])
@pytest.mark.parametrize("config", [None, CoresetConfig(pruning_rate=0), CoresetConfig(score="tdds", pruning_rate=0)])
def test_no_pruning_is_the_full_data_from_the_first_epoch(scheme: str, config: CoresetConfig | None) -> None:
    drawn = Coresets(LABELS, BITS, config, epochs=3, scheme=scheme)
    for selection in selections(drawn):
        assert {b: subset.tolist() for b, subset in selection.subsets.items()} == {b: list(range(N)) for b in BITS}
        assert not selection.scored and not selection.weights
    assert not drawn.rows and drawn.scheme_of(0) == scheme


def test_another_child_does_not_change_a_childs_coreset() -> None:
    """Dedicated networks and the children of one bit-wise run see the same subsets: only the sharing differs."""
    together = draws("bitwise", 2)
    assert [e[4] for e in together] == [e[4] for e in draws("bitwise", 2, bits=(4,))]
    assert [e[4] for e in together] == [e[4] for e in draws("dedicated", 2, bits=(4,))]


# Coresets by score


@pytest.mark.parametrize("score", ["tdds", "el2n", "entropy", "grand", "moderate"])
@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_each_child_keeps_the_top_of_its_own_scores(score: str, rate: float) -> None:
    seen, drawn = Observations(), coresets(score=score, pruning_rate=rate, scoring_epochs=5, labels=UNEVEN, epochs=6)
    found = selections(drawn, seen)[-1]
    for b in BITS:
        expected = coreset.select(seen.scores(score, b, 5, UNEVEN), rate)
        assert found.subsets[b].tolist() == expected.tolist()
    assert found.subsets[2].tolist() != found.subsets[8].tolist()


@pytest.mark.parametrize("options", [{"window": 4}, {"window": 5, "decay": 0.4}])
def test_tdds_takes_window_and_decay_from_the_config(options: dict) -> None:
    seen, drawn = Observations(), coresets(score="tdds", pruning_rate=0.5, scoring_epochs=6, epochs=7, **options)
    found = selections(drawn, seen)[-1]
    default = coreset.select(seen.scores("tdds", 4, 6, LABELS), 0.5).tolist()
    assert found.subsets[4].tolist() == coreset.select(seen.scores("tdds", 4, 6, LABELS, **options), 0.5).tolist()
    assert found.subsets[4].tolist() != default


@pytest.mark.parametrize("scheme", ["bitwise", "joint"])
def test_a_shared_coreset_is_the_top_of_the_mean_rank(scheme: str) -> None:
    seen = Observations()
    drawn = coresets(scheme, score="el2n", pruning_rate=0.8, across_bits="identical", epochs=2)
    found = sets(selections(drawn, seen)[-1])
    ranks = [seen.scores("el2n", b, 1, LABELS).argsort().argsort() for b in BITS]
    total = sum(ranks)
    kept, rest = sorted(found[2]), sorted(set(range(N)) - found[2])
    assert found[2] == found[4] == found[8] and len(kept) == 24
    assert total[kept].min() >= total[rest].max()
    assert set(ranks[0].topk(24).indices.tolist()) != found[2]


class Alike(Observations):
    """All samples look the same."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.ones_like(self.logits)


def test_of_equal_scores_a_random_part_is_kept_whatever_the_order_of_the_data() -> None:
    found = []
    for seed in (0, 0, 1):
        drawn = coresets(score="entropy", pruning_rate=0.5, seed=seed, epochs=2)
        found.append(sets(selections(drawn, Alike())[-1]))
    assert found[0] == found[1] != found[2]
    assert found[0][2] != found[0][4] != found[0][8] != found[0][2]
    for own in found[0].values():  # of 60 first ones 30 +- 2.7
        assert 18 < sum(i < N // 2 for i in own) < 42


def test_draws_by_importance_prefer_high_scores() -> None:
    """The chance of a draw grows with the rank from a tenth to the whole of the highest."""
    seen = Observations()
    drawn = coresets(score="el2n", pruning_rate=0.8, how="sample", power=2.0, epochs=401)
    p = literal_inclusion(seen.scores("el2n", 4, 1, LABELS), 24, power=2.0)
    assert_drawn_as_often(drawn, seen, p)
    assert p.min() > 0 and p.max() / p.min() == pytest.approx(1 / (0.1 + 0.9 / N**2), rel=1e-4)


def test_a_draw_may_reach_what_was_not_scored() -> None:
    """Samples that are no candidates come in as often as a candidate of mean weight."""
    seen = Observations()
    options = {"candidates": 0.4, "how": "sample", "unscored": True, "power": 2.0}
    drawn = coresets(score="el2n", pruning_rate=0.8, epochs=401, **options)
    own = drawn.subsets(0)[4]
    scored = torch.zeros(N, dtype=torch.bool).index_fill_(0, own, True)
    w = torch.zeros(N, dtype=torch.double)
    ranks = seen.scores("el2n", 4, 1, LABELS)[own].argsort().argsort() + 1
    w[own] = 0.1 + 0.9 * (ranks.double() / len(own)) ** 2
    w[~scored] = w[own].mean()
    p = 24 * w / w.sum()
    assert p.max() < 1 and len(own) == 48  # none is certain, so that p is that simple
    assert_drawn_as_often(drawn, seen, p)


def assert_drawn_as_often(drawn: Coresets, seen: Observations, p: Tensor) -> None:
    """At 4 bits, in 400 epochs after a scoring phase of one."""
    seen.show(drawn, select(drawn, 0), 0)
    counts = torch.zeros(N)
    for epoch in range(1, 401):
        counts[drawn.subsets(epoch)[4]] += 1
    assert bool(((counts - 400 * p).abs() <= 4.5 * (400 * p * (1 - p)).sqrt() + 1e-6).all())


def literal_inclusion(scores: Tensor, keep: int, power: float = 1.0) -> Tensor:
    """Of w = 0.1 + 0.9 (rank / N)^power, ranks from 1."""
    w = 0.1 + 0.9 * ((scores.argsort().argsort() + 1).double() / len(scores)) ** power
    return torch.tensor(reference.inclusion(w.tolist(), keep), dtype=torch.double)


# Sizes, and what bit-widths have in common


@pytest.mark.parametrize("candidates", [1.0, 0.5])
@pytest.mark.parametrize("across", ["independent", "identical", "disjoint"])
@pytest.mark.parametrize("how", ["top", "sample"])
def test_sizes_are_exact_and_coresets_come_from_the_own_candidates(how: str, across: str, candidates: float) -> None:
    options = {"how": how, "across_bits": across, "candidates": candidates}
    for rate in (0.5, 0.8):
        drawn = coresets(score="el2n", pruning_rate=rate, labels=UNEVEN, epochs=4, **options)
        phase, *rest = selections(drawn, Observations())
        held: set[int] = set()
        for b in reversed(BITS):
            own = set(phase.subsets[b].tolist())
            assert len(own) == round(candidates * N)
            for selection in rest:
                subset = selection.subsets[b].tolist()
                assert len(subset) == round((1 - rate) * N) and subset == sorted(set(subset)) and set(subset) <= own
            if across == "disjoint":  # another's sample is taken only where no own one is left
                shared = set(subset) & held
                assert not shared or own - held <= set(subset)
            held |= set(subset)
            if across == "identical":
                assert held == set(subset)


@pytest.mark.parametrize(("candidates", "overlap"), [(1 / 3, 0), (0.5, 20), (2 / 3, 40), (1.0, 120)])
def test_candidates_of_different_bit_widths_overlap_as_little_as_they_can(candidates: float, overlap: int) -> None:
    """A third each is disjoint and everything together; of more, as much as must be is in common."""
    phase = sets(select(coresets(score="el2n", pruning_rate=0.8, candidates=candidates), 0))
    assert {len(own) for own in phase.values()} == {round(candidates * N)}
    assert {len(phase[a] & phase[b]) for a, b in PAIRS} == {overlap}
    assert set().union(*phase.values()) == set(range(N))
    other = coresets(score="el2n", pruning_rate=0.8, candidates=candidates, seed=1)
    assert (sets(select(other, 0)) == phase) == (candidates == 1)


@pytest.mark.parametrize(
    ("scheme", "options"), [("joint", {}), ("bitwise", {"across_bits": "identical"}), ("bitwise", {"scoring": "joint"})]
)
def test_who_shares_batches_or_a_coreset_shares_candidates(scheme: str, options: dict) -> None:
    phase = select(coresets(scheme, score="el2n", candidates=0.5, **options), 0)
    assert len(phase.subsets[2]) == N // 2 and phase.scored
    assert phase.subsets[2].tolist() == phase.subsets[4].tolist() == phase.subsets[8].tolist()


def test_a_disjoint_coreset_is_the_top_of_what_is_left() -> None:
    """The highest bit-width chooses first."""
    seen, drawn = Observations(), coresets(score="el2n", pruning_rate=0.8, across_bits="disjoint", epochs=2)
    found, left = selections(drawn, seen)[-1].subsets, torch.ones(N, dtype=torch.bool)
    for b in reversed(BITS):
        scores = seen.scores("el2n", b, 1, LABELS)
        assert found[b].tolist() == scores.where(left, torch.tensor(-1.0)).topk(24).indices.sort().values.tolist()
        left[found[b]] = False


# Phases


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        ({}, 0),
        ({"score": "moderate"}, 1),
        ({"score": "forgetting"}, 2),
        ({"score": "tdds"}, 3),
        ({"score": "tdds", "window": 5}, 5),
        ({"score": "tdds", "scoring_epochs": 7}, 7),
        ({"score": "el2n", "scoring_epochs": 3}, 3),
        ({"score": "el2n", "scoring_epochs": 3, "pruning_rate": 0}, 0),
    ],
)
def test_the_scoring_phase_is_as_short_as_the_score_allows(options: dict, warmup: int) -> None:
    drawn = coresets(**options)
    assert CoresetConfig(**options).warmup == warmup
    scored = [selection.scored for selection in selections(drawn, Observations())]
    assert scored == [True] * warmup + [False] * (8 - warmup)


@pytest.mark.parametrize("how", ["top", "sample"])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_draws_after_the_scoring_phase(how: str, every: int) -> None:
    drawn = coresets(score="el2n", how=how, resample_every=every, epochs=7)
    found = [sets(selection)[4] for selection in selections(drawn, Observations())[1:]]
    changed = [a != b for a, b in pairwise(found)]
    redrawn = [bool(every) and epoch % every == 0 for epoch in range(1, 6)]
    assert changed == [again and how == "sample" for again in redrawn]
    drifts = [row["drift"] for row in drawn.rows if row["bits"] == 4]
    assert drifts[0] is None and len(drifts) == 1 + sum(redrawn)
    assert all(drift > 0 if how == "sample" else drift == 0 for drift in drifts[1:])


COUNTED = {
    "random": {},
    "scored": {"score": "tdds", "pruning_rate": 0.7},
    "candidates": {"score": "el2n", "scoring_epochs": 2, "candidates": 0.45},
    "joint scoring": {"score": "el2n", "scoring": "joint", "candidates": 0.45},
    "disjoint": {"score": "el2n", "pruning_rate": 0.5, "across_bits": "disjoint"},
    "identical": {"score": "forgetting", "across_bits": "identical", "resample_every": 2},
    "none": {"pruning_rate": 0.0},
}


@pytest.mark.parametrize("scheme", ["bitwise", "joint", "dedicated"])
@pytest.mark.parametrize("name", COUNTED)
def test_every_epoch_has_as_many_steps_as_were_counted(name: str, scheme: str) -> None:
    bits = (4,) if scheme == "dedicated" else BITS
    config = CoresetConfig(**COUNTED[name])
    drawn, seen = Coresets(LABELS, bits, config, epochs=6, scheme=scheme), Observations()
    for epoch in range(6):
        steps, selection = drawn.steps(epoch, 16), select(drawn, epoch)
        seen.show(drawn, selection, epoch)
        assert drawn.count(epoch, 16) == len(steps)
        for b in bits:
            seen_by_b = [indices for own, indices in steps if b in own]
            assert torch.cat(seen_by_b).sort().values.tolist() == selection.subsets[b].tolist()  # each sample once
            sizes = [len(indices) for indices in seen_by_b]
            assert sum(sizes) == drawn.size(epoch) and max(sizes) <= 16 and max(sizes) - min(sizes) <= 1
        joint = scheme == "joint" or (selection.scored and name == "joint scoring" and scheme == "bitwise")
        assert {own for own, _ in steps} == ({bits[::-1]} if joint else {(b,) for b in bits})


# Rows


@pytest.mark.parametrize(
    "options",
    [
        {"score": "el2n", "how": "sample", "candidates": 0.5},
        {"score": "el2n"},
        {"score": "el2n", "across_bits": "disjoint", "pruning_rate": 0.5},
        {"score": "random", "resample_every": 2},
    ],
)
def test_rows_tell_what_the_coresets_have_in_common(options: dict) -> None:
    drawn = coresets(**{"pruning_rate": 0.7, "labels": UNEVEN, "epochs": 6} | options)
    found = selections(drawn, Observations())
    firsts = [row["epoch"] for row in drawn.rows if row["bits"] == 2]
    assert len(firsts) > 2 and len(drawn.rows) == 3 * len(firsts)
    for number, epoch in enumerate(firsts):
        own = sets(found[epoch - 1])
        before = sets(found[firsts[number - 1] - 1]) if number else None
        for row in [row for row in drawn.rows if row["epoch"] == epoch]:
            b, keep = row["bits"], row["size"]
            assert keep == len(own[b])
            assert row["union"] == pytest.approx(len(own[2] | own[4] | own[8]) / N, abs=1e-4)
            others = {str(o): len(own[b] & own[o]) / keep for o in BITS if o != b}
            assert row["overlap"] == pytest.approx(others, abs=1e-4)
            drift = None if before is None else len(before[b] - own[b]) / keep
            assert row["drift"] == (drift if drift is None else pytest.approx(drift, abs=1e-4))
            assert row["classes"] == [sum(int(UNEVEN[i]) == c for i in own[b]) for c in range(CLASSES)]
            assert row["clipped"] == 0


@pytest.mark.parametrize("candidates", [0.6, 1.0])
def test_rank_correlation_is_spearmans_over_what_both_scored(candidates: float) -> None:
    seen, drawn = Observations(), coresets(score="el2n", candidates=candidates, epochs=3)
    phase = sets(selections(drawn, seen)[0])
    for row in drawn.rows:
        b, found = row["bits"], {}
        for other in (o for o in BITS if o != b):
            both = sorted(phase[b] & phase[other])
            pair = {str(x): seen.scores("el2n", x, 1, LABELS)[both].numpy() for x in (b, other)}
            found[str(other)] = pd.DataFrame(pair).corr(method="spearman").iloc[0, 1]
        assert row["rank_correlation"] == pytest.approx(found, abs=1e-4)
        assert all(0.2 < value < 0.99 for value in found.values())


def test_there_is_no_rank_correlation_where_nothing_is_scored_by_both() -> None:
    drawn = coresets(score="el2n", candidates=1 / 3, epochs=2)
    selections(drawn, Observations())
    assert [list(row["rank_correlation"].values()) for row in drawn.rows] == [[None, None]] * 3
    drawn = coresets(epochs=2)
    selections(drawn)
    assert [row["rank_correlation"] for row in drawn.rows] == [{}] * 6


# Weights of losses


@pytest.mark.parametrize("across", ["independent", "identical"])
def test_weights_are_k_over_n_times_the_chance(across: str) -> None:
    seen, options = Observations(), {"how": "sample", "unbiased": True, "across_bits": across, "max_weight": 1e9}
    drawn = coresets(score="el2n", pruning_rate=0.6, epochs=2, **options)
    selection = selections(drawn, seen)[-1]
    for b in BITS:
        scores = seen.scores("el2n", b, 1, LABELS)
        if across == "identical":
            ranks = sum(seen.scores("el2n", o, 1, LABELS).argsort().argsort() for o in BITS) / 3.0
            w = 0.1 + 0.9 * (ranks + 1) / (ranks.max() + 1)
            p = coreset.inclusion(w, 48)
        else:
            p = literal_inclusion(scores, 48)
        assert selection.weights[b].shape == (N,)
        torch.testing.assert_close(selection.weights[b].double(), 48 / (N * p), rtol=1e-4, atol=0)
    assert {row["clipped"] for row in drawn.rows} == {0.0}


@pytest.mark.parametrize("largest", [1.0, 1.5, 2.5])
def test_weights_are_clipped_and_the_clipped_are_counted(largest: float) -> None:
    options = {"score": "el2n", "pruning_rate": 0.8, "how": "sample", "unbiased": True, "epochs": 5}
    free, clipped = coresets(max_weight=1e9, **options), coresets(max_weight=largest, **options)
    before, after = selections(free, Observations()), selections(clipped, Observations())
    for row in clipped.rows:
        b, epoch = row["bits"], row["epoch"] - 1
        own, weights = before[epoch].subsets[b], before[epoch].weights[b]
        assert torch.equal(after[epoch].subsets[b], own)
        assert torch.equal(after[epoch].weights[b], weights.clamp_max(largest))
        assert row["clipped"] == pytest.approx((weights[own] > largest).float().mean().item(), abs=1e-4)
    assert len(clipped.rows) == 12 and max(row["clipped"] for row in clipped.rows) > 0


@pytest.mark.parametrize("scheme", ["bitwise", "joint"])
def test_random_coresets_have_weights_of_one(scheme: str) -> None:
    drawn = coresets(scheme, how="sample", unbiased=True, pruning_rate=0.7, epochs=3)
    for selection in selections(drawn):
        assert set(selection.weights) == set(BITS)
        assert all(bool(((w - 1).abs() < 1e-6).all()) for w in selection.weights.values())


# Recording


@pytest.mark.parametrize("score", coreset.OF_FEATURES)
def test_features_are_the_input_of_the_last_linear_layer(score: str) -> None:
    model, seen = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)), Observations()
    x, found = seen.features[0, 0], []
    for watched in (True, False):
        drawn = coresets(score=score, epochs=2)
        with suppress(ZeroDivisionError), drawn.watching(model):
            drawn.subsets(0)
            for b in BITS:
                drawn.observe(b, torch.arange(N), model(x), LABELS, None if watched else model[0](x))
            raise ZeroDivisionError
        assert not model[0]._forward_pre_hooks and not model[1]._forward_pre_hooks
        found.append(drawn.recorders[4].scores())
    assert torch.equal(*found) and found[0].std() > 0


class HeadFirst(nn.Module):
    """The last linear layer to be called is the first one to be registered."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.head, self.relu, self.body = nn.Linear(WIDTH, outputs), nn.ReLU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.body(x)))


@pytest.mark.parametrize("score", coreset.OF_FEATURES)
def test_the_last_linear_layer_is_the_one_that_is_called_last(score: str) -> None:
    """Its input is what it computes with, where conversion has left the ReLU before it to its quantizer."""
    model, x, found = HeadFirst(), Observations().features[0, 0], []
    converted = emq.convert(model, emq.QuantSpec(bits=BITS, full_precision=()))
    for watched in (True, False):
        drawn = coresets(score=score, epochs=2)
        with drawn.watching(converted):
            drawn.subsets(0)
            for b in BITS:
                hidden = converted.body(x).relu().detach()
                drawn.observe(b, torch.arange(N), converted(x), LABELS, None if watched else hidden)
        found.append(drawn.recorders[4].scores())
    assert torch.equal(*found) and found[0].std() > 0


def test_features_are_those_that_give_the_logits() -> None:
    model, drawn = HeadFirst(outputs=CLASSES + 1), coresets(score="grand", epochs=2)
    drawn.subsets(0)
    x = Observations().features[0, 0]
    with drawn.watching(model), pytest.raises(ValueError, match=r"^score='grand': .* does not give the logits$"):
        drawn.observe(4, torch.arange(N), model(x)[:, :CLASSES], LABELS)


@pytest.mark.parametrize("score", coreset.OF_FEATURES)
def test_features_need_a_linear_layer(score: str) -> None:
    drawn = coresets(score=score)
    drawn.subsets(0)
    with pytest.raises(ValueError, match=rf"^score='{score}': expected another, where a network has no linear layer$"):
        drawn.watching(nn.Sequential(nn.Conv2d(3, CLASSES, 1))).__enter__()


# The config


def test_a_run_is_longer_than_its_scoring_phase() -> None:
    for options, least in (({"score": "tdds"}, 4), ({"score": "el2n", "scoring_epochs": 5}, 6)):
        config = CoresetConfig(**options)
        assert TrainConfig(epochs=least, coreset=config).epochs == least
        with pytest.raises(ValueError, match=rf"^epochs={least - 1}: expected more than the {least - 1} of the cores"):
            TrainConfig(epochs=least - 1, coreset=config)
    assert TrainConfig(epochs=1, coreset=CoresetConfig(score="tdds", pruning_rate=0)).epochs == 1
