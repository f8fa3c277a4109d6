"""Training: plans, schedules and seeds by closed forms, steps by a loop written out, runs by stopping and killing."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_cases import BITS, assert_same_state, quick, same_state, tiny, train

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


def test_bitwise_steps_alternate_between_the_children() -> None:
    steps = plans(HUNDRED, BITS, TrainConfig(scheme="bitwise", batch_size=16))[0]
    assert [bits for bits, _ in steps] == [(8,), (4,), (2,)] * 7
    first = [indices.tolist() for _, indices in steps[:3]]
    assert first[0] != first[1] != first[2] != first[0]


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
    drawn, scored = coresets(HUNDRED, bits, quick(scheme=scheme, epochs=4, coreset=coreset)), coreset and coreset.warmup
    passes = [len(bits) * drawn.size(epoch) for epoch in range(4)]
    assert history.sample_passes.tolist() == passes
    assert history.scoring_passes.tolist() == [n if i < (scored or 0) else 0 for i, n in enumerate(passes)]
    assert history.steps.tolist() == [drawn.count(epoch, 25) for epoch in range(4)]


# Learning rate


def test_each_step_has_the_rate_of_its_middle(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear warm-up, and a cosine whose last step has a rate above zero; every group of parameters follows."""
    seen: list[list[float]] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD) -> None:
        seen.append([group["lr"] for group in self.param_groups])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    history = train(tiny(), digits, quick(scheme="joint", epochs=4, batch_size=50, lr=0.2, warmup_epochs=1))
    expected = [0.05, 0.15] + [0.1 * (1 + math.cos(math.pi * (i + 0.5) / 6)) for i in range(6)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([expected, expected]).T)
    assert history.lr.tolist() == pytest.approx(expected[1::2])


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
    with pytest.raises(FloatingPointError):
        train(tiny(dropout=0.3), digits, quick(lr=1e35))
    assert torch.equal(torch.get_rng_state(), before)


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
        if config.distillation and bits < (8,):
            with emq.at_bits(model.eval(), 8), torch.no_grad():
                target = model(images).softmax(1)
            model.train()
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
    "bitwise distillation": {"distillation": True, "label_smoothing": 0.2},
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
    assert losses(digits, compile="graphs") == losses(digits)  # which are for a GPU alone: test_cuda


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


def test_numpy_numbers_become_plain_ones(digits: Dataset, tmp_path: Path) -> None:
    """They cannot be written as JSON, which would fail after the first epoch."""
    config = quick(
        epochs=np.int64(1), batch_size=np.int32(50), seed=np.uint8(3), lr=np.float32(0.5), milestones=[np.int64(1)]
    )
    assert config == quick(epochs=1, batch_size=50, seed=3, lr=0.5, milestones=(1,))
    train(tiny(), digits, config, tmp_path / "run.pt")
    assert quick(lr=1) == quick(lr=1.0) and isinstance(quick(lr=1).lr, float)
