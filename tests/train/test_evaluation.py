"""Evaluation and batch-norm adaptation of converted networks."""

import copy
import math

import pandas as pd
import pytest
import torch
from networks import assert_same_state, build, spec, state
from torch import Tensor, nn

import emqlib as emq
from emqlib.layers import NORMS, InputQuantizer
from emqlib.norms import MultiBitBatchNorm
from emqlib.train.data import Dataset, Split, normalize


@pytest.fixture
def data(rng: torch.Generator) -> Dataset:
    def split(count: int) -> Split:
        images = torch.randint(256, (count, 3, 16, 16), generator=rng, dtype=torch.uint8)
        return Split(images, torch.randint(10, (count,), generator=rng))

    return Dataset("noise", split(90), split(50), tuple("0123456789"), (0.5,) * 3, (0.3,) * 3, False, 0, "")


def batches_of(data: Dataset, split: Split, size: int) -> list[tuple[Tensor, Tensor]]:
    images = normalize(split.images, data)
    return list(zip(images.split(size), split.labels.split(size), strict=True))


def norms(model: nn.Module) -> list[MultiBitBatchNorm]:
    return [m for m in model.modules() if isinstance(m, MultiBitBatchNorm)]


def everything(model: nn.Module) -> list[object]:
    """All that evaluation must leave as it was, but the state dict."""
    flags = [(m.training, getattr(m, "bits", None), getattr(m, "momentum", None)) for m in model.modules()]
    return [flags, [m.own for m in norms(model)], [m.started for m in model.modules() if isinstance(m, InputQuantizer)]]


@pytest.mark.parametrize("activation", ["dorefa", "lsq"])
@pytest.mark.parametrize("norm", NORMS)
def test_evaluate(norm: str, activation: str, data: Dataset) -> None:
    model = emq.convert(build("resnet8"), spec(norm=norm, activation=activation, activation_range="tracked"))
    emq.set_bits(model, {"layer3.0.conv1": 2, "*": 4})
    model.layer2.eval()
    before, others = state(model), copy.deepcopy(everything(model))
    for adapt in (False, True):
        table = emq.evaluate(model, data, bits=(8, 2), adapt_norm=adapt, batch_size=20)
        assert_same_state(state(model), before)
        assert everything(model) == others
    assert list(table.columns) == ["bits", "top1", "loss", "trained", "n"]
    assert list(table.bits) == [2, 8] and list(table.n) == [50, 50] and table.trained.all()


def test_evaluate_against_accuracy_by_hand(data: Dataset) -> None:
    model = emq.convert(build("resnet8"), spec()).eval()
    table = emq.evaluate(model, data, bits=range(1, 9), batch_size=20)
    assert list(table.bits) == list(range(1, 9)) and list(table[table.trained].bits) == [2, 4, 8]
    for row in table.itertuples():
        emq.set_bits(model, row.bits)
        correct, loss = 0, 0.0
        with torch.no_grad():
            rows = model(normalize(data.test.images, data)).double().tolist()
        for logits, label in zip(rows, data.test.labels.tolist(), strict=True):
            correct += logits.index(max(logits)) == label
            loss += math.log(sum(math.exp(v) for v in logits)) - logits[label]
        assert row.top1 == pytest.approx(100 * correct / 50) and row.loss == pytest.approx(loss / 50, rel=1e-4)
    pd.testing.assert_frame_equal(emq.evaluate(model, data), table, rtol=1e-4)
    pd.testing.assert_frame_equal(emq.evaluate(model, batches_of(data, data.test, 13)), table, rtol=1e-4)


def test_ranges_start_alike_whatever_bits_are_asked_for(data: Dataset) -> None:
    """A network not yet run starts its ranges at the highest trained bit-width, not at the first one evaluated."""
    model = emq.convert(build("resnet8"), spec(activation="lsq"))
    alone = emq.evaluate(model, data, bits=(8,))
    among = emq.evaluate(model, data, bits=(1, 2, 8))
    assert among.loss.iloc[-1] == alone.loss.iloc[0]


