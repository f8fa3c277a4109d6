"""Scores kept while training against those of the whole log at once, for any batches and with any gaps."""

from collections.abc import Callable
from functools import partial
from inspect import signature

import pytest
import reference
import torch
from torch import Tensor

from emqlib import CoresetConfig, coreset
from emqlib.train import coresets as recorder
from emqlib.train.config import SCORES
from emqlib.train.coresets import Recorder

N, C, D, T = 53, 5, 6, 9
CPU = torch.device("cpu")


class Log:
    """What N samples give in each of T epochs, in float64: p (T, N, C), labels (N,), features (T, N, D)."""

    def __init__(self, rng: torch.Generator, n: int = N, epochs: int = T) -> None:
        self.rng = rng
        self.labels = torch.randint(0, C, (n,), generator=rng)
        towards = torch.nn.functional.one_hot(self.labels, C) * torch.rand(n, 1, generator=rng)
        steps = 0.4 * torch.randn(epochs, n, C, dtype=torch.float64, generator=rng) + 0.5 * towards
        self.p = steps.cumsum(0).softmax(2)
        self.features = torch.randn(epochs, n, D, dtype=torch.float64, generator=rng)
        self.seen = torch.ones(epochs, n, dtype=torch.bool)

    def with_gaps(self) -> "Log":
        """The same, but every presentation is left out with probability 0.2."""
        self.seen = torch.rand(self.seen.shape, generator=self.rng) < 0.8
        return self

    def into(self, record: Recorder, epochs: range | None = None, batch: int = 7, shuffled: bool = True) -> Recorder:
        """Observed epoch by epoch, shuffled, in batches of which the last is smaller."""
        for epoch in epochs or range(len(self.p)):
            seen = self.seen[epoch].nonzero().flatten()
            order = seen[torch.randperm(len(seen), generator=self.rng)] if shuffled else seen
            for i in order.split(batch):
                record.observe(epoch, i, self.p[epoch, i], self.labels[i], self.features[epoch, i])
        return record


def close(actual: Tensor, expected: object, atol: float) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def made(score: str, n: int = N, **options: float) -> Recorder:
    return recorder.recorder(CoresetConfig(score=score, **options), n, C, D, CPU)


def exact_tdds(window: int = 3, decay: float = 0.9) -> Recorder:
    return made("tdds", window=window, decay=decay).double()


