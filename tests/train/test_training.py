"""Training: plans, schedules and seeds by closed forms, steps by a loop written out, runs by stopping and killing."""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import BITS, assert_same_state, quick, same_state, tiny, tiny_net, train

import emqlib as emq
from emqlib import CoresetConfig, Dataset, QuantSpec, TrainConfig
from emqlib.layers import NORMS
from emqlib.norms import MultiBitBatchNorm
from emqlib.train import data as loading
from emqlib.train import loop as training
from emqlib.train.coresets import Coresets
from emqlib.train.distributed import Place
from emqlib.train.loop import LossWatch


def coresets(labels: Tensor, bits: tuple[int, ...], config: TrainConfig) -> Coresets:
    return Coresets(labels, bits, config.coreset, epochs=config.epochs, seed=config.seed, scheme=config.scheme)


def plans(labels: Tensor, bits: tuple[int, ...], config: TrainConfig) -> list[list[tuple[tuple[int, ...], Tensor]]]:
    """The steps of each epoch, for coresets that need no scores."""
    drawn = coresets(labels, bits, config)
    return [drawn.steps(epoch, config.batch_size) for epoch in range(config.epochs)]


HUNDRED = torch.arange(100) % 10


# Plans


@pytest.mark.parametrize("n", [1, 7, 64, 65, 100])
@pytest.mark.parametrize("rate", [0.0, 0.8])
@pytest.mark.parametrize("scheme", ["dedicated", "joint", "bitwise"])
def test_an_epoch_sees_each_sample_of_the_subset_once(scheme: str, rate: float, n: int) -> None:
    bits = (4,) if scheme == "dedicated" else BITS
    config = TrainConfig(scheme=scheme, epochs=2, batch_size=16, coreset=CoresetConfig(pruning_rate=rate))
    drawn = coresets(torch.arange(n) % 10, bits, config)
    for epoch in range(2):
        steps, subsets = drawn.steps(epoch, 16), drawn.subsets(epoch)
        assert set(subsets) == set(bits)
        for b, subset in subsets.items():
            seen = [indices for own, indices in steps if b in own]
            assert torch.cat(seen).sort().values.tolist() == subset.tolist()
            assert len(subset) == max(1, round((1 - rate) * n))
            sizes = [len(indices) for indices in seen]
            assert len(sizes) == math.ceil(len(subset) / 16)
            assert max(sizes) <= 16 and max(sizes) - min(sizes) <= 1


def test_bitwise_steps_alternate_between_the_children() -> None:
    steps = plans(HUNDRED, BITS, TrainConfig(scheme="bitwise", batch_size=16))[0]
    assert [bits for bits, _ in steps] == [(8,), (4,), (2,)] * 7
    first = [indices.tolist() for _, indices in steps[:3]]
    assert first[0] != first[1] != first[2] != first[0]


def test_every_epoch_is_shuffled_anew() -> None:
    config = TrainConfig(scheme="joint", batch_size=100, epochs=3)
    orders = [steps[0][1].tolist() for steps in plans(HUNDRED, BITS, config)]
    assert list(range(100)) not in orders and orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("dedicated", None),
        ("joint", {"pruning_rate": 0.55}),
        ("bitwise", {"pruning_rate": 0.0}),
        ("bitwise", {}),
        ("bitwise", {"score": "el2n", "candidates": 0.6, "scoring": "joint"}),
        ("joint", {"score": "el2n", "scoring_epochs": 2}),
    ],
)
def test_the_history_counts_passes_and_steps(scheme: str, options: dict | None, digits: Dataset) -> None:
    bits = (4,) if scheme == "dedicated" else BITS
    coreset = None if options is None else CoresetConfig(**{"pruning_rate": 0.7} | options)
    history = train(tiny(bits), digits, quick(scheme=scheme, epochs=4, coreset=coreset))
    expected = ["epoch", "lr", "loss", "steps", "sample_passes", "scoring_passes", "seconds"]
    assert history.columns.tolist() == expected and history.epoch.tolist() == [1, 2, 3, 4]
    scored = 0 if coreset is None else coreset.warmup
    sizes = [round(100 * coreset.candidates)] * scored if coreset else []
    sizes += [round(100 * (1 - (coreset.pruning_rate if coreset else 0)))] * (4 - scored)
    assert history.sample_passes.tolist() == [len(bits) * size for size in sizes]
    assert history.scoring_passes.tolist() == [len(bits) * size for size in sizes[:scored]] + [0] * (4 - scored)
    joint = [scheme == "joint" or (i < scored and coreset.scoring == "joint") for i in range(4)]
    steps = [math.ceil(size / 25) * (1 if j else len(bits)) for size, j in zip(sizes, joint, strict=True)]
    assert history.steps.tolist() == steps