@pytest.mark.parametrize("norm", NORMS)
def test_evaluating_with_adaptation_is_adapting_then_evaluating(norm: str, data: Dataset) -> None:
    model = emq.convert(build("resnet8"), spec(norm=norm))
    at_once = emq.evaluate(model, data, bits=(2, 3, 32), adapt_norm=True, batch_size=30)
    plain = emq.evaluate(model, data, bits=(2,), batch_size=30)
    emq.adapt_norm(model, data, bits=(2, 3, 32), batch_size=30)
    pd.testing.assert_frame_equal(emq.evaluate(model, data, bits=(2, 3, 32), batch_size=30), at_once)
    assert plain.loss.iloc[0] != at_once.loss.iloc[0]


@pytest.mark.parametrize("norm", NORMS)
def test_adapt_norm_averages_batch_statistics(norm: str, data: Dataset) -> None:
    model = emq.convert(build("resnet8"), spec(norm=norm)).train()
    model(normalize(data.train.images, data))
    before = state(model)
    seen: dict[MultiBitBatchNorm, list[Tensor]] = {m: [] for m in norms(model)}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen[m].append(args[0])) for m in seen]
    emq.adapt_norm(model, batches_of(data, data.train, 30), bits=(3,))
    for hook in hooks:
        hook.remove()
    row = 2  # of 3 bits, in the order of bit-widths
    for m, inputs in seen.items():
        assert len(inputs) == 3 and m.serves(3) and m.momentum == 0.1 and m.training
        mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
        torch.testing.assert_close(m.running_mean[row], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(m.running_var[row], var, rtol=1e-4, atol=1e-5)
    for name, tensor in state(model).items():
        if "running" in name:
            others = [r for r in range(len(tensor)) if r != row]
            assert torch.equal(tensor[others], before[name][others]), name
        elif "_extra_state" not in name:
            assert torch.equal(tensor, before[name]), name
    emq.set_bits(model, 3)


@pytest.mark.parametrize("what", ["images", "weights"])
def test_what_is_not_finite_is_no_result_and_no_statistics(what: str, data: Dataset) -> None:
    """argmax would call it class 0, and one batch would spoil the statistics of a bit-width for good."""
    model = emq.convert(build("resnet8"), spec())
    pairs = [(torch.full((4, 3, 8, 8), torch.nan), torch.zeros(4).long())] if what == "images" else data
    if what == "weights":
        model.layer2[0].conv1.weight.data[0, 0, 0, 0] = torch.nan
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"^loss=nan at 2 bits: weights, norms or images are not finite$"):
        emq.evaluate(model, pairs, bits=(2, 4))
    with pytest.raises(FloatingPointError, match=r"^statistics of a batch norm: weights or images are not finite$"):
        emq.adapt_norm(model, pairs, bits=(3,))
    pairs = zip(state(model).values(), before.values(), strict=True)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)


