"""Learning rates step by step, what is used where a processor has no bfloat16, and what `make demo` prints."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

import emqlib as emq
from emqlib import TrainConfig, methods, profiles, training

# Learning rates of the steps


def rates(monkeypatch: pytest.MonkeyPatch, images: int = 6, **fields: object) -> list[float]:
    """The rate of each step of a run of three steps an epoch, without the arithmetic of the steps."""
    seen: list[float] = []
    monkeypatch.setattr(training, "_step", lambda run, step, batch, lr, watch, where: seen.append(lr))
    monkeypatch.setattr(training.LossWatch, "mean", lambda self: 0.0)
    data = emq.load_dataset("digits", image_size=8).subset(images, 2)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.LazyLinear(10))
    net(torch.zeros(1, 3, 8, 8))
    config = TrainConfig(**{"scheme": "joint", "batch_size": 2, "lr": 1.0, "device": "cpu"} | fields)
    emq.train(emq.convert(net, emq.QuantSpec(bits=(4,))), data, config, progress=False)
    return seen


def test_a_milestone_of_two_gives_two_epochs_at_the_first_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    found = rates(monkeypatch, epochs=5, schedule="step", milestones=(2, 4))
    assert found == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 3)


def test_neither_the_first_step_of_a_warm_up_nor_the_last_of_a_cosine_has_a_rate_of_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sklearn")
    found = rates(monkeypatch, epochs=3, warmup_epochs=1)
    assert found[:3] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert found[3:] == sorted(found[3:], reverse=True) and found[-1] > 0.01


@pytest.mark.parametrize("fields", [{}, {"schedule": "step", "milestones": (1,)}, {"warmup_epochs": 0.9}])
def test_a_run_of_one_step_trains(monkeypatch: pytest.MonkeyPatch, fields: dict) -> None:
    pytest.importorskip("sklearn")
    (rate,) = rates(monkeypatch, images=2, epochs=1, **fields)
    assert rate >= 0.5


@pytest.mark.parametrize("epochs", range(1, 13))
def test_short_runs_keep_the_decays_apart_and_an_epoch_after_each(epochs: int) -> None:
    p = profiles.parameters(profile="paper")
    scaled = methods.base(p, 0, "cifar10", epochs).config.milestones
    assert all(earlier < later for earlier, later in pairwise((0, *scaled, epochs)))
    own = p.profile.training.milestones
    assert len(scaled) == len(own) or epochs < 6
    assert all(abs(m - n * epochs / 200) <= 1 for m, n in zip(scaled, own, strict=False))


def test_milestones_of_a_run_of_the_profiles_own_length_stay() -> None:
    p = profiles.parameters(profile="paper")
    p = replace(p, profile=replace(p.profile, training=replace(p.profile.training, epochs=4, milestones=(1, 2, 3))))
    assert methods.base(p, 0, "cifar10").config.milestones == (1, 2, 3)