# Learning rate


@pytest.mark.parametrize("progress", [0.1, 1.0, 2.0, 2.5, 6.0, 9.99])
def test_cosine_after_warm_up(progress: float) -> None:
    config = TrainConfig(lr=0.4, epochs=10, warmup_epochs=2.0)
    rising = 0.4 * progress / 2
    falling = 0.2 * (1 + math.cos(math.pi * (progress - 2) / 8))
    assert training.learning_rate(progress, config) == pytest.approx(rising if progress < 2 else falling)


def test_the_peak_and_the_end_of_the_cosine() -> None:
    for warmup in (0.0, 0.5, 3.0):
        config = TrainConfig(lr=0.4, epochs=10, warmup_epochs=warmup)
        assert training.learning_rate(warmup, config) == 0.4
        assert training.learning_rate(10.0, config) == pytest.approx(0, abs=1e-12)
        rates = [training.learning_rate(warmup + i / 10, config) for i in range(int(10 * (10 - warmup)) + 1)]
        assert rates == sorted(rates, reverse=True)


def test_the_history_shows_the_learning_rate(digits: Dataset) -> None:
    history = train(tiny(), digits, quick(epochs=4, batch_size=100, lr=0.2))
    middles = [epoch - 1 / 6 for epoch in (1, 2, 3, 4)]  # of the last of three steps
    assert history.lr.tolist() == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 4)) for t in middles])


def test_every_parameter_group_follows(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD) -> None:
        seen.append([group["lr"] for group in self.param_groups])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    train(tiny(), digits, quick(scheme="joint", batch_size=50, warmup_epochs=1, schedule="step"))
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([[0.0125, 0.0375, 0.05, 0.05]]).T.expand(4, 2))


def rates(monkeypatch: pytest.MonkeyPatch, data: Dataset, images: int = 6, **fields: object) -> list[float]:
    """The learning rate of each step of a run of three steps an epoch, without the arithmetic of the steps."""
    seen: list[float] = []
    monkeypatch.setattr(training, "_step", lambda run, bits, size, batch, lr, *_: seen.append(lr))
    monkeypatch.setattr(LossWatch, "mean", lambda self: 0.0)
    config = quick(**{"scheme": "joint", "batch_size": 2, "lr": 1.0} | fields)
    train(tiny(bits=(4,)), data.subset(images, 2), config)
    return seen


def test_a_milestone_of_two_gives_two_epochs_at_the_first_rate(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rates(monkeypatch, digits, epochs=5, schedule="step", milestones=(2, 4))
    assert found == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 3)


