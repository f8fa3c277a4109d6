"""Training: plans, schedules and seeds by closed forms, steps by a loop written out, runs by stopping and killing."""

import copy
import io
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

import emqlib as emq
from emqlib import CoresetConfig, Dataset, OutOfTime, QuantSpec, TrainConfig, checkpoints, container, loading, training
from emqlib.checkpoints import Deadline
from emqlib.files import Busy
from emqlib.finite import LossWatch
from emqlib.layers import NORMS, InputQuantizer
from emqlib.norms import MultiBitBatchNorm
from emqlib.ranks import Ranks
from emqlib.sampling import SCORES, Sampler, Selection

BITS = (2, 4, 8)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these are ten times slower when threads of several processes wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    pytest.importorskip("sklearn")
    return emq.load_dataset("digits", image_size=8).subset(100, 50)


def tiny_net(classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """First, quantized and last layer, batch norms, and dropout if wanted.

    No bias before a batch norm: its gradient is zero but for rounding, and AdamW would make steps of that.
    """
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(24, classes),
    )


def tiny(bits: tuple[int, ...] = BITS, init: int = 0, dropout: float = 0.0, **spec: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init)
        return emq.convert(tiny_net(dropout=dropout), QuantSpec(bits=bits, **spec))


def quick(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 25, "lr": 0.05} | fields)


def train(model: nn.Module, data: Dataset, config: TrainConfig, checkpoint: Path | None = None) -> pd.DataFrame:
    return emq.train(model, data, config, checkpoint=checkpoint, progress=False)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def sampler(labels: Tensor, bits: tuple[int, ...], config: TrainConfig) -> Sampler:
    return Sampler(config.coreset, config.scheme, config.seed, bits, labels, config.epochs)


def selections(labels: Tensor, bits: tuple[int, ...], config: TrainConfig) -> Iterator[Selection]:
    """What each epoch trains on, for coresets that need no scores."""
    drawn = sampler(labels, bits, config)
    yield from (drawn.selection(epoch) for epoch in range(config.epochs))


def plans(labels: Tensor, bits: tuple[int, ...], config: TrainConfig) -> list[list[training.Step]]:
    return [training.plan(s, config, epoch) for epoch, s in enumerate(selections(labels, bits, config))]


HUNDRED = torch.arange(100) % 10


# Plans


@pytest.mark.parametrize("n", [1, 7, 64, 65, 100])
@pytest.mark.parametrize("rate", [0.0, 0.8])
@pytest.mark.parametrize("scheme", ["dedicated", "joint", "bitwise"])
def test_an_epoch_sees_each_sample_of_the_subset_once(scheme: str, rate: float, n: int) -> None:
    bits = (4,) if scheme == "dedicated" else BITS
    config = TrainConfig(scheme=scheme, epochs=2, batch_size=16, coreset=CoresetConfig(pruning_rate=rate))
    for epoch, selection in enumerate(selections(torch.arange(n) % 10, bits, config)):
        steps = training.plan(selection, config, epoch)
        assert set(selection.subsets) == set(bits)
        for b, subset in selection.subsets.items():
            seen = [step.indices for step in steps if b in step.bits]
            assert torch.cat(seen).sort().values.tolist() == subset.tolist()
            assert len(subset) == max(1, round((1 - rate) * n))
            sizes = [len(indices) for indices in seen]
            assert len(sizes) == math.ceil(len(subset) / 16)
            assert max(sizes) <= 16 and max(sizes) - min(sizes) <= 1


def test_joint_steps_have_all_bit_widths_highest_first() -> None:
    steps = plans(HUNDRED, BITS, TrainConfig(scheme="joint", batch_size=16))[0]
    assert {step.bits for step in steps} == {(8, 4, 2)} and len(steps) == 7


def test_bitwise_steps_alternate_between_the_children() -> None:
    steps = plans(HUNDRED, BITS, TrainConfig(scheme="bitwise", batch_size=16))[0]
    assert [step.bits for step in steps] == [(8,), (4,), (2,)] * 7
    first = [step.indices.tolist() for step in steps[:3]]
    assert first[0] != first[1] != first[2] != first[0]


def test_every_epoch_is_shuffled_anew() -> None:
    config = TrainConfig(scheme="joint", batch_size=100, epochs=3)
    orders = [steps[0].indices.tolist() for steps in plans(HUNDRED, BITS, config)]
    assert list(range(100)) not in orders and orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(("scheme", "bits"), [("dedicated", (4,)), ("joint", BITS), ("bitwise", BITS)])
@pytest.mark.parametrize("rate", [None, 0.0, 0.55, 0.8])
def test_sample_passes_are_counted(digits: Dataset, scheme: str, bits: tuple[int, ...], rate: float | None) -> None:
    coreset = None if rate is None else CoresetConfig(pruning_rate=rate)
    history = train(tiny(bits), digits, quick(scheme=scheme, batch_size=50, coreset=coreset))
    expected = ["epoch", "lr", "loss", "steps", "sample_passes", "scoring_passes", "seconds"]
    assert history.columns.tolist() == expected and not history.scoring_passes.any()
    passes = len(bits) * round((1 - (rate or 0)) * 100)
    assert history.sample_passes.tolist() == [passes, passes]
    batches = math.ceil(round((1 - (rate or 0)) * 100) / 50)
    assert history.steps.tolist() == [batches * (len(bits) if scheme == "bitwise" else 1)] * 2
    assert history.epoch.tolist() == [1, 2]


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


