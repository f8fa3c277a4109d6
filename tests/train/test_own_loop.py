"""Coresets in a training loop of one's own: against `emq.train`, with a DataLoader's workers, and stopped half-way."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, StackDataset
from training_cases import BITS, assert_same_state, quick, tiny, train

import emqlib as emq
from emqlib import CoresetConfig, Coresets
from emqlib.paper.runs import Run
from emqlib.train import coresets as coresets_module
from emqlib.train.config import learning_rate
from emqlib.train.coresets import BatchSampler
from emqlib.train.data import normalize
from emqlib.train.distributed import Place

N = 60
LABELS = torch.arange(N) % 3
LOGITS = torch.randn(3, N, 3, generator=torch.Generator().manual_seed(0))
STEPS = {
    "random": CoresetConfig(pruning_rate=0.5),
    "tdds": CoresetConfig(score="tdds", pruning_rate=0.5),
    "grand": CoresetConfig(score="grand", pruning_rate=0.7, how="sample", unbiased=True),
    "full data": None,
}
EPOCHS = 5


@pytest.fixture(scope="module")
def plain_digits(digits: emq.Dataset) -> emq.Dataset:
    return replace(digits, crop_padding=0)  # without augmentation


def own_loop(model: nn.Module, data: emq.Dataset, config: emq.TrainConfig) -> Coresets:
    """What a reader would write, with the schedule of `emq.train`."""
    images, labels = normalize(data.train.images, data), data.train.labels
    coresets = Coresets(labels, BITS, config.coreset, epochs=config.epochs)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True)
    model.train()
    with coresets.watching(model):
        for epoch in range(config.epochs):
            batches = coresets.batches(epoch, config.batch_size)
            for i, (bits, indices) in enumerate(batches):
                optimizer.param_groups[0]["lr"] = learning_rate(epoch + (i + 0.5) / len(batches), config)
                emq.set_bits(model, bits)
                logits = model(images[indices])
                loss = F.cross_entropy(logits, labels[indices])
                if coresets.loss_weights:  # the same, but for rounding, as a weighted mean with weights of one
                    losses = F.cross_entropy(logits, labels[indices], reduction="none")
                    loss = (losses * coresets.weights(bits, indices)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                coresets.observe(bits, indices, logits, labels[indices])
    return coresets


@pytest.mark.parametrize("config", STEPS.values(), ids=STEPS)
def test_a_plain_loop_ends_with_the_weights_of_train(config: CoresetConfig | None, plain_digits: emq.Dataset) -> None:
    asked = quick(epochs=EPOCHS, weight_decay=0.0, coreset=config, channels_last=False, warmup_epochs=0.5)
    ours, theirs = tiny(), tiny()
    history = train(theirs, plain_digits, asked)
    coresets = own_loop(ours, plain_digits, asked)
    emq.set_bits(ours, BITS[-1])
    assert_same_state(ours, theirs)
    assert coresets.rows == history.attrs["coresets"] and bool(coresets.rows) == (config is not None)


def test_a_second_compiled_training_has_features(plain_digits: emq.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler keeps the graphs of the first, which has no hooks."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **options: compiler(net, backend="aot_eager", **options))
    grand = CoresetConfig(score="grand", pruning_rate=0.5)
    for coreset in (None, grand):
        loss, plain = (
            train(tiny(), plain_digits, quick(epochs=2, batch_size=30, compile=how, coreset=coreset)).loss.tolist()
            for how in (True, False)
        )
        assert loss == pytest.approx(plain, rel=1e-3)


def made_up(coresets: Coresets, epochs: range, batch_size: int = 7) -> list[list[tuple[int, list[int]]]]:
    """The batches of `epochs` in a loop whose network gives what `LOGITS` has, another at each bit-width."""
    found = []
    for epoch in epochs:
        batches = coresets.batches(epoch, batch_size)
        assert len(batches) == coresets.count(epoch, batch_size)
        for bits, i in batches:
            coresets.observe(bits, i, LOGITS[BITS.index(bits), i] * (1 + epoch), LABELS[i], torch.ones(len(i), 2))
        found.append([(bits, i.tolist()) for bits, i in batches])
    return found


@pytest.mark.parametrize("at", [1, 3, 4])
@pytest.mark.parametrize("config", STEPS.values(), ids=STEPS)
def test_a_state_goes_on_where_it_was_taken(config: CoresetConfig | None, at: int) -> None:
    """Through a file, as a checkpoint of one's own would keep it."""
    whole, first, second = (Coresets(LABELS, BITS, config, epochs=6) for _ in range(3))
    expected, file = made_up(whole, range(6)), io.BytesIO()
    made_up(first, range(at))
    torch.save(first.state_dict(), file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert (second.epoch, second.next_epoch) == (at - 1, at)
    assert made_up(second, range(at, 6)) == expected[at:] and second.rows == whole.rows
    i = torch.arange(N)
    assert all(torch.equal(second.weights(b, i), whole.weights(b, i)) for b in BITS)
    if second.loss_weights:
        with pytest.raises(ValueError, match=r"^bits=3: expected one of \(2, 4, 8\)$"):
            second.weights(3, i)


@pytest.mark.parametrize(
    "other",
    [{"labels": LABELS[:30]}, {"bits": (4, 8)}, {"config": CoresetConfig(pruning_rate=0.4)}, {"seed": 1}],
    ids=["labels", "bits", "config", "seed"],
)
def test_a_state_of_other_coresets_is_refused(other: dict) -> None:
    same = {"labels": LABELS, "bits": BITS, "config": CoresetConfig(pruning_rate=0.5), "epochs": 6}
    first, second = Coresets(**same), Coresets(**same | other)
    first.batches(0, 7)
    with pytest.raises(ValueError, match=r"^state='dict': expected a state of the same coresets"):
        second.load_state_dict(first.state_dict())


def test_a_loader_that_counts_from_0_again_goes_on_after_a_saved_state() -> None:
    """As Accelerate's does, which sets the epoch at the beginning of each pass."""
    coresets, again = (Coresets(LABELS, BITS, CoresetConfig(pruning_rate=0.5), epochs=6) for _ in range(2))
    made_up(coresets, range(3))
    again.load_state_dict(coresets.state_dict())
    loader, seen = again.loader(Squares(), 7), []
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        for _ in loader:
            seen.append(again.epoch)
    assert sorted(set(seen)) == [3, 4, 5]


class Squares(Dataset):
    """Sample i is (i squared, its class)."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[int, int]:
        return i * i, i % 3


def doubled(items: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([2 * item for item, _ in items])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_tells_bit_width_and_samples_of_each_batch(workers: int) -> None:
    """In the order of `batches`, epoch by epoch, with the scores of the epoch."""
    config = CoresetConfig(score="tdds", pruning_rate=0.5)
    coresets, plain = (Coresets(LABELS, BITS, config, epochs=5) for _ in range(2))
    loader, expected = coresets.loader(Squares(), 7, num_workers=workers), made_up(plain, range(5))
    for epoch in range(5):
        assert len(loader) == len(expected[epoch])
        found = []
        for bits, i, (x, y) in loader:
            assert torch.equal(x, i**2) and torch.equal(y, LABELS[i]) and coresets.epoch == epoch
            coresets.observe(bits, i, LOGITS[BITS.index(bits), i] * (1 + epoch), y)
            found.append((bits, i.tolist()))
        assert found == expected[epoch]
    assert coresets.rows == plain.rows


def test_a_sampler_goes_on_with_the_epoch_that_was_set_or_follows() -> None:
    """An iteration that is broken off, as Lightning does to look at a loader, does not count."""
    coresets = Coresets(LABELS, BITS, CoresetConfig(pruning_rate=0.5), epochs=9)
    sampler = BatchSampler(coresets, 7)
    loader = DataLoader(Keyed(), batch_sampler=sampler, collate_fn=list)
    expected = [[[(k, b) for k in i.tolist()] for b, i in coresets.batches(epoch, 7)] for epoch in range(9)]
    assert next(iter(loader)) == expected[0][0]
    assert [list(loader), list(loader)] == expected[:2]
    sampler.set_epoch(5)
    assert len(sampler) == 15 and [list(loader), list(loader)] == expected[5:7]
    sampler.sampler.set_epoch(8)  # so Lightning
    assert list(sampler) == expected[8]
    with pytest.raises(ValueError, match=r"^epoch=9: expected an integer in \[0, 8\]$"):
        list(sampler)


class Keyed(Dataset):
    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


def test_a_loader_takes_a_collate_function_of_its_own() -> None:
    bits, i, x = next(iter(Coresets(LABELS, (4,), epochs=1).loader(Squares(), 7, collate_fn=doubled)))
    assert bits == 4 and torch.equal(x, 2 * i**2)


# Scores


def test_nothing_is_recorded_outside_of_the_scoring_phase() -> None:
    coresets = Coresets(LABELS, BITS, CoresetConfig(score="el2n"), epochs=3)
    coresets.observe(4, torch.arange(3), LOGITS[0, :3], LABELS[:3])  # before any epoch
    assert not coresets.recorders
    made_up(coresets, range(2))
    assert not coresets.recorders and len(coresets.rows) == 3 and not coresets.scoring


@pytest.mark.parametrize("forgotten", [BITS, (4,)])
def test_coresets_of_scores_that_were_never_observed_are_refused(forgotten: tuple[int, ...]) -> None:
    coresets = Coresets(LABELS, BITS, CoresetConfig(score="el2n"), epochs=3)
    for bits, i in coresets.batches(0, 30):
        if bits not in forgotten:
            coresets.observe(bits, i, LOGITS[0, i], LABELS[i])
    message = rf"^epoch=1: expected scores of \[{', '.join(map(str, forgotten))}\] bits before it, which `observe` "
    with pytest.raises(ValueError, match=message):
        coresets.batches(1, 30)


def my_el2n(p: Tensor, labels: Tensor, features: Tensor | None) -> Tensor:
    return (p - F.one_hot(labels, p.shape[1])).square().sum(1).sqrt()


def my_grand(p: Tensor, labels: Tensor, features: Tensor | None) -> Tensor:
    return my_el2n(p, labels, None) * (features.square().sum(1) + 1).sqrt()


@pytest.mark.parametrize(("own", "name"), [(my_el2n, "el2n"), (my_grand, "grand")])
def test_a_score_of_ones_own_is_as_good_as_a_name(own: Callable, name: str, plain_digits: emq.Dataset) -> None:
    histories = [
        train(tiny(), plain_digits, quick(epochs=4, coreset=CoresetConfig(score=score, scoring_epochs=2)))
        for score in (own, name)
    ]
    assert histories[0].attrs["coresets"] == histories[1].attrs["coresets"]
    assert histories[0].loss.tolist() == histories[1].loss.tolist()


def test_a_score_of_ones_own_is_told_by_its_name(plain_digits: emq.Dataset, tmp_path: Any) -> None:
    """In a checkpoint, by which a run with another score is refused, and in the name of a run of the paper."""
    config, path = quick(coreset=CoresetConfig(score=my_el2n)), tmp_path / "run.pt"
    history = train(tiny(), plain_digits, config, path)
    assert train(tiny(), plain_digits, config, path).loss.tolist() == history.loss.tolist()
    named = f"'score': '{__name__}.my_el2n'"
    with pytest.raises(ValueError, match=rf"one of the same run, but coreset: .*{named}.* there, "):
        train(tiny(), plain_digits, quick(coreset=CoresetConfig(score=my_grand)), path)
    run = Run(profile="smoke", dataset="digits", model="resnet8", spec=emq.QuantSpec(bits=(2,)), config=config)
    assert run.coreset == f"{__name__}.my_el2n" and len({run.hash, replace(run, config=quick()).hash}) == 2


def of_two(p: Tensor, labels: Tensor) -> Tensor:
    return p.sum(1)


def of_no_batch(p: Tensor, labels: Tensor, features: Tensor | None) -> Tensor:
    return p


def of_nan(p: Tensor, labels: Tensor, features: Tensor | None) -> Tensor:
    return p.sum(1) * torch.nan


@pytest.mark.parametrize("wrong", [of_two, of_no_batch, of_nan, nn.Linear, lambda p, labels, features: p.sum(1)])
def test_a_score_of_ones_own_is_tried_when_it_is_given(wrong: Callable) -> None:
    expected = "(one of el2n, .*, or a )?function (of p|that is defined in a module)"
    with pytest.raises(ValueError, match=rf"^score=.*: expected (a )?{expected}"):
        CoresetConfig(score=wrong)


# Arguments


@pytest.mark.parametrize(
    "given",
    [LABELS.tolist(), LABELS.numpy().astype(np.uint8), StackDataset(pixel_values=torch.ones(N, 2), labels=LABELS)],
    ids=lambda given: type(given).__name__,
)
def test_labels_of_whatever_has_them(given: Any) -> None:
    """Of other data sets: test_own_data."""
    labels = Coresets(given, BITS, epochs=1).labels
    assert torch.equal(labels, LABELS) and labels.dtype == torch.int64


@pytest.mark.parametrize("given", [torch.tensor(3), np.array(3)], ids=["tensor", "array"])
def test_a_single_number_is_no_labels(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^labels=.*: expected integers >= 0, one a sample"):
        Coresets(given, BITS, epochs=1)


def test_a_batch_has_a_sample_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that really share batches: test_processes."""
    monkeypatch.setattr(coresets_module, "here", lambda: Place(0, 3))
    with pytest.raises(ValueError, match=r"^batch_size=2: expected a sample in each batch for each of 3 processes$"):
        Coresets(LABELS, BITS, epochs=1).batches(0, 2)


def test_what_trains_several_child_models_in_a_step_is_for_train_alone() -> None:
    for options, name in (
        ({"scheme": "joint"}, "scheme"),
        ({"config": CoresetConfig(score="el2n", scoring="joint")}, "scoring"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}='joint': expected \"bitwise\", where each step trains one"):
            Coresets(LABELS, BITS, epochs=3, **options).batches(0, 10)


def naive_entropy(p: Tensor, *_: Any) -> Tensor:
    return -(p * p.log()).sum(1)  # 0 log 0 is no number


def test_scores_that_are_no_numbers_are_refused() -> None:
    coresets = Coresets(LABELS, BITS, CoresetConfig(score=naive_entropy, pruning_rate=0.5), epochs=3)
    for bits, i in coresets.batches(0, 60):
        coresets.observe(bits, i, torch.where(i[:, None] < 12, torch.tensor([200.0, 0, 0]), LOGITS[0, i]), LABELS[i])
    with pytest.raises(ValueError, match=r"^score='.*entropy.*numbers: 12 of 60 scores of \d bits are not numbers"):
        coresets.batches(1, 60)


@pytest.mark.parametrize("n", [15, 35, 1435])
def test_candidates_are_never_fewer_than_a_coreset(n: int) -> None:
    """Both are rounded, and 0.3 of 15 is rounded down, where 15 less 0.7 of 15 is rounded up."""
    config = CoresetConfig(score="el2n", pruning_rate=0.7, candidates=0.3)
    coresets = Coresets(torch.arange(n) % 3, (2, 8), config, epochs=3)
    for bits, i in coresets.batches(0, 7):
        coresets.observe(bits, i, torch.ones(len(i), 3), i % 3)
    assert coresets.size(0) >= coresets.size(1) == sum(len(i) for b, i in coresets.batches(1, 7) if b == 2)


# Distillation


def test_a_teacher_after_the_forward_pass_leaves_the_childs_features(plain_digits: emq.Dataset) -> None:
    """Scores by `soft_targets` before the forward pass and after it are the same."""
    x, labels = normalize(plain_digits.train.images[:N], plain_digits), plain_digits.train.labels[:N]
    i, ranks = torch.arange(N), []
    for after in (False, True):
        model, coresets = tiny(), Coresets(labels, BITS, CoresetConfig(score="grand", pruning_rate=0.5), epochs=2)
        model.train()
        with coresets.watching(model):
            for bits, _ in coresets.batches(0, N):
                emq.set_bits(model, bits)
                logits = model(x)
                _ = emq.soft_targets(model, x) if after else None
                coresets.observe(bits, i, logits, labels)
        coresets.batches(1, N)
        ranks.append(coresets.ranks)
    assert all(torch.equal(ranks[0][b], ranks[1][b]) for b in BITS)


@pytest.mark.parametrize("training_mode", [True, False])
@pytest.mark.parametrize("wrap", [lambda net: net, partial(nn.Sequential)])
def test_soft_targets_are_the_softmax_of_the_highest_child(
    training_mode: bool, wrap: Callable, plain_digits: emq.Dataset
) -> None:
    net = tiny(dropout=0.5)
    model, x = wrap(net), normalize(plain_digits.train.images[:9], plain_digits)
    model.train()(x)  # running statistics, and ranges of inputs
    with emq.at_bits(net, 8), torch.no_grad():
        expected = model.eval()(x).softmax(1)
    emq.set_bits(net, 2)
    model.train(training_mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = emq.soft_targets(model, x)
    assert torch.equal(targets, expected) and not targets.requires_grad
    assert net[4].bits == 2 and all(m.training == training_mode for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    net.train()
    logits = model(x)
    loss = F.cross_entropy(logits, emq.soft_targets(model, x))  # after the forward pass whose gradient is still due
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in net[4].parameters())