def test_neither_the_first_step_of_a_warm_up_nor_the_last_of_a_cosine_has_a_rate_of_zero(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rates(monkeypatch, digits, epochs=3, warmup_epochs=1)
    assert found[:3] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert found[3:] == sorted(found[3:], reverse=True) and found[-1] > 0.01


@pytest.mark.parametrize("fields", [{}, {"schedule": "step", "milestones": (1,)}, {"warmup_epochs": 0.9}])
def test_a_run_of_one_step_trains(digits: Dataset, monkeypatch: pytest.MonkeyPatch, fields: dict) -> None:
    (rate,) = rates(monkeypatch, digits, images=2, epochs=1, **fields)
    assert rate >= 0.5


# Seeds by purpose


def test_a_seed_is_a_run_and_the_global_generator_is_left_alone(digits: Dataset) -> None:
    models = []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        models.append(tiny(dropout=0.3))
        train(models[-1], digits, quick(seed=seed, coreset=CoresetConfig(pruning_rate=0.5)))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(models[0], models[1])
    assert not same_state(models[0], models[2])


def test_the_global_generator_is_put_back_after_an_error(digits: Dataset) -> None:
    before = torch.get_rng_state()
    with pytest.raises(FloatingPointError):
        train(tiny(dropout=0.3), digits, quick(lr=1e35))
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_of_different_purposes_differ() -> None:
    purposes = [(0, "shuffle", 0), (1, "shuffle", 0), (0, "augment", 0), (0, "shuffle", 1), (0, "shuffle", 0, 2)]
    seeds = {training.generator(seed, *purpose).initial_seed() for seed, *purpose in purposes}
    assert len(seeds) == len(purposes)
    assert training.generator(0, "shuffle", 0).initial_seed() in seeds


@pytest.mark.parametrize("scheme", ["joint", "bitwise"])
def test_another_coreset_does_not_shift_the_shuffling(scheme: str) -> None:
    """Subsets differ, and the samples in them stand in the same order."""
    orders, subsets = [], []
    for every in (0, 1):
        config = TrainConfig(scheme=scheme, epochs=4, batch_size=16, coreset=CoresetConfig(resample_every=every))
        drawn = coresets(HUNDRED.repeat(2), BITS, config)
        subset, steps = drawn.subsets(3), drawn.steps(3, 16)
        ranks = [torch.searchsorted(subset[bits[0]], indices) for bits, indices in steps]
        orders.append([rank.tolist() for rank in ranks])
        subsets.append(subset[2].tolist())
    assert orders[0] == orders[1] and subsets[0] != subsets[1]


def test_another_coreset_or_network_does_not_shift_the_augmentation(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[Tensor] = []
    moves = loading._moves

    def watched(batch: int, data: Dataset, generator: torch.Generator) -> Tensor:
        states.append(generator.get_state())
        return moves(batch, data, generator)

    monkeypatch.setattr(loading, "_moves", watched)
    runs = []
    for every, dropout in ((0, 0.0), (1, 0.5)):
        states.clear()
        train(tiny(dropout=dropout), digits, quick(coreset=CoresetConfig(pruning_rate=0.5, resample_every=every)))
        runs.append(torch.stack(states))
    assert torch.equal(runs[0], runs[1]) and len(runs[0].unique(dim=0)) == len(runs[0])


# Steps, against a loop written out


def soft_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over the batch of w -sum_c target_c log p_c; logits, target: (B, C), weights: (B,)."""
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    return -(weights * (target * log_p).sum(1)).mean()


def standardized(images: Tensor, data: Dataset) -> Tensor:
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (data.mean, data.std))
    return (images.double() / 255 - mean) / std


def literal_run(model: nn.Module, data: Dataset, config: TrainConfig) -> None:
    """`train` at a constant learning rate for data without augmentation: plain losses and PyTorch's optimizers."""
    decayed = [model[i].weight for i in (0, 4, 10)]
    free = [p for p in model.parameters() if all(p is not weight for weight in decayed)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0}]
    sgd = torch.optim.SGD(groups, config.lr, momentum=config.momentum, nesterov=config.nesterov)
    optimizer = sgd if config.optimizer == "sgd" else torch.optim.AdamW(groups, config.lr)
    model.train()
    drawn = coresets(data.train.labels, BITS, config)
    for bits, indices in (step for epoch in range(config.epochs) for step in drawn.steps(epoch, config.batch_size)):
        images = standardized(data.train.images[indices], data)
        target = nn.functional.one_hot(data.train.labels[indices], 10).double()
        target = target * (1 - config.label_smoothing) + config.label_smoothing / 10
        optimizer.zero_grad()
        for b in bits:
            emq.set_bits(model, b)
            logits = model(images)
            soft_cross_entropy(logits, target, drawn.weights(b, indices)).backward()
            if config.distillation:
                target = logits.detach().exp() / logits.detach().exp().sum(1, keepdim=True)
        if config.clip_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()


@contextmanager
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In float32 a rounding error could lift a weight over a quantization step, and the two runs would part."""
    with monkeypatch.context() as patch:
        patch.setattr(loading, "normalize", standardized)
        patch.setattr(Tensor, "float", lambda t: t if t.is_floating_point() else t.double())
        yield


WEIGHTED = CoresetConfig(pruning_rate=0.5, how="sample", unbiased=True)
STEPS = {
    "bitwise": {},
    "joint": {"scheme": "joint"},
    "distillation": {"scheme": "joint", "distillation": True},
    "smoothed distillation": {"scheme": "joint", "distillation": True, "label_smoothing": 0.2},
    "label smoothing": {"label_smoothing": 0.1},
    "clipped": {"scheme": "joint", "clip_grad_norm": 0.5},
    "no momentum": {"momentum": 0.0, "nesterov": False},
    "heavy ball": {"nesterov": False, "weight_decay": 0.1},
    "adamw": {"scheme": "joint", "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.3},
    "coreset": {"coreset": CoresetConfig(pruning_rate=0.5)},
    "weighted losses": {"coreset": WEIGHTED},
    "weighted joint losses": {"scheme": "joint", "label_smoothing": 0.2, "distillation": True, "coreset": WEIGHTED},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_of_the_literal_loop(
    name: str, norm: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(digits.subset(30, 10), crop_padding=0, mean=(0.25, 0.5, 0.375), std=(0.5, 0.25, 1.0))
    config = quick(**{"batch_size": 15, "schedule": "step", "weight_decay": 0.01} | STEPS[name])
    ours, theirs = (tiny(norm=norm).double() for _ in range(2))
    uneven = (torch.linspace(0.5, 1.5, len(data.train)), 0.0)  # those of random coresets are all one
    monkeypatch.setattr(Coresets, "_loss_weights", lambda *_: uneven)
    with float64(monkeypatch):
        train(ours, data, config)
    literal_run(theirs, data, config)
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
    assert not same_state(ours, tiny(norm=norm).double())


# What the optimizer and the device are told


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_for_convolution_and_linear_weights_alone(optimizer: str) -> None:
    model = tiny(weight="lsq", activation="lsq", norm="switchable")
    groups = training.optimizer(model, quick(optimizer=optimizer, weight_decay=0.25)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert decayed == {"0.weight", "4.weight", "10.weight"}
    assert decayed | free == set(names.values()) and not decayed & free
    assert {"10.bias", "1.weight", "4.weight_scale.values", "4.input_quantizer.scale.values"} <= free


def losses(data: Dataset, model: nn.Module | None = None, **fields: Any) -> list[float]:
    return train(model or tiny(), data, quick(**fields)).loss.tolist()


def test_channels_last_computes_the_same(digits: Dataset) -> None:
    models = [tiny(bits=(8, 32)) for _ in range(2)]
    formats = (torch.channels_last, torch.contiguous_format)
    histories = [losses(digits, m, channels_last=last) for m, last in zip(models, (True, False), strict=True)]
    assert [m[4].weight.is_contiguous(memory_format=f) for m, f in zip(models, formats, strict=True)] == [True, True]
    assert not models[0][4].weight.is_contiguous()
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)


def test_bfloat16_runs_the_layers_in_bfloat16(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.distributed, "has_bfloat16", lambda: True)
    types = set()
    model = tiny()
    for layer in (model[0], model[4], model[10]):
        layer.register_forward_hook(lambda layer, inputs, out: types.add(out.dtype))
    half = losses(digits, model, autocast="bfloat16", scheme="joint")
    assert types == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    full = losses(digits, scheme="joint")
    assert half != full and half == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize("largest", [0.0, 0.1])
def test_float16_gradients_are_scaled_back_before_they_are_clipped(largest: float, digits: Dataset) -> None:
    moved = []
    for autocast in ("float16", "none"):
        model = tiny(activation="none")
        before = model[4].weight.detach().clone()
        train(model, digits, quick(autocast=autocast, clip_grad_norm=largest))
        moved.append((model[4].weight.detach() - before).flatten())
    assert moved[0].norm().item() == pytest.approx(moved[1].norm().item(), rel=0.1)
    assert nn.functional.cosine_similarity(*moved, dim=0) > 0.9


def test_auto_compiles_where_a_run_is_long_enough(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole run, so that one that is resumed does as it did; forward passes count, joint or not."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    model = tiny()
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    for scheme in ("joint", "bitwise"):
        config = quick(compile="auto", scheme=scheme)
        forwards = len(model.emq.spec.bits) * config.epochs * -(-len(digits.train) // config.batch_size)
        for steps, times in ((forwards / layers + 1, 0), (forwards / layers, 1)):
            monkeypatch.setattr(training.distributed, "COMPILE_STEPS", steps)
            compiled.clear()
            train(tiny(), digits, config)
            assert len(compiled) == times
    assert losses(digits, model, compile=True) == losses(digits) and compiled[-1] is model


def test_graphs_are_for_one_gpu_alone(digits: Dataset) -> None:
    """tests/test_cuda.py has them; elsewhere a network is what it is without."""
    assert losses(digits, tiny(), compile="graphs") == losses(digits)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scheme": "joint", "distillation": True},
        {"scheme": "joint", "optimizer": "adamw", "clip_grad_norm": 1.0, "label_smoothing": 0.1},
    ],
)
@pytest.mark.parametrize("spec", [{}, {"weight": "lsq", "activation": "lsq"}, {"norm": "switchable"}])
def test_a_step_mixes_no_devices(fields: dict, spec: dict, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which computes nothing and refuses tensors that lie elsewhere."""
    config, meta = quick(**fields), torch.device("meta")
    monkeypatch.setattr(Place, "device", lambda *_: meta)
    run = training._Run(tiny(**spec), digits, config, BITS)
    model = run.model
    watch = LossWatch(Place(), model, meta)
    watch.lag = 100  # a loss without a value cannot be looked at
    steps = plans(digits.train.labels, BITS, config)[0][:3]
    given = run.loader.epoch([indices for _, indices in steps], torch.Generator())
    for (bits, indices), batch in zip(steps, given, strict=True):
        training._step(run, bits, len(indices), batch, 0.1, watch, "step")
    assert {loss.device for loss, *_ in watch.pending} == {meta}
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    assert {p.grad.device for p in weights.values()} == {meta} and run.optimizer.state


@pytest.mark.parametrize("scheme", ["bitwise", "joint"])
def test_parts_of_a_step_add_up_to_it(scheme: str, digits: Dataset) -> None:
    """Of a network without batch norm, in float64: the gradient is a mean over samples, in however many parts."""
    histories, states = [], []
    for accumulate in (1, 2, 3):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 10))
        model = emq.convert(net, QuantSpec(bits=BITS, weight="minmax", activation="none")).double()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "normalize", standardized)
            config = quick(scheme=scheme, accumulate=accumulate, batch_size=23, clip_grad_norm=1.0)
            histories.append(train(model, digits, config).loss.tolist())
        states.append(model.state_dict())
    for history, state in zip(histories[1:], states[1:], strict=True):
        assert history == pytest.approx(histories[0], rel=1e-6)
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12)