def test_step_schedule() -> None:
    config = TrainConfig(lr=1.0, epochs=20, schedule="step", milestones=[5, 10], gamma=0.1, warmup_epochs=1)
    assert config.milestones == (5, 10)
    rates = [training.learning_rate(progress, config) for progress in (0.5, 1.0, 4.99, 5.0, 9.9, 10.0, 20.0)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_the_history_shows_the_learning_rate(digits: Dataset) -> None:
    history = train(tiny(), digits, quick(epochs=4, batch_size=100, lr=0.2))
    assert history.lr.tolist() == pytest.approx([0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (1, 2, 3, 4)])


def test_every_parameter_group_follows(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD) -> None:
        seen.append([group["lr"] for group in self.param_groups])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    train(tiny(), digits, quick(scheme="joint", batch_size=50, warmup_epochs=1, schedule="step"))
    assert seen == [[rate, rate] for rate in (0.025, 0.05, 0.05, 0.05)]


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
        selection = list(selections(HUNDRED.repeat(2), BITS, config))[3]
        subset, steps = selection.subsets, training.plan(selection, config, 3)
        ranks = [torch.searchsorted(subset[s.bits[0]], s.indices) for s in steps]
        orders.append([rank.tolist() for rank in ranks])
        subsets.append(subset[2].tolist())
    assert orders[0] == orders[1] and subsets[0] != subsets[1]


def test_another_coreset_or_network_does_not_shift_the_augmentation(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[Tensor] = []
    augment = loading.augment

    def watched(images: Tensor, data: Dataset, generator: torch.Generator) -> Tensor:
        states.append(generator.get_state())
        return augment(images, data, generator)

    monkeypatch.setattr(loading, "augment", watched)
    runs = []
    for every, dropout in ((0, 0.0), (1, 0.5)):
        states.clear()
        train(tiny(dropout=dropout), digits, quick(coreset=CoresetConfig(pruning_rate=0.5, resample_every=every)))
        runs.append(torch.stack(states))
    assert torch.equal(runs[0], runs[1]) and len(runs[0].unique(dim=0)) == len(runs[0])


# Steps, against a loop written out


def soft_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Mean over the batch of w -sum_c target_c log p_c; logits, target: (B, C), weights: (B,)."""
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    return -(weights * (target * log_p).sum(1)).mean()


def standardized(images: Tensor, data: Dataset) -> Tensor:
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (data.mean, data.std))
    return (images.double() / 255 - mean) / std


def literal_run(model: nn.Module, data: Dataset, config: TrainConfig) -> None:
    """`train` at a constant learning rate for data without augmentation: plain autograd, updates by hand."""
    decayed = {"0.weight", "4.weight", "10.weight"}
    memory: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    model.train()
    steps = [step for epoch in plans(data.train.labels, BITS, config) for step in epoch]
    for number, step in enumerate(steps, start=1):
        images = standardized(data.train.images[step.indices], data)
        target = nn.functional.one_hot(data.train.labels[step.indices], 10).double()
        target = target * (1 - config.label_smoothing) + config.label_smoothing / 10
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for b in step.bits:
            emq.set_bits(model, b)
            logits = model(images)
            loss = soft_cross_entropy(logits, target, 1.0 if step.weights is None else step.weights[step.indices])
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            for name, grad in zip(total, grads, strict=True):
                total[name] += 0 if grad is None else grad
            if config.distillation:
                target = logits.detach().exp() / logits.detach().exp().sum(1, keepdim=True)
        clip(total, config.clip_grad_norm)
        for name, p in model.named_parameters():
            decay = config.weight_decay if name in decayed else 0.0
            p.data = UPDATES[config.optimizer](p.data, total[name], decay, config, memory[name], number)


def clip(grads: dict[str, Tensor], largest: float) -> None:
    norm = sum(grad.square().sum() for grad in grads.values()).sqrt()
    if largest and norm > largest:
        for grad in grads.values():
            grad *= largest / (norm + 1e-6)


def sgd(w: Tensor, grad: Tensor, decay: float, config: TrainConfig, memory: list[Tensor], _: int) -> Tensor:
    grad = grad + decay * w
    memory[:] = [config.momentum * memory[0] + grad if memory else grad]
    return w - config.lr * (grad + config.momentum * memory[0] if config.nesterov else memory[0])


def adamw(w: Tensor, grad: Tensor, decay: float, config: TrainConfig, memory: list[Tensor], t: int) -> Tensor:
    m, v = memory or (torch.zeros_like(w), torch.zeros_like(w))
    memory[:] = [0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2]
    m, v = memory[0] / (1 - 0.9**t), memory[1] / (1 - 0.999**t)
    return w - config.lr * decay * w - config.lr * m / (v.sqrt() + 1e-8)


UPDATES: dict[str, Callable[..., Tensor]] = {"sgd": sgd, "adamw": adamw}


@contextmanager
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In float32 a rounding error could lift a weight over a quantization step, and the two runs would part."""
    with monkeypatch.context() as patch:
        patch.setattr(loading, "normalize", standardized)
        patch.setattr(Tensor, "float", lambda t: t if t.is_floating_point() else t.double())
        yield


# quotas are whole numbers, classes are not of one size: so weights differ from one
WEIGHTED = CoresetConfig(pruning_rate=0.5, balanced=True, how="sample", unbiased=True)
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


@pytest.mark.processor
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_of_the_literal_loop(
    name: str, norm: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(digits.subset(30, 10), crop_padding=0, mean=(0.25, 0.5, 0.375), std=(0.5, 0.25, 1.0))
    config = quick(**{"batch_size": 15, "schedule": "step", "weight_decay": 0.01} | STEPS[name])
    ours, theirs = (tiny(norm=norm).double() for _ in range(2))
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


@pytest.mark.processor
def test_channels_last_computes_the_same(digits: Dataset) -> None:
    models = [tiny(bits=(8, 32)) for _ in range(2)]
    formats = (torch.channels_last, torch.contiguous_format)
    histories = [losses(digits, m, channels_last=last) for m, last in zip(models, (True, False), strict=True)]
    assert [m[4].weight.is_contiguous(memory_format=f) for m, f in zip(models, formats, strict=True)] == [True, True]
    assert not models[0][4].weight.is_contiguous()
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)


def test_bfloat16_runs_the_layers_in_bfloat16(digits: Dataset) -> None:
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
        forwards = len(model.quant_spec.bits) * config.epochs * -(-len(digits.train) // config.batch_size)
        for steps, times in ((forwards / layers + 1, 0), (forwards / layers, 1)):
            monkeypatch.setattr(training.devices, "COMPILE_STEPS", steps)
            compiled.clear()
            train(tiny(), digits, config)
            assert len(compiled) == times


def test_compile_hands_the_network_to_torch(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    model = tiny()
    assert losses(digits, model, compile=True) == losses(digits)
    assert compiled == [model]


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
def test_a_step_mixes_no_devices(fields: dict, spec: dict, digits: Dataset) -> None:
    """On the meta device, which computes nothing and refuses tensors that lie elsewhere."""
    config, meta = quick(**fields), torch.device("meta")
    model = tiny(**spec).to(meta)
    optimizer, scaler = training.optimizer(model, config), torch.amp.GradScaler("cpu", enabled=False)
    batches = loading.loader(digits.to(meta), "train", meta)
    parts = (torch.contiguous_format, optimizer, scaler, sampler(digits.train.labels, BITS, config))
    run = training._Run(model, model, model, digits.to(meta), config, Ranks(), meta, batches, *parts)
    watch = LossWatch(Ranks(), model, meta)
    watch.lag = 100  # a loss without a value cannot be looked at
    steps = plans(digits.train.labels, BITS, config)[0][:3]
    for step, batch in zip(steps, batches.epoch([step.indices for step in steps], torch.Generator()), strict=True):
        training._step(run, step, batch, 0.1, watch, "step")
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
        r"^batch_size=5: expected two images at least for each of 3 parts on 1 ranks in a step, where some have 5$"
    )
    with pytest.raises(ValueError, match=message):
        train(tiny(), digits, quick(accumulate=3, batch_size=5))


# Scores while training


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("bitwise", {}),
        ("bitwise", {"scoring": "joint"}),
        ("bitwise", {"candidates": 0.6, "full_epochs": 1}),
        ("bitwise", {"candidates": 0.6, "scoring": "joint", "rescore": True}),
        ("joint", {"scoring_epochs": 2}),
        ("joint", {"candidates": 0.6, "full_epochs": 2}),
    ],
)
def test_passes_and_steps_of_a_scored_run_in_closed_form(scheme: str, options: dict, digits: Dataset) -> None:
    coreset = CoresetConfig(**{"score": "el2n", "pruning_rate": 0.7, "scoring_epochs": 1} | options)
    history = train(tiny(), digits, quick(scheme=scheme, epochs=5, coreset=coreset))
    middle = 5 - coreset.warmup - coreset.full_epochs
    sizes = [round(100 * coreset.candidates)] * coreset.warmup + [30] * middle + [100] * coreset.full_epochs
    joint = [scheme == "joint" or (i < coreset.warmup and coreset.scoring == "joint") for i in range(5)]
    assert history.sample_passes.tolist() == [3 * size for size in sizes]
    assert history.scoring_passes.tolist() == [3 * size for size in sizes[: coreset.warmup]] + [0] * (
        5 - coreset.warmup
    )
    assert history.steps.tolist() == [math.ceil(n / 25) * (1 if j else 3) for n, j in zip(sizes, joint, strict=True)]


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


def watch_losses(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple], list[Selection]]:
    """Whatever `train` computes a loss of, as (step, logits, target, loss), and what was selected for each epoch."""
    seen: list[tuple[training.Step, Tensor, Tensor, Tensor]] = []
    selected: list[Selection] = []
    loss, plan = training._loss, training.plan

    def watched(logits: Tensor, target: Tensor, step: training.Step, *rest: Any) -> Tensor:
        value = loss(logits, target, step, *rest)
        seen.append((step, logits.detach(), target, value.detach()))
        return value

    def planned(selection: Selection, *rest: Any) -> list[training.Step]:
        selected.append(selection)
        return plan(selection, *rest)

    monkeypatch.setattr(training, "_loss", watched)
    monkeypatch.setattr(training, "plan", planned)
    return seen, selected