def test_too_little_memory_to_evaluate_says_what_to_try(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = emq.convert(build("resnet8"), spec())

    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    model.fc.register_forward_pre_hook(too_much)
    for function in (emq.evaluate, emq.adapt_norm):
        with pytest.raises(MemoryError, match=r"^batch_size=40: out of memory \(CUDA .*\); try batch_size=20$"):
            function(model, data, bits=(2,), batch_size=40)


def test_adapt_norm_takes_a_random_part_of_the_training_images(data: Dataset) -> None:
    model = emq.convert(build("resnet8"), spec())
    sizes: list[int] = []
    model.bn1.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    emq.adapt_norm(model, data, bits=(2,), samples=50, batch_size=40)
    assert sizes == [25, 25]
    once = state(model)
    emq.adapt_norm(model, data, bits=(2,), samples=50, batch_size=40)
    assert_same_state(state(model), once)  # the same images each time, and nothing left of the first time
    emq.adapt_norm(model, data, bits=(2,), batch_size=90)
    assert sizes[-1] == 90


def test_a_last_batch_of_few_images_counts_for_as_many(data: Dataset) -> None:
    model, seen = emq.convert(build("resnet8"), spec()), []
    model.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    emq.adapt_norm(model, batches_of(data, data.train, 85), bits=(2,))
    first, last = (x.mean((0, 2, 3)) for x in seen)
    assert [len(x) for x in seen] == [85, 5]
    torch.testing.assert_close(model.bn1.running_mean[1], (85 * first + 5 * last) / 90)


class Merged(nn.Linear):
    """Merges its weights for evaluation, as the layers of LoRA do."""

    def train(self, mode: bool = True) -> "Merged":
        self.merged = not mode
        return super().train(mode)


def test_a_layer_with_modes_of_its_own_is_told_of_both(data: Dataset) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), Merged(8, 8), nn.Linear(8, 3))
    model = emq.convert(net, emq.QuantSpec(bits=(2, 8))).train()
    emq.soft_targets(model, torch.rand(4, 3, 2, 2))
    assert model[4].training and not model[4].merged


def test_labels_of_evaluate(data: Dataset) -> None:
    model, (images, labels) = emq.convert(build("resnet8"), spec()), next(iter(batches_of(data, data.test, 20)))
    expected = emq.evaluate(model, [(images, labels)], bits=(2,))
    pd.testing.assert_frame_equal(emq.evaluate(model, [(images, labels.to(torch.int16))], bits=(2,)), expected)
    for wrong in (labels - 100, labels.float()):
        with pytest.raises(ValueError, match=r"^labels=.*: expected integers >= 0, the numbers of classes$"):
            emq.evaluate(model, [(images, wrong)], bits=(2,))


def test_adapt_norm_counts_a_norm_that_is_used_twice(data: Dataset) -> None:
    model = emq.convert(build("twice"), spec())
    seen: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    emq.adapt_norm(model, data, bits=(8,), batch_size=45)
    del seen[:-4]  # the first two went by when the ranges started
    torch.testing.assert_close(model.norm.running_mean[7], torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))


def failing(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The second batch has one channel too few."""
    return [pairs[0], (pairs[1][0][:, :2], pairs[1][1])]


@pytest.mark.parametrize("norm", NORMS)
def test_training_goes_on_as_if_nothing_had_been_adapted(norm: str, data: Dataset) -> None:
    """Training changes the weights that the adapted statistics are of."""
    config = emq.TrainConfig(epochs=1, batch_size=30, lr=0.05)
    plain, adapted = (emq.convert(build("resnet8"), spec(norm=norm, activation="lsq")) for _ in range(2))
    adapted.load_state_dict(plain.state_dict())
    for model in (plain, adapted):
        emq.train(model, data, config, progress=False)
    emq.adapt_norm(adapted, data, (2, 3) if norm == "shared" else (3,), samples=60)
    for model in (plain, adapted):
        emq.train(model, data, config, progress=False)
    for ours, theirs in zip(norms(adapted), norms(plain), strict=True):
        assert ours.own == theirs.own == (set() if norm == "shared" else {*spec().bits})
    assert emq.evaluate(adapted, data, bits=(2, 8)).equals(emq.evaluate(plain, data, bits=(2, 8)))


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_changes_on_an_exception(norm: str, data: Dataset) -> None:
    model = emq.convert(build("resnet8"), spec(norm=norm, activation="lsq"))
    pairs = failing(batches_of(data, data.test, 20))
    before, others = state(model), copy.deepcopy(everything(model))
    for call in (lambda: emq.evaluate(model, pairs, (2, 4)), lambda: emq.adapt_norm(model, pairs, (2, 3))):
        with pytest.raises(RuntimeError):
            call()
        assert_same_state(state(model), before)
        assert everything(model) == others