def test_batch_norm_sees_a_part_at_a_time(digits: Dataset) -> None:
    """So its running statistics move once a part, and batches must leave two images to each."""
    calls: list[int] = []
    model = tiny()
    hook = next(m for m in model.modules() if isinstance(m, MultiBitBatchNorm)).register_forward_pre_hook(
        lambda _, x: calls.append(len(x[0]))
    )
    history = train(model, digits, quick(epochs=1, accumulate=2, batch_size=20))
    hook.remove()
    assert len(calls) == 2 * history.steps.sum() and set(calls) == {10}
    message = (
        r"^batch_size=5: expected two images at least for each of 3 parts on 1 processes in a step, where some have 5$"
    )
    with pytest.raises(ValueError, match=message):
        train(tiny(), digits, quick(accumulate=3, batch_size=5))


# Scores while training


def test_recording_changes_nothing(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the scoring phase a run is, to the bit, one on the full data, whichever score is recorded."""
    states: list[dict[str, Tensor]] = []
    epoch = training._epoch

    def watched(run: Any, bar: Any) -> dict[str, Any]:
        if run.epoch == 3:
            states.append(copy.deepcopy(run.model.state_dict()))
        return epoch(run, bar)

    monkeypatch.setattr(training, "_epoch", watched)
    scores = ("el2n", "tdds", "moderate", "grand", "forgetting", "entropy")
    configs = [CoresetConfig(score=score, pruning_rate=0.5, scoring_epochs=3) for score in scores]
    histories = [train(tiny(dropout=0.3), digits, quick(epochs=4, coreset=config)) for config in (None, *configs)]
    for state, history in zip(states, histories, strict=True):
        assert history.loss.tolist()[:3] == histories[0].loss.tolist()[:3]
        assert not [name for name, tensor in state.items() if not torch.equal(tensor, states[0][name])]
    assert len({history.loss.tolist()[3] for history in histories}) > 2


# Does it learn


@pytest.mark.parametrize("scheme", ["bitwise", "joint"])
def test_it_learns(scheme: str) -> None:
    pytest.importorskip("sklearn")
    data = emq.load_dataset("digits", image_size=12).subset(400, 200)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = emq.convert(emq.models.resnet8(width=8), QuantSpec(bits=BITS))
    history = train(model, data, TrainConfig(scheme=scheme, epochs=5, batch_size=20, lr=0.1, warmup_epochs=0.5))
    assert history.loss.iloc[-1] < 0.7 * history.loss.iloc[0]
    table = emq.evaluate(model, data, bits=BITS)
    assert table.trained.all() and (table.top1 > 40).all(), table  # chance: 10
    assert model.layer2[0].conv1.bits == 8  # left at the highest


# Arguments


@pytest.mark.parametrize("config", [TrainConfig(), CoresetConfig()], ids=["train", "coreset"])
def test_every_field_of_a_config_refuses_what_it_cannot_mean(config: Any) -> None:
    for field in fields(config):
        for value in ("", -1, 1.5j, float("nan"), [None], torch.ones(2)):
            with pytest.raises(ValueError, match=rf"(?s)^{field.name}=.*: expected .+"):
                replace(config, **{field.name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distillation": True}, r'^distillation=True: expected scheme="joint", where the children share a batch'),
        ({"momentum": 0}, r"^nesterov=True: expected False when momentum is 0"),
        ({"warmup_epochs": 5, "epochs": 5}, r"^warmup_epochs=5\.0: expected less than epochs=5"),
        ({"device": "cuda:99"}, r"^device='cuda:99': expected one of auto, cpu"),
    ],
)
def test_values_that_do_not_fit_together(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def test_numpy_numbers_become_plain_ones(digits: Dataset, tmp_path: Path) -> None:
    """They cannot be written as JSON, which would fail after the first epoch."""
    np = pytest.importorskip("numpy")
    config = quick(
        epochs=np.int64(1), batch_size=np.int32(50), seed=np.uint8(3), lr=np.float32(0.5), milestones=[np.int64(1)]
    )
    assert config == quick(epochs=1, batch_size=50, seed=3, lr=0.5, milestones=(1,))
    train(tiny(), digits, config, tmp_path / "run.pt")
    assert quick(lr=1) == quick(lr=1.0) and isinstance(quick(lr=1).lr, float)


def test_a_folder_that_cannot_be_written_to(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(ValueError, match=r"^checkpoint=.*in a folder that can be written to"):
        train(tiny(), digits, quick(), tmp_path / "below" / "run.pt")
    assert not os.listdir(tmp_path)


def test_a_network_needs_an_output_for_each_class(digits: Dataset, tmp_path: Path) -> None:
    model = emq.convert(tiny_net(classes=9), QuantSpec(bits=BITS))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^model='9 outputs': expected 10 or more, one a class"):
        train(model, digits, quick(), tmp_path / "run.pt")
    assert same_state(model, before) and os.listdir(tmp_path) == [".run.pt.lock"]
    train(emq.convert(tiny_net(classes=11), QuantSpec(bits=BITS)), digits, quick())