def test_scores_are_those_of_the_training_passes(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, selected = watch_losses(monkeypatch)
    train(tiny(), digits, quick(coreset=CoresetConfig(score="el2n", pruning_rate=0.6)))
    found = []
    for b in BITS:
        scores = torch.zeros(100)
        for step, logits, target, _ in seen[:12]:  # of the scoring phase
            if step.bits == (b,):
                scores[step.indices] = emq.coreset.el2n(logits.softmax(1), target)
        found.append(selected[1].subsets[b].tolist())
        assert scores.min() > 0 and found[-1] == emq.coreset.select(scores, 0.6).tolist()
    assert found[0] != found[1] != found[2] != found[0]


def test_weighted_losses_are_those_of_the_selections_weights(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """mean(w loss), with the weights of the child that the step trains; none in the scoring phase."""
    seen, selected = watch_losses(monkeypatch)
    coreset = CoresetConfig(score="el2n", pruning_rate=0.6, how="sample", unbiased=True)
    train(tiny(), digits, quick(coreset=coreset))
    assert len(seen) == 3 * 4 + 3 * 2 and [step.weights for step, *_ in seen[:12]] == [None] * 12
    weights = selected[1].weights
    assert set(weights) == set(BITS) and not torch.equal(weights[2], weights[8])
    for step, logits, target, value in seen[12:]:
        w = weights[step.bits[0]][step.indices]
        each = -logits.log_softmax(1)[torch.arange(len(target)), target]
        assert value.item() == pytest.approx(sum((w * each).tolist()) / len(w), rel=1e-5)
        assert w.min() < 0.9 and w.max() > 1.1


@pytest.mark.parametrize("where", ["epoch 1, step 2", "epoch 3, step 2"])
def test_no_hook_stays_after_an_error(where: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the scoring phase nor in an epoch that is scored again."""
    model, during = tiny(), []
    own = len(model[10]._forward_pre_hooks)

    def stop(run: Any) -> None:
        during.append(len(run.model[10]._forward_pre_hooks))
        raise Stop

    coreset = CoresetConfig(score="grand", pruning_rate=0.5, rescore=True)
    with stopped_at(monkeypatch, where, stop), pytest.raises(Stop):
        train(model, digits, quick(epochs=3, coreset=coreset))
    assert during == [own + 1] and len(model[10]._forward_pre_hooks) == own


def test_a_network_without_a_linear_layer_has_no_features_to_score(digits: Dataset) -> None:
    net = nn.Sequential(*(nn.Conv2d(n, m, 3) for n, m in ((3, 6), (6, 6), (6, 10))), nn.Flatten())
    coreset = CoresetConfig(score="grand", pruning_rate=0.5)
    with pytest.raises(ValueError, match=r"^score='grand': expected another, where a network has no linear layer$"):
        train(emq.convert(net, QuantSpec(bits=BITS)), digits, quick(coreset=coreset))


# Does it learn


@pytest.mark.processor
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


# Stopped and resumed


class Stop(Exception):
    """Raised in the middle of an epoch."""


@contextmanager
def stopped_at(
    monkeypatch: pytest.MonkeyPatch, where: str, before: Callable[..., None] | None = None
) -> Iterator[None]:
    """Let `train` run into a Stop at the end of a step, or into what `before(run)` does ahead of it."""
    step = training._step

    def disturbed(run: Any, *args: Any) -> None:
        if before is not None and args[-1] == where:
            before(run)
        step(run, *args)
        if before is None and args[-1] == where:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", disturbed)
        yield


RUNS = {
    "sgd": ({}, {}),
    "joint distillation": ({"scheme": "joint", "distillation": True}, {}),
    "adamw": ({"optimizer": "adamw", "lr": 0.01, "clip_grad_norm": 1.0}, {"norm": "switchable"}),
    "learned scales": ({"scheme": "joint"}, {"weight": "lsq", "activation": "lsq"}),
    "learned clipping": ({"optimizer": "adamw", "lr": 0.01}, {"activation": "pact", "weight": "minmax"}),
    "tracked range": ({"autocast": "bfloat16"}, {"activation_range": "tracked", "norm": "switchable"}),
    "float16": ({"autocast": "float16"}, {}),
    "coreset": ({"coreset": CoresetConfig(pruning_rate=0.5, resample_every=2)}, {"correction": "none"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_where_the_undisturbed_one_does(
    name: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, spec = RUNS[name]
    config, path = quick(epochs=3, warmup_epochs=0.5, **fields), tmp_path / "runs" / "deep" / "run.pt"
    undisturbed = tiny(dropout=0.3, **spec)
    history = train(undisturbed, digits, config, tmp_path / "undisturbed.pt")
    for number, where in enumerate(("epoch 1, step 1", "epoch 2, step 2", "epoch 3, step 1")):
        assert path.exists() == (number > 1)
        model = tiny(init=number if path.exists() else 0, dropout=0.3, **spec)
        torch.manual_seed(number)  # dropout must not depend on where the global generator stands
        with stopped_at(monkeypatch, where), pytest.raises(Stop):
            train(model, digits, config, path)
    resumed = tiny(init=9, dropout=0.3, **spec)
    assert_same_history(train(resumed, digits, config, path), history)
    assert_same_state(resumed, undisturbed)
    scalers = [kept(p)[1]["scaler"] for p in (path, tmp_path / "undisturbed.pt")]
    assert scalers[0] == scalers[1] and bool(scalers[0]) == (name == "float16")
    assert sorted(os.listdir(path.parent)) == [".run.pt.lock", "run.pt"]


def kept(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history and the state in a checkpoint."""
    about, tensors = container.read(path, checkpoints.VERSION, "a checkpoint")
    return json.loads(about["history"]), container.restored(about["state"], tensors)


SCORED = {
    "tdds": {"score": "tdds", "rescore": True, "how": "sample", "unbiased": True},
    "forgetting": {"score": "forgetting", "scoring_epochs": 3, "rescore": True, "candidates": 0.7},
    "moderate": {"score": "moderate", "scoring_epochs": 3, "rescore": True, "scoring": "joint", "how": "ccs"},
    "grand": {"score": "grand", "scoring_epochs": 3, "rescore": True, "across_bits": "disjoint", "balanced": True},
}


@pytest.mark.parametrize("name", SCORED)
def test_a_run_stopped_while_scoring_and_between_draws_ends_with_the_same_coresets(
    name: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick(epochs=6, coreset=CoresetConfig(pruning_rate=0.5, **SCORED[name]))
    undisturbed, path = tiny(), tmp_path / "run.pt"
    history = train(undisturbed, digits, config)
    assert [row["epoch"] for row in history.attrs["coresets"]] == [4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert {row["drift"] for row in history.attrs["coresets"]} > {None}  # rescored: coresets change
    for number, where in enumerate(("epoch 2, step 3", "epoch 5, step 3", "epoch 6, step 2")):
        with stopped_at(monkeypatch, where), pytest.raises(Stop):
            train(tiny(init=number), digits, config, path)
    resumed = tiny(init=9)
    found = train(resumed, digits, config, path)
    assert_same_history(found, history)
    assert found.attrs["coresets"] == history.attrs["coresets"]
    assert_same_state(resumed, undisturbed)


def assert_same_history(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"), check_exact=True)


def test_what_is_observed_after_each_epoch_is_kept_in_the_checkpoint(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path, seen = quick(epochs=3), tmp_path / "run.pt", []

    def observe(model: nn.Module) -> dict[str, list[float]]:
        seen.append(float(model[0].weight.detach().norm()))
        return {"norm": seen[-1:]}

    with stopped_at(monkeypatch, "epoch 3, step 1"), pytest.raises(Stop):
        emq.train(tiny(), digits, config, path, progress=False, observe=observe)
    assert len(seen) == 2
    model = tiny(init=1)
    history = emq.train(model, digits, config, path, progress=False, observe=observe)
    assert len(seen) == len(set(seen)) == 3 and seen[-1] == float(model[0].weight.detach().norm())
    assert history.observed.tolist() == [{"norm": [value]} for value in seen]
    unobserved = tiny()
    assert "observed" not in train(unobserved, digits, config)
    assert_same_state(unobserved, model)


def test_what_started_from_the_first_batch_does_not_start_again(digits: Dataset, tmp_path: Path) -> None:
    config, path = quick(), tmp_path / "run.pt"
    for init in (0, 1):
        model = tiny(init=init, weight="lsq", activation="lsq")
        train(model, digits, config, path)
        quantizers = [m for m in model.modules() if isinstance(m, InputQuantizer)]
        assert quantizers and all(q.started for q in quantizers)
        scale = model[4].input_quantizer.scale.values.detach().clone()
        assert not torch.equal(scale, torch.ones(3))
        emq.evaluate(model, digits, bits=BITS)
        assert torch.equal(model[4].input_quantizer.scale.values, scale)


def test_a_finished_run_is_returned_without_a_step(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = quick(), tmp_path / "run.pt"
    trained = tiny()
    history = train(trained, digits, config, path)
    stamp = path.stat().st_mtime_ns
    monkeypatch.delattr(training, "_step")
    again = tiny(init=1)
    emq.set_bits(again, 2)
    pd.testing.assert_frame_equal(train(again, digits, config, path), history, check_exact=True)
    assert_same_state(again, trained)
    assert path.stat().st_mtime_ns == stamp and again[4].bits == 8


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"lr": 0.1}, "lr: 0.05 there, 0.1 here"),
        ({"epochs": 3, "seed": 1}, "epochs: 2 there, 3 here; seed: 0 there, 1 here"),
        ({"scheme": "joint"}, "scheme: 'bitwise' there, 'joint' here"),
        ({"schedule": "step", "milestones": (1,)}, "milestones: [] there, [1] here"),
        ({"coreset": CoresetConfig(pruning_rate=0.5)}, "coreset: None there, {'score': 'random', 'pruning_rate': 0.5"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(fields: dict, named: str, digits: Dataset, tmp_path: Path) -> None:
    assert_refused(tiny(), digits, quick(**fields), named, digits, tmp_path)


def test_a_checkpoint_of_another_network_or_data_is_refused(digits: Dataset, tmp_path: Path) -> None:
    wider = emq.convert(emq.models.resnet8(width=4), QuantSpec(bits=BITS))
    assert_refused(wider, digits, quick(), "net: '", digits, tmp_path)
    assert_refused(
        tiny(correction="none"), digits, quick(), "spec.correction: 'mean_var' there, 'none' here", digits, tmp_path
    )
    assert_refused(tiny(bits=(2, 3)), digits, quick(), "spec.bits: [2, 4, 8] there, [2, 3] here", digits, tmp_path)
    assert_refused(tiny(), digits.subset(60, 20), quick(), f"data: '{digits.sha256}' there", digits, tmp_path)


def assert_refused(
    model: nn.Module, data: Dataset, config: TrainConfig, named: str, digits: Dataset, folder: Path
) -> None:
    path = folder / "run.pt"
    if not path.exists():
        train(tiny(), digits, quick(), path)
    content, before = path.read_bytes(), copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^checkpoint=.*expected one of the same run, but ") as caught:
        train(model, data, config, path)
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == content
    assert_same_state(model, before)


@pytest.mark.parametrize(
    "options", [{"pruning_rate": 0.6}, {"score": "entropy"}, {"rescore": True}, {"unbiased": True}, {"max_weight": 2.0}]
)
def test_a_checkpoint_of_another_coreset_option_is_refused(options: dict, digits: Dataset, tmp_path: Path) -> None:
    coreset, path = CoresetConfig(score="el2n", pruning_rate=0.5, how="sample"), tmp_path / "run.pt"
    train(tiny(), digits, quick(coreset=coreset), path)
    name = next(iter(options))
    message = rf"^checkpoint=.*expected one of the same run, but coreset: .*'{name}': .* there, .*'{name}': "
    with pytest.raises(ValueError, match=message):
        train(tiny(), digits, quick(coreset=replace(coreset, **options)), path)


def test_a_checkpoint_from_before_an_option_counts_as_at_its_default(digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    history = train(tiny(), digits, quick(), path)
    about, tensors = container.read(path, checkpoints.VERSION, "a checkpoint")
    identity = json.loads(about["identity"])
    del identity["spec.output_correction"], identity["clip_grad_norm"]
    container.write(path, about | {"identity": json.dumps(identity)}, tensors)
    pd.testing.assert_frame_equal(train(tiny(init=1), digits, quick(), path), history)
    with pytest.raises(ValueError, match=r"but spec.output_correction: False there, True here$"):
        train(tiny(output_correction=True), digits, quick(), path)
    with pytest.raises(ValueError, match=r"but clip_grad_norm: 0.0 there, 1.0 here$"):
        train(tiny(), digits, quick(clip_grad_norm=1.0), path)


def test_a_checkpoint_of_a_later_version_is_refused(digits: Dataset, tmp_path: Path) -> None:
    """Of the format, or with an option that this one does not know and so cannot follow."""
    path = tmp_path / "run.pt"
    train(tiny(), digits, quick(), path)
    about, tensors = container.read(path, checkpoints.VERSION, "a checkpoint")
    container.write(path, about | {"identity": json.dumps(json.loads(about["identity"]) | {"depth": 2})}, tensors)
    with pytest.raises(ValueError, match=r"^checkpoint=.*one of the same run, but depth: 2 there, not known here$"):
        train(tiny(), digits, quick(), path)
    container.write(path, about | {"version": checkpoints.VERSION + 1}, tensors)
    with pytest.raises(ValueError, match=r"^checkpoint=.*, of version 2 of the format, not 3$"):
        train(tiny(), digits, quick(), path)


def test_a_device_is_no_difference(digits: Dataset, tmp_path: Path) -> None:
    history = train(tiny(), digits, quick(device="auto"), tmp_path / "run.pt")
    pd.testing.assert_frame_equal(train(tiny(init=1), digits, quick(device="cpu"), tmp_path / "run.pt"), history)


class Hostile:
    """Runs code when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def broken_checkpoints(good: bytes, folder: Path) -> Iterator[bytes]:
    yield b""
    yield b"not a checkpoint"
    yield bytes(range(256)) * 4
    yield from (good[: int(len(good) * part)] for part in (0.01, 0.5, 0.999))
    yield pickle.dumps(Hostile(folder / "executed"))
    for content in (torch.ones(3), {"identity": "{}"}, Hostile(folder / "executed")):
        whole = io.BytesIO()
        torch.save(content, whole)
        yield whole.getvalue()
    path, tensors = folder / "other", {"x": torch.ones(3)}
    state = {"dict": [[name, {"dict": []}] for name in ("model", "optimizer", "scaler", "sampler", "damaged")]}
    told = {"identity": "{}", "history": "[]", "state": state}
    for wrong in (
        {},
        {"identity": 3},
        {"identity": "{"},
        {"history": None},
        {"state": "eval"},
        {"state": {}},
        {"state": {"tensor": "y"}},
        {"state": {"__reduce__": ["os.system", "true"]}},
    ):
        container.write(path, {"version": checkpoints.VERSION} | told | wrong, tensors)
        content = path.read_bytes()
        path.unlink()
        yield content


def test_a_broken_or_hostile_checkpoint_is_refused_and_not_run(digits: Dataset, tmp_path: Path) -> None:
    path, model = tmp_path / "run.pt", tiny()
    train(tiny(), digits, quick(), path)
    for content in broken_checkpoints(path.read_bytes(), tmp_path):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^checkpoint='.*run\.pt': expected a whole checkpoint of this library"):
            train(model, digits, quick(), path)
        assert path.read_bytes() == content and sorted(os.listdir(tmp_path)) == [".run.pt.lock", "run.pt"]
    assert_same_state(model, tiny())


@pytest.mark.parametrize("part", ["model", "optimizer", "scaler", "sampler"])
@pytest.mark.parametrize("wrong", [{}, {"x": torch.ones(2)}, [], None])
def test_a_checkpoint_with_another_state_is_refused(part: str, wrong: Any, digits: Dataset, tmp_path: Path) -> None:
    """Of the right run and with the right checksum, as only somebody could make it who wants it to be taken."""
    path, model, config = tmp_path / "run.pt", tiny(), quick(autocast="float16")
    train(model, digits, config, path)
    history, state = kept(path)
    checkpoints.save(path, checkpoints.identity(model, digits, config), history, state | {part: wrong})
    with pytest.raises(ValueError, match=r"^checkpoint='.*run\.pt': expected a whole state of this run \("):
        train(tiny(), digits, config, path)


def test_a_checkpoint_that_another_process_writes_is_left_to_it(digits: Dataset, tmp_path: Path) -> None:
    path, model = tmp_path / "run.pt", tiny()
    with FileLock(tmp_path / ".run.pt.lock"), pytest.raises(Busy, match=r"run\.pt: another process is at work on it$"):
        train(model, digits, quick(), path)
    assert same_state(model, tiny()) and not path.exists()
    assert len(train(model, digits, quick(), path)) == 2


def test_a_full_disk_keeps_the_checkpoint_before(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, undisturbed, resumed = tmp_path / "run.pt", tiny(), tiny(init=1)
    train(undisturbed, digits, quick())

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: .*run\.pt"):
        patch.setattr(os, "fsync", full)
        train(tiny(), digits, quick(), path)
    assert os.listdir(tmp_path) == [".run.pt.lock"]
    with (
        monkeypatch.context() as patch,
        stopped_at(patch, "epoch 2, step 1", lambda run: patch.setattr(os, "fsync", full)),
        pytest.raises(OSError, match=r"No space left on device: .*run\.pt"),
    ):
        train(tiny(), digits, quick(), path)
    assert sorted(os.listdir(tmp_path)) == [".run.pt.lock", "run.pt"]
    assert train(resumed, digits, quick(), path).epoch.tolist() == [1, 2]
    assert_same_state(resumed, undisturbed)


# Stopped when time is up


def in_slices(
    make: Callable[..., nn.Module], data: Dataset, config: TrainConfig, path: Path, budget: float
) -> tuple[nn.Module, pd.DataFrame, list[str]]:
    """The network and the history of a run in calls of so many seconds, and what those that did not end it said."""
    said: list[str] = []
    for init in itertools.count():
        model = make(init=init)
        torch.manual_seed(init)  # dropout must not depend on where the global generator stands
        try:
            return model, emq.train(model, data, config, path, progress=False, budget=budget), said
        except OutOfTime as stop:
            said.append(str(stop))


EL2N = CoresetConfig(score="el2n", pruning_rate=0.5, scoring="joint", candidates=0.7, full_epochs=1)
SLICED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bitwise": ({}, {}),
    "joint": ({"scheme": "joint", "distillation": True, "clip_grad_norm": 0.5}, {"norm": "switchable"}),
    "dedicated": ({"scheme": "dedicated", "warmup_epochs": 0.5}, {"bits": (4,), "weight": "minmax"}),
    "accumulated": ({"accumulate": 2}, {"norm": "shared_affine"}),
    "learned scales": ({"optimizer": "adamw", "lr": 0.01}, {"weight": "lsq", "activation": "lsq"}),
    "tracked": ({"autocast": "bfloat16"}, {"activation_range": "tracked", "output_correction": True}),
    "float16": ({"autocast": "float16"}, {"activation": "pact"}),
    "random": ({"coreset": CoresetConfig(pruning_rate=0.5)}, {}),
    "weighted": ({"scheme": "joint", "coreset": replace(WEIGHTED, score="el2n")}, {}),
    "jointly scored": ({"coreset": EL2N}, {}),
    "features": ({"coreset": CoresetConfig(score="grand", pruning_rate=0.5, rescore=True)}, {}),
    "tdds": ({"epochs": 5, "coreset": CoresetConfig(pruning_rate=0.5, **SCORED["tdds"])}, {}),
}


@pytest.mark.parametrize("name", SLICED)
def test_a_run_in_slices_of_a_step_ends_where_the_undisturbed_one_does(
    name: str, digits: Dataset, tmp_path: Path, clock: list[float]
) -> None:
    fields, spec = SLICED[name]
    config, data = quick(**{"epochs": 3, "batch_size": 20} | fields), replace(digits.subset(40, 10), flip=True)
    assert data.crop_padding > 0

    def make(init: int = 0) -> nn.Module:
        return tiny(**{"init": init, "dropout": 0.3} | spec)

    undisturbed, path, before = make(), tmp_path / "run.pt", torch.get_rng_state()
    history = train(undisturbed, data, config, tmp_path / "undisturbed.pt")
    assert torch.equal(torch.get_rng_state(), before)
    model, found, said = in_slices(make, data, config, path, budget=1)
    assert_same_history(found, history)
    assert found.attrs["coresets"] == history.attrs["coresets"]
    assert_same_state(model, undisturbed)
    steps = [(e, i, n) for e, n in enumerate(history.steps, start=1) for i in range(1, n + 1)]
    text = [f"epoch {e}, step {i} of {n}" if i < n else f"epoch {e} of {len(history)}" for e, i, n in steps]
    assert said == [f"{done}; time is up, call again to go on" for done in text[:-1]]
    ours, theirs = (kept(p)[1] for p in (path, tmp_path / "undisturbed.pt"))
    assert ours["paused"] is theirs["paused"] is None and ours["scaler"] == theirs["scaler"]
    assert_same_tensors(ours["optimizer"], theirs["optimizer"])
    for state in (ours, theirs):
        del state["sampler"]["shape"]  # that of the recorders, where there are any
    assert_same_tensors(ours["sampler"], theirs["sampler"])
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["run.pt", "undisturbed.pt"]


def assert_same_tensors(ours: Any, theirs: Any) -> None:
    """Equal containers of equal tensors and numbers."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert_same_tensors(list(ours.values()), list(theirs.values()))
    elif isinstance(ours, (list, tuple)):
        for a, b in zip(ours, theirs, strict=True):
            assert_same_tensors(a, b)
    else:
        assert ours == theirs


@pytest.mark.parametrize(("budget", "calls"), [(0.01, 24), (1.5, 12), (12, 2), (12.5, 2), (24, 1), (1000, 1)])
def test_a_budget_is_used_up_and_never_less_than_a_step(
    budget: float, calls: int, digits: Dataset, tmp_path: Path, clock: list[float]
) -> None:
    """Of two epochs of twelve steps; after the last step of all there is nothing to come back for."""
    undisturbed = tiny(dropout=0.3)
    history = train(undisturbed, digits, quick())
    model, found, said = in_slices(
        lambda init: tiny(init=init, dropout=0.3), digits, quick(), tmp_path / "r.pt", budget
    )
    assert len(said) + 1 == calls
    assert_same_history(found, history)
    assert_same_state(model, undisturbed)


def test_a_deadline_is_for_several_calls_together(digits: Dataset, tmp_path: Path, clock: list[float]) -> None:
    deadline = Deadline(13)
    emq.train(tiny(), digits, quick(epochs=1), tmp_path / "first.pt", progress=False, budget=deadline)
    with pytest.raises(OutOfTime, match=r"^epoch 1, step 1 of 12; time is up, call again to go on$"):
        emq.train(tiny(), digits, quick(), tmp_path / "second.pt", progress=False, budget=deadline)
    assert Deadline.of(deadline) is deadline and not Deadline(None).passed(Ranks()) and deadline.passed(Ranks())


def test_what_was_stopped_in_the_middle_of_an_epoch_goes_on_without_a_budget_too(
    digits: Dataset, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in that same epoch it goes on from its middle again, and later on from the epoch's end."""
    config, path, seconds = quick(epochs=3), tmp_path / "run.pt", iter(range(1000))
    monkeypatch.setattr(training, "perf_counter", lambda: next(seconds))
    undisturbed, steps = tiny(dropout=0.3), []
    history = train(undisturbed, digits, config)
    assert history.seconds.tolist() == [1, 1, 1]  # it is looked at twice an epoch
    with pytest.raises(OutOfTime):
        emq.train(tiny(dropout=0.3), digits, config, path, progress=False, budget=15)
    for where, first in (("epoch 2, step 9", "epoch 2, step 4"), ("epoch 3, step 2", "epoch 2, step 4")):
        steps.clear()
        with stopped_at(monkeypatch, where), noted(monkeypatch, steps), pytest.raises(Stop):
            train(tiny(init=1, dropout=0.3), digits, config, path)
        assert steps[0] == first
    with noted(monkeypatch, steps):
        steps.clear()
        found = train(model := tiny(init=2, dropout=0.3), digits, config, path)
    assert len(steps) == 12 and found.seconds.tolist() == [1, 2, 1]
    assert_same_history(found, history)
    assert_same_state(model, undisturbed)


@contextmanager
def noted(monkeypatch: pytest.MonkeyPatch, steps: list[str]) -> Iterator[None]:
    """Append what is trained to `steps`."""
    step = training._step
    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", lambda *args: steps.append(args[-1]) or step(*args))
        yield


def test_losses_that_wait_to_be_looked_at_are_not_forgotten(
    digits: Dataset, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA they are looked at some steps late: here as well."""
    history, see = train(tiny(), digits, quick()), LossWatch.see

    def late(self: LossWatch, *args: Any) -> None:
        self.lag = 16
        see(self, *args)

    monkeypatch.setattr(LossWatch, "see", late)
    assert_same_history(in_slices(tiny, digits, quick(), tmp_path / "run.pt", budget=5)[1], history)


def test_weights_that_break_before_time_is_up_do_not_reach_the_checkpoint(
    digits: Dataset, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, step = tmp_path / "run.pt", training._step

    def broken(run: Any, *args: Any) -> None:
        step(run, *args)
        if args[-1] == "epoch 1, step 6":
            spoil(run)

    with pytest.raises(OutOfTime):
        emq.train(tiny(), digits, quick(), path, progress=False, budget=5)
    content = path.read_bytes()
    monkeypatch.setattr(training, "_step", broken)
    message = r"^4\.weight is not finite after epoch 1, step 6, \(2,\) bits, lr "
    with pytest.raises(FloatingPointError, match=message):
        emq.train(tiny(), digits, quick(), path, progress=False, budget=1)
    assert path.read_bytes() == content


def test_other_ranks_do_not_go_on_in_the_middle_of_an_epoch(
    digits: Dataset, tmp_path: Path, clock: list[float]
) -> None:
    path, model = tmp_path / "run.pt", tiny(init=1)
    with pytest.raises(OutOfTime):
        emq.train(tiny(), digits, quick(), path, progress=False, budget=5)
    history, state = kept(path)
    state["paused"]["ranks"] *= 2
    checkpoints.save(path, checkpoints.identity(model, digits, quick()), history, state)
    message = r"^checkpoint=.*: expected one of 1 process\(es\), or of a whole epoch: it is 2 that stopped"
    with pytest.raises(ValueError, match=message):
        train(model, digits, quick(), path)
    assert_same_state(model, tiny(init=1))


# Losses and weights that are not finite


def spoil(run: Any) -> None:
    run.model[4].weight.data[0, 0, 0, 0] = torch.nan


def test_a_loss_that_is_not_finite_stops_the_run(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path, undisturbed, resumed = quick(epochs=3), tmp_path / "run.pt", tiny(), tiny(init=1)
    train(undisturbed, digits, config)
    lr = training.learning_rate(1 + 5 / 12, config)
    message = rf"^loss=nan at epoch 2, step 5, 4 bits, lr {lr:.3g}: training stopped; the last checkpoint stays"

    def spoil_images(run: Any) -> None:
        monkeypatch.setattr(training.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * torch.nan)

    with stopped_at(monkeypatch, "epoch 2, step 5", spoil_images), pytest.raises(FloatingPointError, match=message):
        train(tiny(), digits, config, path)
    monkeypatch.undo()
    assert len(kept(path)[0]) == 1
    train(resumed, digits, config, path)
    assert_same_state(resumed, undisturbed)


@pytest.mark.parametrize("spec", [{}, {"weight": "lsq", "activation": "lsq"}])
def test_a_gradient_that_is_not_finite_is_named_by_the_step_it_broke(spec: dict, digits: Dataset) -> None:
    """The loss before it was finite, and in the first forward pass after it, which may be of another child, is not."""
    model, calls = tiny(**spec), []

    def fourth(grad: torch.Tensor) -> torch.Tensor | None:
        calls.append(grad)
        return grad * torch.nan if len(calls) == 4 else None

    model[4].weight.register_hook(fourth)
    message = r"^loss=nan at epoch 1, step 5, 4 bits, lr \S+: 4\.weight was not finite before it, so a gradient of"
    with pytest.raises(FloatingPointError, match=message):
        train(model, digits, quick())


def test_float16_without_a_finite_gradient_is_no_training(digits: Dataset, tmp_path: Path) -> None:
    """The scaler leaves such steps out, so that losses and weights stay finite, and nothing is learned."""
    model = tiny()
    model[4].weight.register_hook(lambda grad: grad * torch.inf)
    message = r"^no gradient is finite in float16, .* and no step is made, up to epoch 4, step 12, .* checkpoint"
    with pytest.raises(FloatingPointError, match=message):
        train(model, digits, quick(epochs=9, autocast="float16"), tmp_path / "run.pt")
    assert len(kept(tmp_path / "run.pt")[0]) == 3  # 40 steps in epochs of 12


@pytest.mark.parametrize("score", SCORES)
def test_a_loss_that_is_not_finite_is_named_where_it_is_scored_too(
    score: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick(epochs=4, coreset=CoresetConfig(score=score, pruning_rate=0.5))
    message = r"^loss=nan at epoch 1, step 2, 4 bits, lr "
    with stopped_at(monkeypatch, "epoch 1, step 2", spoil), pytest.raises(FloatingPointError, match=message):
        train(tiny(), digits, config)


def test_a_joint_step_names_the_child(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil_scale(run: Any) -> None:
        run.model[4].weight_scale.values.data[0] = torch.nan

    message = r"^loss=nan at epoch 1, step 2, 8 bits, lr 0\.05: "
    config, model = quick(scheme="joint", schedule="step"), tiny(weight="lsq")
    with stopped_at(monkeypatch, "epoch 1, step 2", spoil_scale), pytest.raises(FloatingPointError, match=message):
        train(model, digits, config)
    assert model[0].weight.isfinite().all()  # no step was made with it


def test_too_high_a_learning_rate_stops_in_the_first_steps(digits: Dataset) -> None:
    with pytest.raises(FloatingPointError, match=r"at epoch 1, step [234], [248] bits, lr \d(\.\d+)?e\+3\d: "):
        train(tiny(), digits, quick(lr=1e35))


def test_weights_that_break_in_the_last_step_do_not_reach_the_checkpoint(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of an epoch's last step is computed before that step changes the weights."""
    path, step = tmp_path / "run.pt", training._step

    def broken(run: Any, *args: Any) -> None:
        step(run, *args)
        if args[-1] == "epoch 2, step 12":
            spoil(run)

    monkeypatch.setattr(training, "_step", broken)
    message = r"^4\.weight is not finite after epoch 2, step 12, \(2,\) bits, lr "
    with pytest.raises(FloatingPointError, match=message):
        train(tiny(), digits, quick(epochs=3), path)
    history, state = kept(path)
    assert len(history) == 1 and all(tensor.isfinite().all() for tensor in state["model"].values())


# Killed

SCRIPT = """
import sys, time
import torch
import emqlib as emq
from emqlib import training

checkpoint, final, init, pause = sys.argv[1:]
step = training._step

def slow_step(*args):
    step(*args)
    print(args[-1], flush=True)
    time.sleep(float(pause))

training._step = slow_step
torch.manual_seed(int(init))
model = emq.convert(emq.models.resnet8(width=4), emq.QuantSpec(bits=(2, 4)))
data = emq.load_dataset("digits", image_size=8).subset(100, 10)
config = emq.TrainConfig(epochs=3, batch_size=20, coreset=emq.CoresetConfig(pruning_rate=0.2))
emq.train(model, data, config, checkpoint=checkpoint, progress=False)
torch.save(model.state_dict(), final)
"""


def start(folder: Path, final: str, init: int, pause: float = 0) -> subprocess.Popen[str]:
    """A training process that writes a line after each step, and its weights to `final` when it is done."""
    checkpoint = folder / f"{final.split('-')[0]}.checkpoint"
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), str(folder / final), str(init), str(pause)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(emq.__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def test_a_process_killed_in_the_middle_of_an_epoch_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    undisturbed = start(tmp_path, "undisturbed", init=0)
    with start(tmp_path, "killed-first", init=0, pause=0.1) as victim:
        for line in victim.stdout:
            if line == "epoch 2, step 3\n":
                break
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    assert (tmp_path / "killed.checkpoint").exists() and not (tmp_path / "killed-first").exists()
    resumed = start(tmp_path, "killed-second", init=1)
    steps = resumed.communicate(timeout=60)[0].splitlines()
    assert steps[0] == "epoch 2, step 1" and steps[-1] == "epoch 3, step 8"
    assert undisturbed.communicate(timeout=60)[0].splitlines()[-16:] == steps
    assert resumed.returncode == undisturbed.returncode == 0
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("killed-second", "undisturbed"))
    assert list(ours) == list(theirs)
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


# Arguments

NAN, INF = float("nan"), float("inf")
NOT_A_NUMBER = ["0.1", None, True, NAN, INF, -INF, [0.1], 1j]
NOT_AN_INTEGER = ["1", None, True, NAN, INF, 1.0, 0.5, [1], torch.ones(2), -1]
NOT_A_FLAG = [0, 1, "yes", None, NAN, [True]]
WRONG: dict[str, list[object]] = {
    "scheme": ["", "Joint", "bit-wise", None, 1, ["joint"]],
    "epochs": [0, *NOT_AN_INTEGER],
    "batch_size": [0, *NOT_AN_INTEGER],
    "accumulate": [0, 129, *NOT_AN_INTEGER],
    "optimizer": ["adam", "SGD", "", None, torch.optim.SGD],
    "lr": [0, -0.1, *NOT_A_NUMBER],
    "momentum": [1, 1.5, -0.1, *NOT_A_NUMBER],
    "nesterov": NOT_A_FLAG,
    "weight_decay": [-1e-4, *NOT_A_NUMBER],
    "schedule": ["linear", "", None, 0, ["cosine"]],
    "milestones": ["12", 5, None, {3}, [0], [-1], [1.5], ["1"], [True], [NAN], (3, None)],
    "gamma": [-0.1, *NOT_A_NUMBER],
    "warmup_epochs": [-1, 10, 11.5, *NOT_A_NUMBER],
    "label_smoothing": [1, -0.1, *NOT_A_NUMBER],
    "clip_grad_norm": [-1, *NOT_A_NUMBER],
    "distillation": NOT_A_FLAG,
    "autocast": ["fp16", "half", "", None, True, torch.bfloat16],
    "channels_last": NOT_A_FLAG,
    "compile": NOT_A_FLAG,
    "device": ["gpu", "", "cpu:0x", "cuda:99", "meta", None, 0, NAN, torch.device("cpu")],
    "seed": NOT_AN_INTEGER,
    "coreset": ["random", 0.8, True, {}, CoresetConfig],
}


def test_every_field_has_wrong_values() -> None:
    assert set(WRONG) == {field.name for field in fields(TrainConfig)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_config(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=rf"(?s)^{name}=.*: expected .+"):
            TrainConfig(**{name: value})
        with pytest.raises(ValueError, match=rf"(?s)^{name}=.*: expected .+"):
            replace(TrainConfig(), **{name: value})


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("model", value) for value in (None, "resnet8", 3, tiny_net(), nn.Module)),
        *(("data", value) for value in (None, "digits", [], torch.ones(3))),
        *(("config", value) for value in (None, {}, "joint", TrainConfig)),
        *(
            ("checkpoint", value)
            for value in (3, True, b"run.pt", "", ".", "/", "FOLDER", "FILE/run.pt", "FILE/a/run.pt")
        ),
        *(("progress", value) for value in (None, 1, 2.5)),
        *(("budget", value) for value in (0, 0.0, -1, "60", True, NAN, INF, [60], 60)),  # 60: without a checkpoint
    ],
)
def test_wrong_arguments(name: str, value: object, digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FILE").write_text("old")
    if isinstance(value, str) and value.startswith("F"):
        value = str(tmp_path / value)
    model = tiny()
    arguments = {"model": model, "data": digits, "config": quick(), "progress": False} | {name: value}
    with pytest.raises(ValueError, match=rf"(?s)^{name}=.*: expected .+"):
        emq.train(**arguments)
    assert_same_state(model, tiny())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["FILE", "FOLDER"]


def test_a_folder_that_cannot_be_written_to(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(ValueError, match=r"^checkpoint=.*in a folder that can be written to"):
        train(tiny(), digits, quick(), tmp_path / "below" / "run.pt")
    assert not os.listdir(tmp_path)


def test_dedicated_is_for_one_bit_width(digits: Dataset) -> None:
    with pytest.raises(ValueError, match=r"^scheme='dedicated': expected one trained bit-width .*\(2, 4, 8\)"):
        train(tiny(), digits, quick(scheme="dedicated"))


def test_a_network_needs_an_output_for_each_class(digits: Dataset, tmp_path: Path) -> None:
    model = emq.convert(tiny_net(classes=9), QuantSpec(bits=BITS))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^model='9 outputs': expected 10 or more, one a class"):
        train(model, digits, quick(), tmp_path / "run.pt")
    assert same_state(model, before) and os.listdir(tmp_path) == [".run.pt.lock"]
    train(emq.convert(tiny_net(classes=11), QuantSpec(bits=BITS)), digits, quick())