# A recorder of each kind, and how far two ways to the same scores may be apart
KINDS: dict[str, tuple[Callable[[], Recorder], float]] = {
    "exact tdds": (exact_tdds, 1e-12),
    **{score: (partial(made, score), 1e-5) for score in SCORES[1:]},
}
each_kind = pytest.mark.parametrize(("make", "atol"), KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("batch", [1, 7, N])
@pytest.mark.parametrize(("window", "decay"), [(3, 0.9), (4, 0.5), (8, 0.9), (T, 1.0)])
def test_streamed_tdds_is_that_of_the_whole_log(window: int, decay: float, batch: int, rng: torch.Generator) -> None:
    log = Log(rng)
    record = log.into(exact_tdds(window, decay), batch=batch)
    close(record.scores(), coreset.tdds(log.p, window, decay), 1e-12)


def test_half_precision_keeps_the_same_samples(rng: torch.Generator) -> None:
    log = Log(rng, n=4000, epochs=6)
    record = log.into(made("tdds", 4000), batch=1001)
    kept, exact = (set(coreset.select(s, 0.8).tolist()) for s in (record.scores(), coreset.tdds(log.p, 3)))
    assert len(kept & exact) >= 0.997 * len(exact)  # bfloat16: 0.994


@each_kind
def test_an_epoch_that_is_broken_off_and_begun_anew_counts_once(
    make: Callable[[], Recorder], atol: float, rng: torch.Generator
) -> None:
    log, record = Log(rng).with_gaps(), make()
    for epoch in range(T):
        if epoch % 3 == 1:
            i = log.seen[epoch].nonzero().flatten()[::2]
            record.observe(epoch, i, log.p[epoch, i], log.labels[i], log.features[epoch, i])
        log.into(record, range(epoch, epoch + 1))
    close(record.scores(), log.into(make()).scores(), atol)


def log_probability(p: Tensor, labels: Tensor, features: Tensor | None) -> Tensor:
    """A score of one's own that is never positive."""
    return p.gather(1, labels[:, None]).squeeze(1).log()


def test_what_was_never_observed_ranks_last(rng: torch.Generator) -> None:
    log = Log(rng)
    log.seen[:, :9] = False
    records = [made(score) for score in (*SCORES[1:], log_probability)]
    for record in records:
        assert log.into(record).scores().argsort(stable=True)[:9].sort().values.tolist() == list(range(9))


@each_kind
def test_neither_order_nor_batch_size_matters(make: Callable[[], Recorder], atol: float, rng: torch.Generator) -> None:
    log = Log(rng).with_gaps()
    expected = log.into(make(), batch=N, shuffled=False).scores()
    assert len(expected.unique()) > 1
    for batch in (5, 16):
        close(log.into(make(), batch=batch).scores(), expected, atol)


def tdds_of_runs(p: Tensor, seen: Tensor, window: int, decay: float) -> float:
    """Of one sample, (T, C) and (T,): the moving average over the windows that lie in epochs without a gap."""
    score = 0.0
    for start in range(len(p) - window + 1):
        if all(seen[start : start + window]):
            snapshots = [p[t].numpy() for t in range(start, start + window)]
            score = (1 - decay) * score + decay * reference.tdds_window(snapshots)
    return score


@pytest.mark.parametrize("window", [3, 4])
def test_a_gap_starts_a_new_window(window: int, rng: torch.Generator) -> None:
    log = Log(rng, epochs=16).with_gaps()
    expected = [tdds_of_runs(log.p[:, i], log.seen[:, i], window, 0.6) for i in range(N)]
    # several windows on both sides of a gap, somewhere
    assert any(seen[:5].all() and not seen.all() and seen[-5:].all() for seen in log.seen.T)
    close(log.into(exact_tdds(window, 0.6)).scores(), expected, 1e-12)


@pytest.mark.parametrize("window", [3, 5])
def test_no_tdds_before_a_full_window(window: int, rng: torch.Generator) -> None:
    log, record = Log(rng), exact_tdds(window)
    for epoch in range(window - 1):
        with pytest.raises(ValueError, match=rf"^window={window}: expected at most as many epochs"):
            log.into(record, range(epoch, epoch + 1)).scores()
    assert bool((log.into(record, range(window - 1, window)).scores() > 0).all())


@pytest.mark.parametrize("score", coreset.SNAPSHOTS)
def test_mean_over_the_epochs_in_which_a_sample_was_seen(score: str, rng: torch.Generator) -> None:
    log = Log(rng).with_gaps()
    log.seen[:, 0] = False
    function = getattr(coreset, score)
    needed = len(signature(function).parameters)
    rows = [function(*(p, log.labels, h)[:needed]) for p, h in zip(log.p, log.features, strict=True)]
    expected = [
        row[seen].mean().nan_to_num(-torch.inf) for row, seen in zip(torch.stack(rows).T, log.seen.T, strict=True)
    ]
    close(log.into(made(score)).scores(), torch.stack(expected), 1e-5)


def test_forgetting_with_gaps_is_that_of_the_epochs_in_which_a_sample_was_seen(rng: torch.Generator) -> None:
    log = Log(rng).with_gaps()
    log.labels[:9] = log.p[:, :9].sum(0).argmin(1)
    correct = log.p.argmax(2) == log.labels
    expected = [reference.forgetting(correct[log.seen[:, i], i].tolist()) for i in range(N)]
    assert log.into(made("forgetting")).scores().tolist() == expected


def test_moderate_is_the_centrality_of_the_last_features(rng: torch.Generator) -> None:
    log = Log(rng, n=400, epochs=3)
    scores = log.into(made("moderate", 400)).scores()
    assert torch.equal(scores, coreset.centrality(coreset.moderate(log.features[-1].float(), log.labels)))


BYTES = {"tdds": N * (2 * C + 4 * (4 - 1) + 8), "forgetting": 12 * N, "moderate": N * (4 * D + 10)}


@pytest.mark.parametrize("score", SCORES[1:])
def test_memory_is_what_the_docstring_says(score: str, rng: torch.Generator) -> None:
    record = made(score, window=4)
    for used in (record, Log(rng).into(record)):
        assert nbytes(used) == BYTES.get(score, 10 * N)


def nbytes(record: Recorder) -> int:
    return sum(buffer.nbytes for buffer in record.buffers())


@pytest.mark.parametrize(("limit", "device"), [(N * C * 2, "meta"), (N * C * 2 - 1, "cpu")])
def test_only_a_table_that_fits_goes_to_the_device(limit: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "LARGE", limit)
    record = recorder.recorder(CoresetConfig(score="tdds"), N, C, D, torch.device("meta"))
    assert {buffer.device.type for buffer in record.buffers()} == {device}
